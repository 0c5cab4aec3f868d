"""Whether a variable depends on the arguments of the call: a walk over the base jaxpr.

What a weight meets decides what the result is. Features times a weight are features, which
nonlinear operations take next. A constant times a weight is another weight, which features will
meet, and it keeps its low-rank form. Both are the same equation; only the origin tells them apart.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import compat
from lora_jax.transform.primitive import Primitive, inner_jaxpr, solve_bodies

# CONSTANT: made of parameters, literals and iotas. CLOSED: made of an array that the function
# closes over, a mask or a permutation, but perhaps its data. DATA: made of an argument.
Origin = int
CONSTANT: Origin = 0
CLOSED: Origin = 1
DATA: Origin = 2

Origins = dict[Any, Origin]  # by variable; those that are missing count as DATA


def origin_of(origins: Origins, v: Any) -> Origin:
    """The origin of a variable or a literal."""
    return CONSTANT if isinstance(v, compat.Literal) else origins.get(v, DATA)


def follow(
    found: Origins,
    jaxpr: Any,
    given: Sequence[Origin],
    closed: Origin,
    primitives: Mapping[str, Primitive],
) -> list[Origin]:
    """Notes the origin of every variable of a jaxpr and of all jaxprs inside it.

    Args:
      found: receives the origins. A jaxpr that is called twice keeps the later of two origins.
      jaxpr: closed or open.
      given: of its invars.
      closed: of arrays that a jaxpr closes over and of which nothing is known.
      primitives: the row of each primitive, by name.

    Returns:
      The origins of its outvars.
    """
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    for v in jaxpr.constvars:
        found.setdefault(v, closed)
    for v, origin in zip(jaxpr.invars, given, strict=True):
        found[v] = max(found.get(v, CONSTANT), origin)

    def inside(inner: Any, ins: Sequence[Origin]) -> list[Origin]:
        return follow(found, inner, ins, closed=closed, primitives=primitives)

    for eqn in jaxpr.eqns:
        ins = [origin_of(found, v) for v in eqn.invars]
        row = primitives.get(compat.name_of(eqn))
        body = None if row is None else row.body
        # What has no body, or one that cannot be matched, is as late as its latest operand.
        outs = _BODIES[body](eqn, ins, inside) if body else None
        latest = max(ins, default=CONSTANT)
        for v, origin in zip(eqn.outvars, outs or [latest] * len(eqn.outvars), strict=True):
            found[v] = max(found.get(v, CONSTANT), origin)
    return [origin_of(found, v) for v in jaxpr.outvars]


def _call(eqn: Any, ins: list, inside: Callable) -> list[Origin] | None:
    inner = inner_jaxpr(eqn)
    # Where the counts differ, operands and invars cannot be matched.
    if inner is None or len(compat.open_jaxpr(inner)[0].invars) != len(ins):
        return None
    return inside(inner, ins)


def _scan(eqn: Any, ins: list, inside: Callable) -> list[Origin]:
    consts, carry = compat.scan_counts(eqn.params, len(ins))
    state = ins[consts : consts + carry]

    def body(state: list) -> list:
        return inside(eqn.params["jaxpr"], [*ins[:consts], *state, *ins[consts + carry :]])

    return _fixed_point(body, state)


def _while(eqn: Any, ins: list, inside: Callable) -> list[Origin]:
    p = eqn.params
    start, end = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    outs = _fixed_point(lambda s: inside(p["body_jaxpr"], [*ins[start:end], *s]), ins[end:])
    inside(p["cond_jaxpr"], [*ins[:start], *outs])
    return outs


def _fixed_point(body: Callable[[list], list], state: list) -> list[Origin]:
    """The outputs of a loop's body once another step changes no origin of the carry."""
    # Ends after at most two steps for each carry: an origin only grows, up to DATA.
    while True:
        outs = body(state)
        after = [max(pair) for pair in zip(state, outs, strict=False)]
        if after == state:
            return [*after, *outs[len(state) :]]
        state = after


def _cond(eqn: Any, ins: list, inside: Callable) -> list[Origin]:
    each = [inside(branch, ins[1:]) for branch in eqn.params["branches"]]
    # Which branch runs depends on the index.
    return [max(ins[0], *outs) for outs in zip(*each, strict=True)]


def _solve(eqn: Any, ins: list, inside: Callable) -> list[Origin]:
    latest = max(ins)
    # The vectors that the functions are applied to depend on all operands.
    each = solve_bodies(eqn, ins, [latest] * len(eqn.outvars))
    return [inside(inner, given) for inner, given in each][-1]


_BODIES: dict[str, Callable] = {
    "call": _call,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "solve": _solve,
}
