"""Low-rank products of elements that each have an adapter of their own, sorted by adapter.

    y[e] = (x[e] · A[id[e]]) · B[id[e]] · scale[id[e]]          e: a row of a batch, or a token

Nothing of size elements x factors is made. The elements are sorted by adapter, the plain base's
last, and multiplied group by group, in one of two forms:

- `tiles`: every group is filled up to whole tiles of a few elements, each tile is one entry of a
  batched product with its adapter's factors. There are at most `e // size + min(adapters, e)`
  tiles.
- `ragged`: `jax.lax.ragged_dot`, which takes the groups as they are. TPUs have an instruction for
  it. XLA:CPU (and by default XLA:GPU) expands it to a product with every adapter, and keeps a copy
  of the activations for each: 8 adapters cost 8 times the work. There it runs
  only if the caller chooses it.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, custom_batching, lax

from lora_jax import compat
from lora_jax.dims import checked_index

# "gathered": factors copied for every element; "grouped": elements sorted by adapter, in tiles;
# "ragged": sorted, multiplied by `ragged_dot`.
Strategy = Literal["gathered", "grouped", "ragged"]

# Where `ragged_dot` is one operation; elsewhere groups are products of tiles.
_RAGGED = frozenset({"tpu"})
# The rank a tile's size is reckoned for: small, since a larger one only makes tiles cheaper.
_USUAL_RANK = 8


class Groups(NamedTuple):
    """Elements sorted by adapter.

    Attributes:
      which: (e,) each element's adapter index; for the plain base the number of adapters.
      order: (e,) the element at each sorted place.
      place: (e,) each element's sorted place.
      sizes: (adapters + 1,) elements of each adapter, the plain base's last.
    """

    which: Any
    order: Any
    place: Any
    sizes: Any


class Form(NamedTuple):
    """What is static about a product.

    Attributes:
      precision: as in `lax.dot_general`.
      compute, wide, result: dtypes of the operands, of what is between the products, of `y`.
      strategy: how the elements meet their factors.
      reverse_only: whether moving elements has a backward of its own (no forward mode).
    """

    precision: Any
    compute: Any
    wide: Any
    result: Any
    strategy: Strategy
    reverse_only: bool


def sort(ids: Any, count: int) -> Groups:
    """Sorts elements by adapter.

    Args:
      ids: int (e,); a number that is no adapter's index is the plain base.
      count: how many adapters there are.
    """
    which = checked_index(ids, count).astype(jnp.int32)
    # Stable: elements of one adapter keep their order, so results do not depend on the sort.
    order = jnp.argsort(which, stable=True).astype(jnp.int32)
    numbers = jnp.arange(which.shape[0], dtype=jnp.int32)
    # The inverse permutation.
    place = jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)
    return Groups(which, order, place, jnp.bincount(which, length=count + 1).astype(jnp.int32))


def tile_size(elements: int, count: int) -> int:
    """How many elements of one adapter are multiplied together, a power of two.

    A tile of `T` elements reads its adapter's factors once, and each adapter's last tile is filled
    up with less than `T` elements: `r · e / T + T · adapters` numbers for each input, least at
    `T = √(r · e / adapters)`.
    """
    best = (_USUAL_RANK * elements / min(count, elements)) ** 0.5
    # A power of two, so that a few sizes serve all batches; 1.5 rounds to the nearer one.
    size = 1
    while size * 2 <= min(best * 1.5, elements):
        size *= 2
    return size


def tile_count(elements: int, count: int) -> int:
    """How many tiles there are at most."""
    return elements // tile_size(elements, count) + min(count, elements)


def choose_strategy(elements: int, positions: int, count: int, rank: int) -> Strategy:
    """The cheaper strategy, by the numbers that are moved for each input of a weight.

    Gathering copies `rank` numbers for each element. Sorting copies the element's own
    `positions` there and back (reckoned once: reading it is common to both) and the factors of
    every tile: it pays where few adapters serve many elements of few positions each, as in
    decoding with fewer adapters than rows, or with one adapter for each token. A row of a training
    batch or a prompt has more tokens than the rank: there gathering costs next to nothing.
    `benchmarks/multi_adapter.py --strategies` measures both; CPU and GPU follow the same rule.

    Args:
      elements: rows, or tokens of all rows where each has its own adapter.
      positions: of an element: the tokens of a row; 1 for a token.
      count: adapters in the stack.
      rank: of the stack.

    Returns:
      "gathered" or "grouped".
    """
    moved = positions + rank * tile_count(elements, count) / elements
    return "grouped" if moved < rank else "gathered"


def on_device(strategy: Strategy) -> Strategy:
    """The strategy on the default device: "grouped" is `ragged_dot` where that is native."""
    native = jax.default_backend() in _RAGGED
    return "ragged" if strategy == "grouped" and native else strategy


def product(form: Form, x: Any, ids: Any, factors: tuple, scale: Any, groups: Groups) -> Array:
    """`x · factors[0][id] · factors[1][id] · scale[id]`, element by element.

    Inside a `jax.vmap` over rows the elements of all rows are multiplied together: `groups` sorts
    them, the first row's before the second's.

    Args:
      form: static.
      x: (e, positions, k).
      ids: int (e,); a number that is no adapter's index is the plain base and gives 0.
      factors: one or two stacks (adapters, k, r), (adapters, r, n).
      scale: (adapters,).
      groups: of the elements of all rows.

    Returns:
      (e, positions, n) in `form.result`.
    """

    @custom_batching.custom_vmap
    def one_row(x: Any, ids: Any, factors: tuple, scale: Any, groups: Groups) -> Array:
        return _each(form, x, ids, factors=factors, scale=scale)

    @one_row.def_vmap
    def all_rows(
        rows: int, batched: Any, x: Any, ids: Any, factors: tuple, scale: Any, groups: Groups
    ) -> Any:
        if any(jax.tree.leaves(batched[2:])):  # the stack itself differs between rows
            # Then there are no shared groups to sort by.
            axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched[:4]))
            run = jax.vmap(functools.partial(_each, form), in_axes=axes)
            return run(x, ids, factors, scale), True
        # A batch of one row is not mapped: the same elements for all.
        wide = [
            y if mapped else jnp.broadcast_to(y, (rows, *y.shape))
            for y, mapped in zip((x, ids), batched, strict=False)
        ]
        # (rows, e, …) to (rows · e, …): the order that `groups` was made for.
        flat = [y.reshape(-1, *y.shape[2:]) for y in wide]
        if form.strategy == "gathered":
            y = _each(form, flat[0], flat[1], factors=factors, scale=scale)
        else:
            run = _by_ragged if form.strategy == "ragged" else _by_tiles
            y = run(form, flat[0], factors=factors, scale=scale, groups=groups)
        return y.reshape(*wide[1].shape, *y.shape[1:]), True

    return one_row(x, ids, factors=factors, scale=scale, groups=groups)


def nan_outside(ids: jax.Array, count: int) -> jax.Array:
    """NaN for ids that are neither an adapter index nor -1 (the plain base), else 0.

    Traced ids cannot be checked; adding this to a result makes a wrong id visible in its own row.
    """
    return jnp.where((ids < -1) | (ids >= count), jnp.nan, 0.0)


def take_adapters(array: jax.Array, where: jax.Array, axis: int, fill: float = 0) -> jax.Array:
    """Adapters of a stack by index; an index out of range gives `fill`.

    An adapter is taken as one long run: XLA:CPU gathers number by number in a loop over the last
    dim, and over a last dim of the rank's size (8) it takes three times as long.
    """
    shape = array.shape
    # Dims that lie over explicit mesh axes do not merge.
    whole = compat.spec_of(array) is not None
    runs = array if whole else array.reshape(*shape[: axis + 1], -1)
    taken = jnp.take(runs, where, axis=axis, mode="fill", fill_value=fill)
    return taken.reshape(*shape[:axis], *where.shape, *shape[axis + 1 :])


def _each(form: Form, x: Any, ids: Any, factors: tuple, scale: Any) -> Array:
    """Every element with factors gathered for it."""
    which = checked_index(ids, scale.shape[0])
    chosen = [take_adapters(f, which, 0) for f in factors]
    return _steps(form, x, chosen, take_adapters(scale, which, 0))


def _steps(form: Form, x: Any, factors: Sequence, scale: Any) -> Array:
    """`x (n, p, k)` through factors `(n, k, r)`, `(n, r, m)`, the scale `(n,)` before the last."""
    y = x
    for number, factor in enumerate(factors, start=1):
        last = number == len(factors)
        # On the thin array of width r, in float32: the cheapest place, and no bits are lost.
        if last:
            y = y.astype(form.wide) * scale[:, None, None].astype(form.wide)
        y = lax.dot_general(
            y.astype(form.compute),
            factor.astype(form.compute),
            (((2,), (1,)), ((0,), (0,))),
            precision=form.precision,
            preferred_element_type=form.result if last else form.wide,
        )
    return y


def _by_tiles(form: Form, x: Any, factors: tuple, scale: Any, groups: Groups) -> Array:
    elements, positions, width = x.shape
    count = scale.shape[0]
    size = tile_size(elements, count)
    # (tiles,), (tiles · size,) and (elements,).
    owner, source, target = _tiles(groups, count, size)
    tiles = move(x, source, target, form.reverse_only)
    # (tiles, elements of a tile · positions, k), one adapter a tile.
    tiles = tiles.reshape(owner.shape[0], size * positions, width)
    y = _steps(form, tiles, [f[owner] for f in factors], scale[owner])
    y = y.reshape(owner.shape[0] * size, positions, -1)
    return move(y, target, source, form.reverse_only)


def _tiles(groups: Groups, count: int, size: int) -> Any:
    """Each tile's adapter, the element at each of its places, and each element's place.

    Whatever is nowhere (the filling of a tile, an element of the plain base) has a number beyond
    the last.
    """
    elements = groups.which.shape[0]
    tiles = tile_count(elements, count)
    sizes = groups.sizes[:count]
    # Rounded up: the last tile of an adapter may be part filling.
    needed = -(-sizes // size)
    ends = jnp.cumsum(needed)
    # Tiles behind the last adapter's are all filling; any factors do for them.
    owner = jnp.searchsorted(ends, jnp.arange(tiles), side="right").clip(max=count - 1)
    # How far an adapter's elements move: its first tile's place less its first sorted place.
    first = (ends - needed) * size - (jnp.cumsum(sizes) - sizes)
    target = groups.place + jnp.take(first, groups.which, mode="clip")
    target = jnp.where(groups.which < count, target, tiles * size)
    numbers = jnp.arange(elements, dtype=jnp.int32)
    source = jnp.full(tiles * size, elements, jnp.int32)
    return owner, source.at[target].set(numbers, mode="drop", unique_indices=True), target


def _by_ragged(form: Form, x: Any, factors: tuple, scale: Any, groups: Groups) -> Array:
    elements, positions, width = x.shape
    count = scale.shape[0]
    # Rows of the flattened (elements · positions, k) for each group.
    sizes = groups.sizes[:count] * positions
    known = jnp.repeat(groups.which[groups.order] < count, positions)[:, None]
    y = move(x, groups.order, groups.place, form.reverse_only).reshape(-1, width)
    # What `ragged_dot` does with rows behind the last group is unspecified.
    y = jnp.where(known, y, 0)
    spread = jnp.repeat(jnp.take(scale, groups.which[groups.order], mode="clip"), positions)
    for number, factor in enumerate(factors, start=1):
        last = number == len(factors)
        if last:
            y = y.astype(form.wide) * spread[:, None].astype(form.wide)
        y = lax.ragged_dot(
            y.astype(form.compute),
            factor.astype(form.compute),
            sizes,
            precision=form.precision,
            preferred_element_type=form.result if last else form.wide,
        )
        y = jnp.where(known, y, 0)
    y = y.reshape(elements, positions, -1)
    return move(y, groups.place, groups.order, form.reverse_only)


def move(x: Any, source: Any, target: Any, reverse_only: bool) -> Array:
    """`x[source]`, 0 for a number beyond the last; `target` is where each of `x` went.

    Its transpose would scatter; for reverse mode alone it is the same gather the other way.
    """
    return (_moved if reverse_only else _take)(x, source, target)


def _take(x: Any, source: Any, target: Any) -> Array:
    del target
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0, unique_indices=True)


_moved = jax.custom_vjp(_take)
_moved.defvjp(
    lambda x, source, target: (_take(x, source, target), (source, target)),
    lambda saved, g: (_take(g, saved[1], saved[0]), None, None),
)
