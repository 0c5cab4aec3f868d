"""Rules for loops and branches, which may carry or return weights.

A weight that goes through unchanged is closed over. One that the body changes is carried in a form
that every round gives (the same roles, dtypes and rank) where there is one; else it is
materialized.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import compat
from lora_jax.transform import base_weight
from lora_jax.transform.implicit import Implicit, Unsupported, has_many, is_implicit, owned
from lora_jax.transform.interpret import Context, enter
from lora_jax.transform.origins import DATA, origin_of
from lora_jax.transform.rules_call import fold_keys, forwarded, has_dropout
from lora_jax.transform.rules_join import common_form, in_form


def _invariant(body: Any, consts: int, carry: Sequence) -> dict[int, Any]:
    """Implicit carries that the body returns as they came in."""
    jaxpr, _ = compat.open_jaxpr(body)
    ins = jaxpr.invars[consts : consts + len(carry)]
    pairs = enumerate(zip(ins, jaxpr.outvars, carry, strict=False))
    return {i: x for i, (before, after, x) in pairs if is_implicit(x) and before is after}


class _Loop(NamedTuple):
    """The body of a loop and what it closes over.

    Attributes:
      body: jaxpr of constants, carries and, in a scan, slices.
      consts: values of its constants.
      fixed: by number, the carries that are weights and that the body does not change.
      live: the numbers of the other carries.
      masks: whether dropout draws masks of its own in each round.
    """

    body: Any
    consts: Sequence
    fixed: dict[int, Any]
    live: list[int]
    masks: bool


def _loop(body: Any, consts: Sequence, carry: Sequence) -> _Loop:
    fixed = _invariant(body, len(consts), carry)
    live = [i for i in range(len(carry)) if i not in fixed]
    return _Loop(body, consts, fixed, live, masks=has_dropout([*consts, *carry]))


def _round(
    context: Context, loop: _Loop, step: Any, state: Sequence, xs: Sequence = ()
) -> tuple[list, list]:
    """One round of a loop: the carries that it changes, and what a scan stacks."""
    # What is fixed is closed over, as a constant: JAX would carry each factor.
    held = [*loop.consts, *loop.fixed.values(), *state]
    held = fold_keys(held, step) if loop.masks else held
    start, end = len(loop.consts), len(loop.consts) + len(loop.fixed)
    fixed = dict(zip(loop.fixed, held[start:end], strict=True))
    carry = _fill(fixed, loop.live, held[end:])
    outs = enter(context, loop.body, [*held[:start], *carry, *xs])
    return [outs[i] for i in loop.live], outs[len(carry) :]


def _in_forms(
    context: Context, eqn: Any, values: Sequence, forms: Sequence, *, reason: str
) -> list:
    """What a loop or a branch returns: weights in their forms, all else as arrays."""
    return [
        in_form(x, form)
        if form is not None
        else context.fall_back(x, eqn, reason)
        if is_implicit(x)
        else x
        for x, form in zip(values, forms, strict=True)
    ]


def _carried(
    context: Context, loop: _Loop, carry: Sequence, step: Callable[[Context, list], list]
) -> list[Implicit | None]:
    """The forms in which a loop carries weights that it changes, None for what it carries as array.

    A scaled or a transposed weight keeps its form; one to which another is added each time does
    not, as its rank grows.

    Args:
      context: of the call.
      loop: its body and what that closes over.
      carry: the first values of those that change.
      step: the loop's body on carries, in a context.
    """
    outvars = [compat.open_jaxpr(loop.body)[0].outvars[i] for i in loop.live]
    may = [
        is_implicit(x) or (_may_be_weight(v) and origin_of(context.origins, v) != DATA)
        for x, v in zip(carry, outvars, strict=True)
    ]
    state = jax.eval_shape(lambda xs: xs, list(carry)) if any(may) else []
    # The first round may change the form (a scale is folded), the second must not.
    for _ in range(3):
        if not any(may):
            break
        after = jax.eval_shape(functools.partial(step, context.probe()), state)
        forms = [_form(x, y) if m else None for x, y, m in zip(state, after, may, strict=True)]
        before, state = state, [
            jax.ShapeDtypeStruct(x.shape, x.dtype) if form is None else form
            for x, form in zip(state, forms, strict=True)
        ]  # fmt: skip
        if _layout(before) == _layout(state):
            return forms
        may = [form is not None for form in forms]
    return [None] * len(carry)


def _layout(values: Sequence) -> tuple:
    leaves, tree = jax.tree.flatten(list(values))
    return tree, [(x.shape, x.dtype) for x in leaves]


def _form(*values: Any) -> Implicit | None:
    """The common form of abstract values, None where they have none or none is a weight."""
    if not any(map(is_implicit, values)):
        return None
    try:
        return jax.eval_shape(common_form, list(values))
    except Unsupported:
        return None


def _may_be_weight(v: Any) -> bool:
    # A vector, such as a bias or a loss, has no two factors.
    return len(v.aval.shape) > 1 and jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _fill(fixed: dict, live: Sequence, values: Sequence) -> list:
    """All carries of a loop in their order, from those that are fixed and those that are not."""
    full: list = [None] * (len(fixed) + len(live))
    for i, x in [*fixed.items(), *zip(live, values, strict=True)]:
        full[i] = x
    return full


def scan(context: Context, eqn: Any, values: list) -> list:
    """`lax.scan`: stacked weights are sliced factor by factor, constant ones closed over."""
    p = eqn.params
    n_consts, n_carry = compat.scan_counts(p, len(values))
    consts = list(values[:n_consts])
    carry = list(values[n_consts : n_consts + n_carry])
    xs = [_scannable(context, eqn, x) for x in values[n_consts + n_carry :]]
    loop, shape = _loop(p["jaxpr"], consts, carry), []

    # The step's number only where masks need it: without dropout the loop is the model's own.
    inputs = (jnp.arange(p["length"]) if loop.masks else None, [_sliced(x) for x in xs])
    start, forms = [carry[i] for i in loop.live], [None] * len(loop.live)
    # A loop of no steps has no first slice to try the body on, and changes no carry.
    if p["length"]:

        def first(probe: Context, state: Sequence) -> list:
            step, xs = jax.tree.map(lambda x: x[0], inputs)
            return _round(probe, loop, step, state=state, xs=xs)[0]

        forms = _carried(context, loop, start, first)

    def body(state: Sequence, x: tuple) -> tuple[list, list]:
        step, xs = x
        after, ys = _round(context, loop, step, state=state, xs=xs)
        ys, structure = jax.tree.flatten(list(ys))
        shape[:] = [structure]
        return _in_forms(context, eqn, after, forms, reason="the loop carries it out"), ys

    state, ys = lax.scan(
        context.resumable(body),
        _in_forms(context, eqn, start, forms, reason="the loop changes it as its carry"),
        inputs,
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    stacked = [_stacked(y) for y in jax.tree.unflatten(shape[0], ys)]
    return _fill(loop.fixed, loop.live, state) + stacked


def _scannable(context: Context, eqn: Any, x: Any) -> Any:
    if not is_implicit(x):
        return x
    # Copies, one for each step, become a stack whose indices are equal.
    if x.roles[0] == "u" and not has_many(x):
        x = owned(x, [0], "s")
    if x.roles[0] != "s":
        return context.fall_back(x, eqn, f"it is scanned over a dim of role `{x.roles[0]}`")
    return dataclasses.replace(base_weight.scannable(x), places=None)


def _sliced(x: Any) -> Any:
    """What one step sees of a scanned implicit array: its roles without the stack axis."""
    if not is_implicit(x):
        return x
    return dataclasses.replace(x, w=base_weight.unstacked(x.w), roles=x.roles[1:])


def _stacked(y: Any) -> Any:
    if not is_implicit(y):
        return y
    return dataclasses.replace(y, w=base_weight.restacked(y.w), roles="s" + y.roles)


def while_loop(context: Context, eqn: Any, values: list) -> list:
    """`lax.while_loop`: weights are closed over, but for those that the loop changes."""
    p = eqn.params
    a, b = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, consts, carry = values[:a], values[a : a + b], list(values[a + b :])
    loop = _loop(p["body_jaxpr"], consts, carry)

    def test(state: tuple) -> Any:
        full = _fill(loop.fixed, loop.live, state[1])
        return enter(context, p["cond_jaxpr"], [*cond_consts, *full])[0]

    first, zero = [carry[i] for i in loop.live], jnp.zeros((), jnp.int32)
    forms = _carried(
        context, loop, first, lambda probe, now: _round(probe, loop, zero, state=now)[0]
    )

    def body(state: tuple) -> tuple:
        step, now = state
        after, _ = _round(context, loop, step, now)
        return step + 1, _in_forms(context, eqn, after, forms, reason="the loop carries it out")

    # A while loop has no step number of its own.
    start = zero, _in_forms(context, eqn, first, forms, reason="the loop changes it as its carry")
    _, state = lax.while_loop(test, context.resumable(body), start)
    return _fill(loop.fixed, loop.live, state)


def cond(context: Context, eqn: Any, values: list) -> list:
    """`lax.cond` and `lax.switch`: a weight that branches return has a form that all can give."""
    index, *operands = values
    # An integer made of a weight, such as the `argmax` of a router's kernel.
    if is_implicit(index):
        raise Unsupported("a weight chooses the branch")
    branches = eqn.params["branches"]
    leaves, tree = jax.tree.flatten(operands)
    same = _forwarded_by_all(branches, operands)
    kept = [i for i in range(len(eqn.outvars)) if i not in same]

    def run(context: Context, jaxpr: Any, xs: Sequence) -> list:
        outs = enter(context, jaxpr, jax.tree.unflatten(tree, xs))
        return [outs[i] for i in kept]

    forms = _returned(context, branches, kept, lambda probe, jaxpr: run(probe, jaxpr, leaves))

    def branch(jaxpr: Any) -> Callable:
        def go(*xs: Any) -> list:
            return _in_forms(
                context, eqn, run(context, jaxpr, xs), forms, reason="a branch returns it"
            )

        return context.resumable(go)

    outs = iter(lax.switch(index, [branch(j) for j in branches], *leaves))
    return [same[i] if i in same else next(outs) for i in range(len(eqn.outvars))]


def _returned(
    context: Context,
    branches: Sequence,
    kept: Sequence[int],
    run: Callable[[Context, Any], list],
) -> list[Implicit | None]:
    """The forms of weights that branches return, None for what they return as array."""
    outvars = [compat.open_jaxpr(j)[0].outvars for j in branches]
    may = [
        all(_may_be_weight(each[i]) and origin_of(context.origins, each[i]) != DATA
            for each in outvars)
        for i in kept
    ]  # fmt: skip
    if not any(may):  # what depends on the arguments is no weight: nothing is traced twice
        return [None] * len(kept)
    found = [jax.eval_shape(functools.partial(run, context.probe(), j)) for j in branches]
    return [_form(*values) if m else None for m, *values in zip(may, *found, strict=True)]


def _forwarded_by_all(branches: Sequence, operands: Sequence) -> dict[int, Any]:
    each = [forwarded(branch, operands) for branch in branches]
    return {i: x for i, x in each[0].items() if all(f.get(i) is x for f in each)}
