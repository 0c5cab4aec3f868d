"""What the dataflow knows of a variable, and where the dims of an activation came from."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lora_jax import compat
from lora_jax.plan.leaf import Use
from lora_jax.transform.primitive import Dims


@dataclasses.dataclass(frozen=True)
class Track:
    """A leaf on its way through the function.

    Attributes:
      leaf: its number.
      dims: for each current dim, which of the leaf's own dims it is made of.
      picked: the leaf's dims of which one index has been taken.
      lookup: the index, among the leaf's uses, of the gather it came through; -1 before any.
      mapped: the leaf's dims that the first constant matrix on the way summed over.
    """

    leaf: int
    dims: Dims
    picked: frozenset = frozenset()
    lookup: int = -1
    mapped: frozenset = frozenset()


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of one variable of the jaxpr.

    Attributes:
      tracks: the leaves it is, rearranged.
      origin: for each dim of an activation, the `(leaf, dim, direct)` it came from.
      fed: 2 if it depends on the function's other arguments, 1 if only on constants that may be
        data, else 0.
      made: the leaves whose contractions it is the result of.
      live: the leaves that a gradient with respect to it reaches.
    """

    tracks: tuple[Track, ...] = ()
    origin: Dims = ()
    fed: int = 0
    made: frozenset = frozenset()
    live: frozenset = frozenset()


@dataclasses.dataclass(frozen=True)
class Usage:
    """The uses of every leaf, and what later contractions reveal about earlier ones.

    Attributes:
      uses: of each leaf.
      rebatched: pairs (leaf, dim) that a later contraction treats as experts.
      inner: leaves whose results meet another weight: no output heads.
      masks: of a leaf, the leaves that it is multiplied with element by element.
      stopped: leaves that only a `stop_gradient` of the model's own leads to.
      closed: whether the function has no array among its arguments, so that data is closed over.
      lines: source lines of the equations being walked into, innermost last.
    """

    uses: tuple[list[Use], ...]
    rebatched: set[tuple[int, int]]
    inner: set[int] = dataclasses.field(default_factory=set)
    masks: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    stopped: set[int] = dataclasses.field(default_factory=set)
    closed: bool = False
    lines: list[str] = dataclasses.field(default_factory=lambda: ["unknown line"])

    def line(self, eqn: Any) -> str:
        return compat.source_line(eqn, self.lines[-1])


def free_dims(found: Usage, eqn: Any, flows: Sequence[Flow], rank: int) -> Dims:
    """Origins of a product's output dims; notes the weight dims that number experts."""
    contracting, batching = eqn.params["dimension_numbers"]
    for k in (0, 1):
        if flows[k].origin and flows[1 - k].tracks:
            summed = [eqn.invars[k].aval.shape[axis] for axis in contracting[k]]
            if math.prod(summed) > 1:  # a scale multiplies and sums nothing
                _note_batched(found, flows[k].origin, batching[k])
            _note_summed(found, flows[k].origin, flows[1 - k], contracting[k], contracting[1 - k])
    # A product of two activations, as in attention: its dims are no longer those of a hidden layer.
    if not any(f.tracks for f in flows):
        flows = [dataclasses.replace(f, origin=_indirect(f.origin)) for f in flows]
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
    return tuple(frozenset((leaf, d, False) for leaf, d, _ in dims) for dims in origin)


def _note_batched(found: Usage, origin: Dims, batched: Sequence[int]) -> None:
    """Notes an expert axis that a weight is batched over while it contracts something else.

    An axis counts only if it is a whole dim of the weight it came from: heads that a reshape cut
    out of an output dim are a part of one. And only if that dim stands before the in dim, where
    experts are kept; heads stand behind it, `(in, heads, head_dim)`.
    """
    pairs = [{(leaf, d) for leaf, d, _ in dims} for dims in origin]
    rest = set().union(*(pair for axis, pair in enumerate(pairs) if axis not in batched))
    for leaf, d in set().union(*(pairs[axis] for axis in batched)) - rest:
        if d < min(_first_contracted(found, leaf), default=-1):
            found.rebatched.add((leaf, d))


def _first_contracted(found: Usage, leaf: int) -> frozenset:
    """The dims that a leaf's first contraction sums over."""
    return next((u.contracted for u in found.uses[leaf] if u.kind == "contract"), frozenset())


def _note_summed(found: Usage, origin: Dims, weight: Flow, summed: Sequence, own: Sequence) -> None:
    """Notes an expert axis that is summed away together with the experts' hidden dim.

    In `btd,edf->btef` then `btef,efd->btd` nothing but the layout tells experts from heads: the
    expert axis stands before the first kernel's in dim, the hidden dim after it, and nothing mixes
    the activations in between (attention would).
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
    own = frozenset((t.leaf, d, True) for t in flow.tracks for d in t.dims[axis])
    return own | (flow.origin[axis] if flow.origin else frozenset())
