"""`lorafy(fn, reverse_only=True)`: the same values and gradients, forward mode refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora

from tests.support.random_arrays import normal

pytestmark = pytest.mark.once

X = normal(0, 3, 5, 8)


def scanned(p, x):
    def body(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return lax.scan(body, x, p["layers"])[0]


def heads(p, x):
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    return jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["o"])


def tied(p, x):
    return jnp.tanh(x @ p["e"].T) @ p["e"]


def experts(p, x):
    return jnp.einsum("ecd,edf->ecf", x, p["w"])


CASES = {
    "scanned": (
        scanned,
        {"layers": {"up": normal(1, 4, 8, 16, scale=0.3), "down": normal(2, 4, 16, 8, scale=0.3)}},
    ),
    "heads": (heads, {"q": normal(3, 8, 2, 6, scale=0.3), "o": normal(4, 2, 6, 8, scale=0.3)}),
    "tied": (tied, {"e": normal(5, 12, 8, scale=0.3)}),
    "experts": (experts, {"w": normal(6, 3, 8, 10, scale=0.3)}),
}


def losses(fn, params, **config):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = tuple(path[-1].key for path, _ in leaves)
    config = lora.LoraConfig(rank=2, target_modules=names, init="random", **config)
    trainable, frozen = lora.split(
        lora.init(jax.random.key(7), lora.plan(config, fn, params, X), params)
    )

    def make(reverse_only):
        call = lora.lorafy(fn, strict=True, reverse_only=reverse_only)

        def loss(trainable, x, key=None):
            return jnp.sum(jnp.sin(call(lora.combine(trainable, frozen), x, lora_key=key)))

        return loss

    return make(False), make(True), trainable


def close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32 sums in another order
        np.testing.assert_allclose(g, w, atol=2e-6 * (1 + np.abs(w).max()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"dropout": 0.3}], ids=str)
def test_values_and_gradients_are_the_same(name, config):
    if name == "tied" and "use_dora" in config:
        pytest.xfail("DoRA's magnitude of a table used both ways is partly summed: it falls back")
    plain, own, trainable = losses(*CASES[name], **config)
    key = jax.random.key(3) if "dropout" in config else None
    both = jax.jit(jax.value_and_grad(own))(trainable, X, key)
    close(both, jax.jit(jax.value_and_grad(plain))(trainable, X, key))


@pytest.mark.slow
def test_under_vmap_remat_and_twice():
    plain, own, trainable = losses(*CASES["scanned"])
    rows = X[:, None]
    per_row = [jax.vmap(jax.grad(f), in_axes=(None, 0))(trainable, rows) for f in (own, plain)]
    close(*per_row)
    close(*(jax.grad(jax.checkpoint(f))(trainable, X) for f in (own, plain)))

    def twice(f):
        squares = lambda t: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(f)(t, X)))  # noqa: E731
        return jax.grad(squares)(trainable)

    close(twice(own), twice(plain))


def test_forward_mode_is_refused_not_wrong():
    _, own, trainable = losses(*CASES["heads"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda t: own(t, X), (trainable,), (trainable,))


def test_bfloat16_keeps_dtypes():
    fn, params = CASES["heads"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = X.astype(jnp.bfloat16)
    config = lora.LoraConfig(rank=2, target_modules=("q", "o"), init="random")
    trainable, frozen = lora.split(
        lora.init(jax.random.key(7), lora.plan(config, fn, params, x), params)
    )

    def grads(reverse_only):
        call = lora.lorafy(fn, reverse_only=reverse_only)
        return jax.grad(
            lambda t: jnp.sum(call(lora.combine(t, frozen), x).astype(jnp.float32) ** 2)
        )(trainable)

    got, want = grads(True), grads(False)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype == jnp.float32
        np.testing.assert_allclose(g, w, atol=0.02 * np.abs(w).max())  # bfloat16 has 8 bits
