"""A config that came with an adapter, made one that `lora_jax.plan` accepts."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.peft.index import (
    every_module,
    every_parameter,
    modules_of,
    parameters_of,
    their_parameter,
)
from lora_jax.hf.peft.tying import HEAD
from lora_jax.paths import bare, expand, module_of


def plannable(config: LoraConfig, leaves: Mapping[str, Any], source: str) -> LoraConfig:
    """A config that `lora_jax.plan` accepts, for the same leaves.

    PEFT ignores names that match nothing, or excluded modules only (it writes such ones itself),
    and allows ranks above full rank; `plan` refuses both. Nothing is lost by leaving them out,
    because the tensors of the file are checked one by one.

    Args:
      config: the adapter's config.
      leaves: the base's leaves by path.
      source: what messages call the adapter.

    Raises:
      ValueError: the adapter's initialisation changed the base in a way that cannot be repeated.
    """
    if base_change(config.init) == "unrepeatable":
        raise ValueError(
            f'{source}: the adapter was initialised by "{config.init}", which changed the base '
            "weights in a way that cannot be repeated; save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    config = _in_our_parameters(settled(config, leaves), leaves)
    config = _in_our_modules(config, leaves)
    # Such a start is computed again from the base, for which `init` takes the ranks as they are.
    if base_change(config.init) == "repeatable":
        return config
    # `fill` makes factors of the file's ranks; a plan of rank 1 allocates little before it does.
    return dataclasses.replace(config, init="default", rank=1, rank_pattern={}, alpha_pattern={})


def _in_our_parameters(config: LoraConfig, leaves: Mapping[str, Any]) -> LoraConfig:
    """The config with target_parameters by the names of our parameters: `kernel` for `weight`."""
    entries = []
    for entry in config.target_parameters:
        module, _, theirs = entry.rpartition(".")
        ours = {
            path.rpartition(".")[2]
            for path, leaf in leaves.items()
            for name in parameters_of(path, leaf, config).values()
            if matching.ends_with(name, entry) and their_parameter(bare(path)) == theirs
        }
        entries += [f"{module}.{name}" if module else name for name in sorted(ours or {theirs})]
    return dataclasses.replace(config, target_parameters=tuple(dict.fromkeys(entries)))


def _in_our_modules(config: LoraConfig, leaves: Mapping[str, Any]) -> LoraConfig:
    """The config with target_modules by the names of a plan, which does not number experts."""
    targets = config.target_modules
    numbered = isinstance(targets, str) or any(re.search(r"\d", entry) for entry in targets)
    if targets == ALL_LINEAR or not numbered:
        return config
    ours: dict[str, str] = {}  # layers.2.experts.0.up -> layers.experts.up
    for path, leaf in leaves.items():
        module = module_of(bare(path))
        known = expand(module, leaf.shape[0]) if leaf.shape else ()
        names = {name for _, name in modules_of(path, leaf)} - {module, *known}
        ours |= dict.fromkeys(names, module)
    if isinstance(targets, str):
        found = {module for name, module in ours.items() if matching.fits(targets, name)}
        every = "|".join((f"(?:{targets})", *map(re.escape, sorted(found))))
        return dataclasses.replace(config, target_modules=every if found else targets)
    ends: dict[str, dict[str, None]] = {}  # entries may be the end of a name
    for name, module in ours.items():
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), {})[module] = None
    each = (ends.get(x, (x,)) if re.search(r"\d", x) else (x,) for x in targets)
    return dataclasses.replace(config, target_modules=tuple(dict.fromkeys(chain(*each))))


def settled(config: LoraConfig, leaves: Mapping[str, Any]) -> LoraConfig:
    """A config without the entries that match nothing in a model.

    Every reader of adapters settles a config here before it plans it.

    Args:
      config: of an adapter.
      leaves: the base's leaves by path.
    """
    every = [*every_module(leaves, config), *every_parameter(leaves, config)]
    # A plan also matches the paths themselves, without the numbers of stacked layers.
    every += dict.fromkeys(name for path in leaves for name in (path, module_of(path)))
    unused = set(matching.unmatched(config, every))
    kept: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = getattr(config, field)
        if isinstance(value, tuple):
            kept[field] = tuple(entry for entry in value if (field, entry) not in unused)
    if "target_modules" in kept:
        # An entry that matches only modules that are excluded, or of other layers, is unused too.
        used = (entry for entry in kept["target_modules"] if _is_used(entry, config, every))
        # With none left, the error of `plan` lists the nearest names.
        kept["target_modules"] = tuple(used) or config.target_modules
    if ("exclude_modules", config.exclude_modules) in unused:
        kept["exclude_modules"] = ()
    kept["trainable_token_indices"] = _without_tied_rows(config, every)
    for field in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, field)
        kept[field] = {k: v for k, v in value.items() if (field, k) not in unused}
    return dataclasses.replace(config, **kept)


def _is_used(entry: str, config: LoraConfig, names: Iterable[str]) -> bool:
    """Whether an entry of target_modules names a module that is adapted."""
    alone = dataclasses.replace(config, target_modules=(entry,))
    return any(matching.is_target(alone, name) for name in names)


def _without_tied_rows(config: LoraConfig, every: list[str]) -> Any:
    """The token rows of a config; where the head is the embedding's table, PEFT keeps one copy."""
    rows = config.trainable_token_indices
    if not isinstance(rows, Mapping) or any(matching.ends_with(n, HEAD) for n in every):
        return rows
    # No head in the tree: its rows are those of the embedding, if both lists agree.
    rest = {entry: ids for entry, ids in rows.items() if not matching.ends_with(entry, HEAD)}
    same = all(ids in rest.values() for ids in rows.values())
    return rest if rest and same else rows
