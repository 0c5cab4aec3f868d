"""Products of tokens with the weights of their own experts, sorted by expert.

By `lax.ragged_dot` where that is one operation (TPU), elsewhere by tiles of rows of one expert,
because XLA makes of `ragged_dot` a dense product with all experts there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax import compat

# Backends on which `ragged_dot` is one operation.
_RAGGED = frozenset({"tpu"})


class Order(NamedTuple):
    """The rows `token · K + choice`, sorted by expert.

    Attributes:
      source: the row at each sorted place.
      place: the sorted place of each row.
      sizes: rows of each expert. What is left of the rows comes last: other devices' experts.
      count: of the experts that the rows are spread over, on all devices.
    """

    source: Int[Array, " rows"]
    place: Int[Array, " rows"]
    sizes: Int[Array, " e"]
    count: int


def sort_by_expert(experts: Int[Array, "m k"], count: int, *, own: int | None = None) -> Order:
    """Sorts the choices of all tokens by expert; those of one expert stay in their order.

    Args:
      experts: numbers of experts.
      count: of the experts on all devices.
      own: how many a device has; the choices of others, which have other numbers than 0 to
        `own` - 1, come last.
    """
    own = count if own is None else own
    flat = experts.reshape(-1)
    if own < count:
        flat = jnp.where((flat >= 0) & (flat < own), flat, own)
    source = jnp.argsort(flat, stable=True)
    return Order(source, jnp.argsort(source), jnp.bincount(flat, length=own), count)


def product(
    rows: Float[Array, "rows i"], weights: Float[Array, "e i o"], order: Order
) -> Float[Array, "rows o"]:
    """Each sorted row times its expert's weights; 0 for the experts of other devices."""
    return (ragged if jax.default_backend() in _RAGGED else tiled)(rows, weights, order)


def ragged(
    rows: Float[Array, "rows i"], weights: Float[Array, "e i o"], order: Order
) -> Float[Array, "rows o"]:
    """Each sorted row times its expert's weights, in one operation."""
    out = lax.ragged_dot(rows, weights, order.sizes)
    if weights.shape[0] == order.count:
        return out
    # What stands behind the last group of a grouped product is not defined.
    return jnp.where((jnp.arange(len(rows)) < order.sizes.sum())[:, None], out, 0)


def tiled(
    rows: Float[Array, "rows i"], weights: Float[Array, "e i o"], order: Order
) -> Float[Array, "rows o"]:
    """As `ragged`, a tile of rows of one expert at a time.

    Each expert's last tile is filled up with zeros, so that sizes do not depend on the choices.
    Where a device has some of the experts, it leaves out the tiles without a row.
    """
    count, experts = rows.shape[0], weights.shape[0]
    size = tile_size(count, order.count)
    tiles = tile_count(count, order.count, own=experts)
    needed = -(-order.sizes // size)  # tiles of each expert
    ends = jnp.cumsum(needed)
    # The last tiles may be no expert's: they hold zeros, and any weights do for them.
    owner = jnp.searchsorted(ends, jnp.arange(tiles), side="right").clip(max=experts - 1)
    # How far an expert's rows move: its first tile's place less its first sorted place.
    shift = (ends - needed) * size - (jnp.cumsum(order.sizes) - order.sizes)
    at = jnp.arange(count) + jnp.repeat(shift, order.sizes, total_repeat_length=count)
    skipped = None
    if experts < order.count:
        # Beyond the tiles: what is written there is dropped, what is read from there is 0.
        at = jnp.where(jnp.arange(count) < order.sizes.sum(), at, tiles * size + jnp.arange(count))
        # Where XLA spreads the product over more axes, all devices have to reach its collectives.
        if not compat.open_axes(jax.sharding.get_abstract_mesh()):
            skipped = jnp.arange(tiles) >= ends[-1]
    apart = jnp.zeros((tiles * size, rows.shape[1]), rows.dtype)
    apart = apart.at[at].set(rows, unique_indices=True, indices_are_sorted=True, mode="drop")
    out = _each_tile(apart.reshape(tiles, size, -1), owner, weights, skipped)
    return jnp.take(
        out.reshape(tiles * size, -1), at, axis=0, unique_indices=True, mode="fill", fill_value=0
    )


def _each_tile(
    tiles: Float[Array, "tiles rows i"],
    owner: Int[Array, " tiles"],
    weights: Float[Array, "e i o"],
    skipped: Bool[Array, " tiles"] | None,
) -> Float[Array, "tiles rows o"]:
    # One after another: all at once would copy the weights for each tile. The checkpoint keeps the
    # backward pass from holding those copies: it takes the expert's weights again.
    @jax.checkpoint
    def one(each: tuple[Array, Array, Array | None]) -> Array:
        x, expert, skip = each

        def product() -> Array:
            return x @ lax.dynamic_index_in_dim(weights, expert, keepdims=False)

        if skip is None:
            return product()
        return lax.cond(skip, lambda: jnp.zeros((len(x), weights.shape[2]), x.dtype), product)

    return lax.map(one, (tiles, owner, skipped))


def tile_size(rows: int, experts: int) -> int:
    """Rows of one tile: a quarter of an expert's share, in whole eights where there are enough.

    Each expert adds at most a tile of filling, so that a quarter is added to the work.
    """
    quarter = rows / experts / 4
    return 1 if quarter < 4 else min(256, 8 * max(1, round(quarter / 8)))


def tile_count(rows: int, experts: int, *, own: int | None = None) -> int:
    """How many tiles there are at most, whatever tokens choose, of a device's own experts."""
    return rows // tile_size(rows, experts) + min(rows, experts if own is None else own)
