"""The table: every case of the laws, and the model, plan and adapters of each, made once."""

import dataclasses
import functools
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax import paths
from lora_jax.tree import stack_values

from tests.laws import (
    cases_blocks,
    cases_control,
    cases_dots,
    cases_hard,
    cases_linen,
    cases_low_rank,
    cases_nnx,
    cases_structure,
)
from tests.laws.case import Case, normal

CASES: tuple[Case, ...] = (
    *cases_dots.CASES,
    *cases_structure.CASES,
    *cases_low_rank.CASES,
    *cases_control.CASES,
    *cases_hard.CASES,
    *cases_linen.CASES,
    *cases_nnx.CASES,
    *cases_blocks.CASES,
)


# One or more cases of every kind of rule: these also run eagerly, are differentiated twice, and
# their gradients are taken on every supported release.
WHOLE = frozenset(
    "dot_matmul dot_transposed dot_partial dot_inner_product dot_batched conv_1d conv_grouped "
    "gather_tied gather_experts split_columns concatenate_rows gain_columns checkpoint_policy "
    "inner_gradient scan scan_checkpoint scan_constant cond shard_map heads_oio experts_summed "
    "weight_norm".split()
)
# JAX releases differ in control flow and in what they trace, not in what a rule computes: that a
# case is traced as expected is checked on all releases, the numbers of the rest on one.
REPEATED = frozenset(case.name for case in cases_control.CASES) | WHOLE
REVERSIBLE = tuple(case for case in CASES if case.reverse)
# Of the rest, whose gradients are taken where the clock runs; the others' values are.
QUARTER = frozenset(case.name for case in REVERSIBLE[::4]) - REPEATED


def marked(cases, *, slow) -> list:
    """The cases as parameters.

    Args:
      cases: some of `CASES`.
      slow: `(name)` to whether a case that one release is enough for waits for all tests.
    """

    def marks(name: str) -> list:
        if name in REPEATED:
            return []
        return [pytest.mark.once, *([pytest.mark.slow] if slow(name) else [])]

    return [pytest.param(c, marks=marks(c.name), id=str(c)) for c in cases]


# What is compiled once and run once: the laws are about mathematics, not about LLVM's tuning.
QUICK = {"xla_backend_optimization_level": 0}
TEXT = re.compile(
    r"`(?P<path>[^`]+)` has no low-rank form in `(?P<primitive>[\w-]+)` at (?P<line>.+?): "
)


class Model(NamedTuple):
    """A case made."""

    fn: Any
    params: Any
    args: tuple
    plan: lora.Plan
    lora_params: Any


def config_of(case: Case, **changes) -> lora.LoraConfig:
    """The config that targets the case's leaves by their paths."""
    fields = {"rank": 2, "alpha": 3, "target_modules": tuple(case.roles)}
    return lora.LoraConfig(**(fields | dict(case.config) | changes))


@functools.cache
def model(case_name: str) -> Model:
    """The case's model, planned and with adapters of made-up numbers, neither factor zero."""
    case = by_name(case_name)
    fn, params, args = case.build()
    plan = lora.plan(config_of(case), fn, params, *args)
    return Model(fn, params, args, plan, adapted(plan, params))


def adapted(plan: lora.Plan, params):
    """`lora.init` with numpy's numbers in A and B: nothing is compiled for them."""
    shapes = jax.eval_shape(lambda p: lora.init(jax.random.key(0), plan, p), params)
    planned = plan.by_path()

    def fill(key_path, x, w):
        if not isinstance(x, lora.LoraArray):
            return w
        leaf = planned[paths.spell(key_path)]
        seed = zlib.crc32(leaf.path.encode())
        return dataclasses.replace(
            x,
            w=w,
            a=normal(seed, *x.a.shape).astype(x.a.dtype),
            b=normal(seed + 1, *x.b.shape).astype(x.b.dtype),
            scale=jnp.asarray(stack_values(leaf, leaf.scales), jnp.float32),
        )

    return jax.tree_util.tree_map_with_path(fill, shapes, params, is_leaf=lora.is_lora)


def by_name(name: str) -> Case:
    return {case.name: case for case in CASES}[name]


def materialized(caught) -> frozenset:
    """The (path, primitive) pairs that warnings name; any other warning fails the test."""
    found = set()
    for warning in caught:
        assert issubclass(warning.category, lora.MaterializedWarning), warning.message
        match = TEXT.match(str(warning.message))
        assert match, warning.message
        found.add((match["path"], match["primitive"]))
    return frozenset(found)


def outputs(tree) -> list[jax.Array]:
    """The floating-point arrays of an output; an adapter the model handed back counts merged."""
    leaves = jax.tree.leaves(lora.merge(tree))
    return [x for x in map(jnp.asarray, leaves) if jnp.issubdtype(x.dtype, jnp.floating)]


def with_dropout(lora_params, rate: float):
    """The tree with this dropout probability at every adapter."""

    def change(x):
        return dataclasses.replace(x, dropout=rate) if isinstance(x, lora.LoraArray) else x

    return jax.tree.map(change, lora_params, is_leaf=lora.is_lora)


def adapter_bytes(lora_params) -> int:
    """Bytes of every A and B, found without `split`."""
    leaves = jax.tree.leaves(lora_params, is_leaf=lora.is_lora)
    return sum(x.a.nbytes + x.b.nbytes for x in leaves if isinstance(x, lora.LoraArray))


def loss(tree) -> jax.Array:
    """A scalar that depends on every output in a way that is not linear."""
    parts = []
    for x in outputs(tree):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        weights = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        parts.append(jnp.sum(weights * x + jnp.sin(x)))
    return sum(parts, jnp.zeros(()))


def assert_near(got, want, tolerance: float, what: str):
    """Every array of `got` is `want`'s, relative to the largest absolute value of the latter."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want), what
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape and x.dtype == y.dtype, (what, i, x, y)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, y = x.astype(wide), y.astype(wide)
        error = float(jnp.max(jnp.abs(x - y), initial=0))
        size = float(jnp.max(jnp.abs(y), initial=0)) + 1e-6
        assert error <= tolerance * size, f"{what}[{i}]: error {error:.2e} of {size:.2e}"
