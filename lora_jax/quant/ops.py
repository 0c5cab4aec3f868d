"""Operations on quantized weights: contractions, rows by index, and rearrangements of dims."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from lora_jax.dims import AnyArray, in_dims, in_range, out_dims, reshape_roles, stack_dims
from lora_jax.quant import formats
from lora_jax.quant.array import QuantArray, coded, expanded, form_of, in_order
from lora_jax.quant.matmul import linear, matmul


def dot_general(
    q: QuantArray,
    x: AnyArray,
    bind: Callable[..., Array],
    *,
    weight_left: bool,
    contracting: tuple[Sequence[int], Sequence[int]],
    batching: tuple[Sequence[int], Sequence[int]],
    precision: Any = None,
    preferred: DTypeLike | None = None,
    plain: bool = True,
) -> Array:
    """`lax.dot_general` with a quantized operand.

    Where all in dims or all out dims are contracted and all stack dims batched, this is `matmul`.
    Any other contraction decodes the weight inside `linear`.

    Args:
      q: the weight.
      x: the other operand.
      bind: the primitive on dense operands, in their order.
      weight_left: whether the weight is the left operand.
      contracting, batching: dims of the weight, and of `x`.
      precision, preferred: as in `lax.dot_general`.
      plain: False to bind the primitive itself, which has an output sharding.
    """
    # Mixed dtypes and output shardings follow the primitive's own rules.
    transposed = _direction(q, contracting[0], batching[0])
    if not plain or transposed is None or x.dtype != q.dtype:
        if weight_left:
            return linear(lambda x, w: bind(w, x), x, q)
        return linear(lambda x, w: bind(x, w), x, q)
    stack, owners = stack_dims(q.roles), (in_dims(q.roles), out_dims(q.roles))
    summed, free = owners[::-1] if transposed else owners
    partner = dict(zip(contracting[0], contracting[1], strict=True))
    partner |= dict(zip(batching[0], batching[1], strict=True))
    x_free = [d for d in range(x.ndim) if d not in set(partner.values())]
    # `x` becomes (stack, rows, contracted), the contracted dims in the weight's order, in which
    # the codes are stored.
    order = [partner[d] for d in stack] + x_free + [partner[d] for d in summed]
    rows = [x.shape[d] for d in x_free]
    flat = x.transpose(order).reshape(
        *(q.shape[d] for d in stack), *rows, math.prod(q.shape[d] for d in summed)
    )
    y = matmul(flat, q, transposed=transposed, precision=precision, preferred=preferred)
    y = y.reshape(*y.shape[:-1], *(q.shape[d] for d in free))
    # `matmul` gives stack, rows of `x`, free dims of the weight; `dot_general` gives batch dims,
    # the free dims of the left operand, then of the right. Unit dims are no part of the matrix:
    # the last reshape puts them back.
    have = [*(("w", d) for d in stack), *(("x", d) for d in x_free), *(("w", d) for d in free)]
    shown = [("w", d) for d in range(q.ndim) if d not in partner]  # unit dims included
    batch = [("w", d) for d in batching[0]]
    mine = [("x", d) for d in x_free]
    want = batch + (shown + mine if weight_left else mine + shown)
    y = y.transpose([have.index(label) for label in want if label in have])
    return y.reshape([q.shape[d] if side == "w" else x.shape[d] for side, d in want])


def _direction(q: QuantArray, contracted: Sequence[int], batch: Sequence[int]) -> bool | None:
    """False where the in dims are contracted, True where the out dims are, None for neither."""
    if set(batch) != set(stack_dims(q.roles)):
        return None
    if set(contracted) == set(in_dims(q.roles)):
        return False
    return True if set(contracted) == set(out_dims(q.roles)) else None


def gather(
    q: QuantArray,
    indices: Integer[AnyArray, "*m _"],
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: lax.GatherScatterMode,
    fill_value: Any = None,
    **_: Any,
) -> Array | QuantArray | None:
    """Rows, columns or stacked matrices of a weight by index; only those are decoded.

    Args:
      q: the weight.
      indices: integers `(..., 1)`.
      dimension_numbers, slice_sizes, mode, fill_value: of the gather primitive.

    Returns:
      An array of the weight's dtype, or a `QuantArray` where a stack dim is indexed. None unless
      the gather indexes one dim and takes all others whole.
    """
    numbers = dimension_numbers
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (dim,) = numbers.start_index_map
    whole = all(n == q.shape[d] for d, n in enumerate(slice_sizes) if d != dim)
    # `x[ids]` collapses the indexed dim and takes slices of size 1; anything else is a window.
    if numbers.collapsed_slice_dims != (dim,) or not whole or slice_sizes[dim] != 1:
        return None
    index, valid = _index(jnp.asarray(indices)[..., 0], q.shape[dim], mode)
    role = q.roles[dim]
    if role == "s":
        return _pick_stack(q, index, valid, dim=dim, numbers=numbers)
    if role == "u" or [d for d in range(q.ndim) if q.roles[d] == role] != [dim]:
        return None
    if role == "i" and q.order is not None:
        return None
    rows = _rows(q, index) if role == "i" else _columns(q, index)
    if valid is not None:
        # NaN is what `jnp.take` fills float arrays with.
        fill = jnp.nan if fill_value is None else fill_value
        rows = jnp.where(valid.reshape(valid.shape + (1,) * (q.ndim - 1)), rows, fill)
    survive = [d for d in range(q.ndim) if d != dim]
    front = [a for a in range(rows.ndim) if a not in numbers.offset_dims]
    # `offset_dims` are the places of the weight's other dims in the result; index dims fill the
    # rest.
    place = [*front, *numbers.offset_dims[: len(survive)]]
    return rows.transpose([place.index(a) for a in range(rows.ndim)]).astype(q.dtype)


def take(q: QuantArray, index: Any, dim: int) -> Array:
    """`W` at some indices of a dim, which becomes the first; only those are decoded.

    Args:
      q: the weight.
      index: integers `(n,)` inside the dim.
      dim: alone in its role (in or out); otherwise the whole weight is decoded.
    """
    index, role = jnp.asarray(index), q.roles[dim]
    if role not in "io" or q.roles.count(role) > 1 or (role == "i" and q.order is not None):
        return jnp.moveaxis(jnp.take(q.dequantize(), index, axis=dim), dim, 0)
    return _rows(q, index) if role == "i" else _columns(q, index)


def _index(
    index: Integer[Array, "*m"], size: int, mode: Any
) -> tuple[Integer[Array, "*m"], Bool[Array, "*m"] | None]:
    """The indices clipped to the dim, and a mask of the valid ones if others are to be filled."""
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        return jnp.clip(index, 0, size - 1), in_range(index, size)
    # Other modes clip or promise valid indices, for which a clip changes nothing.
    return jnp.clip(index, 0, size - 1), None


def _rows(q: QuantArray, index: Integer[Array, "*m"]) -> Float[Array, "..."]:
    """`W[index]` of an in dim: `(index..., the other dims)`."""
    q = expanded(q)
    form, block = form_of(q), q.block
    number = index.reshape(-1)
    take = functools.partial(jnp.take, axis=-2)
    values = formats.code_values(formats.unpack_rows(q.packed, number, form, block), form)
    # Every row has the scale of its block.
    values = values * take(q.scale, number // block).astype(jnp.float32)
    if q.bias is not None:
        values = values + take(q.bias, number // block).astype(jnp.float32)
    return _shaped(q, index, values, axis=-2, role="i")


def _columns(q: QuantArray, index: Integer[Array, "*m"]) -> Float[Array, "..."]:
    """`W[..., index]` of an out dim: `(index..., the other dims)`."""
    number = index.reshape(-1)
    take = functools.partial(jnp.take, indices=number, axis=-1)
    w = coded(q)
    few = dataclasses.replace(
        w,
        packed=take(w.packed),
        scale=take(w.scale),
        bias=None if w.bias is None else take(w.bias),
    )
    values = in_order(formats.decode(few, jnp.float32), q)
    # A column is decoded with its padding, which is cut off here.
    fan_in = math.prod(q.shape[d] for d in in_dims(q.roles))
    return _shaped(q, index, values[..., :fan_in, :], axis=-1, role="o")


def _shaped(
    q: QuantArray,
    index: Integer[Array, "*m"],
    values: Float[Array, "*s k n"],
    *,
    axis: Literal[-2, -1],
    role: Literal["i", "o"],
) -> Float[Array, "..."]:
    """Index axes first, then the weight's other dims in its own order.

    Args:
      q: the weight.
      index: as it was given.
      values: decoded, the indexed rows or columns along `axis`.
      axis, role: of the indexed dim.
    """
    values = jnp.moveaxis(values, axis, 0)
    # `values` has the stack and the other role folded together; they are split, then put in the
    # weight's order among themselves.
    other = out_dims(q.roles) if role == "i" else in_dims(q.roles)
    have = [*stack_dims(q.roles), *other]
    values = values.reshape(*index.shape, *(q.shape[d] for d in have))
    values = values.transpose(
        [*range(index.ndim), *(index.ndim + have.index(d) for d in sorted(have))]
    )
    shown = [q.shape[d] for d in range(q.ndim) if q.roles[d] != role]
    return values.astype(q.dtype).reshape(*index.shape, *shown)


def _pick_stack(
    q: QuantArray,
    index: Integer[Array, "*m"],
    valid: Bool[Array, "*m"] | None,
    *,
    dim: int,
    numbers: lax.GatherDimensionNumbers,
) -> QuantArray | None:
    """Matrices of a stack with one dim; None where an index may be invalid, or dims move."""
    survive = q.ndim - 1
    front = tuple(range(index.ndim, index.ndim + survive))
    if stack_dims(q.roles) != [dim] or valid is not None or tuple(numbers.offset_dims) != front:
        return None
    rest = [d for d in range(q.ndim) if d != dim]
    return dataclasses.replace(
        jax.tree.map(lambda x: jnp.take(x, index, axis=0), q),
        shape=(*index.shape, *(q.shape[d] for d in rest)),
        roles="s" * index.ndim + "".join(q.roles[d] for d in rest),
    )


def _relabelled(q: QuantArray, shape: Sequence[int], roles: str) -> QuantArray:
    """The same matrices as a weight of another shape."""
    stack = tuple(shape[d] for d in stack_dims(roles))
    # K and N are folded already, so only the stack's leading dims can change.
    old = len(stack_dims(q.roles))

    def fold(x: Array) -> Array:
        return x if x.shape[:old] == stack else x.reshape(*stack, *x.shape[old:])

    return dataclasses.replace(jax.tree.map(fold, q), shape=tuple(shape), roles=roles)


def transpose(q: QuantArray, permutation: Sequence[int]) -> QuantArray | None:
    """The weight with its dims in another order; None where codes would have to move."""
    for role in "sio":
        # Dims of one role are stored as one: reordering them would move codes. Any other transpose
        # changes the labels only.
        order = [d for d in permutation if q.roles[d] == role]
        if order != sorted(order):
            return None
    shape = [q.shape[d] for d in permutation]
    return _relabelled(q, shape, "".join(q.roles[d] for d in permutation))


def reshape(q: QuantArray, shape: Sequence[int]) -> QuantArray | None:
    """The weight in another shape; None where dims of two roles would merge."""
    made = reshape_roles(q.shape, q.roles, shape)
    if any(len(roles) > 1 for roles in made):
        return None
    return _relabelled(q, shape, "".join(next(iter(roles), "u") for roles in made))


def squeeze(q: QuantArray, dims: Sequence[int]) -> QuantArray:
    """The weight without some unit dims."""
    kept = [d for d in range(q.ndim) if d not in dims]
    return _relabelled(q, [q.shape[d] for d in kept], "".join(q.roles[d] for d in kept))


def broadcast_in_dim(q: QuantArray, shape: Sequence[int], dims: Sequence[int]) -> QuantArray | None:
    """Adds unit dims; None for any other broadcast."""
    roles = ["u"] * len(shape)
    for old, new in enumerate(dims):
        roles[new] = q.roles[old]
    if any(shape[new] != (1 if new not in dims else q.shape[list(dims).index(new)])
           for new in range(len(shape))):  # fmt: skip
        return None
    return _relabelled(q, shape, "".join(roles))


def _along_stack(
    q: QuantArray, sizes: Sequence[int], cut: Callable[[Array, list[int]], Array]
) -> QuantArray | None:
    """Cuts the stack dims of every array; None if another dim would be cut.

    Args:
      q: the weight.
      sizes: of the result.
      cut: `f(array, the weight's stack dims, which lead in the array) -> array`.
    """
    stack = stack_dims(q.roles)
    if any(sizes[d] != q.shape[d] for d in range(q.ndim) if d not in stack):
        return None
    cuts = jax.tree.map(lambda x: cut(x, stack), q)
    return dataclasses.replace(cuts, shape=tuple(sizes))


def slice(
    q: QuantArray, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None
) -> QuantArray | None:
    """Some matrices of a stack; None where another dim is cut."""
    steps = strides or (1,) * q.ndim
    sizes = [-(-(b - a) // s) for a, b, s in zip(starts, limits, steps, strict=True)]

    def cut(x: Array, stack: list[int]) -> Array:
        rest = x.shape[len(stack) :]
        return lax.slice(
            x,
            [*(starts[d] for d in stack), *(0 for _ in rest)],
            [*(limits[d] for d in stack), *rest],
            [*(steps[d] for d in stack), *(1 for _ in rest)],
        )

    return _along_stack(q, sizes, cut)


def dynamic_slice(
    q: QuantArray, starts: Sequence[Array], sizes: Sequence[int]
) -> QuantArray | None:
    """As `slice`, from starts that are data."""

    def cut(x: Array, stack: list[int]) -> Array:
        if not stack:
            return x
        rest = x.shape[len(stack) :]
        zero = jnp.zeros_like(starts[0])
        # `lax.dynamic_slice` needs all starts in one dtype.
        where = [starts[d].astype(zero.dtype) for d in stack]
        return lax.dynamic_slice(
            x, [*where, *(zero for _ in rest)], [*(sizes[d] for d in stack), *rest]
        )

    return _along_stack(q, sizes, cut)


def first_index(q: QuantArray) -> QuantArray:
    """The weight in one step of a scan over its first dim, a stack dim; its arrays are sliced."""
    return dataclasses.replace(q, shape=q.shape[1:], roles=q.roles[1:])


def with_stack(q: QuantArray, count: int) -> QuantArray:
    """The inverse of `first_index`, for arrays that have the leading dim again."""
    return dataclasses.replace(q, shape=(count, *q.shape), roles="s" + q.roles)
