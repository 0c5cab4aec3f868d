"""What the rules do with the base weight of an implicit array, a plain array or a quantized one.

A quantized weight stays quantized where an operation only relabels its dims or slices its stack.
`lora_jax.quant` multiplies with it, and keeps nothing but its codes for the backward pass. Where
an operation would mix the numbers of a block, the weight is decoded, with a warning.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lora_jax import compat
from lora_jax.dims import in_dims, out_dims, stack_dims
from lora_jax.quant import ops
from lora_jax.quant import sharding as quant_sharding
from lora_jax.quant.array import QuantArray, expanded
from lora_jax.quant.matmul import linear
from lora_jax.transform.implicit import Implicit, Note


class DecodedWarning(UserWarning):
    """A quantized weight was decoded as a whole, because an operation on it needs an array."""


def base_array(v: Implicit, operation: str) -> Any:
    """The weight as an array; a quantized one is decoded, with a warning."""
    if not isinstance(v.w, QuantArray):
        return v.w
    warnings.warn(
        f"`{v.path}` (quantized, {v.w.format}) is decoded for `{operation}`: the result is right, "
        f"its memory is not saved in training",
        DecodedWarning,
        stacklevel=2,
    )
    return v.w.dequantize()


def rearranged(v: Implicit, plain: Callable, quantized: Callable, args: Sequence) -> Any:
    """The weight after an operation that rearranges it.

    Args:
      v: the implicit array.
      plain: the operation on arrays, of `jax.lax`.
      quantized: the same of `lora_jax.quant.ops`; it gives None where the codes do not allow it.
      args: arguments of both, after the weight.
    """
    if isinstance(v.w, QuantArray):
        # None where codes would move or a block would be cut.
        q = quantized(v.w, *args)
        if q is not None:
            return q
    return plain(base_array(v, quantized.__name__), *args)


def unchanged(v: Implicit, bind: Callable) -> Any:
    """The weight after an operation that changes no number: on every array it is made of."""
    return jax.tree.map(bind, v.w) if isinstance(v.w, QuantArray) else bind(v.w)


def product(
    v: Implicit,
    x: Any,
    bind: Callable,
    *,
    weight_left: bool,
    dimension_numbers: tuple,
    precision: Any,
    **params: Any,
) -> Any:
    """`lax.dot_general` of the weight and an array, either one on the left."""
    if not isinstance(v.w, QuantArray):
        return bind(v.w, x) if weight_left else bind(x, v.w)
    contracting, batching = dimension_numbers
    # Dimension numbers in the order (weight, other).
    side = 1 if weight_left else -1
    return ops.dot_general(
        v.w,
        x,
        bind,
        weight_left=weight_left,
        contracting=contracting[::side],
        batching=batching[::side],
        precision=precision,
        preferred=params.get("preferred_element_type"),
        # Under an explicit mesh the primitive itself runs: only it can state its result's sharding.
        plain=compat.spec_of(x) is None and params.get("out_sharding") is None,
    )


def applied(v: Implicit, x: Any, op: Callable, *rest) -> Any:
    """`op(x, weight, *rest)`, linear in `x`: a convolution, a grouped product."""
    # `linear` decodes inside the operation and again in its transpose, so that only codes are kept.
    return linear(op, x, v.w, *rest) if isinstance(v.w, QuantArray) else op(x, v.w, *rest)


def rows(v: Implicit, indices: Any, bind: Callable, **params) -> Any:
    """`lax.gather` of the weight: of a quantized one only what is looked up is decoded."""
    if isinstance(v.w, QuantArray):
        found = ops.gather(v.w, indices, **params)
        if found is not None:
            return found
    return bind(base_array(v, "gather"), indices)


def unstacked(w: Any) -> Any:
    """What one step of a scan sees of a stacked weight whose arrays have been sliced."""
    # The shape of a quantized weight is static data: `lax.scan` slices its arrays, but not that.
    return ops.first_index(w) if isinstance(w, QuantArray) else w


def restacked(w: Any) -> Any:
    """A weight that a scan has stacked: its static shape grows by the steps there are."""
    return ops.with_stack(w, w.packed.shape[0]) if isinstance(w, QuantArray) else w


def scannable(v: Implicit) -> Implicit:
    """Makes sure that the weight's first dim is a stack dim of its arrays."""
    if isinstance(v.w, QuantArray) and v.w.roles[0] != "s":
        return dataclasses.replace(v, w=base_array(v, "scan"))
    return v


def moved(v: Implicit, to: Any, put: Callable) -> Any:
    """The weight put to a device, a memory space or a sharding; `put(array, to)`."""
    if not isinstance(v.w, QuantArray):
        return put(v.w, to)
    if not isinstance(to, NamedSharding):
        return jax.tree.map(lambda x: put(x, to), v.w)
    # Codes and scales have fewer entries along a blocked dim: each array has a spec of its own.
    places = quant_sharding.shardings(v.w, to.mesh, to.spec)
    return jax.tree.map(put, v.w, places)


def for_shard_map(v: Implicit, spec: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """A weight that enters a `shard_map`.

    Returns:
      The weight to pass in, its specs, and what it is inside (None where that is the same): a
      quantized weight with the static shape of one device's part.
    """
    if not isinstance(v.w, QuantArray):
        return v.w, spec, None
    q = expanded(v.w)
    return q, quant_sharding.array_specs(q, spec), quant_sharding.local_part(q, spec, mesh)


def without_adapter(q: QuantArray, path: Note) -> Implicit:
    """A quantized weight that no adapter changes: an implicit array of rank 0."""
    # With factors of rank 0 most rules need no case of their own for it.
    stack = [q.shape[d] for d in stack_dims(q.roles)]
    ins = [q.shape[d] for d in in_dims(q.roles)]
    outs = [q.shape[d] for d in out_dims(q.roles)]
    return Implicit(
        w=q,
        a=jnp.zeros((*stack, *ins, 0), jnp.float32),
        b=jnp.zeros((*stack, 0, *outs), jnp.float32),
        scale=jnp.ones(stack, jnp.float32),
        gain=None,
        key=None,
        roles=q.roles,
        path=path,
    )
