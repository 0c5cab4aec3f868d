"""The implicit array inside the interpreter: a weight, its factors, and what each dim is."""

import dataclasses
from typing import Any

import jax
from jax import lax

from lora_jax.array import base_dtype, base_ndim, base_shape, dense, widened
from lora_jax.transform.labels import PARTS, contract, expand_to, labels, reorder


class Unsupported(Exception):  # noqa: N818  (control flow: a rule has no low-rank form)
    """Raised by a rule that has no low-rank form for its operands; holds the reason."""


class Note(str):
    """Text that travels in a treedef but never makes two treedefs differ."""

    __slots__ = ()

    def __eq__(self, other):
        return isinstance(other, Note)

    def __ne__(self, other):
        return not isinstance(other, Note)

    def __hash__(self):
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Implicit:
    """`gain · (w + scale · a·b)`, never added up while the model runs.

    Attributes:
      w: the dense (or quantized) weight in its current shape.
      a, b: factors; axes as of `labels(roles, "a")` and `labels(roles, "b")`.
      scale: one number a stack index.
      gain: DoRA's `m / ‖W + ΔW‖` over stack and out dims, or None.
      key: dropout key, one a stack index, or None when dropout is off.
      roles: one letter for each current dim of `w`: s, i, o, or u (a unit dim no factor owns).
      dropout: probability.
      path: where the leaf is in the parameter tree, for messages.
      reverse_only: whether its products may have a backward of their own (no forward mode).
      bias: added to a product with the weight, times the scale (PEFT's `lora_bias`), or None.
      adapter_count: how many adapters the factors hold (scale, gain and bias too), numbered on
        the axis after the stack dims; 0 for one adapter without such an axis.
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    gain: Any
    key: Any
    roles: str = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True}, default=0.0)
    path: Note = dataclasses.field(metadata={"static": True}, default=Note(""))
    reverse_only: bool = dataclasses.field(metadata={"static": True}, default=False)
    bias: Any = None
    adapter_count: int = dataclasses.field(metadata={"static": True}, default=0)

    shape, ndim, dtype = base_shape, base_ndim, base_dtype

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


def is_implicit(x: Any) -> bool:
    return isinstance(x, Implicit)


def has_many(x: Any) -> bool:
    """Whether `x` is a weight that holds many adapters."""
    return isinstance(x, Implicit) and x.adapter_count > 0


def rebuild(v: Implicit, w, roles: str, transform) -> Implicit:
    """An implicit array after a per-dimension operation.

    Args:
      v: before.
      w: the weight after the operation.
      roles: roles of `w`'s dims.
      transform: `f(part_array, part_labels) -> (array, labels)`, where labels are dims of the new
        `w` or RANK, in any order.
    """
    parts = {}
    for part in PARTS:
        array = getattr(v, part)
        if array is None:
            parts[part] = None
            continue
        array, have = transform(array, labels(v.roles, part))
        parts[part] = reorder(array, have, labels(roles, part))
    return dataclasses.replace(v, w=w, roles=roles, **parts)


def materialize(v: Implicit):
    """The dense weight `gain · (w + scale · a·b)` in `w`'s dtype, computed in float32 or wider.

    Raises:
      ValueError: the adapter has a bias, which is no part of the weight.
    """
    if v.bias is not None:
        raise ValueError(
            f"`{v.path}` is used otherwise than in a product, so the bias of its adapter "
            "(`lora_bias=True`) has no place to be added: leave it out of `target_modules`, or "
            "train without `lora_bias`"
        )

    if not v.rank:  # a quantized weight without an adapter
        return dense(v.w)
    dims = [d for d in range(v.ndim) if v.roles[d] != "u"]
    wide = widened(v.a.dtype)
    la, lb = labels(v.roles, "a"), labels(v.roles, "b")
    a = v.a.astype(wide) * expand_to(v.scale.astype(wide), labels(v.roles, "scale"), la)
    change, have = contract(
        a, la, v.b.astype(wide), lb, keep=set(dims), precision=lax.Precision.HIGHEST
    )
    change = lax.reshape(reorder(change, have, dims), v.shape)
    full = dense(v.w).astype(wide) + change
    if v.gain is not None:
        full = full * expand_to(v.gain, labels(v.roles, "gain"), range(v.ndim)).astype(wide)
    return full.astype(v.dtype)
