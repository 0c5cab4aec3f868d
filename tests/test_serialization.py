"""Adapted trees in pickles, in `flax.serialization` and in `jax.export`."""

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.quant.formats import FormatName

X = jnp.ones((2, 64))
TREES = ["lora", "dora", "quantized", "saved", "bias", "stack"]


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def tree_of(kind: str):
    params = {"up": jnp.full((64, 64), 0.1), "down": jnp.full((64, 8), 0.1)}
    if kind == "quantized":
        params = lora.quantize(params, ("up",))
    fields = {
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
        "saved": {"modules_to_save": ("down",)},
    }.get(kind, {})
    config = lora.LoraConfig(rank=2, target_modules=("up",), **fields)
    tree = lora.init(jax.random.key(0), lora.plan(config, fn, params, X), params)
    return lora.stack([tree, tree]) if kind == "stack" else tree


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("kind", TREES)
def test_pickle_and_flax_give_the_tree_back(kind: str):
    tree = tree_of(kind)
    assert_same(pickle.loads(pickle.dumps(tree)), tree)
    blank = jax.tree.map(jnp.zeros_like, tree)
    assert_same(flax.serialization.from_bytes(blank, flax.serialization.to_bytes(tree)), tree)
    if kind != "stack":
        trainable, _ = lora.split(tree)
        state = flax.serialization.to_state_dict(trainable)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        assert_same(flax.serialization.from_state_dict(trainable, state), trainable)


def test_a_state_of_another_plan_is_an_error():
    state = flax.serialization.to_state_dict(tree_of("lora"))
    with pytest.raises(ValueError, match=r"state of a `LoraArray` has the fields .*same plan"):
        flax.serialization.from_state_dict(tree_of("dora"), state)


@pytest.mark.parametrize("kind", [kind for kind in TREES if kind != "stack"])
def test_an_exported_call_takes_the_tree(kind: str):
    pytest.importorskip("flatbuffers", reason="jax.export writes files with it")
    tree = tree_of(kind)
    call = jax.jit(lora.lorafy(fn))
    text = export.export(call)(tree, X).serialize()
    np.testing.assert_allclose(export.deserialize(text).call(tree, X), call(tree, X), rtol=1e-6)


@pytest.mark.parametrize(("form", "double"), [("nf4", False), ("int8", False), ("nf4", True)])
def test_quantized_bases_on_explicit_axes_pass_through_files(form: FormatName, double: bool):
    """The gradient of `x` has its axes again, and scales are looked up without a reshape."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    params = {"up": jnp.full((64, 64), 0.1), "down": jnp.full((64, 8), 0.1)}
    params = lora.quantize(params, ("up",), format=form, double_quant=double)
    spec = PartitionSpec(None, "tensor")
    params = jax.device_put(
        params,
        jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            lora.partition_specs(params, {"up": spec, "down": PartitionSpec()}),
            is_leaf=lambda spec: isinstance(spec, PartitionSpec),
        ),
    )
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(mesh, PartitionSpec("data")))
    config = lora.LoraConfig(rank=2, target_modules=("up",))
    tree = lora.init(jax.random.key(0), lora.plan(config, fn, params, x), params)
    assert_same(pickle.loads(pickle.dumps(tree)), tree)
    call = jax.jit(lora.lorafy(fn))
    (dx,) = jax.vjp(lambda x: call(tree, x), x)[1](call(tree, x))
    assert jax.typeof(dx).sharding.spec == PartitionSpec("data", None)
    text = export.export(call)(tree, x).serialize(vjp_order=1)
    np.testing.assert_allclose(export.deserialize(text).call(tree, x), call(tree, x), rtol=1e-6)
