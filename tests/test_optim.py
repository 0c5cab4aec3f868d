"""Gradients through the whole tree: of what trains, over float and quantized bases alike."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.train.step import init_state

X = jax.random.normal(jax.random.key(9), (5, 32))
BASE = {"up": jax.random.normal(jax.random.key(0), (32, 16)) / 4, "bias": jnp.ones(16)}


def fn(p, x):
    return jnp.tanh(x @ p["up"]) + p["bias"]


def loss(p, x, power=2):
    y = lora.lorafy(fn)(p, x)
    return jnp.sum(y**power)


def adapted(base):
    config = lora.LoraConfig(rank=2, target_modules=("up",), init="random")
    return lora.init(jax.random.key(1), lora.plan(config, fn, base, X), base)


@pytest.fixture(scope="module")
def quantized():
    return adapted(lora.quantize(BASE, ["up"], block_size=16))


def by_hand(params):
    trainable, frozen = lora.split(params)
    return jax.value_and_grad(lambda t: loss(lora.combine(t, frozen), X))(trainable)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradients_are_those_of_the_trainable_half(quantized):
    for params in (adapted(BASE), quantized):
        value, grads = lora.value_and_grad(loss)(params, X)
        same((value, grads), by_hand(params))
        assert grads["bias"] is None and grads["up"].w is None
        same(lora.grad(loss)(params, X, power=2), grads)


def test_auxiliary_outputs_come_along(quantized):
    def both(p, x):
        return loss(p, x), {"y": lora.lorafy(fn)(p, x)}

    (value, aux), grads = lora.value_and_grad(both, has_aux=True)(quantized, X)
    same((value, grads), by_hand(quantized))
    assert aux["y"].shape == (5, 16)
    again, aux = lora.grad(both, has_aux=True)(quantized, X)
    same(again, grads)
    assert list(aux) == ["y"]


def test_codes_have_no_gradient(quantized):
    """JAX refuses them itself; with `allow_int` the base's gradient is zero and masked away."""
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(loss)(quantized, X)
    whole = jax.grad(loss, allow_int=True)(quantized, X)
    assert not np.any(whole["up"].w.scale)
    tx = lora.masked(optax.sgd(0.1))
    state = tx.init(quantized)
    moved: list[Any] = [
        optax.apply_updates(quantized, tx.update(grads, state, quantized)[0])
        for grads in (whole, lora.grad(loss)(quantized, X))
    ]
    same(*moved)
    same(lora.split(moved[0])[1], lora.split(quantized)[1])
    assert np.any(moved[0]["up"].b != quantized["up"].b)


def test_what_cannot_train_is_said(quantized):
    plain = lora.quantize(BASE, ["up"], block_size=16)
    for start in (lora.grad(loss), lora.masked(optax.sgd(0.1)).init):
        with pytest.raises(ValueError, match="holds nothing that trains: pass the tree that"):
            start(plain, *([X] if start.__name__ == "run" else []))
    with pytest.raises(ValueError, match="`trainable` holds the base too, which would get moments"):
        init_state(jax.random.key(0), quantized, optax.sgd(0.1))
    half = lora.split(quantized)[0]
    for call in (lora.grad(loss), loss):
        with pytest.raises(ValueError, match="no base weight at `up`: pass the whole tree"):
            call(half, X)


def test_optax_finds_its_parameters_in_a_masked_state(quantized):
    tx = lora.masked(optax.adam(0.1))
    state = tx.init(quantized)
    doubled: Any = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert {float(x.min()) for x in jax.tree.leaves(doubled[0].mu)} == {1.0}


def test_the_wrapped_transformation_sees_the_trainable_half_alone(quantized):
    seen: list = []

    def update(updates, state, params=None):
        seen.append([jax.tree.structure(x) for x in (updates, params)])
        return updates, state

    tx = lora.masked(optax.GradientTransformation(lambda params: (), update))
    half, grads = lora.split(quantized)[0], lora.grad(loss)(quantized, X)
    for params in (quantized, half):
        tx.update(grads, tx.init(params), params)
    assert seen == [[jax.tree.structure(half)] * 2] * 2


@pytest.mark.parametrize("tx", [optax.sgd(1e-2), optax.adam(1e-3), optax.adamw(1e-3)])
def test_a_whole_tree_optimizer_is_found_out_when_the_adapter_is_saved(tx, tmp_path):
    """It moves the base, which the adapter's file does not have; `masked` does not."""
    params = {"up": {"kernel": jnp.eye(32, 8)}}

    def run(p, x):
        return x @ p["up"]["kernel"]

    def loss(p):
        return jnp.mean(lora.lorafy(run)(p, X) ** 2)

    config = lora.LoraConfig(rank=2, init="random", target_modules=("up",))
    start = lora.init(jax.random.key(0), lora.plan(config, run, params, X), params)
    for wrapped, moves in ((tx, True), (lora.masked(tx), False)):
        tree: Any = start
        state = wrapped.init(start)
        for _ in range(2):
            updates, state = wrapped.update(jax.grad(loss)(tree), state, tree)
            tree = cast(Any, optax.apply_updates(tree, updates))
        assert bool((tree["up"]["kernel"].w != params["up"]["kernel"]).any()) is moves
        if moves:
            with pytest.raises(ValueError, match=r"on the whole tree.*`lora\.split.*lora\.masked"):
                lora.hf.save_peft(tmp_path / "a", tree, config)
        else:
            lora.hf.save_peft(tmp_path / "a", tree, config)
