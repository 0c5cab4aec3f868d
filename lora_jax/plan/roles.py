"""What each dim of a weight is: read off its uses, or given in the config."""

from collections.abc import Sequence

from lora_jax import paths
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.plan.leaf import Use


def given(config: LoraConfig, path: str, ndim: int) -> str:
    """The config's own roles for a leaf, or "".

    Raises:
      ValueError: they do not fit the leaf.
    """
    for name in (path, paths.module_of(path)):
        pattern = matching.matched_pattern(config.roles, name)
        if pattern is not None:
            roles = config.roles[pattern]
            if len(roles) != ndim or not {"i", "o"} <= set(roles):
                raise ValueError(
                    f"roles[{pattern!r}]={roles!r} does not fit `{path}` with {ndim} dims: give "
                    f"one letter a dim, s (stack), i (in) or o (out), with an i and an o"
                )
            return roles
    return ""


def inferred(uses: Sequence[Use], ndim: int, rebatched: set) -> tuple[str, bool, str]:
    """Roles from uses.

    Args:
      uses: of a leaf, in the function's order.
      ndim: of the leaf.
      rebatched: dims that a later contraction treats as experts.

    Returns:
      One letter a dim ("" where no use shows them), whether the leaf is a lookup table, and a
      remark.
    """
    deciding = _deciding(uses)
    if deciding is None:
        return "", False, _why_not(uses)
    stacked = set(deciding.stacked)
    remark = ""
    if moved := (rebatched - stacked):
        stacked |= moved
        dims = ", ".join(map(str, sorted(moved)))
        remark = (
            f"dim {dims} looks like experts (kept by one contraction, batched or summed away with "
            f"the hidden dim by the next): read as a stack, one adapter an index; `roles` overrides"
        )
    roles = "".join(
        "s" if d in stacked else "i" if d in deciding.contracted else "o" for d in range(ndim)
    )
    return roles, deciding.kind in ("lookup", "rows"), remark


def is_linear(uses: Sequence[Use]) -> bool:
    """Whether a weight maps features: not one that is resized or mixed, and then added.

    A resized table of positions is contracted only with a matrix that no argument feeds, and then
    added to the features; a kernel that is resized is contracted with features afterwards.
    """
    kinds = [use.kind for use in uses]
    return "contract" in kinds or "other" not in kinds


def _deciding(uses: Sequence[Use]) -> Use | None:
    """The use that shows the roles: a lookup, the first contraction, or what is like one.

    A contraction that an argument feeds comes before one with a constant only (the vectors of a
    spectral norm).
    """
    for kind in ("lookup", "contract", "transform", "rows"):
        of_kind = [use for use in uses if use.kind == kind]
        if of_kind:
            return min(of_kind, key=lambda use: use.constant and kind == "contract")
    return None


def _why_not(uses: Sequence[Use]) -> str:
    if not uses:
        return "the function does not use it"
    found = ", ".join(sorted({f"`{u.primitive}`" for u in uses if u.kind != "picked"}))
    return f"no contraction and no lookup uses it, only {found}" if found else "only indexed"
