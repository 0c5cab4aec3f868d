"""The role of each dim of a weight, inferred from its uses."""

import math
from collections.abc import Sequence

from lora_jax.plan.leaf import LeafPlan, Use
from lora_jax.transform.many import token_axis
from lora_jax.transform.primitives import PRIMITIVES

# A parameter that only these operations combine with features is a bias, a scale, or a prompt: rows
# put beside the features.
_BESIDE_FEATURES = frozenset(
    name for name, row in PRIMITIVES.items() if row.tokens is token_axis.elementwise
) | {"concatenate", "dynamic_update_slice", "pad"}


def inferred(
    uses: Sequence[Use], shape: Sequence[int], rebatched: set[int]
) -> tuple[str, bool, str]:
    """The roles of a leaf.

    Args:
      uses: of a leaf, in the function's order.
      shape: of the leaf.
      rebatched: dims that a later contraction treats as experts.

    Returns:
      One letter for each dim ("" where no use shows them), whether the leaf is a lookup table,
      and a remark.
    """
    deciding = _deciding(uses)
    if deciding is None:
        return "", False, _why_not(uses)
    stacked = set(deciding.stacked)
    remark = ""
    moved = rebatched - stacked
    outs = set(range(len(shape))) - stacked - deciding.contracted
    # Each expert is a matrix: if no out dim were left, the axis is none of experts.
    if moved and any(shape[d] > 1 for d in outs - moved):
        stacked |= moved
        dims = ", ".join(map(str, sorted(moved)))
        remark = (
            f"dim {dims} looks like experts (kept by one contraction, batched or summed away with "
            "the hidden dim by the next): read as a stack, one adapter for each index; `roles` "
            "overrides"
        )
    roles = "".join(
        "s" if d in stacked else "i" if d in deciding.contracted else "o" for d in range(len(shape))
    )
    return roles, deciding.kind in ("lookup", "rows"), remark


def maps_features(uses: Sequence[Use]) -> bool:
    """Whether features are contracted with a weight, after it was resized or as it is.

    A table of positions that is resized and then added to the features is contracted with a
    constant matrix only; a resized kernel is contracted with the features afterwards.
    """
    kinds = [use.kind for use in uses]
    return "contract" in kinds or "other" not in kinds


def _deciding(uses: Sequence[Use]) -> Use | None:
    """The use that decides the roles: a lookup, else the first contraction, else a similar use.

    A contraction with an argument comes before one with a constant, such as the vectors of a
    spectral norm, and rows by constant indices that no argument meets are those of a table, such as
    one of distances between tokens.
    """
    table = any(use.kind == "rows" for use in uses)
    # A table that is tied to the head is both looked up and contracted: the lookup decides, as in
    # PEFT.
    for kind in ("lookup", "contract", "transform", "rows"):
        of_kind = [use for use in uses if use.kind == kind]
        if kind == "contract" and table and all(use.constant for use in of_kind):
            continue
        if of_kind:
            # `min` returns the first of equals, in the order of the function.
            return min(of_kind, key=lambda use: use.constant and kind == "contract")
    return None


def _why_not(uses: Sequence[Use]) -> str:
    if not uses:
        return "the function does not use it"
    found = ", ".join(sorted({f"`{u.primitive}`" for u in uses if u.kind != "picked"}))
    return f"no contraction and no lookup uses it, only {found}" if found else "only indexed"


def override(leaf: LeafPlan) -> str:
    """The advice, mostly a `roles` setting, that adapts a leaf which is left out; "" for no matrix.

    A leaf is a matrix if it has floats, if two of its dims are longer than 1, apart from dims taken
    index by index (layers of a scan), and if not all its uses are those of a bias, a scale or a
    prompt.
    """
    if leaf.dtype.startswith("complex") and sum(n > 1 for n in leaf.shape) > 1:
        return "hold its real and imaginary parts as two leaves, and join them by `lax.complex`"
    if "float" not in leaf.dtype:
        return ""
    picked = frozenset().union(*(use.picked for use in leaf.uses))
    large = [d for d, n in enumerate(leaf.shape) if n > 1 and d not in picked]
    if len(large) < 2 and any(u.constant and _is_scatter(u) for u in leaf.uses):
        # A row, a column or a number is put into a constant: its index numbers no layers.
        picked, large = frozenset[int](), [d for d, n in enumerate(leaf.shape) if n > 1]
    if len(large) < 2 and any(0 < use.flat <= math.prod(leaf.shape) for use in leaf.uses):
        return (
            "it holds matrices: let `fn` take them as leaves of a tree, such as `ravel_pytree`'s "
            "second result makes of it"
        )
    uses = [use for use in leaf.uses if use.kind != "picked"]
    if len(large) < 2 or (uses and all(map(_joins_features, uses))):
        return ""
    summed = frozenset().union(*(u.contracted for u in leaf.uses if u.kind == "contract"))
    ins = summed & {*large}
    # A guess for the user to correct, where the uses show no in dim or no out dim: the first large
    # dim is in, the others are out.
    if not ins or len(ins) == len(large):
        ins = {large[0]}
    roles = "".join(
        "s" if d in picked else "i" if d in ins else "o" for d in range(len(leaf.shape))
    )
    return f"set roles={{{leaf.path!r}: {roles!r}}} to adapt it"


def _joins_features(use: Use) -> bool:
    """Whether a use adds a parameter to features, scales them by it, or puts it beside them."""
    if use.primitive == "dot_general":
        return use.kind == "other"  # an einsum that sums nothing: a scale
    beside = use.primitive in _BESIDE_FEATURES or _is_scatter(use)
    return use.kind == "other" and not use.constant and beside


def _is_scatter(use: Use) -> bool:
    return use.primitive.startswith("scatter")
