"""The rule of `gather` for a table with many adapters: rows of an embedding by index."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.dims import checked_index
from lora_jax.transform import base_weight
from lora_jax.transform.implicit import Implicit, Unsupported, has_many, wide_dtype
from lora_jax.transform.many.rules import axis_of_tokens, one_for_row, own_product
from lora_jax.transform.origins import DATA, origin_of
from lora_jax.transform.primitive import Rule, binder


def gather(context: Any, eqn: Any, values: list, rule: Rule) -> Any:
    """A lookup in a table with many adapters."""
    v, indices = values
    if not has_many(v):
        raise Unsupported("a weight used as indices")
    if origin_of(context.origins, eqn.invars[1]) != DATA:
        return one_for_row("its rows are chosen by constants")(context, eqn, values, rule)
    if not _is_lookup(v, indices, eqn.params):
        reason = "it is no lookup of rows or columns of a table"
        return one_for_row(reason)(context, eqn, values, rule)
    if v.bias is not None:
        raise Unsupported("lookup of a weight whose adapter has a bias")
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    token = axis_of_tokens(context, v, eqn, operand=1, among=range(indices.ndim - 1))
    adapters = context.row_adapters
    (d,), (axis,) = numbers.start_index_map, numbers.offset_dims
    base = base_weight.rows(
        v,
        indices,
        binder(eqn),
        dimension_numbers=numbers,
        slice_sizes=sizes,
        mode=eqn.params["mode"],
        fill_value=eqn.params["fill_value"],
    )
    index = _index(indices[..., 0], v.shape[d], eqn.params["mode"])
    if token is not None:
        index = jnp.moveaxis(index, token, 0)
    which = checked_index(adapters.ids, v.adapter_count)
    # One adapter index for each looked-up row: of the batch's row, or of the token.
    which = lax.broadcast_in_dim(which, index.shape, tuple(range(which.ndim)))
    at_a = v.roles[d] == "i"
    # (adapters, rows, r): the factor that has the looked-up rows; (adapters, r, n): the other.
    table = v.a if at_a else jnp.swapaxes(v.b, 1, 2)
    other = v.b if at_a else jnp.swapaxes(v.a, 1, 2)
    rows = table.at[which, index].get(mode="fill", fill_value=0)
    wide = wide_dtype(v.a.dtype)
    x = rows.reshape(adapters.ids.size, -1, v.rank)
    form = (lax.Precision.HIGHEST, wide, wide, wide)
    change = own_product(adapters, v, x, factors=(other,), scale=v.scale, dtypes=form).reshape(
        *index.shape, -1
    )

    def placed(y: Any) -> Array:
        return y if token is None else jnp.moveaxis(y, 0, token)

    y = base + jnp.moveaxis(placed(change), -1, axis).astype(base.dtype)
    if v.gain is None:
        return y
    # DoRA's gain is over the outputs: one vector for each adapter where rows are inputs, else the
    # looked-up outputs' own numbers.
    if at_a:
        gain = placed(v.gain.at[which].get(mode="fill", fill_value=1))
        gain = jnp.moveaxis(gain, -1, axis)
    else:
        gain = jnp.expand_dims(placed(v.gain.at[which, index].get(mode="fill", fill_value=1)), axis)
    return y * gain.astype(y.dtype)


def _is_lookup(v: Implicit, indices: Any, params: dict) -> bool:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    where = tuple(numbers.start_index_map)
    return (
        sorted(v.roles) == ["i", "o"]
        and len(where) == 1
        and tuple(numbers.collapsed_slice_dims) == where
        and not numbers.operand_batching_dims
        and sizes[1 - where[0]] == v.shape[1 - where[0]]
        and indices.shape[-1] == 1
    )


def _index(index: jax.Array, size: int, mode: lax.GatherScatterMode) -> jax.Array:
    """Indices, those out of range made one beyond the last, or clipped: as `mode` has it."""
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        return checked_index(index, size)
    return jnp.clip(index, 0, size - 1)
