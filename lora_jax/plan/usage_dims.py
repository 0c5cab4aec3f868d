"""Which dims of an operand each dim of an operation's output is made of."""

from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.dims import reshape_groups

Dims = tuple[frozenset, ...]  # for each current dim, the original dims it is made of

REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split()
)
# Operations that hold the number of dims and their order, whatever happens to the sizes.
_SAME_DIMS = frozenset("concatenate optimization_barrier rev pad tile".split())
_MIXING = frozenset("dot_general ragged_dot_general conv_general_dilated sort".split())
# Operations after which rows looked up by index are still rows of the table, not features.
_KEEPING = frozenset(
    "transpose reshape squeeze broadcast_in_dim convert_element_type slice dynamic_slice split "
    "unstack reshard neg sharding_constraint optimization_barrier copy copy_p stop_gradient name "
    "reduce_precision pvary device_put".split()
)


def dim_map(eqn, k: int, name: str):
    """For each output, for each of its dims, the dims of operand `k` it is made of; or None.

    Args:
      eqn: an equation.
      k: number of the operand.
      name: of the primitive.
    """
    shape = tuple(getattr(eqn.invars[k].aval, "shape", ()))
    if name == "stack":
        return _map_stack(eqn, shape)
    handler = _DIM_MAPS.get(name)
    if handler is not None:
        return None if k != 0 else handler(eqn, shape)
    if name in REDUCTIONS:
        axes = set(eqn.params["axes"])
        return [[(d,) for d in range(len(shape)) if d not in axes]]
    same = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
    if name in _MIXING:
        return None
    kept = name in _SAME_DIMS and all(len(s) == len(shape) for s in same)
    if kept or all(s == shape for s in same):
        return [[(d,) for d in range(len(shape))] for _ in same]
    return None


def _map_reshape(eqn, shape):
    new_shape = eqn.params["new_sizes"]
    if 0 in shape or eqn.params.get("dimensions") is not None:
        return None
    old = [d for d, n in enumerate(shape) if n != 1]
    new = [d for d, n in enumerate(new_shape) if n != 1]
    out: list[tuple] = [()] * len(new_shape)
    for left, right in reshape_groups([shape[d] for d in old], [new_shape[d] for d in new]):
        for j in right:
            out[new[j]] = tuple(old[i] for i in left)
    return [out]


def _map_broadcast(eqn, shape):
    out: list[tuple] = [()] * len(eqn.params["shape"])
    for d, new in enumerate(eqn.params["broadcast_dimensions"]):
        out[new] = (d,)
    return [out]


def _map_gather(eqn, shape):
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        return None
    survive = iter([d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims])
    rank = len(eqn.outvars[0].aval.shape)
    picked = tuple(indexed_dims(eqn))
    return [[(next(survive),) if i in numbers.offset_dims else picked for i in range(rank)]]


def _map_stack(eqn, shape):
    axis = eqn.params["axis"]
    dims: list[tuple] = [(d,) for d in range(len(shape))]
    return [[*dims[:axis], (), *dims[axis:]]]


def _map_squeeze(eqn, shape):
    gone = {d % len(shape) for d in eqn.params["dimensions"]}
    return [[(d,) for d in range(len(shape)) if d not in gone]]


def _map_unstack(eqn, shape):
    axis = eqn.params["axis"]
    return [[(d,) for d in range(len(shape)) if d != axis] for _ in eqn.outvars]


_DIM_MAPS: dict[str, Callable[[Any, tuple], Any]] = {
    "transpose": lambda eqn, shape: [[(d,) for d in eqn.params["permutation"]]],
    "reshape": _map_reshape,
    "broadcast_in_dim": _map_broadcast,
    "squeeze": _map_squeeze,
    "gather": _map_gather,
    "unstack": _map_unstack,
    "slice": lambda eqn, shape: [[(d,) for d in range(len(shape))]],
    "dynamic_slice": lambda eqn, shape: [[(d,) for d in range(len(shape))]],
    "split": lambda eqn, shape: [[(d,) for d in range(len(shape))]] * len(eqn.outvars),
}


def transformed(eqn, k: int, dims: Sequence[frozenset]) -> tuple:
    """Dims of a weight after a constant matrix: the matrix's own come from those it sums over."""
    contracting, batching = eqn.params["dimension_numbers"]
    summed = frozenset().union(*(dims[d] for d in contracting[k]))
    sides = []
    for side in (0, 1):
        taken = {*contracting[side], *batching[side]}
        free = [d for d in range(len(eqn.invars[side].aval.shape)) if d not in taken]
        sides.append([dims[d] for d in free] if side == k else [summed for _ in free])
    return (*(dims[d] for d in batching[k]), *sides[0], *sides[1])


def contraction(eqn, k: int, name: str):
    """The operand's (contracted, batched) axes if it can be a weight there, else None."""
    if name == "dot_general" and k < 2:
        contracting, batching = eqn.params["dimension_numbers"]
        return contracting[k], batching[k]
    if name == "ragged_dot_general" and k == 1:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        contracting, batching = numbers.dot_dimension_numbers
        return contracting[1], (*batching[1], *numbers.rhs_group_dimensions)
    if name == "conv_general_dilated" and k == 1:
        return eqn.params["dimension_numbers"].rhs_spec[1:], ()
    return None


def window_axes(eqn) -> tuple[int, ...]:
    """The spatial axes of a convolution's kernel, in the convolution's order."""
    return tuple(eqn.params["dimension_numbers"].rhs_spec[2:])


def picked_dims(eqn, k: int, name: str) -> list[int]:
    """Dims of which an operation takes one index at a time."""
    if k != 0:
        return []
    shape = eqn.invars[0].aval.shape
    if name in ("slice", "dynamic_slice", "split"):
        out = eqn.outvars[0].aval.shape
        return [d for d in range(len(shape)) if out[d] == 1 != shape[d]]
    if name == "gather":
        return indexed_dims(eqn)
    return [eqn.params["axis"]] if name == "unstack" else []


def indexed_dims(eqn) -> list[int]:
    """The dims of which a gather takes a part; others may have an index, which can only be 0."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    return [d for d in eqn.params["dimension_numbers"].start_index_map if sizes[d] != shape[d]]


def keeps(eqn, k: int, name: str) -> bool:
    """Whether rows looked up by index are rows still, after this operation."""
    if name in ("gather", "dynamic_slice", "slice"):
        return k == 0
    return name in _KEEPING or scales(eqn, k, name)


def scales(eqn, k: int, name: str) -> bool:
    """Whether the equation multiplies operand `k` by a number, or a matrix by a vector's gains."""
    if name not in ("mul", "div") or (name == "div" and k == 1):
        return False
    own, other = (tuple(eqn.invars[i].aval.shape) for i in (k, 1 - k))
    large = sum(n > 1 for n in other)
    return large == 0 or (large == 1 and sum(n > 1 for n in own) > 1)


def through(dims: Dims, mapped: Sequence) -> Dims:
    """The dims after an operation whose result's are made of its operand's as `mapped` says."""
    return tuple(frozenset().union(*(dims[i] for i in group)) for group in mapped)


def whole(dims: Dims, axes: Sequence[int]) -> frozenset:
    """The leaf's dims that the current dims `axes` are all of: not a part, as after a split."""
    rest = frozenset().union(*(d for i, d in enumerate(dims) if i not in axes))
    return frozenset().union(*(dims[i] for i in axes)) - rest
