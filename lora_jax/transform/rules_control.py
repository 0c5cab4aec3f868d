"""Rules for operations that hold a jaxpr: re-expressed with JAX's public functions, not rebound.

Only reading their parameters depends on the JAX version. An output that *is* one of the inputs
(a weight carried through a loop, a state returned from jit) is handed through outside.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import compat
from lora_jax.transform import base_weight
from lora_jax.transform.implicit import Implicit, Unsupported, is_implicit
from lora_jax.transform.interpret import Context, enter
from lora_jax.transform.labels import PARTS, part_spec

# Added to the number of a repeated call of one inner jit, apart from the numbers of uses.
_CALL_SITES = 1 << 20


def _flat_function(f: Callable, tree) -> tuple[Callable, list]:
    """`f` on values, as a function of array leaves; the list receives the output's treedef."""
    shape: list = []

    def run(*leaves):
        out, structure = jax.tree.flatten(list(f(jax.tree.unflatten(tree, leaves))))
        shape[:] = [structure]
        return out

    return run, shape


def _forwarded(inner, values: Sequence) -> dict[int, Any]:
    """Outputs of an inner jaxpr that are simply one of its implicit inputs."""
    jaxpr, _ = compat.open_jaxpr(inner)
    where = {v: x for v, x in zip(jaxpr.invars, values, strict=True) if is_implicit(x)}
    return {i: where[v] for i, v in enumerate(jaxpr.outvars)
            if isinstance(v, compat.Var) and v in where}  # fmt: skip


def _fold_keys(values: Sequence, number) -> list:
    """Folds a number into the dropout key of every implicit array."""

    def fold(v):
        if not is_implicit(v) or v.key is None:
            return v
        keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(v.key.reshape(-1))
        return dataclasses.replace(v, key=keys.reshape(v.key.shape))

    return [fold(v) for v in values]


def _has_dropout(values: Sequence) -> bool:
    return any(is_implicit(v) and v.key is not None and v.dropout > 0 for v in values)


def jit(context: Context, eqn: Any, values: list) -> list:
    """An inner jit: one jitted function, shared by every call with the same structure."""
    inner, name = eqn.params["jaxpr"], eqn.params["name"]
    leaves, tree = jax.tree.flatten(values)
    key = (id(compat.open_jaxpr(inner)[0]), tree)
    warned = len(context.warned)
    if key in context.memo:
        run, shape, _, calls = context.memo[key]
        calls[0] += 1
        if _has_dropout(values):
            leaves = jax.tree.leaves(_fold_keys(values, _CALL_SITES + calls[0]))
    else:
        run, shape = _flat_function(lambda xs: enter(context, inner, xs), tree)
        run.__name__ = name
        run = jax.jit(run)
    out = run(*leaves)
    if (
        key not in context.memo and len(context.warned) == warned
    ):  # a warning names one leaf: retrace
        context.memo[key] = (run, shape, inner, [0])
    outs = jax.tree.unflatten(shape[0], out)
    forwarded = _forwarded(inner, values)
    return [forwarded.get(i, x) for i, x in enumerate(outs)]


def closed_call(context: Context, eqn: Any, values: list) -> list:
    return enter(context, eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), values)


def remat(context: Context, eqn: Any, values: list) -> list:
    """`jax.checkpoint` with its own policy; named residuals keep their names."""
    params = eqn.params
    leaves, tree = jax.tree.flatten(values)
    run, shape = _flat_function(
        context.resumable(lambda xs: enter(context, params["jaxpr"], xs)), tree
    )
    out = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(*leaves)
    outs = jax.tree.unflatten(shape[0], out)
    forwarded = _forwarded(params["jaxpr"], values)
    return [forwarded.get(i, x) for i, x in enumerate(outs)]


def _invariant(body, consts: int, carry: Sequence) -> dict[int, Any]:
    """Implicit carries that the body hands on unchanged."""
    jaxpr, _ = compat.open_jaxpr(body)
    ins = jaxpr.invars[consts : consts + len(carry)]
    pairs = enumerate(zip(ins, jaxpr.outvars, carry, strict=False))
    return {i: x for i, (before, after, x) in pairs if is_implicit(x) and before is after}


def _dense_carry(context: Context, eqn, carry: Sequence, fixed: dict, reason: str) -> list:
    return [
        context.fall_back(x, eqn, reason) if is_implicit(x) and i not in fixed else x
        for i, x in enumerate(carry)
    ]


def _fill(count: int, fixed: dict, live: Sequence, values: Sequence) -> list:
    full: list = [None] * count
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
    fixed = _invariant(p["jaxpr"], n_consts, carry)
    live = [i for i in range(n_carry) if i not in fixed]
    carry = _dense_carry(context, eqn, carry, fixed, "the loop changes it as its carry")
    steps = _has_dropout([*consts, *fixed.values()])
    shape: list = []

    def body(state, x):
        step, x = x
        held = [*consts, *fixed.values()]
        held = _fold_keys(held, step) if steps else held
        now = dict(zip(fixed, held[n_consts:], strict=True))
        full = _fill(n_carry, now, live, state)
        outs = enter(context, p["jaxpr"], [*held[:n_consts], *full, *x])
        new = _dense_carry(context, eqn, outs[:n_carry], fixed, "the loop carries it out")
        ys, structure = jax.tree.flatten(list(outs[n_carry:]))
        shape[:] = [structure]
        return [new[i] for i in live], ys

    state, ys = lax.scan(
        context.resumable(body),
        [carry[i] for i in live],
        (jnp.arange(p["length"]) if steps else None, [_sliced(x) for x in xs]),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    stacked = [_stacked(y) for y in jax.tree.unflatten(shape[0], ys)]
    return _fill(n_carry, fixed, live, state) + stacked


def _scannable(context: Context, eqn, x):
    if is_implicit(x) and x.roles[0] != "s":
        return context.fall_back(x, eqn, f"it is scanned over a dim of role `{x.roles[0]}`")
    return base_weight.scannable(x) if is_implicit(x) else x


def _sliced(x):
    """What one step sees of a scanned implicit array: its roles without the stack axis."""
    if not is_implicit(x):
        return x
    return dataclasses.replace(x, w=base_weight.unstacked(x.w), roles=x.roles[1:])


def _stacked(y):
    if not is_implicit(y):
        return y
    return dataclasses.replace(y, w=base_weight.restacked(y.w), roles="s" + y.roles)


def while_loop(context: Context, eqn: Any, values: list) -> list:
    p = eqn.params
    a, b = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, consts, carry = values[:a], values[a : a + b], list(values[a + b :])
    fixed = _invariant(p["body_jaxpr"], b, carry)
    live = [i for i in range(len(carry)) if i not in fixed]
    carry = _dense_carry(context, eqn, carry, fixed, "the loop changes it as its carry")
    steps = _has_dropout([*consts, *fixed.values()])

    def test(state):
        full = _fill(len(carry), fixed, live, state[1])
        return enter(context, p["cond_jaxpr"], [*cond_consts, *full])[0]

    def body(state):
        step, now = state
        held = [*consts, *fixed.values()]
        held = _fold_keys(held, step) if steps else held
        full = _fill(len(carry), dict(zip(fixed, held[b:], strict=True)), live, now)
        outs = enter(context, p["body_jaxpr"], [*held[:b], *full])
        new = _dense_carry(context, eqn, outs, fixed, "the loop carries it out")
        return step + 1, [new[i] for i in live]

    start = (jnp.zeros((), jnp.int32), [carry[i] for i in live])
    _, state = lax.while_loop(test, context.resumable(body), start)
    return _fill(len(carry), fixed, live, state)


def cond(context: Context, eqn: Any, values: list) -> list:
    index, *operands = values
    if is_implicit(index):
        raise Unsupported("a weight chooses the branch")
    branches = eqn.params["branches"]
    leaves, tree = jax.tree.flatten(operands)
    forwarded = _forwarded_by_all(branches, operands)

    def branch(jaxpr):
        def run(*xs):
            outs = enter(context, jaxpr, jax.tree.unflatten(tree, xs))
            kept = [x for i, x in enumerate(outs) if i not in forwarded]
            return [context.fall_back(x, eqn, "a branch returns it") if is_implicit(x) else x
                    for x in kept]  # fmt: skip

        return context.resumable(run)

    outs = iter(lax.switch(index, [branch(j) for j in branches], *leaves))
    return [forwarded[i] if i in forwarded else next(outs) for i in range(len(eqn.outvars))]


def _forwarded_by_all(branches, operands) -> dict[int, Any]:
    each = [_forwarded(branch, operands) for branch in branches]
    return {i: x for i, x in each[0].items() if all(f.get(i) is x for f in each)}


def shard_map(context: Context, eqn: Any, values: list) -> list:
    """`jax.shard_map`: the factors enter under the specs that follow from the weight's."""
    p = eqn.params
    specs, inputs, inside = [], [], []
    for v, spec in zip(values, p["in_specs"], strict=True):
        there = v
        if is_implicit(v):
            w, w_spec, w_there = base_weight.mapped(v, spec, p["mesh"])
            spec = dataclasses.replace(_part_specs(v, spec), w=w_spec)
            v = dataclasses.replace(v, w=w)
            there = v if w_there is None else dataclasses.replace(v, w=w_there)
        specs.append(spec)
        inputs.append(v)
        inside.append(there)
    leaves, tree = jax.tree.flatten(inputs)[0], jax.tree.structure(inside)
    flat_specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

    def run(*xs):
        outs = enter(context, p["jaxpr"], jax.tree.unflatten(tree, xs))
        return [context.fall_back(x, eqn, "it is returned from shard_map") if is_implicit(x) else x
                for x in outs]  # fmt: skip

    axes = p.get("newly_manual_axes", p.get("manual_axes"))
    mapped = jax.shard_map(
        context.resumable(run),
        mesh=p["mesh"],
        in_specs=tuple(flat_specs),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=frozenset(axes),
    )
    return mapped(*leaves)


def _part_specs(v: Implicit, spec: PartitionSpec) -> Implicit:
    parts = {
        part: None if getattr(v, part) is None else part_spec(spec, v.roles, part) for part in PARTS
    }
    return dataclasses.replace(v, w=spec, **parts)


def custom_derivative(context: Context, eqn: Any, values: list) -> list:
    raise Unsupported("a custom derivative rule takes the weight, and is kept as it is")
