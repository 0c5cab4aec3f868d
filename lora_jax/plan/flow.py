"""The facts that the dataflow keeps for each variable: how they join, and where dims came from."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lora_jax import compat
from lora_jax.array import Window
from lora_jax.plan.leaf import Use
from lora_jax.transform.dim_maps import whole, window_axes
from lora_jax.transform.primitive import Dims


@dataclasses.dataclass(frozen=True)
class Track:
    """A leaf followed through the operations that only rearrange it.

    Attributes:
      leaf: its index in the tree.
      dims: for each current dim, the leaf's own dims that it is made of.
      picked: the leaf's dims of which one index has been taken.
      lookup: the index, among the leaf's uses, of the gather that took rows of it; -1 for none.
      mapped: the leaf's dims that its first product with a constant matrix summed over.
      spread_by: the Fourier transform that it went through, by which a use that is no contraction
        is named: a product with what it makes of a filter scales no features.
      mixed: whether gains of each example multiplied it: only a contraction may follow.
    """

    leaf: int
    dims: Dims
    picked: frozenset = frozenset()
    lookup: int = -1
    mapped: frozenset = frozenset()
    spread_by: str = ""
    mixed: bool = False


@dataclasses.dataclass(frozen=True)
class Flow:
    """The facts about one variable of the jaxpr.

    Attributes:
      tracks: the leaves whose numbers it holds, rearranged.
      origin: for each dim of an activation, the `(leaf, dim, direct)` it came from; not `direct`
        once two activations have been multiplied.
      fed: 2 if it depends on the function's other arguments, 1 if only on constants that may be
        data, else 0.
      made: the leaves whose contractions led to it.
      live: the leaves that its gradient reaches.
    """

    tracks: tuple[Track, ...] = ()
    origin: Dims = ()
    fed: int = 0
    made: frozenset = frozenset()
    live: frozenset = frozenset()


def fed_by(flows: Sequence[Flow]) -> int:
    """The largest `fed` of several flows."""
    return max((f.fed for f in flows), default=0)


def joined(flows: Sequence[Flow]) -> Flow:
    """One flow with the facts of several: of branches, or of an operation's operands."""
    origins = [f.origin for f in flows if f.origin]
    origin: Dims = ()
    if origins and len({len(o) for o in origins}) == 1:
        origin = tuple(frozenset().union(*dims) for dims in zip(*origins, strict=True))
    return Flow(
        tuple(t for f in flows for t in f.tracks),
        origin=origin,
        fed=fed_by(flows),
        made=frozenset().union(*(f.made for f in flows)),
        live=frozenset().union(*(f.live for f in flows)),
    )


def peeled(flow: Flow) -> Flow:
    """An operand of a scan within one step: one index of its first dim is taken."""
    tracks = tuple(
        dataclasses.replace(t, dims=t.dims[1:], picked=t.picked | whole(t.dims, [0]))
        for t in flow.tracks
    )
    return dataclasses.replace(flow, tracks=tracks, origin=flow.origin[1:])


def restacked(flow: Flow) -> Flow:
    """A result of one step of a scan, stacked by the scan along a new first dim."""
    tracks = tuple(dataclasses.replace(t, dims=(t.picked, *t.dims)) for t in flow.tracks)
    origin = (frozenset(), *flow.origin) if flow.origin else ()
    return dataclasses.replace(flow, tracks=tracks, origin=origin)


@dataclasses.dataclass(frozen=True)
class Usage:
    """The uses of every leaf, and what later contractions reveal about earlier ones.

    Attributes:
      uses: of each leaf.
      rebatched: pairs (leaf, dim) that a later contraction treats as experts.
      inner: leaves whose results are contracted with another weight: no output heads.
      masks: for a leaf, the leaves that it is multiplied with element by element.
      scales: for a leaf of scales, the leaves whose elements they multiply.
      stopped: leaves that no gradient reaches, because the model calls `stop_gradient`.
      closed: whether no argument of the function is an array, so that the data is closed over.
      lines: source lines of the equations that the walk is inside of, innermost last.
    """

    uses: tuple[list[Use], ...]
    rebatched: set[tuple[int, int]]
    inner: set[int] = dataclasses.field(default_factory=set)
    masks: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    scales: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    stopped: set[int] = dataclasses.field(default_factory=set)
    closed: bool = False
    lines: list[str] = dataclasses.field(default_factory=lambda: ["unknown line"])

    def line(self, eqn: Any) -> str:
        return compat.source_line(eqn, self.lines[-1])


def free_dims(found: Usage, eqn: Any, flows: Sequence[Flow], rank: int) -> Dims:
    """Origins of a product's output dims; notes the weight dims that are expert axes."""
    contracting, batching = eqn.params["dimension_numbers"]
    # Operand `k` as the activation, the other as the weight.
    for k in (0, 1):
        if flows[k].origin and flows[1 - k].tracks:
            summed = [eqn.invars[k].aval.shape[axis] for axis in contracting[k]]
            if math.prod(summed) > 1:  # a scale multiplies and sums nothing
                _note_batched(found, flows[k].origin, batching[k])
            _note_summed(
                found,
                flows[k].origin,
                flows[1 - k],
                summed=contracting[k],
                own=contracting[1 - k],
            )
    # A product of two activations, as in attention, is no hidden layer of a weight.
    if not any(f.tracks for f in flows):
        flows = [dataclasses.replace(f, origin=_indirect(f.origin)) for f in flows]
    # `dot_general` returns the batch dims first, then the free dims of each operand.
    groups = [
        _dims_of(flows[0], axis) | _dims_of(flows[1], other)
        for axis, other in zip(*batching, strict=True)
    ]
    for k in (0, 1):
        taken = {*contracting[k], *batching[k]}
        free = [d for d in range(len(eqn.invars[k].aval.shape)) if d not in taken]
        groups += [_dims_of(flows[k], d) for d in free]
    return tuple(groups) if any(groups) and len(groups) == rank else ()


def _indirect(origin: Dims) -> Dims:
    """The same origins, marked as no longer direct."""
    return tuple(frozenset((leaf, d, False) for leaf, d, _ in dims) for dims in origin)


def _note_batched(found: Usage, origin: Dims, batched: Sequence[int]) -> None:
    """Notes an expert axis that a weight is batched over while it contracts something else.

    The axis must be a whole dim of the weight it came from: heads that a reshape has split off an
    out dim are only a part of one. And the dim must come before the in dim, as the axis of experts
    does; an axis of heads comes after it, `(in, heads, head_dim)`.
    """
    pairs = [{(leaf, d) for leaf, d, _ in dims} for dims in origin]
    # Dims that are also free or summed were split: they are not whole.
    rest = set().union(*(pair for axis, pair in enumerate(pairs) if axis not in batched))
    for leaf, d in set().union(*(pairs[axis] for axis in batched)) - rest:
        if d < min(_first_contracted(found, leaf), default=-1):
            found.rebatched.add((leaf, d))


def _first_contracted(found: Usage, leaf: int) -> frozenset:
    """The dims that a leaf's first contraction sums over."""
    return next((u.contracted for u in found.uses[leaf] if u.kind == "contract"), frozenset())


def _note_summed(
    found: Usage, origin: Dims, weight: Flow, *, summed: Sequence, own: Sequence
) -> None:
    """Notes an expert axis that is summed away together with the experts' hidden dim.

    In `btd,edf->btef` then `btef,efd->btd` only the layout distinguishes experts from heads: the
    expert axis comes before the first kernel's in dim, the hidden dim after it, and nothing mixes
    the activations in between, as attention does.

    Args:
      found: collects the axes, of both kernels.
      origin: of the activation's dims.
      weight: the second kernel.
      summed, own: the contracted dims of the activation and, in the same order, of the kernel.
    """
    for axis, dim in zip(summed, own, strict=True):
        for leaf, e, direct in origin[axis]:
            contracted = _first_contracted(found, leaf)
            after = [
                f
                for other in summed
                for same, f, straight in origin[other]
                if same == leaf and straight and other != axis
            ]
            if direct and contracted and after and e < min(contracted) < min(after):
                found.rebatched.add((leaf, e))
                found.rebatched.update((t.leaf, d) for t in weight.tracks for d in t.dims[dim])


def _dims_of(flow: Flow, axis: int) -> frozenset:
    """The origin of one dim of a variable, as a weight or as an activation."""
    own = frozenset((t.leaf, d, True) for t in flow.tracks for d in t.dims[axis])
    return own | (flow.origin[axis] if flow.origin else frozenset())


def note_masks(found: Usage, eqn: Any, flows: Sequence[Flow]) -> None:
    """Notes two weights that are multiplied element by element: one may be a mask, or scales.

    Of two matrices of one size either may be a mask. One that is smaller, and was broadcast, holds
    scales of the other, such as those of its blocks.
    """
    size = math.prod(eqn.outvars[0].aval.shape)
    matrices = [
        {t.leaf for t in flow.tracks if v.aval.size == size and _is_whole_matrix(v.aval.shape, t)}
        for v, flow in zip(eqn.invars, flows, strict=True)
    ]
    for k in (0, 1):
        smaller = {t.leaf for t in flows[1 - k].tracks} - matrices[1 - k]
        for one in matrices[k]:
            for other in matrices[1 - k] - {one}:
                found.masks.setdefault(one, set()).add(other)
            for other in smaller - {one}:
                found.scales.setdefault(other, set()).add(one)


def note_zero_points(found: Usage, eqn: Any, flows: Sequence[Flow]) -> None:
    """Notes a weight that shifts the blocks of another: it is broadcast along part of a dim."""
    for k in (0, 1):
        shape = eqn.invars[1 - k].aval.shape
        pairs = [(x, y) for x in flows[k].tracks for y in flows[1 - k].tracks if x.leaf != y.leaf]
        for one, other in pairs if shape else ():
            parts = [i for i, dims in enumerate(one.dims) if dims & _except(one.dims, i)]
            if any(shape[i] == 1 or not other.dims[i] for i in parts):
                found.scales.setdefault(other.leaf, set()).add(one.leaf)


def _except(dims: Dims, i: int) -> frozenset:
    """The leaf's dims that all but one of the current dims are made of."""
    return frozenset().union(*dims[:i], *dims[i + 1 :])


def _is_whole_matrix(shape: Sequence[int], track: Track) -> bool:
    """Whether no dim of a weight was broadcast, and two or more are longer than 1."""
    large = [dims for n, dims in zip(shape, track.dims, strict=True) if n > 1]
    return len(large) > 1 and all(large)


def is_constant_matrix(found: Usage, eqn: Any, k: int, track: Track) -> bool:
    """Whether a weight is combined with a constant of its shape, or written into a constant.

    A mask made outside the function counts like one made inside. Where no argument of the function
    is an array, an array that it closes over may be the data, and is no constant.
    """
    shape = eqn.invars[k].aval.shape
    of_one_shape = k == 2 or eqn.outvars[0].aval.shape == shape  # 2: what a scatter writes
    return not found.closed and of_one_shape and _is_whole_matrix(shape, track)


def are_vectors(found: Usage, eqn: Any, k: int, track: Track) -> bool:
    """Whether looked-up rows are vectors: those of a table, and not the matrices of experts.

    They may be summed by weights, as in a bag of words, or contracted with features, as items are
    with a user.
    """
    rows = found.uses[track.leaf][track.lookup].contracted
    shape = eqn.invars[k].aval.shape
    return sum(n > 1 and not dims <= rows for n, dims in zip(shape, track.dims, strict=True)) < 2


def parted(eqn: Any, k: int, track: Track, axes: tuple) -> frozenset:
    """Out dims of which a slice took one index: the first output alone, or an array that is rolled.

    An index of layers leaves no dim, and a matrix behind it.
    """
    free = [i for i in range(len(track.dims)) if i not in (*axes[0], *axes[1])]
    shape = eqn.invars[k].aval.shape
    if any(shape[i] > 1 and not track.dims[i] <= track.picked for i in free):
        return frozenset()
    return frozenset().union(*(track.dims[i] for i in free)) & track.picked


def is_chosen(eqn: Any, flows: Sequence[Flow], track: Track) -> bool:
    """Whether data chooses between a weight and the weight itself: `vmap` of a `switch` does."""
    return compat.name_of(eqn) == "select_n" and all(track in f.tracks for f in flows[1:])


def flat_size(eqn: Any, k: int, track: Track, summed: Sequence[int]) -> int:
    """The size of a weight one dim of which is summed over in part, else 0."""
    gone = frozenset().union(*(track.dims[i] for i in summed))
    left = frozenset().union(*(d for i, d in enumerate(track.dims) if i not in summed))
    return eqn.invars[k].aval.size if gone & left else 0


def is_gained(eqn: Any, k: int, track: Track) -> bool:
    """Whether an elementwise product multiplies a matrix, with gains of examples, by more gains."""
    if compat.name_of(eqn) not in ("mul", "div") or (compat.name_of(eqn) == "div" and k == 1):
        return False
    shape = eqn.invars[1 - k].aval.shape
    large = [n > 1 for n, dims in zip(shape, track.dims, strict=False) if dims]
    return len(large) > 1 and sum(large) < 2


def kernel_window(eqn: Any, track: Track, name: str) -> Window | None:
    """The spatial dims of a convolution's kernel, if each is one dim of the leaf."""
    if name != "conv_general_dilated":
        return None
    dims = [track.dims[axis] for axis in window_axes(eqn)]
    if any(len(d) != 1 for d in dims):
        return None
    return Window(tuple(next(iter(d)) for d in dims), eqn.params["feature_group_count"])
