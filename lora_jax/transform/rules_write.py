"""Rules for writing into a weight, and for writing a weight into a buffer."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.transform.base_weight import base_array
from lora_jax.transform.implicit import Implicit, Unsupported, folded, owned, rebuild, without_gain
from lora_jax.transform.labels import PARTS, RANK, expand_to, labels, reorder


def scatter(
    v: Any,
    indices: Any,
    updates: Any,
    bind: Callable,
    *,
    dimension_numbers: lax.ScatterDimensionNumbers,
    **params: Any,
) -> Implicit:
    """Rows or columns of a weight written over, where its change is zero, or written elsewhere.

    Args:
      v, indices, updates: the operands, the first or the last of them a weight.
      bind: binds the original primitive to dense operands.
      dimension_numbers: of the primitive.
      **params: its other parameters.
    """
    numbers = dimension_numbers
    if params["update_jaxpr"] is not None:  # `w.at[rows].apply(f)`
        raise Unsupported("a function of a part of its numbers")
    if isinstance(updates, Implicit):
        write = functools.partial(lax.scatter, mode=params["mode"])
        return _placed_at(updates, v, indices, numbers=numbers, bind=bind, write=write)
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


def scatter_add(
    v: Any,
    indices: Any,
    updates: Any,
    bind: Callable,
    *,
    dimension_numbers: lax.ScatterDimensionNumbers,
    **params: Any,
) -> Implicit:
    """Numbers added to a weight, which its base takes, or a weight added to rows or columns."""
    if isinstance(updates, Implicit):
        write = functools.partial(lax.scatter_add, mode=params["mode"])
        return _placed_at(updates, v, indices, numbers=dimension_numbers, bind=bind, write=write)
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


def _placed_at(
    v: Implicit,
    buffer: Any,
    indices: Any,
    *,
    numbers: lax.ScatterDimensionNumbers,
    bind: Callable,
    write: Callable,
) -> Implicit:
    """A weight written into a buffer at indices: each factor is, into zeros.

    Args:
      v: the weight; its dims are those of windows and those of the indices.
      buffer, indices: the other operands.
      numbers: which dims of the buffer a window covers, and which ones the indices choose.
      bind: binds the original primitive to dense operands.
      write: `f(buffer, indices, updates, numbers)` writes a factor as the primitive does.
    """
    if isinstance(buffer, Implicit):
        raise Unsupported("a weight is written into another one")
    if numbers.operand_batching_dims:
        raise Unsupported("batched scatter")
    chosen = numbers.scatter_dims_to_operand_dims
    kept = [d for d in range(buffer.ndim) if d not in numbers.inserted_window_dims]
    # For each dim of the buffer that a window covers, the weight's; the rank stays what it is.
    window: dict = dict(zip(kept, numbers.update_window_dims, strict=True))
    cut = [d for d, n in enumerate(buffer.shape) if d not in window or v.shape[window[d]] != n]
    if not set(chosen) <= set(cut):
        raise Unsupported("a write that moves a window along a dim it covers")
    rows = [axis for axis in range(v.ndim) if axis not in numbers.update_window_dims]
    role = _role_of_rows(v, rows)
    v = without_gain(v)
    placed = {*rows, *(window[d] for d in cut if d in window)}
    v = owned(v, [axis for axis in placed if v.roles[axis] == "u"], role)
    roles = "".join(v.roles[window[d]] if d in window else role for d in range(buffer.ndim))
    # Of several rows one factor alone may know the places; those of a stack would be in both.
    if indices[..., 0].size > 1 and {roles[d] for d in chosen} - {role} | {role} & {"s"}:
        raise Unsupported("indices choose dims of both factors")
    if v.key is not None and any(roles[d] == "s" for d in cut):
        raise Unsupported("a stack with dropout is written into a buffer")

    def place(array: Array, part: str) -> Array:
        have, want = labels(v.roles, part), labels(roles, part)
        # In a scatter's updates the dims of the indices come first here.
        own: list = [axis for axis in rows if axis in have]
        order = own + [window.get(d, d) for d in want if d in window or d == RANK]
        array = reorder(array, have, order)
        if not set(want) & set(cut):
            return array
        columns = jnp.array([k for k, d in enumerate(chosen) if d in want], int)
        where = indices if own else indices.reshape(-1, indices.shape[-1])[0]
        sizes = [array.shape[order.index(d)] if d == RANK else buffer.shape[d] for d in want]
        part_numbers = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(len(own), array.ndim)),
            inserted_window_dims=tuple(i for i, d in enumerate(want) if d not in (*window, RANK)),
            scatter_dims_to_operand_dims=tuple(want.index(d) for d in chosen if d in want),
        )
        return write(jnp.zeros(sizes, array.dtype), where[..., columns], array, part_numbers)

    parts = {p: place(x, p) for p in PARTS if (x := getattr(v, p)) is not None}
    return dataclasses.replace(
        v, w=bind(buffer, indices, base_array(v, "a write")), roles=roles, **parts
    )


def _role_of_rows(v: Implicit, rows: Sequence[int]) -> str:
    """The role of the dims that a write's indices choose, from those of the weight's rows."""
    found = {v.roles[axis] for axis in rows} - {"u"}
    if len(found) > 1:
        raise Unsupported("indices choose dims of both factors")
    # Where no factor has them (one row, or copies of one), they go to the factor that has none.
    return found.pop() if found else next((role for role in "io" if role not in v.roles), "s")
