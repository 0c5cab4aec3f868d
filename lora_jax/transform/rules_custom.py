"""Rules for functions with derivatives of their own, and for linear solves, that take weights.

Equations of these kinds hold their derivatives as functions of dense arrays. JAX itself applies
them to abstract dense operands, which gives a jaxpr of the derivative; the interpreter then runs
that jaxpr on the weights in their low-rank form. Implicit layers (`custom_root`, diffrax's and
optimistix's adjoints) reach a weight this way, through `jax.closure_convert`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import compat
from lora_jax.quant.array import QuantArray
from lora_jax.transform.implicit import (
    Unsupported,
    folded,
    has_many,
    is_implicit,
    wide_dtype,
)
from lora_jax.transform.interpret import Context, enter, evaluate
from lora_jax.transform.labels import contract, labels, reorder
from lora_jax.transform.many.rules import row_adapter

_REASON = "a custom derivative rule takes the weight"


def _operands(context: Context, eqn: Any, values: Sequence) -> tuple[list, list]:
    """The operands, each weight as base and two factors: what the derivatives are taken by.

    Returns:
      The arrays that the function closes over, by which JAX refuses to differentiate, and the rest.
    """
    ready = []
    for v, x in zip(eqn.invars, values, strict=True):
        if not is_implicit(x):
            # A constant may be a number of Python, which has no dtype.
            ready.append(x if compat.is_array(x) else jnp.asarray(x, v.aval.dtype))
            continue
        if x.key is not None and x.dropout > 0:
            # The rule's backward cannot use the mask that its forward drew.
            raise Unsupported(f"{_REASON}, with dropout")
        if isinstance(x.w, QuantArray) or x.bias is not None:
            raise Unsupported(f"{_REASON}, of a quantized base or with a bias")
        x = row_adapter(context, x, eqn, _REASON) if has_many(x) else x
        ready.append(dataclasses.replace(_transposable(folded(x)), key=None, dropout=0.0))
    held = eqn.params.get("num_consts", 0)
    return ready[:held], ready[held:]


def _transposable(x: Any) -> Any:
    """A weight whose products JAX can transpose, as it does with tangents and linear solves."""
    # A product with a backward of its own is a `custom_vjp`, which JAX cannot transpose.
    return dataclasses.replace(x, reverse_only=False) if is_implicit(x) else x


def _dense_call(jaxpr: Any, eqn: Any) -> Callable[..., list]:
    """The equation as a function of dense operands, with its own derivatives."""
    variables = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, compat.Var)))
    part = compat.segment(jaxpr, [eqn], variables, list(eqn.outvars))

    def call(*xs: Any) -> list:
        # A constant among the operands is in the equation already.
        pairs = zip(eqn.invars, xs, strict=True)
        given = {v: x for v, x in pairs if isinstance(v, compat.Var)}
        return compat.eval_segment(part, [given[v] for v in variables])

    return call


def _avals(values: Sequence) -> list:
    return [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in values]


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _as_arrays(context: Context, eqn: Any, values: Sequence) -> list:
    return [context.fall_back(x, eqn, _REASON) if is_implicit(x) else x for x in values]


def _probe(
    context: Context,
    make: Callable[[Context], Callable],
    differentiate: Callable[[Callable, Sequence], None],
    operands: list,
) -> None:
    """Finds out, on abstract values, whether a function and its derivative need a weight as array.

    If they do, the weight is materialized once for the whole function. The plan, which
    differentiates nothing, then reports it too.

    Args:
      context: of the call.
      make: gives the function that runs in a context.
      differentiate: traces the function and its derivative.
      operands: of the function.

    Raises:
      Unsupported: with the reason of the first fallback inside.
    """
    if context.probing:  # a derivative often calls its own function, as `jax.nn.relu`'s does
        return
    quiet = context.probe()
    run = make(quiet)
    try:
        jax.eval_shape(lambda xs: differentiate(run, xs), operands)
    except Exception:  # what cannot be differentiated can still be called
        jax.eval_shape(lambda xs: run(*xs), operands)
    if quiet.warned:
        raise Unsupported(f"{_REASON}; {next(iter(quiet.warned.values()))}")


def custom_vjp(context: Context, eqn: Any, values: list) -> list:
    """`jax.custom_vjp`: its forward and its backward, on weights in their low-rank form.

    The rule gives dW as an array, of which the gradients of the factors are made.
    """
    held, operands = _operands(context, eqn, values)

    def differentiate(run: Callable, xs: Sequence) -> None:
        # A rule that is told what varies may refuse some operands; weights are what trains.
        symbolic = eqn.params.get("symbolic_zeros", False)
        outs, pull = _vjp(run, [is_implicit(x) or not symbolic for x in xs], xs)
        pull([jnp.zeros_like(x) for x in outs])

    _probe(context, lambda quiet: _vjp_function(quiet, eqn, held), differentiate, operands)
    return _vjp_function(context, eqn, held)(*operands)


def _vjp_function(context: Context, eqn: Any, held: Sequence) -> Callable[..., list]:
    call, seen = _dense_call(_owner_jaxpr(eqn), eqn), {}

    def primal(*xs: Any) -> list:
        inner = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        outs = enter(context, inner, [*held, *xs])
        return _as_arrays(context, eqn, outs)

    symbolic = eqn.params.get("symbolic_zeros", False)

    def forward(*xs: Any) -> tuple:
        if symbolic:
            # Such a rule sees which operands have tangents, and may refuse some that do.
            varies = [_varies(x) for x in xs]
            xs = jax.tree.map(lambda leaf: leaf.value, xs, is_leaf=_is_primal)
        else:
            varies = [_is_inexact(x) for x in xs]
        seen["varies"] = varies

        def dense(held: list, given: list) -> tuple:
            outs, pull = _vjp(functools.partial(call, *held), varies, given)
            # JAX's pullback is a tree: its leaves are what the rule saves, its structure the rest.
            saved, seen["pull"] = jax.tree.flatten(pull)
            return outs, saved

        jaxpr, consts = compat.open_jaxpr(jax.make_jaxpr(dense)(_avals(held), _avals(xs)))
        # A weight that the rule saves is saved as base and factors, not materialized.
        results = evaluate(context, jaxpr, consts, [*held, *xs])
        count = len(eqn.outvars)
        return _as_arrays(context, eqn, results[:count]), (xs, results[count:])

    def backward(kept: tuple, cotangents: list) -> tuple:
        xs, saved = kept
        if symbolic:
            cotangents = [_instantiated(x) for x in cotangents]

        def dense(saved: list, given: list) -> list:
            return list(jax.tree.unflatten(seen["pull"], saved)(given))

        jaxpr = jax.make_jaxpr(dense)(_avals(saved), _avals(cotangents))
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        found = evaluate(context, jaxpr, consts, [*saved, *cotangents])
        gradients = iter(_as_arrays(context, eqn, found))
        return tuple(
            _gradient(x, next(gradients)) if varies else jax.tree.map(_zero_tangent, x)
            for x, varies in zip(xs, seen["varies"], strict=True)
        )

    run = jax.custom_vjp(context.resumable(primal))
    run.defvjp(context.resumable(forward), context.resumable(backward), symbolic_zeros=symbolic)
    return run


def _vjp(fn: Callable, varies: Sequence[bool], xs: Sequence) -> tuple[Any, Callable]:
    """`jax.vjp` by the operands that vary."""

    def of_varying(*moved: Any) -> Any:
        moving = iter(moved)
        return fn(*[next(moving) if v else x for v, x in zip(varies, xs, strict=True)])

    return jax.vjp(of_varying, *[x for v, x in zip(varies, xs, strict=True) if v])


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _varies(x: Any) -> bool:
    """Whether an operand of a rule with `symbolic_zeros` has a tangent."""
    leaves = jax.tree.leaves(x, is_leaf=_is_primal)
    return any(leaf.perturbed and _is_inexact(leaf.value) for leaf in leaves)


def _instantiated(x: Any) -> Any:
    if not isinstance(x, jax.custom_derivatives.SymbolicZero):
        return x
    aval: Any = x.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _gradient(x: Any, g: Any) -> Any:
    """The cotangent of an operand: of a weight `dA = dW·Bᵀ` and `dB = Aᵀ·dW` beside dW itself."""
    if not is_implicit(x):
        return g
    dims, la, lb = list(range(x.ndim)), labels(x.roles, "a"), labels(x.roles, "b")
    wide = wide_dtype(x.a.dtype, g.dtype)
    full, precision = g.astype(wide), lax.Precision.HIGHEST

    def against(factor: Any, have: list, want: list, dtype: Any) -> Any:
        out, got = contract(
            full, dims, factor.astype(wide), have, keep=set(want), precision=precision
        )
        return reorder(out, got, want).astype(dtype)

    return dataclasses.replace(
        x,
        w=g.astype(x.w.dtype),
        a=against(x.b, lb, la, x.a.dtype),
        b=against(x.a, la, lb, x.b.dtype),
        scale=jnp.zeros_like(x.scale),
    )


def custom_jvp(context: Context, eqn: Any, values: list) -> list:
    """`jax.custom_jvp`: its forward and its derivative, on weights in their low-rank form.

    The tangent of a weight is the sum of two weights, `dW + dA·B` and `A·dB`; the rule is linear
    in tangents, so it runs on each.
    """
    held, operands = _operands(context, eqn, values)

    def differentiate(run: Callable, xs: Sequence) -> None:
        tangents = [jax.tree.map(_zero_tangent, x) for x in xs]
        jax.jvp(run, tuple(xs), tuple(tangents))

    _probe(context, lambda quiet: _jvp_function(quiet, eqn, held), differentiate, operands)
    return _jvp_function(context, eqn, held)(*operands)


def _zero_tangent(x: Any) -> Any:
    return jnp.zeros_like(x) if _is_inexact(x) else np.zeros(jnp.shape(x), jax.dtypes.float0)


def _jvp_function(context: Context, eqn: Any, held: Sequence) -> Callable[..., list]:
    call = _dense_call(_owner_jaxpr(eqn), eqn)

    def primal(*xs: Any) -> list:
        outs = enter(context, eqn.params["call_jaxpr"], [*held, *xs])
        return _as_arrays(context, eqn, outs)

    def derivative(xs: tuple, tangents: tuple) -> tuple:
        loose = [k for k, x in enumerate(xs) if _is_inexact(x)]

        def dense(held: list, given: list, dots: list) -> tuple:
            full = [np.zeros(jnp.shape(x), jax.dtypes.float0) for x in xs]
            for k, dot in zip(loose, dots, strict=True):
                full[k] = dot
            return jax.jvp(functools.partial(call, *held), given, full)

        avals = _avals(xs)
        jaxpr = jax.make_jaxpr(dense)(_avals(held), avals, [avals[k] for k in loose])
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        count = len(eqn.outvars)

        def run_on(dots: list) -> tuple[list, list]:
            outs = evaluate(context, jaxpr, consts, [*held, *xs, *dots])
            outs = _as_arrays(context, eqn, outs)
            return outs[:count], outs[count:]

        # f'(dW + dA·B + A·dB) = f'(dW + dA·B) + f'(A·dB): the rank of a tangent stays r.
        outs, first = run_on([_tangent(xs[k], tangents[k], of_b=False) for k in loose])
        if not any(map(is_implicit, xs)):
            return outs, first
        _, second = run_on([_tangent(xs[k], tangents[k], of_b=True) for k in loose])
        # An integer's tangent, of dtype float0, has no numbers to add.
        pairs = zip(first, second, strict=True)
        return outs, [a if a.dtype == jax.dtypes.float0 else a + b for a, b in pairs]

    run = jax.custom_jvp(context.resumable(primal))
    run.defjvp(context.resumable(derivative))
    return run


def _tangent(x: Any, dot: Any, *, of_b: bool) -> Any:
    """One of the two parts of an operand's tangent; the second is zero for what is no weight."""
    if not is_implicit(x):
        return jnp.zeros_like(dot) if of_b else dot
    if of_b:
        return dataclasses.replace(x, w=jnp.zeros_like(x.w), b=dot.b)
    return dataclasses.replace(x, w=dot.w, a=dot.a)


def _owner_jaxpr(eqn: Any) -> Any:
    """A jaxpr with debug information, which a segment of one equation needs."""
    return compat.open_jaxpr(eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr")))[0]


def linear_solve(context: Context, eqn: Any, values: list) -> list:
    """`lax.custom_linear_solve`: the weights of its functions are closed over, factors and all."""
    # The operands are the constants of matvec, vecmat, solve and transpose_solve, then the vectors.
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    consts, start = {}, 0
    for name in lengths._fields:
        count = getattr(lengths, name)
        consts[name] = list(map(_transposable, values[start : start + count]))
        start += count
    right = values[start:]
    if any(map(is_implicit, right)):
        raise Unsupported("a weight is the right-hand side of a linear solve")
    # With `has_aux` the solve returns more than the solution.
    aux = len(compat.open_jaxpr(jaxprs.solve)[0].outvars) > len(right)

    def function(name: str) -> Callable[[list], Any]:
        def run(xs: list) -> Any:
            outs = enter(context, getattr(jaxprs, name), [*consts[name], *xs])
            outs = _as_arrays(context, eqn, outs)
            return (outs[: len(right)], outs[len(right) :]) if aux and "solve" in name else outs

        return context.resumable(run)

    solve, transposed = function("solve"), function("transpose_solve")
    outs = lax.custom_linear_solve(
        function("matvec"),
        right,
        lambda _, b: solve(b),
        None if jaxprs.transpose_solve is None else lambda _, b: transposed(b),
        symmetric=jaxprs.vecmat is jaxprs.matvec,
        has_aux=aux,
    )
    return [*outs[0], *outs[1]] if aux else list(outs)
