"""Checks of a plan against its config: every entry matches, and every rank fits."""

import dataclasses
import re
import warnings
from collections.abc import Sequence

from lora_jax import paths
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.dims import sizes
from lora_jax.plan.draft import Draft
from lora_jax.plan.leaf import LeafPlan


def check(config: LoraConfig, drafts: Sequence[Draft]) -> None:
    """Raises where an entry of the config matches nothing, or a rank is too high.

    Args:
      config: of the plan.
      drafts: of all leaves, decided.

    Raises:
      ValueError: with all problems, so that they can be corrected together.

    Warns:
      UserWarning: a target trains whole, so that it has no adapter.
    """
    leaves = [draft.leaf for draft in drafts]
    names = {name for draft in drafts for name in draft.names.every}
    modules = {draft.names.module for draft in drafts}
    unmatched, excluded = matching.unmatched_and_excluded(config, names)
    problems = [
        f'`{field}` entry "{entry}" matches no module; nearest: {paths.nearest(entry, modules)}'
        for field, entry in unmatched
        if not (field == "modules_to_save" and _is_other_head(config.modules_to_save, entry, names))
    ]
    paths_of = [leaf.path for leaf in leaves] + [paths.module_of(leaf.path) for leaf in leaves]
    problems += [
        f'`roles` entry "{entry}" matches no leaf; nearest: {paths.nearest(entry, paths_of)}'
        for entry in config.roles
        if not any(matching.matched_pattern([entry], path) for path in paths_of)
    ]
    for entry in config.modules_to_save:
        of_entry = [
            x.leaf for x in drafts if any(matching.saved_by(entry, n) for n in x.names.every)
        ]
        if of_entry and all(leaf.kind != "saved" for leaf in of_entry):
            leaf = of_entry[0]
            problems.append(
                f'`modules_to_save` entry "{entry}" trains nothing: `{leaf.path}` is {leaf.dtype}'
            )
    # Layers under another name have an error of their own.
    if all(x.names.numbered or "s" not in x.leaf.roles for x in drafts):
        # A leaf without roles may be no stack, whatever the numbers it is given: see `names_of`.
        with_roles = [x.names.layers for x in drafts if x.leaf.roles]
        problems += _other_layers(
            config, {n for layers in with_roles for own in layers for n in own}
        )
    if not problems and not isinstance(config.target_modules, str):
        problems += _useless_targets(config.target_modules, drafts, excluded)
    adapted = [leaf for leaf in leaves if leaf.kind == "lora"]
    if (whole := _whole_targets(config, drafts)) and not problems:
        text = (
            f"`target_modules` {', '.join(whole)} lie in `modules_to_save`, where the whole module "
            "trains and gets no adapter: name a module in one of the two"
        )
        if adapted:  # PEFT is silent here, and refuses a config without any adapter
            warnings.warn(text, stacklevel=3)
        else:
            problems.append(text)
    problems += [
        f"lora_bias=True does not work with the embedding `{leaf.path}`: exclude it"
        for leaf in adapted
        if config.lora_bias and leaf.lookup
    ]
    problems += [f"{found[0]}: {found[1]}" for leaf in adapted if (found := too_high(leaf))]
    # The most general problem: only where none of the others explains it.
    if not problems and all(leaf.kind == "frozen" for leaf in leaves):
        problems.append(
            _nothing(
                config.target_modules, leaves, modules, excluded=_all_excluded(leaves, excluded)
            )
        )
    if problems:
        raise ValueError("; ".join(problems))


def _other_layers(config: LoraConfig, names: set[str]) -> list[str]:
    """A problem where none of the layers that are to be adapted exists, or others are meant."""
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else {*(layers or ())}
    every = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
    named = sorted(name for name in names if wanted and matching.is_target(every, name))
    numbers = {name: matching.layer_number(name, config.layers_pattern) for name in named}
    for name, number in numbers.items() if not config.layers_pattern else ():
        first = re.match(r"([^.]+)\.(\d+)\.", name)
        # A list inside the layers of a list that is the start of all names: PEFT counts the former.
        if first and number is not None:
            return [
                f"`layers_to_transform` takes the first number behind two names, as PEFT does, "
                f"which is {number} in `{name}`: name the list of the layers, "
                f'`layers_pattern="{first[1]}"`'
            ]
    there = {number for number in numbers.values() if number is not None}
    # A module listed by its whole name is adapted in any layer.
    numbered = (name for name in named if numbers[name] is not None)
    if not named or any(matching.is_target(config, name) for name in numbered):
        return []
    if not there:
        behind = (re.search(r"([^.]+)\.\d+\.", name) for name in numbers)
        lists = next((found[1] for found in behind if found), None)
        way_out = "leave it out" if lists is None else f'name the list, `layers_pattern="{lists}"`'
        return [
            f"`layers_to_transform` is {layers}, and no module has a layer's number behind two "
            f"other names, as `model.layers.0.q` has: {way_out}"
        ]
    least, most = min(there), max(there)
    return [f"`layers_to_transform` is {layers}, and layers are numbered {least} to {most}"]


def _is_other_head(saved: Sequence[str], entry: str, names: set[str]) -> bool:
    """Whether an entry is one of PEFT's two names of a head, and the model has the other.

    PEFT adds both names of a classification head to modules_to_save, and a model has one of them.
    """
    heads = ("classifier", "score")
    return (
        entry in heads
        and set(heads) <= set(saved)
        and any(matching.ends_with(name, head) for name in names for head in heads)
    )


def _useless_targets(
    targets: Sequence[str], drafts: Sequence[Draft], excluded: set[str]
) -> list[str]:
    """A problem for each listed target that matches frozen leaves only.

    Not where the config excludes one of them: then a target without effect may be meant so.
    """
    problems = []
    for entry in targets:
        matched, names = [], set()
        for leaf, own, _ in drafts:
            # A leaf without roles has no stack whose layers have numbers: see `names_of`.
            candidates = own.every if leaf.roles else set(own.unnumbered)
            if any(matching.ends_with(name, entry) for name in candidates):
                matched.append(leaf)
                names |= candidates
        if matched and not names & excluded and all(leaf.kind == "frozen" for leaf in matched):
            why = "; ".join(_why(leaf) for leaf in matched[:3])
            problems.append(f'`target_modules` entry "{entry}" adapts nothing ({why})')
    return problems


def _whole_targets(config: LoraConfig, drafts: Sequence[Draft]) -> list[str]:
    """The listed targets of which every leaf trains whole."""
    if isinstance(config.target_modules, str) or not config.modules_to_save:
        return []
    found = []
    for entry in config.target_modules:
        kinds = {
            leaf.kind
            for leaf, own, _ in drafts
            if any(matching.ends_with(name, entry) for name in own.every)
        }
        found += [f'"{entry}"'] if kinds == {"saved"} else []
    return found


def _why(leaf: LeafPlan) -> str:
    return f"`{leaf.path}`: {leaf.reason}" + (f", {leaf.left_out}" if leaf.left_out else "")


def too_high(leaf: LeafPlan) -> tuple[str, str] | None:
    """Why an adapted leaf cannot have its rank, and what to do; None where it can."""
    _, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
    limit = min(fan_in, fan_out)
    if leaf.rank <= limit:
        return None
    if not limit:
        return f"`{leaf.path}` of shape {leaf.shape} has no number to adapt", "exclude it"
    # A dim wrongly read as a stack leaves a smaller matrix.
    stacked = f"; its dims are read as {leaf.roles}, `roles` overrides" if "s" in leaf.roles else ""
    return (
        f"`rank` {leaf.rank} is above the smallest dimension {limit} of `{leaf.path}` "
        f"(in {fan_in}, out {fan_out}), where full rank is reached",
        "lower `rank`, or set "
        f"rank_pattern={{{paths.module_of(leaf.path).rsplit('.', 1)[-1]!r}: {limit}}}{stacked}",
    )


def _all_excluded(leaves: Sequence[LeafPlan], excluded: set[str]) -> bool:
    """Whether the config excludes every leaf that could be adapted."""
    found = [leaf.path for leaf in leaves if leaf.roles]
    return bool(found) and all({path, paths.module_of(path)} & excluded for path in found)


def _nothing(
    targets: Sequence[str] | str,
    leaves: Sequence[LeafPlan],
    modules: set[str],
    *,
    excluded: bool,
) -> str:
    if excluded:
        return "`exclude_modules` leaves out every module: nothing is left to adapt"
    # First those that are named, then those that could be.
    likely = sorted(leaves, key=lambda leaf: (not leaf.left_out, not leaf.roles))
    some = "; ".join(_why(leaf) for leaf in likely[:5])
    if any(leaf.left_out for leaf in leaves):
        some = "; ".join(_why(leaf) for leaf in likely[:2])
        count = sum(bool(leaf.left_out) for leaf in leaves)
        more = f"; and {count - 2} more" if count > 2 else ""
        return f"target_modules={targets!r} adapts nothing: {some}{more}"
    # "all-linear" is no name, so no name is near it.
    near = "" if targets == ALL_LINEAR else f"; nearest: {paths.nearest(str(targets), modules)}"
    return (
        f"target_modules={targets!r} matches nothing in a tree of {len(leaves)} leaves{near} "
        f"({some})"
    )
