"""The implicit array inside the interpreter: a weight, its factors, and what each dim is."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.array import base_dtype, base_ndim, base_shape, dense, widened
from lora_jax.quant.array import QuantArray
from lora_jax.transform.labels import PARTS, contract, expand_to, labels, reorder


class Unsupported(Exception):  # noqa: N818  (control flow: a rule has no low-rank form)
    """Raised by a rule that has no low-rank form for its operands; holds the reason."""


class Note(str):
    """Text that travels in a treedef but never makes two treedefs differ."""

    # Equal to every other note: two layers with other paths share one traced function.
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Implicit:
    """`gain · (w + scale · a·b)`, not materialized while the model runs.

    Attributes:
      w: the dense (or quantized) weight in its current shape.
      a, b: factors; axes as of `labels(roles, "a")` and `labels(roles, "b")`.
      scale: one number a stack index.
      gain: DoRA's `m / ‖W + ΔW‖` over stack and out dims, or None.
      key: dropout key, one a stack index, or None when dropout is off.
      roles: one letter for each current dim of `w`: s, i, o, or u for a dim that no factor has: it
        is of size 1, or the change of the weight is the same at each of its indices.
      dropout: probability.
      path: where the leaf is in the parameter tree, for messages.
      reverse_only: whether its products may have a backward of their own (no forward mode).
      bias: added to a product with the weight, times the scale (PEFT's `lora_bias`), or None.
      derived: whether a product with a constant or a lookup by constant indices made it. Where an
        operation has no low-rank form for it, it is materialized without a warning: that costs
        what the product or the lookup itself costs.
      adapter_count: how many adapters the factors hold (scale, gain and bias too), numbered on
        the axis after the stack dims; 0 for one adapter without such an axis.
      places: int32, a number for each row of the other operand, which dropout draws its mask for;
        None where the mask is drawn for all rows together.
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
    derived: bool = dataclasses.field(metadata={"static": True}, default=False)
    adapter_count: int = dataclasses.field(metadata={"static": True}, default=0)
    places: Any = None

    shape, ndim, dtype = base_shape, base_ndim, base_dtype

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


def is_implicit(x: Any) -> bool:
    return isinstance(x, Implicit)


def has_many(x: Any) -> bool:
    """Whether `x` is a weight that holds many adapters."""
    return isinstance(x, Implicit) and x.adapter_count > 0


def rebuild(v: Implicit, w: Any, roles: str, transform: Callable) -> Implicit:
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


def owned(v: Implicit, dims: Collection[int], role: str) -> Implicit:
    """The same weight with dims that no factor had given to a role: the factors get copies.

    Args:
      v: with role `u` at these dims.
      dims: may be none.
      role: their new role, s, i or o.
    """
    if not dims:
        return v
    # The base has these copies already: only the factors lack the dims.
    roles = "".join(role if d in dims else old for d, old in enumerate(v.roles))
    parts = {}
    for part in PARTS:
        array = getattr(v, part)
        if array is None:
            continue
        have, want = labels(v.roles, part), labels(roles, part)
        new = [d for d in want if d not in have]
        array = jnp.broadcast_to(array, [*(v.shape[d] for d in new), *array.shape])
        parts[part] = reorder(array, [*new, *have], want)
    return dataclasses.replace(v, roles=roles, **parts)


def folded(v: Implicit) -> Implicit:
    """The same weight with its scale and gain multiplied into base and factors."""
    # s·(A·B) = (s·A)·B. Every stack dim of the scale is one of A's.
    scale = labels(v.roles, "scale")
    a = v.a * expand_to(v.scale, scale, labels(v.roles, "a")).astype(v.a.dtype)
    bias = v.bias
    if bias is not None:
        bias = bias * expand_to(v.scale.astype(bias.dtype), scale, labels(v.roles, "bias"))
    v = dataclasses.replace(v, a=a, bias=bias, scale=jnp.ones_like(v.scale))
    if v.gain is None:
        return v
    # g·(W + A·B) = g·W + A·(g·B): the gain is over stack and out dims, all of which B has.
    have = labels(v.roles, "gain")
    w = dense(v.w)
    w = w * expand_to(v.gain, have, range(v.ndim)).astype(w.dtype)
    b = v.b * expand_to(v.gain, have, labels(v.roles, "b")).astype(v.b.dtype)
    return dataclasses.replace(v, w=w, b=b, gain=None)


def without_gain(v: Implicit) -> Implicit:
    """The same weight, folded where it has a gain: what is added to it must not be scaled."""
    return v if v.gain is None else folded(v)


def vector_as_array(v: Implicit) -> Any:
    """The weight itself while it is a matrix with an adapter; else it as an array.

    A vector made of a weight, such as its mean over the outputs, costs no more than its base.
    """
    if isinstance(v.w, QuantArray) or v.bias is not None:
        return v
    return materialize(v) if v.rank == 0 or not is_matrix(v) else v


def is_matrix(v: Implicit) -> bool:
    """Whether both factors have dims that are longer than 1."""
    return {"i", "o"} <= {role for role, n in zip(v.roles, v.shape, strict=True) if n != 1}


def wide_dtype(*dtypes: Any) -> np.dtype:
    """As `widened`, but complex where one of the dtypes is."""
    real = widened(*(jnp.finfo(d).dtype if jnp.issubdtype(d, jnp.inexact) else d for d in dtypes))
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        return jnp.dtype(jnp.complex128 if real == jnp.float64 else jnp.complex64)
    return real


def materialize(v: Implicit) -> Array:
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
    # The change has the dims that factors have; it repeats along the others.
    dims = [d for d in range(v.ndim) if v.roles[d] != "u"]
    # Not in bfloat16: a change far smaller than W would be rounded before it is added.
    wide = wide_dtype(v.a.dtype, v.b.dtype)
    la, lb = labels(v.roles, "a"), labels(v.roles, "b")
    a = v.a.astype(wide) * expand_to(v.scale.astype(wide), labels(v.roles, "scale"), la)
    change, have = contract(
        a, la, v.b.astype(wide), lb, keep=set(dims), precision=lax.Precision.HIGHEST
    )
    # Size 1 for what no factor has, which the sum with the base broadcasts.
    sizes = [1 if v.roles[d] == "u" else n for d, n in enumerate(v.shape)]
    w = dense(v.w)
    wide = wide_dtype(wide, w.dtype)
    full = w.astype(wide) + lax.reshape(reorder(change, have, dims), sizes).astype(wide)
    if v.gain is not None:
        full = full * expand_to(v.gain, labels(v.roles, "gain"), range(v.ndim)).astype(wide)
    return full.astype(v.dtype)
