"""Rules for writing into a weight, and for writing a weight into a buffer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.transform.base_weight import base_array
from lora_jax.transform.implicit import Implicit, Unsupported, folded, owned, rebuild, without_gain
from lora_jax.transform.labels import RANK, expand_to, labels


def scatter(
    v: Any,
    indices: Any,
    updates: Any,
    bind: Callable,
    *,
    dimension_numbers: lax.ScatterDimensionNumbers,
    **params: Any,
) -> Implicit:
    """Rows or columns of a weight written over: its change is zero there.

    Args:
      v, indices, updates: the operands.
      bind: binds the original primitive to dense operands.
      dimension_numbers: of the primitive.
      **params: its other parameters.
    """
    numbers = dimension_numbers
    if not isinstance(v, Implicit) or isinstance(updates, Implicit):
        raise Unsupported("a weight is written, at indices, into another array")
    if numbers.operand_batching_dims:
        raise Unsupported("batched scatter")
    kept = [d for d in range(v.ndim) if d not in numbers.inserted_window_dims]
    # For each dim that a window covers, the axis of `updates` that has it.
    window = dict(zip(kept, numbers.update_window_dims, strict=True))
    cut = [d for d, n in enumerate(v.shape) if d not in window or updates.shape[window[d]] != n]
    if not set(numbers.scatter_dims_to_operand_dims) <= set(cut):
        raise Unsupported("a write that moves a window along a dim it covers")

    # The same write, of zeros, into ones over the dims of which it covers a part: a mask of the
    # rows (or columns) that stay.
    whole = [axis for d, axis in window.items() if d not in cut]
    axes = [axis for axis in range(updates.ndim) if axis not in whole]
    own = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(axes.index(window[d]) for d in kept if d in cut),
        inserted_window_dims=tuple(cut.index(d) for d in cut if d not in window),
        scatter_dims_to_operand_dims=tuple(
            cut.index(d) for d in numbers.scatter_dims_to_operand_dims
        ),
    )
    outside = lax.scatter(
        jnp.ones([v.shape[d] for d in cut]),
        indices,
        jnp.zeros([updates.shape[axis] for axis in axes]),
        own,
        mode=params["mode"],
    )
    # Zero where the base is written over: the change is gone there, as the base's own number is.
    return _written(v, cut, outside, lambda w: bind(w, indices, updates))


def scatter_add(v: Any, indices: Any, updates: Any, bind: Callable, **_: Any) -> Implicit:
    """Numbers added to a weight, which its base takes."""
    if not isinstance(v, Implicit) or isinstance(updates, Implicit):
        raise Unsupported("a weight is added, at indices, to another array")
    v = without_gain(v)
    return dataclasses.replace(v, w=bind(base_array(v, "scatter-add"), indices, updates))


def dynamic_update_slice(operand: Any, update: Any, *starts: Any, bind: Callable) -> Implicit:
    """A slice of a weight written over, or a weight written into a buffer."""
    if isinstance(operand, Implicit) and isinstance(update, Implicit):
        raise Unsupported("a weight is written into another one")
    shape, part = operand.shape, update.shape
    cut = [d for d in range(len(shape)) if shape[d] != part[d]]
    if isinstance(update, Implicit):
        return _placed(update, operand, cut, starts=starts, bind=bind)
    outside = lax.dynamic_update_slice(
        jnp.ones([shape[d] for d in cut]),
        jnp.zeros([part[d] for d in cut]),
        [starts[d] for d in cut],
    )
    return _written(operand, cut, outside, lambda w: bind(w, update, *starts))


def _written(v: Implicit, cut: Sequence[int], outside: Array, write: Callable) -> Implicit:
    """A weight some of whose numbers are written over.

    Args:
      v: the weight.
      cut: the dims of which the write covers a part.
      outside: one where nothing is written, else zero, over these dims.
      write: the operation on the base.
    """
    v = folded(owned(v, [d for d in cut if v.roles[d] == "u"], "o"))
    # A block of rows and columns set to zero is not of rank r: only whole rows or columns are.
    roles = {v.roles[d] for d in cut}
    if len(roles) > 1:
        raise Unsupported("a write to a part of the rows and a part of the columns")
    if v.bias is not None and roles - {"i"}:
        raise Unsupported("a write to the outputs of a weight whose adapter has a bias")
    part = "b" if roles == {"o"} else "a"
    array = getattr(v, part)
    array = array * expand_to(outside, cut, labels(v.roles, part)).astype(array.dtype)
    return dataclasses.replace(v, w=write(base_array(v, "a write")), **{part: array})


def _placed(
    v: Implicit, buffer: Any, cut: Sequence[int], starts: Sequence, bind: Callable
) -> Implicit:
    """A weight in a larger buffer, such as a layer in a stack: the factors are zero around it."""
    v = without_gain(v)
    v = owned(v, [d for d in cut if v.roles[d] == "u"], "s")
    if v.key is not None and any(v.roles[d] == "s" for d in cut):
        raise Unsupported("a stack with dropout is written into a buffer")

    def place(array: Array, dims: list) -> tuple[Array, list]:
        if not set(dims) & set(cut):  # dropout keys, which have no zeros
            return array, dims
        sizes = [
            n if d == RANK else buffer.shape[d] for d, n in zip(dims, array.shape, strict=True)
        ]
        zero = jnp.zeros_like(starts[0])
        where = [zero if d == RANK else starts[d].astype(zero.dtype) for d in dims]
        return lax.dynamic_update_slice(jnp.zeros(sizes, array.dtype), array, where), dims

    return rebuild(v, bind(buffer, base_array(v, "a write"), *starts), v.roles, place)
