"""The role of each dim of a weight, read off its uses."""

from collections.abc import Sequence

from lora_jax.plan.leaf import LeafPlan, Use
from lora_jax.transform.many import token_axis
from lora_jax.transform.primitives import PRIMITIVES

# A parameter that only meets features in these is a bias, a scale, or rows put beside them.
_BESIDE_FEATURES = frozenset(
    name for name, row in PRIMITIVES.items() if row.tokens is token_axis.elementwise
) | {"concatenate", "dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "pad"}


def inferred(
    uses: Sequence[Use], shape: Sequence[int], rebatched: set[int]
) -> tuple[str, bool, str]:
    """Roles from uses.

    Args:
      uses: of a leaf, in the function's order.
      shape: of the leaf.
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
    moved = rebatched - stacked
    outs = set(range(len(shape))) - stacked - deciding.contracted
    # Experts are matrices: without an out dim the axis is no expert axis.
    if moved and any(shape[d] > 1 for d in outs - moved):
        stacked |= moved
        dims = ", ".join(map(str, sorted(moved)))
        remark = (
            f"dim {dims} looks like experts (kept by one contraction, batched or summed away with "
            f"the hidden dim by the next): read as a stack, one adapter an index; `roles` overrides"
        )
    roles = "".join(
        "s" if d in stacked else "i" if d in deciding.contracted else "o" for d in range(len(shape))
    )
    return roles, deciding.kind in ("lookup", "rows"), remark


def maps_features(uses: Sequence[Use]) -> bool:
    """Whether a weight maps features, and is not a table that is resized and then added to them.

    A resized table of positions is contracted only with a constant matrix, and then added to the
    features; a resized kernel is contracted with the features afterwards.
    """
    kinds = [use.kind for use in uses]
    return "contract" in kinds or "other" not in kinds


def _deciding(uses: Sequence[Use]) -> Use | None:
    """The use that decides the roles: a lookup, else the first contraction, else what is like one.

    A contraction with an argument comes before one with a constant, such as the vectors of a
    spectral norm.
    """
    # A tied table is looked up and contracted (by the head): the lookup decides.
    for kind in ("lookup", "contract", "transform", "rows"):
        of_kind = [use for use in uses if use.kind == kind]
        if of_kind:
            # `min` keeps the first of equals.
            return min(of_kind, key=lambda use: use.constant and kind == "contract")
    return None


def _why_not(uses: Sequence[Use]) -> str:
    if not uses:
        return "the function does not use it"
    found = ", ".join(sorted({f"`{u.primitive}`" for u in uses if u.kind != "picked"}))
    return f"no contraction and no lookup uses it, only {found}" if found else "only indexed"


def override(leaf: LeafPlan) -> str:
    """The `roles` line that adapts a leaf which is left out, or "" where it is no matrix.

    A leaf is a matrix if two of its dims are longer than 1, dims that are taken index by index
    (layers of a scan) apart, and if not all its uses are those of a bias, a scale or a prompt.
    """
    picked = frozenset().union(*(use.picked for use in leaf.uses))
    large = [d for d, n in enumerate(leaf.shape) if n > 1 and d not in picked]
    if len(large) < 2 or (leaf.uses and all(map(_joins_features, leaf.uses))):
        return ""
    summed = frozenset().union(*(u.contracted for u in leaf.uses if u.kind == "contract"))
    ins = summed & {*large}
    # Both kinds of dims are needed: where the uses do not show them, the first is the in dim.
    if not ins or len(ins) == len(large):
        ins = {large[0]}
    roles = "".join(
        "s" if d in picked else "i" if d in ins else "o" for d in range(len(leaf.shape))
    )
    return f"set roles={{{leaf.path!r}: {roles!r}}} to adapt it"


def _joins_features(use: Use) -> bool:
    """Whether a use adds a parameter to features, scales them by it, or puts it beside them."""
    if use.primitive == "dot_general":  # an einsum that sums nothing: a scale
        return use.kind == "other"
    return use.kind == "other" and not use.constant and use.primitive in _BESIDE_FEATURES
