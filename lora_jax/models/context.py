"""Attention in rows whose tokens are spread over devices: the axis `context` of a mesh.

Every device has the queries of its own tokens, and each layer gathers the keys and values of whole
rows; backward, their gradients are summed and scattered. With T tokens in a row, K key heads of
size H and n devices, a device receives 2·T·K·H·(n-1)/n numbers of each row in a layer: forward, for
the repetition of the block, and backward.

Source: Dubey et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.3.2: with few
key heads to gather, it costs less than passing them around a ring.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lora_jax.dims import AnyArray
from lora_jax.models.kernels import in_place, spread
from lora_jax.models.sharding import check_length


def over_tokens(
    mix: Callable[..., Array],
    q: Float[Array, "b t n hq"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    *others: AnyArray | None,
    axis: str | None,
) -> Float[Array, "b t n h"]:
    """`mix(q, k, v, first, *others)` of each device's queries with the keys of whole rows.

    Args:
      mix: attention of queries of which the first stands at `first` in its row.
      q, k, v: of all tokens; inside of a `shard_map` over the axis, of a device's own.
      others: masks and the like, (b, s) of whole rows, or None.
      axis: the axis of the mesh that tokens are spread over; None computes whole rows.
    """
    if axis is None:
        return mix(q, k, v, 0, *others)

    def own(q: Array, k: Array, v: Array, *others: Any) -> Array:
        keys, values = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))
        return mix(q, keys, values, lax.axis_index(axis) * q.shape[1], *others)

    mesh = jax.sharding.get_abstract_mesh()
    if axis in mesh.manual_axes:
        return own(q, k, v, *others)
    rows, heads = spread(mesh, q.shape[0], k.shape[2])
    apart, whole = PartitionSpec(rows, axis, heads), PartitionSpec(rows)
    mixed = jax.shard_map(
        own,
        in_specs=(apart,) * 3 + tuple(None if x is None else whole for x in others),
        out_specs=apart,
        # Of all axes: XLA would gather the rows and heads that it partitions by itself.
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(q, k, v, *others)
    return in_place(mixed, q)


def of_whole_rows(x: Any, axis: str | None) -> Any:
    """Tokens, a mask or the like, (b, t), of whole rows, which it is outside of a `shard_map`."""
    if x is None or axis not in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    return lax.all_gather(x, axis, axis=1, tiled=True)


def of_own_tokens(x: Array, axis: str | None) -> Array:
    """Of whole rows, (b, s), a device's own part inside of a `shard_map`, and all of it outside."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.manual_axes:
        return x
    size = x.shape[1] // mesh.shape[axis]
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, axis=1)


def check_tokens(count: int, axis: str | None) -> None:
    """Checks that a row of so many tokens can be spread over an axis of the context's mesh.

    Raises:
      ValueError: there is no such axis, or it does not divide the tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axis is None or axis in mesh.manual_axes:
        return
    if axis not in mesh.shape:
        raise ValueError(
            f'`forward.tokens` is "{axis}", an axis that the mesh of the context does not have: '
            "call under jax.set_mesh(mesh)"
        )
    check_length("tokens", count, mesh.shape[axis])
