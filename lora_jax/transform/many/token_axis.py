"""Which axis of every activation numbers the tokens: a walk over the base jaxpr.

Where each token has an adapter of its own, a product must know which axis of its input the tokens
are on. The axis is followed from the arguments through operations that leave every position in its
place: elementwise ones, products (attention mixes what stands at the positions, its output is
still one vector for each), sums over other axes, transposes, reshapes that leave it whole, loops.
It is lost where positions are moved, cut or joined (a slice or a shift along the tokens, a
convolution over them, a flattened batch, a lookup of some positions): what comes behind has no
adapter for each token, and a product there is an error rather than a guess.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lora_jax import compat
from lora_jax.dims import reshape_groups

Axes = frozenset  # of the axes that number the tokens
_NONE: Axes = frozenset()


class Positions(NamedTuple):
    """What the walk found, by the jaxprs' variables.

    Attributes:
      axes: the axes that number the tokens.
      lost: where they were lost on the way to a variable that has none.
    """

    axes: dict
    lost: dict


# Operations on operands of one shape (or numbers), position by position.
_ELEMENTWISE = frozenset(
    "add add_any sub mul div rem max min pow integer_pow square exp exp2 log log1p expm1 tanh sin "
    "cos tan asin acos atan sinh cosh asinh acosh atanh atan2 logistic erf erfc erf_inv lgamma "
    "digamma sqrt rsqrt cbrt abs neg sign floor ceil round is_finite not and or xor shift_left "
    "shift_right_logical shift_right_arithmetic eq ne lt le gt ge select_n clamp nextafter "
    "convert_element_type stop_gradient copy copy_p name reduce_precision pvary real imag conj "
    "complex population_count clz sharding_constraint bitcast_convert_type cumsum cumprod cummax "
    "cummin cumlogsumexp".split()
)

_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split()
)


def follow(jaxpr, given: Sequence[Axes]) -> Positions:
    """Follows the tokens' axis through a jaxpr and all that it holds.

    Args:
      jaxpr: an open jaxpr.
      given: the axes of each of its invars.
    """
    found = Positions({}, {})
    _walk(found, jaxpr, given)
    return found


def _walk(found: Positions, jaxpr, given: Sequence[Axes]) -> list[Axes]:
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    for v, axes in zip(jaxpr.invars, given, strict=True):
        # A jaxpr that is called twice (a jitted helper) is one set of variables.
        found.axes[v] = found.axes.get(v, _NONE) | axes
    for eqn in jaxpr.eqns:
        name = compat.name_of(eqn)
        ins = [_of(found, v) for v in eqn.invars]
        if name in _LOOPS:
            outs = _LOOPS[name](found, eqn, ins)
        elif (inner := _inner(eqn)) is not None:
            outs = _walk(found, inner, ins)
        else:
            outs = _outs(name, eqn, ins)
        _note(found, name, eqn, ins, outs)
    return [_of(found, v) for v in jaxpr.outvars]


def _note(found: Positions, name: str, eqn, ins: Sequence[Axes], outs: Sequence[Axes]):
    before = [found.lost[v] for v in eqn.invars if not _literal(v) and v in found.lost]
    for v, axes in zip(eqn.outvars, outs, strict=True):
        found.axes[v] = found.axes.get(v, _NONE) | axes
        if axes:
            continue
        if any(ins):
            found.lost[v] = f"`{name}` at {compat.source_line(eqn)}"
        elif before:
            found.lost[v] = before[0]


def _literal(v) -> bool:
    return isinstance(v, compat.Literal)


def _of(found: Positions, v) -> Axes:
    return _NONE if _literal(v) else found.axes.get(v, _NONE)


def _inner(eqn):
    """The jaxpr of an operation that simply runs one."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is not None and hasattr(inner, "eqns"):
            inner, _ = compat.open_jaxpr(inner)
            return inner if len(inner.invars) == len(eqn.invars) else None
    return None


def _outs(name: str, eqn, ins: Sequence[Axes]) -> list[Axes]:
    shapes = [tuple(getattr(v.aval, "shape", ())) for v in eqn.invars]
    if name in _ELEMENTWISE:
        return [_together(shapes, ins, tuple(v.aval.shape)) for v in eqn.outvars]
    if name in _REDUCTIONS:
        gone = sorted(d % len(shapes[0]) for d in eqn.params["axes"])
        return [_without(ins[0], gone)]
    rule = _RULES.get(name)
    if rule is None:
        return [_NONE] * len(eqn.outvars)
    outs = rule(eqn, shapes, ins)
    return outs if isinstance(outs, list) else [outs] * len(eqn.outvars)


def _together(shapes, ins: Sequence[Axes], shape) -> Axes:
    return frozenset().union(*(a for s, a in zip(shapes, ins, strict=True) if s == shape))


def _without(axes: Axes, gone: Sequence[int]) -> Axes:
    return frozenset(d - sum(g < d for g in gone) for d in axes if d not in gone)


def _moved(axes: Axes, where: dict) -> Axes:
    return frozenset(where[d] for d in axes if d in where)


def _transpose(eqn, shapes, ins):
    return _moved(ins[0], {old: new for new, old in enumerate(eqn.params["permutation"])})


def _broadcast(eqn, shapes, ins):
    p, (old, *_) = eqn.params, shapes
    where = {d: new for d, new in enumerate(p["broadcast_dimensions"]) if p["shape"][new] == old[d]}
    return _moved(ins[0], where)


def _reshape(eqn, shapes, ins):
    """An axis that is neither joined with another nor split."""
    old, new = shapes[0], tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in old:
        return _NONE
    here = [d for d, n in enumerate(old) if n != 1]
    there = [d for d, n in enumerate(new) if n != 1]
    groups = reshape_groups([old[d] for d in here], [new[d] for d in there])
    where = {
        here[left[0]]: there[right[0]]
        for left, right in groups
        if len(left) == 1 and len(right) == 1
    }
    return _moved(ins[0], where)


def _squeeze(eqn, shapes, ins):
    return _without(ins[0], [d % len(shapes[0]) for d in eqn.params["dimensions"]])


def _whole(eqn, shapes, ins):
    """Slices and paddings: axes that come out as long as they were."""
    after = tuple(eqn.outvars[0].aval.shape)
    return frozenset(d for d in ins[0] if after[d] == shapes[0][d] and not _shifted(eqn, d))


def _shifted(eqn, d: int) -> bool:
    config = eqn.params.get("padding_config")
    return config is not None and tuple(config[d]) != (0, 0, 0)


def _except(key: str) -> Callable:
    """Operations along one axis, or several, that leave the others alone."""

    def rule(eqn, shapes, ins):
        along = eqn.params[key]
        gone = set(along) if isinstance(along, tuple | list) else {along}
        count = len(shapes[0])
        gone = {d % count for d in gone}
        return frozenset().union(*ins) - gone

    return rule


def _top_k(eqn, shapes, ins):
    return ins[0] - {eqn.params.get("axis", -1) % len(shapes[0])}


def _stack(eqn, shapes, ins):
    axis = eqn.params["axis"]
    return frozenset(d + (d >= axis) for d in frozenset().union(*ins))


def _unstack(eqn, shapes, ins):
    return _without(ins[0], [eqn.params["axis"]])


def _dot(eqn, shapes, ins):
    summed, batch = eqn.params["dimension_numbers"]
    out, start = set(), len(batch[0])
    for shape, sums, batched, axes in zip(shapes, summed, batch, ins, strict=True):
        out |= {i for i, d in enumerate(batched) if d in axes}
        free = [d for d in range(len(shape)) if d not in sums and d not in batched]
        out |= {start + i for i, d in enumerate(free) if d in axes}
        start += len(free)
    return frozenset(out)


def _conv(eqn, shapes, ins):
    """Windows mix positions; a batch axis stays."""
    numbers = eqn.params["dimension_numbers"]
    batch = numbers.lhs_spec[0] in ins[0] and eqn.params["batch_group_count"] == 1
    return frozenset({numbers.out_spec[0]} if batch else ())


def _gather(eqn, shapes, ins):
    """What is looked up at each token; and the tokens of a table that is taken whole."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = len(eqn.outvars[0].aval.shape)
    index_axes = [d for d in range(rank) if d not in numbers.offset_dims]
    out = {index_axes[d] for d in ins[1] if d < len(index_axes)}
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(shapes[0])) if d not in gone]
    for axis, d in zip(numbers.offset_dims, kept, strict=True):
        if d in ins[0] and sizes[d] == shapes[0][d]:
            out.add(axis)
    return frozenset(out)


def _first(eqn, shapes, ins):
    """Writing into an array: what was there stays in its place."""
    return ins[0]


def _update(eqn, shapes, ins):
    same = frozenset(d for d in ins[1] if shapes[1][d] == shapes[0][d])
    return ins[0] | same


def _each(eqn, shapes, ins):
    return list(ins[: len(eqn.outvars)])


_RULES: dict[str, Callable] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _whole,
    "dynamic_slice": _whole,
    "pad": _whole,
    "rev": _except("dimensions"),
    "sort": _except("dimension"),
    "concatenate": _except("dimension"),
    "split": _except("axis"),
    "top_k": _top_k,
    "stack": _stack,
    "unstack": _unstack,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scatter": _first,
    "scatter-add": _first,
    "scatter_add": _first,
    "dynamic_update_slice": _update,
    "optimization_barrier": _each,
    "device_put": _each,
}


def _scan(found: Positions, eqn, ins: Sequence[Axes]) -> list[Axes]:
    n_consts, n_carry = compat.scan_counts(eqn.params, len(ins))
    consts, carry = ins[:n_consts], list(ins[n_consts : n_consts + n_carry])
    xs = [frozenset(d - 1 for d in a if d > 0) for a in ins[n_consts + n_carry :]]

    def body(carry):
        return _walk(found, eqn.params["jaxpr"], [*consts, *carry, *xs])

    carry, outs = _settled(body, carry)
    return carry + [frozenset(d + 1 for d in a) for a in outs[n_carry:]]


def _while(found: Positions, eqn, ins: Sequence[Axes]) -> list[Axes]:
    p = eqn.params
    start, end = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

    def body(carry):
        return _walk(found, p["body_jaxpr"], [*ins[start:end], *carry])

    carry, _ = _settled(body, list(ins[end:]))
    _walk(found, p["cond_jaxpr"], [*ins[:start], *carry])
    return carry


def _settled(body: Callable, carry: list[Axes]) -> tuple[list[Axes], list[Axes]]:
    """A loop's carry once another step changes nothing: each step only adds axes."""
    while True:
        outs = body(carry)
        after = [a | b for a, b in zip(carry, outs, strict=False)]
        if after == carry:
            return carry, outs
        carry = after


def _cond(found: Positions, eqn, ins: Sequence[Axes]) -> list[Axes]:
    each = [_walk(found, branch, ins[1:]) for branch in eqn.params["branches"]]
    return [frozenset().union(*outs) for outs in zip(*each, strict=True)]


_LOOPS: dict[str, Callable] = {"scan": _scan, "while": _while, "cond": _cond}
