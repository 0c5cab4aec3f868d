"""Every row of the table of primitives serves all four walks over a jaxpr."""

import dataclasses
from typing import get_args

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import pytest
from jax import core
from jax.interpreters import batching, mlir

import lora_jax as lora
from lora_jax import compat
from lora_jax.analysis.step_memory import program
from lora_jax.plan import usage as dataflow
from lora_jax.transform import primitive, primitives
from lora_jax.transform.many import token_axis
from lora_jax.transform.primitives import PRIMITIVES


@pytest.mark.parametrize("name", PRIMITIVES)
def test_row_decides_on_every_walk(name):
    row = PRIMITIVES[name]
    assert row.memory in get_args(primitive.Memory)
    assert callable(row.tokens)
    flow = row.dims
    assert all(map(callable, (flow.maps, flow.contracted, flow.picked)))
    assert all(map(callable, (flow.keeps_rows, flow.takes_data)))
    assert flow.pairwise in (True, False)
    assert row.rule is None or callable(row.rule)
    # A body is entered by every walk; what rearranges or consumes works for many adapters too.
    assert row.body is None or row.body in get_args(primitive.Body)
    assert (row.many is None) == (row.rule is None) or row.body is not None


def test_rows_have_no_defaults():
    fields = dataclasses.fields(primitive.Primitive)
    assert all(f.default is dataclasses.MISSING for f in fields)
    assert all(f.default_factory is dataclasses.MISSING for f in fields)
    assert primitive.DimFlow._field_defaults == {}


def test_every_walk_has_every_body():
    bodies = set(get_args(primitive.Body))
    assert set(dataflow._BODIES) == bodies
    assert set(token_axis._LOOPS) | {"call"} == bodies
    assert {row.body for row in PRIMITIVES.values()} == bodies | {None}


def test_names_are_those_compat_gives():
    assert not set(PRIMITIVES) & set(compat._RENAMED)


# A made-up primitive: a transpose of the last two dims.
turn_p = jexc.Primitive("turn")
turn_p.def_impl(lambda x: jnp.swapaxes(x, -1, -2))


@turn_p.def_abstract_eval
def _turned(x):
    return core.ShapedArray((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)


mlir.register_lowering(
    turn_p, mlir.lower_fun(lambda x: jnp.swapaxes(x, -1, -2), multiple_results=False)
)


def turn(x):
    return turn_p.bind(x)


batching.primitive_batchers[turn_p] = lambda args, dims: (
    turn_p.bind(jnp.moveaxis(args[0], dims[0], 0)),
    0,
)

CONFIG = lora.LoraConfig(rank=2, target_modules=("w",))
PARAMS = {"w": np.random.default_rng(0).normal(size=(6, 4)).astype("float32")}
X = np.random.default_rng(1).normal(size=(2, 3, 4)).astype("float32")


def model(params, x):
    """The weight goes through the primitive once, the activation twice."""
    return turn(turn(x)) @ turn(params["w"])


@pytest.fixture
def turn_row(monkeypatch):
    def like_a_transpose(context, eqn, values):
        rule = PRIMITIVES["transpose"].rule
        assert rule is not None
        return rule(context, _with_permutation(eqn), values)

    row = dataclasses.replace(
        PRIMITIVES["transpose"],
        rule=like_a_transpose,
        dims=PRIMITIVES["transpose"].dims._replace(
            maps=lambda eqn, k: [[(d,) for d in _swapped(eqn)]]
        ),
        tokens=lambda eqn, shapes, ins: frozenset(_swapped(eqn).index(d) for d in ins[0]),
    )
    monkeypatch.setitem(primitives.PRIMITIVES, "turn", row)


def _swapped(eqn):
    *front, i, j = range(eqn.invars[0].aval.ndim)
    return (*front, j, i)


def _with_permutation(eqn):
    return eqn.replace(params={"permutation": _swapped(eqn)})


def adapters(plan, count):
    for seed in range(count):
        tree = lora.init(jax.random.key(seed), plan, PARAMS)
        shape = tree["w"].b.shape
        b = np.random.default_rng(seed).normal(size=shape).astype("float32")
        yield {"w": dataclasses.replace(tree["w"], b=jnp.asarray(b))}


def test_without_a_row_no_walk_follows_it():
    with pytest.raises(ValueError, match="no contraction and no lookup"):
        lora.plan(CONFIG, model, PARAMS, X)
    assert _nodes() == ["turn", "turn", "turn", "dot_general"]


@pytest.mark.usefixtures("turn_row")
def test_one_row_serves_all_four_walks():
    plan = lora.plan(CONFIG, model, PARAMS, X)
    assert plan.by_path()["w"].roles == "oi"

    first, second = adapters(plan, 2)
    run = lora.lorafy(model, strict=True)
    expected = [model(lora.merge(tree), X) for tree in (first, second)]
    np.testing.assert_allclose(run(first, X), expected[0], rtol=1e-4, atol=1e-5)

    stacked = lora.stack([first, second])
    for strategy in ("gathered", "grouped"):
        run = lora.lorafy(model, strict=True, adapter_strategy=strategy)
        by_row = run(stacked, X, adapter_ids=np.array([0, 1]))
        wanted = [expected[0][0], expected[1][1]]
        np.testing.assert_allclose(by_row, wanted, rtol=1e-4, atol=1e-5)

    ids = np.array([[0, 1, 0], [1, -1, 0]])
    by_token = lora.lorafy(model, strict=True)(stacked, X, adapter_ids=ids)
    every = np.stack([*expected, model(PARAMS, X)])
    wanted = np.take_along_axis(every, ids[None, :, :, None], 0)[0]
    np.testing.assert_allclose(by_token, wanted, rtol=1e-4, atol=1e-5)

    assert _nodes() == ["dot_general"]  # views of their operands, as a transpose


def _nodes():
    jaxpr = jax.make_jaxpr(model)(PARAMS, X)
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    found = program.read(jaxpr, [program.HELD] * 2, stacked_from=1)
    return [node.op for node in found.nodes]
