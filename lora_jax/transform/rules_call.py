"""Rules for operations that run a jaxpr on their operands, such as an inner jit.

They are expressed again with JAX's public functions: only reading their parameters depends on the
JAX version. An output that *is* one of the inputs (a
weight returned from jit as part of a state) does not pass through the operation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import compat
from lora_jax.transform import base_weight
from lora_jax.transform.implicit import Implicit, is_implicit
from lora_jax.transform.interpret import Context, enter
from lora_jax.transform.labels import PARTS, part_spec
from lora_jax.transform.low_rank import AT_PLACES, masked_at

# Added to the number of a repeated call of one inner jit, apart from the numbers of uses.
_CALL_SITES = 1 << 20


def _flat_function(f: Callable, tree: Any) -> tuple[Callable, list]:
    """`f` on values, as a function of array leaves; the list receives the output's treedef."""
    shape: list = []

    def run(*leaves) -> Any:
        out, structure = jax.tree.flatten(list(f(jax.tree.unflatten(tree, leaves))))
        shape[:] = [structure]
        return out

    return run, shape


def forwarded(inner: Any, values: Sequence) -> dict[int, Any]:
    """Outputs of an inner jaxpr that are simply one of its implicit inputs."""
    jaxpr, _ = compat.open_jaxpr(inner)
    where = {v: x for v, x in zip(jaxpr.invars, values, strict=True) if is_implicit(x)}
    return {i: where[v] for i, v in enumerate(jaxpr.outvars)
            if isinstance(v, compat.Var) and v in where}  # fmt: skip


def fold_keys(values: Sequence, number: Any) -> list:
    """Folds a number into the dropout key of every implicit array.

    Masks of places depend on nothing else: not on the round of a loop that has a part of them.
    """

    def fold(v: Any) -> Any:
        if not is_implicit(v) or v.key is None or v.places is not None:
            return v
        # `fold_in` takes one key; a stack has one for each index.
        keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(v.key.reshape(-1))
        return dataclasses.replace(v, key=keys.reshape(v.key.shape))

    return [fold(v) for v in values]


def has_dropout(values: Sequence) -> bool:
    return any(is_implicit(v) and v.key is not None and v.dropout > 0 for v in values)


def jit(context: Context, eqn: Any, values: list) -> list:
    """An inner jit: one jitted function, shared by every call with the same structure."""
    inner, name = eqn.params["jaxpr"], eqn.params["name"]
    if name == AT_PLACES:
        return masked_at(values)
    # By identity, as comparing jaxprs is slow. The memo keeps the jaxpr, so its id stays its own.
    leaves, tree = jax.tree.flatten(values)
    key = (id(compat.open_jaxpr(inner)[0]), tree)
    warned = len(context.warned)
    if key in context.memo:
        run, shape, _, calls = context.memo[key]
        calls[0] += 1
        if has_dropout(values):
            # The memoized function draws the masks of its first call: fold in which call this is.
            leaves = jax.tree.leaves(fold_keys(values, _CALL_SITES + calls[0]))
    else:
        run, shape = _flat_function(lambda xs: enter(context, inner, xs), tree)
        run.__name__ = name
        run = jax.jit(run)
    out = run(*leaves)
    # A fallback's warning names one leaf: the next call, with another, is traced again for its own.
    if key not in context.memo and len(context.warned) == warned:
        context.memo[key] = (run, shape, inner, [0])
    outs = jax.tree.unflatten(shape[0], out)
    found = forwarded(inner, values)
    return [found.get(i, x) for i, x in enumerate(outs)]


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
    found = forwarded(params["jaxpr"], values)
    return [found.get(i, x) for i, x in enumerate(outs)]


def shard_map(context: Context, eqn: Any, values: list) -> list:
    """`jax.shard_map`: the factors enter under the specs that follow from the weight's."""
    p = eqn.params
    specs, inputs, inside = [], [], []
    for v, spec in zip(values, p["in_specs"], strict=True):
        there = v
        if is_implicit(v):
            w, w_spec, w_there = base_weight.for_shard_map(v, spec, p["mesh"])
            spec = dataclasses.replace(_part_specs(v, spec), w=w_spec)
            v = dataclasses.replace(v, w=w, places=None)
            there = v if w_there is None else dataclasses.replace(v, w=w_there)
        specs.append(spec)
        inputs.append(v)
        inside.append(there)
    # Inside a shard_map a quantized weight has the static shape of its part, so its tree differs.
    leaves, tree = jax.tree.flatten(inputs)[0], jax.tree.structure(inside)
    flat_specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

    def run(*xs) -> Any:
        outs = enter(context, p["jaxpr"], jax.tree.unflatten(tree, xs))
        return [context.fall_back(x, eqn, "it is returned from shard_map") if is_implicit(x) else x
                for x in outs]  # fmt: skip

    mapped = jax.shard_map(
        context.resumable(run),
        mesh=p["mesh"],
        in_specs=tuple(flat_specs),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=compat.mapped_axes(p),
    )
    return mapped(*leaves)


def _part_specs(v: Implicit, spec: PartitionSpec) -> Implicit:
    """A weight's tree with a spec in place of every array."""
    parts = {
        part: None if getattr(v, part) is None else part_spec(spec, v.roles, part) for part in PARTS
    }
    return dataclasses.replace(v, w=spec, **parts)
