"""Which dims of an operand each dim of an operation's result is made of.

The functions of `(eqn, k)` fill the `DimFlow` of a primitive's row; `k` is the operand's number.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lora_jax.dims import reshape_groups
from lora_jax.transform.primitive import DimFlow, Dims

Map = list[tuple[int, ...]]  # for each dim of one result, the operand's dims it is made of


def _shape(eqn: Any, k: int) -> tuple[int, ...]:
    return tuple(getattr(eqn.invars[k].aval, "shape", ()))


def _identity(rank: int) -> Map:
    return [(d,) for d in range(rank)]


def never(eqn: Any, k: int) -> bool:
    return False


def always(eqn: Any, k: int) -> bool:
    return True


def is_first(eqn: Any, k: int) -> bool:
    return k == 0


def nothing(eqn: Any, k: int) -> None:
    return None


def no_dims(eqn: Any, k: int) -> tuple:
    return ()


def same_shape(eqn: Any, k: int) -> list[Map] | None:
    """Every result has the operand's dims, as of an elementwise operation; those of size 1 grow.

    A dim that grows holds copies: it is made of no dim.
    """
    shape = _shape(eqn, k)
    maps = []
    for v in eqn.outvars:
        after = tuple(getattr(v.aval, "shape", ()))
        if len(after) != len(shape) or any(
            n not in (1, m) for n, m in zip(shape, after, strict=True)
        ):
            return None
        maps.append([(d,) if shape[d] == n else () for d, n in enumerate(after)])
    return maps


def same_rank(eqn: Any, k: int) -> list[Map] | None:
    """Every result has the operand's dims in their order, whatever happens to their sizes."""
    rank = len(_shape(eqn, k))
    if any(len(getattr(v.aval, "shape", ())) != rank for v in eqn.outvars):
        return None
    return [_identity(rank) for _ in eqn.outvars]


def of_first(dim_map: Callable[[Any, tuple], list[Map] | None]) -> Callable:
    """`dim_map(eqn, shape)` for the first operand; the others are indices."""
    return lambda eqn, k: dim_map(eqn, _shape(eqn, 0)) if k == 0 else None


def reduced(eqn: Any, k: int) -> list[Map]:
    axes = set(eqn.params["axes"])
    return [[(d,) for d in range(len(_shape(eqn, k))) if d not in axes]]


def stacked(eqn: Any, k: int) -> list[Map]:
    # The new axis is made of no dim of the operand.
    axis, dims = eqn.params["axis"], _identity(len(_shape(eqn, k)))
    return [[*dims[:axis], (), *dims[axis:]]]


def transposed(eqn: Any, shape: tuple) -> list[Map]:
    return [[(d,) for d in eqn.params["permutation"]]]


def reshaped(eqn: Any, shape: tuple) -> list[Map] | None:
    new_shape = eqn.params["new_sizes"]
    if 0 in shape or eqn.params.get("dimensions") is not None:
        return None
    # Runs of dims with equal products: within a run every new dim is made of all old ones.
    # Dims of size 1 are left out: they may be anywhere, and are made of nothing.
    old = [d for d, n in enumerate(shape) if n != 1]
    new = [d for d, n in enumerate(new_shape) if n != 1]
    out: Map = [()] * len(new_shape)
    for left, right in reshape_groups([shape[d] for d in old], [new_shape[d] for d in new]):
        for j in right:
            out[new[j]] = tuple(old[i] for i in left)
    return [out]


def broadcast(eqn: Any, shape: tuple) -> list[Map]:
    # A new dim, and one of size 1 that grows, holds copies: it is made of no dim.
    after = eqn.params["shape"]
    out: Map = [()] * len(after)
    for d, new in enumerate(eqn.params["broadcast_dimensions"]):
        out[new] = (d,) if shape[d] == after[new] else ()
    return [out]


def gathered(eqn: Any, shape: tuple) -> list[Map]:
    numbers = eqn.params["dimension_numbers"]
    # Offset axes have the dims that are not collapsed, in their order; index axes the indexed, or
    # the dim that is batched with them.
    batched = numbers.operand_batching_dims
    gone = {*numbers.collapsed_slice_dims, *batched}
    survive = iter([d for d in range(len(shape)) if d not in gone])
    beside = dict(zip(numbers.start_indices_batching_dims, batched, strict=True))
    picked = tuple(indexed_dims(eqn))
    index_axes = iter(range(len(eqn.outvars[0].aval.shape)))

    def source(axis: int) -> tuple[int, ...]:
        if axis in numbers.offset_dims:
            return (next(survive),)
        other = beside.get(next(index_axes))
        return picked if other is None else (other,)

    return [[source(axis) for axis in range(len(eqn.outvars[0].aval.shape))]]


def written(eqn: Any, k: int) -> list[Map] | None:
    """Of a write at indices: the dims of what is written into, or of what is written."""
    if k != 2:
        return same_shape(eqn, k)
    numbers, rank = eqn.params["dimension_numbers"], len(_shape(eqn, 0))
    rows = tuple(d for d in range(len(_shape(eqn, 2))) if d not in numbers.update_window_dims)
    # One row alone has no dim that its place could be made of.
    if numbers.operand_batching_dims or (numbers.inserted_window_dims and not rows):
        return None
    windows = iter(numbers.update_window_dims)
    return [[rows if d in numbers.inserted_window_dims else (next(windows),) for d in range(rank)]]


def squeezed(eqn: Any, shape: tuple) -> list[Map]:
    gone = {d % len(shape) for d in eqn.params["dimensions"]}
    return [[(d,) for d in range(len(shape)) if d not in gone]]


def unstacked(eqn: Any, shape: tuple) -> list[Map]:
    axis = eqn.params["axis"]
    return [[(d,) for d in range(len(shape)) if d != axis] for _ in eqn.outvars]


def sliced(eqn: Any, shape: tuple) -> list[Map]:
    return [_identity(len(shape)) for _ in eqn.outvars]


def dot_axes(eqn: Any, k: int) -> tuple | None:
    contracting, batching = eqn.params["dimension_numbers"]
    return contracting[k], batching[k]


def multiplied(eqn: Any, k: int) -> list[Map] | None:
    """Of a product that sums nothing, such as of a weight and its scales: the operand's dims."""
    contracting, batching = eqn.params["dimension_numbers"]
    if contracting[k]:
        return None
    sides: Map = []
    for side in (0, 1):
        free = [d for d in range(len(_shape(eqn, side))) if d not in batching[side]]
        sides += [(d,) * (side == k) for d in free]
    return [[*((d,) for d in batching[k]), *sides]]


def ragged_axes(eqn: Any, k: int) -> tuple | None:
    if k != 1:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batching = numbers.dot_dimension_numbers
    # One weight a group, as one a batch entry: the plan makes both a stack dim.
    return contracting[1], (*batching[1], *numbers.rhs_group_dimensions)


def kernel_axes(eqn: Any, k: int) -> tuple | None:
    # rhs_spec is (out channels, in channels, *window): all but the first are summed over.
    return (eqn.params["dimension_numbers"].rhs_spec[1:], ()) if k == 1 else None


def cut_to_one(eqn: Any, k: int) -> list[int]:
    """The dims of which a slice leaves one index."""
    if k != 0:
        return []
    before, after = _shape(eqn, 0), eqn.outvars[0].aval.shape
    return [d for d in range(len(before)) if after[d] == 1 != before[d]]


def unstacked_axis(eqn: Any, k: int) -> list[int]:
    return [eqn.params["axis"]]


def indexed(eqn: Any, k: int) -> list[int]:
    return indexed_dims(eqn) if k == 0 else []


def indexed_dims(eqn: Any) -> list[int]:
    """The dims of which a gather takes a part; others may have an index, which can only be 0."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    return [d for d in eqn.params["dimension_numbers"].start_index_map if sizes[d] != shape[d]]


def permutes(eqn: Any, dim_map: Sequence) -> bool:
    """Whether rows that constant indices choose are still rows of a matrix, and not its layers.

    Layers and experts are on the first dim, with a matrix behind it.
    """
    shape, rows = eqn.invars[0].aval.shape, set(indexed_dims(eqn))
    # A matrix has one long dim besides the indexed one; a stack of matrices has two.
    others = [d for d, n in enumerate(shape) if n > 1 and d not in rows]
    kept = {d for group in dim_map for d in group}
    return rows <= kept and (0 not in rows or len(others) < 2)


def scales(eqn: Any, k: int) -> bool:
    """Whether a product multiplies operand `k` by a number, or a matrix by a vector of gains.

    The gains may differ along dims that the matrix does not have, such as from example to example.
    """
    pairs = _paired(eqn, k)
    if all(other == 1 for _, other in pairs):
        return True
    # A matrix times a vector of gains stays a matrix; two matrices mask one another.
    large = [other > 1 for own, other in pairs if own > 1]
    return len(large) > 1 and sum(large) < 2


def spreads(eqn: Any, k: int) -> bool:
    """Whether a product gives operand `k` a dim that it does not have, as gains of examples do."""
    return any(own == 1 < other for own, other in _paired(eqn, k))


def _paired(eqn: Any, k: int) -> list[tuple[int, int]]:
    """Of each dim of an elementwise product, the size in operand `k` and in the other one."""
    own, other = _shape(eqn, k), _shape(eqn, 1 - k)
    if "dimension_numbers" not in eqn.params:
        return list(zip(own, other, strict=False))
    batch = eqn.params["dimension_numbers"][1]
    mine = [(n, 1) for d, n in enumerate(own) if d not in batch[k]]
    theirs = [(1, n) for d, n in enumerate(other) if d not in batch[1 - k]]
    return [*((own[d], own[d]) for d in batch[k]), *mine, *theirs]


def is_scaled(eqn: Any, k: int) -> bool:
    """As `scales`, for a quotient: a weight in the denominator is not scaled."""
    return k == 0 and scales(eqn, k)


# An operation that the dataflow follows where its result has the operand's shape.
SAME_SHAPE = DimFlow(
    maps=same_shape,
    contracted=nothing,
    picked=no_dims,
    keeps_rows=never,
    takes_data=never,
    pairwise=False,
)
# An operation after which no dim of an operand can be recognised.
MIXED = SAME_SHAPE._replace(maps=nothing)
# The same numbers in the same places: a copy, a cast, a sign.
UNCHANGED = SAME_SHAPE._replace(keeps_rows=always)
PAIRWISE = UNCHANGED._replace(pairwise=True)
SCALED = SAME_SHAPE._replace(keeps_rows=scales, takes_data=scales)
DIVIDED = SAME_SHAPE._replace(keeps_rows=is_scaled, takes_data=is_scaled)
WRITTEN = SAME_SHAPE._replace(maps=written)
REDUCED = SAME_SHAPE._replace(maps=reduced)
SAME_RANK = SAME_SHAPE._replace(maps=same_rank)


def rearranged(dim_map: Callable[[Any, tuple], list[Map] | None]) -> DimFlow:
    """The flow of an operation that only rearranges its first operand."""
    return UNCHANGED._replace(maps=of_first(dim_map))


def transformed(eqn: Any, k: int, dims: Sequence[frozenset]) -> Dims:
    """Dims of a weight after a constant matrix: the matrix's own come from those it sums over."""
    contracting, batching = eqn.params["dimension_numbers"]
    # The result's new dims stand in the place of those that were summed.
    summed = frozenset().union(*(dims[d] for d in contracting[k]))
    sides = []
    for side in (0, 1):
        taken = {*contracting[side], *batching[side]}
        free = [d for d in range(len(eqn.invars[side].aval.shape)) if d not in taken]
        # `k` is the weight: its free dims stay what they are.
        sides.append([dims[d] for d in free] if side == k else [summed for _ in free])
    return (*(dims[d] for d in batching[k]), *sides[0], *sides[1])


def window_axes(eqn: Any) -> tuple[int, ...]:
    """The spatial axes of a convolution's kernel, in the convolution's order."""
    return tuple(eqn.params["dimension_numbers"].rhs_spec[2:])


def through(dims: Dims, mapped: Iterable[Sequence[int]]) -> Dims:
    """The dims after an operation whose result's dims are made of its operand's as in `mapped`."""
    return tuple(frozenset().union(*(dims[i] for i in group)) for group in mapped)


def whole(dims: Dims, axes: Sequence[int]) -> frozenset:
    """The leaf's dims that the current dims `axes` are all of: not a part, as after a split."""
    rest = frozenset().union(*(d for i, d in enumerate(dims) if i not in axes))
    return frozenset().union(*(dims[i] for i in axes)) - rest
