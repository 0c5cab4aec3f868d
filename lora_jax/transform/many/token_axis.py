"""Which axis of every activation numbers the tokens: a walk over the base jaxpr.

Where each token has an adapter of its own, a product needs the axis of its input that numbers the
tokens. The axis is followed from the arguments through operations that leave every position in its
place: elementwise ones, products (attention mixes what stands at the positions, its output is
still one vector for each), sums over other axes, transposes, reshapes that leave it whole, loops.
It is lost where positions are moved, cut or joined (a slice or a shift along the tokens, a
convolution over them, a flattened batch, a lookup of some positions): what comes behind has no
adapter for each token, and a product there is an error rather than a guess.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import compat
from lora_jax.dims import reshape_groups
from lora_jax.transform.primitive import Axes, Primitive, TokenRule, inner_jaxpr, solve_bodies

_NONE: Axes = frozenset()


class Positions(NamedTuple):
    """What the walk found, by the jaxprs' variables.

    Attributes:
      axes: the axes that number the tokens.
      lost: where they were lost on the way to a variable that has none.
      primitives: the row of each primitive.
    """

    axes: dict
    lost: dict
    primitives: Mapping[str, Primitive]


def follow(jaxpr: Any, given: Sequence[Axes], primitives: Mapping[str, Primitive]) -> Positions:
    """Follows the tokens' axis through a jaxpr and all that it holds.

    Args:
      jaxpr: an open jaxpr.
      given: the axes of each of its invars.
      primitives: the table of rows.
    """
    found = Positions({}, {}, primitives)
    _walk(found, jaxpr, given)
    return found


def _walk(found: Positions, jaxpr: Any, given: Sequence[Axes]) -> list[Axes]:
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    for v, axes in zip(jaxpr.invars, given, strict=True):
        # A jaxpr that is called twice (a jitted helper) is one set of variables.
        # Sets only grow: the walk of a loop ends.
        found.axes[v] = found.axes.get(v, _NONE) | axes
    for eqn in jaxpr.eqns:
        name = compat.name_of(eqn)
        row = found.primitives.get(name)
        ins = [_of(found, v) for v in eqn.invars]
        # A primitive without a row may run a jaxpr too: custom calls of other libraries do.
        body = "call" if row is None else row.body
        if body in _LOOPS:
            outs = _LOOPS[body](found, eqn, ins)
        elif body == "call" and (inner := _inner(eqn)) is not None:
            outs = _walk(found, inner, ins)
        else:
            outs = _outs(eqn, ins, lost if row is None else row.tokens)
        _note(found, name, eqn, ins=ins, outs=outs)
    return [_of(found, v) for v in jaxpr.outvars]


def _note(found: Positions, name: str, eqn: Any, ins: Sequence[Axes], outs: Sequence[Axes]) -> None:
    before = [found.lost[v] for v in eqn.invars if not _literal(v) and v in found.lost]
    for v, axes in zip(eqn.outvars, outs, strict=True):
        found.axes[v] = found.axes.get(v, _NONE) | axes
        if axes:
            continue
        if any(ins):
            found.lost[v] = f"`{name}` at {compat.source_line(eqn)}"
        elif before:
            found.lost[v] = before[0]


def _literal(v: Any) -> bool:
    return isinstance(v, compat.Literal)


def _of(found: Positions, v: Any) -> Axes:
    return _NONE if _literal(v) else found.axes.get(v, _NONE)


def _inner(eqn: Any) -> Any:
    """The jaxpr of an operation that simply runs one on its own operands."""
    inner = inner_jaxpr(eqn)
    if inner is None or not hasattr(inner, "eqns"):
        return None
    inner, _ = compat.open_jaxpr(inner)
    return inner if len(inner.invars) == len(eqn.invars) else None


def _outs(eqn: Any, ins: Sequence[Axes], rule: TokenRule) -> list[Axes]:
    outs = rule(eqn, [tuple(getattr(v.aval, "shape", ())) for v in eqn.invars], ins)
    return outs if isinstance(outs, list) else [outs] * len(eqn.outvars)


def lost(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    """Positions are moved, cut or joined, or the operation is not known."""
    return _NONE


def elementwise(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> list[Axes]:
    """Position by position, on operands of the result's shape (or numbers)."""
    # An operand of another shape is a number, which has no axes.
    same = [tuple(v.aval.shape) for v in eqn.outvars]
    pairs = list(zip(shapes, ins, strict=True))
    return [frozenset().union(*(axes for s, axes in pairs if s == shape)) for shape in same]


def reduction(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    return _without(ins[0], sorted(d % len(shapes[0]) for d in eqn.params["axes"]))


def _without(axes: Axes, gone: Sequence[int]) -> Axes:
    return frozenset(d - sum(g < d for g in gone) for d in axes if d not in gone)


def _moved(axes: Axes, where: dict) -> Axes:
    return frozenset(where[d] for d in axes if d in where)


def transpose(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    return _moved(ins[0], {old: new for new, old in enumerate(eqn.params["permutation"])})


def broadcast(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    p, (old, *_) = eqn.params, shapes
    where = {d: new for d, new in enumerate(p["broadcast_dimensions"]) if p["shape"][new] == old[d]}
    return _moved(ins[0], where)


def reshape(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    """An axis that is neither joined with another nor split."""
    old, new = shapes[0], tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in old:
        return _NONE
    # Dims of size 1 may be anywhere in a reshape.
    here = [d for d, n in enumerate(old) if n != 1]
    there = [d for d, n in enumerate(new) if n != 1]
    groups = reshape_groups([old[d] for d in here], [new[d] for d in there])
    # A run of one dim on either side is an axis that came through whole.
    where = {
        here[left[0]]: there[right[0]]
        for left, right in groups
        if len(left) == 1 and len(right) == 1
    }
    return _moved(ins[0], where)


def squeeze(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    return _without(ins[0], [d % len(shapes[0]) for d in eqn.params["dimensions"]])


def uncut(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    """Slices and paddings: axes that come out as long as they were."""
    after = tuple(eqn.outvars[0].aval.shape)
    return frozenset(d for d in ins[0] if after[d] == shapes[0][d] and not _shifted(eqn, d))


def _shifted(eqn: Any, d: int) -> bool:
    config = eqn.params.get("padding_config")
    return config is not None and tuple(config[d]) != (0, 0, 0)


def except_along(key: str) -> TokenRule:
    """Operations along one axis, or several, that leave the others alone."""

    def rule(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
        along = eqn.params[key]
        gone = set(along) if isinstance(along, tuple | list) else {along}
        count = len(shapes[0])
        # Axes may be negative.
        gone = {d % count for d in gone}
        return frozenset().union(*ins) - gone

    return rule


def top_k(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    return ins[0] - {eqn.params.get("axis", -1) % len(shapes[0])}


def stack(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    axis = eqn.params["axis"]
    return frozenset(d + (d >= axis) for d in frozenset().union(*ins))


def unstack(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    return _without(ins[0], [eqn.params["axis"]])


def dot(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    summed, batch = eqn.params["dimension_numbers"]
    # The result has the batch axes, then the left operand's free axes, then the right's.
    out, start = set(), len(batch[0])
    for shape, sums, batched, axes in zip(shapes, summed, batch, ins, strict=True):
        out |= {i for i, d in enumerate(batched) if d in axes}
        free = [d for d in range(len(shape)) if d not in sums and d not in batched]
        out |= {start + i for i, d in enumerate(free) if d in axes}
        start += len(free)
    return frozenset(out)


def conv(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    """Windows mix positions; a batch axis stays."""
    numbers = eqn.params["dimension_numbers"]
    batch = numbers.lhs_spec[0] in ins[0] and eqn.params["batch_group_count"] == 1
    return frozenset({numbers.out_spec[0]} if batch else ())


def gather(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    """What is looked up at each token; and the tokens of a table that is taken whole."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = len(eqn.outvars[0].aval.shape)
    # A gather's result has the index axes wherever no offset is.
    index_axes = [d for d in range(rank) if d not in numbers.offset_dims]
    out = {index_axes[d] for d in ins[1] if d < len(index_axes)}
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(shapes[0])) if d not in gone]
    for axis, d in zip(numbers.offset_dims, kept, strict=True):
        if d in ins[0] and sizes[d] == shapes[0][d]:
            out.add(axis)
    return frozenset(out)


def first(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    """Writing into an array: what was there stays in its place."""
    return ins[0]


def update(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> Axes:
    # Axes that the update covers in full, such as the tokens of a cache written in one go.
    same = frozenset(d for d in ins[1] if shapes[1][d] == shapes[0][d])
    return ins[0] | same


def attention(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> list[Axes]:
    """Mixed values in the places of the queries; then the sums of the softmax, for the backward."""
    return [ins[0], *[_NONE] * (len(eqn.outvars) - 1)]


def pairwise(eqn: Any, shapes: Sequence[tuple], ins: Sequence[Axes]) -> list[Axes]:
    return list(ins[: len(eqn.outvars)])


def _scan(found: Positions, eqn: Any, ins: Sequence[Axes]) -> list[Axes]:
    n_consts, n_carry = compat.scan_counts(eqn.params, len(ins))
    consts, carry = ins[:n_consts], list(ins[n_consts : n_consts + n_carry])
    # One step sees arrays without their first axis; tokens on it are one a step, not an axis.
    xs = [frozenset(d - 1 for d in a if d > 0) for a in ins[n_consts + n_carry :]]

    def body(carry: Any) -> Any:
        return _walk(found, eqn.params["jaxpr"], [*consts, *carry, *xs])

    carry, outs = _fixed_point(body, carry)
    return carry + [frozenset(d + 1 for d in a) for a in outs[n_carry:]]


def _while(found: Positions, eqn: Any, ins: Sequence[Axes]) -> list[Axes]:
    p = eqn.params
    start, end = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

    def body(carry: Any) -> Any:
        return _walk(found, p["body_jaxpr"], [*ins[start:end], *carry])

    carry, _ = _fixed_point(body, list(ins[end:]))
    _walk(found, p["cond_jaxpr"], [*ins[:start], *carry])
    return carry


def _fixed_point(body: Callable, carry: list[Axes]) -> tuple[list[Axes], list[Axes]]:
    """A loop's carry once another step changes nothing: each step only adds axes."""
    while True:
        outs = body(carry)
        after = [a | b for a, b in zip(carry, outs, strict=False)]
        if after == carry:
            return carry, outs
        carry = after


def _cond(found: Positions, eqn: Any, ins: Sequence[Axes]) -> list[Axes]:
    # The first operand is the index.
    each = [_walk(found, branch, ins[1:]) for branch in eqn.params["branches"]]
    return [frozenset().union(*outs) for outs in zip(*each, strict=True)]


def _solve(found: Positions, eqn: Any, ins: Sequence[Axes]) -> list[Axes]:
    """A solution mixes positions; what is inside a linear solve has no axis for them."""
    nowhere = [_NONE] * len(eqn.outvars)
    for inner, given in solve_bodies(eqn, [_NONE] * len(ins), nowhere):
        _walk(found, inner, given)
    return nowhere


_LOOPS: dict[str, Callable] = {"scan": _scan, "while": _while, "cond": _cond, "solve": _solve}
