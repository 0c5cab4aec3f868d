"""Which modules a LoraConfig names: PEFT's matching rules as pure functions of names.

A name is a module's full dotted name, `model.layers.3.self_attn.q_proj`.

Source: PEFT 0.21, `check_target_module_exists`, `get_pattern_key`, `_set_trainable`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import regex

from lora_jax.config.lora import ALL_LINEAR, LoraConfig

# Seconds for one name. A match takes microseconds, unless the expression backtracks exponentially.
_LONGEST_MATCH = 0.5


def fits(pattern: str, name: str, *, whole: bool = True) -> regex.Match | None:
    """`re.fullmatch`, or `re.match`, with a time limit: expressions come with downloaded adapters.

    Raises:
      ValueError: the match takes too long.
    """
    match = regex.fullmatch if whole else regex.match
    try:
        return match(pattern, name, timeout=_LONGEST_MATCH)
    except TimeoutError:
        raise ValueError(
            f"the regular expression `{pattern}` takes too long to match `{name}`: write it "
            "without a repetition inside a repetition, such as `(.+)+`"
        ) from None


def ends_with(name: str, entry: str) -> bool:
    """Whether `entry` is the whole of `name`, or its end after a dot."""
    return name == entry or name.endswith("." + entry)


def is_excluded(config: LoraConfig, name: str) -> bool:
    """Whether a module is never adapted: in exclude_modules, or inside a saved module."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if fits(excluded, name):
            return True
    elif any(ends_with(name, entry) for entry in excluded):
        return True
    # Unescaped, as in PEFT.
    return any(fits(rf"(^|.*\.){m}($|\..*)", name, whole=False) for m in config.modules_to_save)


def is_target(config: LoraConfig, name: str) -> bool:
    """Whether a module is adapted, for target_modules as names or as a regular expression.

    Exclusion comes first. A regular expression must match the whole name. A list entry must be the
    whole name or its end after a dot, and is no regular expression. `layers_to_transform` filters
    matches of an end, but not a module that is listed by its whole name.

    Raises:
      ValueError: target_modules is "all-linear", which names alone cannot decide.
    """
    if not _is_listed(config, name):
        return False
    targets = config.target_modules
    return isinstance(targets, str) or name in targets or in_layers(config, name)


def _is_listed(config: LoraConfig, name: str) -> bool:
    """As `is_target`, for a module of any layer."""
    targets = config.target_modules
    if targets == ALL_LINEAR:
        raise ValueError(
            'target_modules="all-linear" is decided by how weights are used, not by names: '
            "use is_excluded, and lora_jax.plan for the rest"
        )
    if is_excluded(config, name):
        return False
    if isinstance(targets, str):
        return fits(targets, name) is not None
    return any(ends_with(name, entry) for entry in targets)


def names_parameter(config: LoraConfig, name: str) -> bool:
    """Whether target_parameters lists a parameter, by its whole name or its end after a dot."""
    return any(ends_with(name, entry) for entry in config.target_parameters)


def in_layers(config: LoraConfig, name: str) -> bool:
    """Whether layers_to_transform lets a module through; without it, every module."""
    layers = config.layers_to_transform
    # In PEFT an empty list is no filter.
    if layers is None or layers == ():
        return True
    layer = layer_number(name, config.layers_pattern)
    return layer == layers if isinstance(layers, int) else layer in layers


def layer_number(name: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """The layer a module belongs to: the first number in its name that follows two names.

    Args:
      name: full module name.
      pattern: name (or names, tried in turn) of the module list that must come before the
        number; it may also be the start of the name.

    Returns:
      The number, or None where the name has none.
    """
    if not pattern:
        # Lazy, to find the number of the layer and not that of an expert inside it.
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for entry in (pattern,) if isinstance(pattern, str) else pattern:
        found = fits(rf"(?:^|.*?\.){entry}\.(?P<idx>\d+)\.", name, whole=False)
        if found:
            return int(found["idx"])
    return None


def matched_pattern(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that matches the end of a name, from a dot or from the name's start."""
    for pattern in patterns:
        if fits(rf"(.*\.)?({pattern})$", name, whole=False):
            return pattern
    return None


def _from_pattern(patterns: Mapping, name: str, default: Any) -> Any:
    found = matched_pattern(patterns, name)
    return default if found is None else patterns[found]


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of a module: rank_pattern's first match, else config.rank."""
    return _from_pattern(config.rank_pattern, name, config.rank)


def alpha_of(config: LoraConfig, name: str) -> float:
    """The alpha of a module: alpha_pattern's first match, else config.alpha."""
    return _from_pattern(config.alpha_pattern, name, config.alpha)


def scale_of(config: LoraConfig, rank: int, alpha: float) -> float:
    """The factor of A·B: alpha/rank, with rsLoRA alpha/√rank."""
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


class Match(NamedTuple):
    """How a config treats one layer of a leaf, as far as names decide it.

    Attributes:
      targeted: it is to be adapted; every leaf that is not excluded, for "all-linear".
      other_layer: it would be targeted, but `layers_to_transform` leaves its layer out.
      excluded: by `exclude_modules`.
      saved: it trains whole.
      rank, alpha, scale: of its adapter.
    """

    targeted: bool
    other_layer: bool
    excluded: bool
    saved: bool
    rank: int
    alpha: float
    scale: float


def match(config: LoraConfig, names: tuple[str, ...], unnumbered: Sequence[str]) -> Match:
    """How `config` treats one layer of a leaf.

    Args:
      names: the module's and the parameter's, `(model.layers.3.up, model.layers.3.up.kernel)`;
        one of them alone where the other has no place for a layer number.
      unnumbered: the leaf's names without layer numbers, which match too where the config chooses
        no layers.
    """
    module, parameter = names[0], names[-1]
    by_parameter = names_parameter(config, parameter)
    targeted = by_parameter
    other_layer = False
    excluded = not by_parameter and any(is_excluded(config, name) for name in names)
    if not by_parameter and not excluded:
        if config.target_modules == ALL_LINEAR:
            targeted = True
        else:
            every_layer = config.layers_to_transform is None
            # A name without a number matches in every layer, past the filter.
            candidates = [*names, *unnumbered] if every_layer else names
            targeted = any(is_target(config, name) for name in candidates)
            other_layer = not targeted and any(_is_listed(config, name) for name in names)
    # PEFT looks up the rank of a parameter of `target_parameters` by the parameter's name, that of
    # all others by the module's.
    name = parameter if by_parameter else module
    rank, alpha = rank_of(config, name), float(alpha_of(config, name))
    return Match(
        targeted=targeted,
        other_layer=other_layer,
        excluded=excluded,
        saved=any(is_saved(config, name) for name in names),
        rank=rank,
        alpha=alpha,
        scale=scale_of(config, rank, alpha),
    )


def given_roles(config: LoraConfig, names: Sequence[str], ndim: int) -> str:
    """The roles of a leaf in `config.roles`, or "".

    Args:
      names: the leaf's path, then its module.
      ndim: of the leaf.

    Raises:
      ValueError: they do not fit the leaf.
    """
    for name in names:
        pattern = matched_pattern(config.roles, name)
        # A module's roles are those of its matrix, and not of its bias.
        if pattern is not None and (ndim > 1 or name == names[0]):
            roles = config.roles[pattern]
            if len(roles) != ndim or not {"i", "o"} <= set(roles):
                raise ValueError(
                    f"roles[{pattern!r}]={roles!r} does not fit `{names[0]}` with {ndim} dims: "
                    "give one letter for each dim, s (stack), i (in) or o (out), with an i and an o"
                )
            return roles
    return ""


def is_saved(config: LoraConfig, name: str) -> bool:
    """Whether a module trains whole: its name, or that of a module around it, ends with an entry.

    PEFT needs no dot before the end here: "head" also matches `lm_head`.
    """
    return saved_root(config, name) is not None


def saved_root(config: LoraConfig, name: str) -> str | None:
    """The saved module that a module is or lies in, or None; see `is_saved`."""
    parts = name.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((m for m in around if m.endswith(tuple(config.modules_to_save))), None)


def trains_bias(config: LoraConfig, name: str, *, adapted: bool) -> bool:
    """Whether a parameter is a bias that trains.

    Args:
      name: full parameter name, `model.layers.0.self_attn.q_proj.bias`.
      adapted: whether its module carries an adapter.
    """
    if config.bias == "none" or not ends_with(name, "bias"):
        return False
    return adapted or config.bias == "all"


def unmatched(config: LoraConfig, names: Iterable[str]) -> list[tuple[str, str]]:
    """The entries of a config that match no module of the model.

    Args:
      names: full names of all modules and parameters.

    Returns:
      Pairs (field, entry), in the config's order. A target that matches only modules which are
      excluded, or in other layers, counts as matched.
    """
    names = list(names)
    missing = []
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        value = getattr(config, field)
        if isinstance(value, str):
            if value != ALL_LINEAR and not any(fits(value, n) for n in names):
                missing.append((field, value))
            continue
        missing += [(field, e) for e in value if not any(ends_with(n, e) for n in names)]
    for entry in config.modules_to_save:
        if not any(saved_by(entry, name) for name in names):
            missing.append(("modules_to_save", entry))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if all(matched_pattern((pattern,), name) is None for name in names):
                missing.append((field, pattern))
    return missing


def unmatched_and_excluded(
    config: LoraConfig, names: Iterable[str]
) -> tuple[list[tuple[str, str]], set[str]]:
    """The entries of `unmatched`, and the names that are never adapted."""
    names = list(names)
    return unmatched(config, names), {name for name in names if is_excluded(config, name)}


def saved_by(entry: str, name: str) -> bool:
    """Whether an entry of modules_to_save names a parameter, its module or one around it."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(entry) for i in range(len(parts)))
