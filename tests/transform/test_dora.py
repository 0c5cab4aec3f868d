"""DoRA's gradient: the norm is a constant, as in the paper, though it depends on the factors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.transform import dora

pytestmark = pytest.mark.once

KEYS = jax.random.split(jax.random.key(0), 5)
W, X = jax.random.normal(KEYS[0], (6, 4)), jax.random.normal(KEYS[1], (3, 6))
A, B = jax.random.normal(KEYS[2], (6, 2)), jax.random.normal(KEYS[3], (2, 4))
M, SCALE = jnp.exp(jax.random.normal(KEYS[4], (4,))), jnp.float32(0.7)


def norm(a, b):
    return jnp.linalg.norm(W + SCALE * a @ b, axis=0)


def by_hand(parts, constant=None):
    a, b, m = parts
    whole = m * (W + SCALE * a @ b) / (norm(a, b) if constant is None else constant)
    return jnp.sum(jnp.sin(X @ whole))


def one(parts, reverse_only):
    a, b, m = parts
    leaf = lora.LoraArray(W, a, b, SCALE, m)
    fn = lora.lorafy(lambda p, x: x @ p["w"], reverse_only=reverse_only)
    return jnp.sum(jnp.sin(fn({"w": leaf}, X)))


def in_a_stack(parts, reverse_only):
    a, b, m = parts
    leaf = lora.LoraArray(W, A, B, SCALE, M)
    stacked = lora.stack([{"w": leaf}] * 2, train=True)
    put = {"a": a, "b": b, "m": m}
    fields = {k: getattr(stacked["w"], k).at[1].set(x) for k, x in put.items()}
    own = {"w": dataclasses.replace(stacked["w"], **fields)}
    fn = lora.lorafy(lambda p, x: x @ p["w"], reverse_only=reverse_only)
    return jnp.sum(jnp.sin(fn(own, X, adapter_ids=jnp.ones(3, int))))


@pytest.mark.parametrize("reverse_only", [False, True])
@pytest.mark.parametrize("loss", [one, in_a_stack])
def test_the_norm_is_a_constant_of_the_gradient(loss, reverse_only):
    parts = (A, B, M)
    value, got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(parts, reverse_only)
    want = jax.grad(by_hand)(parts, norm(A, B))
    np.testing.assert_allclose(value, by_hand(parts), rtol=1e-5)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    # The derivative of the norm is no small matter here.
    whole = jax.grad(by_hand)(parts)
    assert np.abs(whole[1] - want[1]).max() > 0.1 * np.abs(want[1]).max()


def test_gains_of_stacked_layers_are_each_adapters_own():
    """The axis of the adapters follows that of the layers; their scales differ."""

    def leaf(seed, scale):
        w, a, b = (jnp.stack([x, -2 * x]) for x in (W, A + seed, B))
        scales, m = jnp.array([scale, 2.0]), jnp.stack([M, M + seed])
        return lora.LoraArray(w, a, b, scales, m, roles="sio")

    leaves = [leaf(1, 0.5), leaf(2, 1.5)]
    stacked = lora.stack([{"w": x} for x in leaves], train=True)["w"]
    want = jnp.stack([dora.gain(x) for x in leaves], 1)
    got = dora.gains(stacked)
    assert got is not None
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_weight_that_its_change_cancels_has_a_norm():
    """The three terms of its square may round to below zero."""
    a, b = jax.random.normal(KEYS[0], (16, 3)), jax.random.normal(KEYS[1], (3, 200))
    found = dora.norm(lora.LoraArray(-0.5 * a @ b, a, b, jnp.float32(0.5)))
    # Roots of the rounding of squares of 16 numbers.
    np.testing.assert_allclose(found, np.zeros(200), atol=2e-2)


def test_the_norm_of_a_half_weight_is_of_single_precision():
    w = W.astype(jnp.bfloat16)
    found = dora.norm(lora.LoraArray(w, A, B, SCALE))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jnp.linalg.norm(w + SCALE * A @ B, axis=0), rtol=1e-5)
