"""`lora_bias`: a bias on B, added wherever the weight's product is, and merged into the base's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import LoraArray

from tests.support.random_arrays import normal

pytestmark = pytest.mark.once

KEY = jax.random.key(0)


def adapted(fn, params, *args, **fields):
    """A tree whose adapters, biases among them, are all random."""
    config = lora.LoraConfig(rank=2, alpha=3, lora_bias=True, init="random", **fields)
    plan = lora.plan(config, fn, params, *args)
    tree = lora.init(KEY, plan, params)
    filled = [
        dataclasses.replace(x, bias=normal(i + 7, *x.bias.shape)) if isinstance(x, LoraArray) else x
        for i, x in enumerate(jax.tree.leaves(tree, is_leaf=lora.is_lora))
    ]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lora.is_lora), filled), plan


def close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


def dense(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


DENSE = {
    "up": {"kernel": normal(1, 5, 7), "bias": normal(2, 7)},
    "down": {"kernel": normal(3, 7, 4)},
}


def test_a_product_gets_the_scaled_bias_whether_or_not_the_base_has_one():
    x = normal(4, 3, 5)
    tree, plan = adapted(dense, DENSE, x)
    up, down = tree["up"]["kernel"], tree["down"]["kernel"]
    assert plan.trainable == 2 * (5 + 7) + 7 + 2 * (7 + 4) + 4
    s = 3 / 2
    hidden = jnp.tanh(x @ (up.w + s * up.a @ up.b) + tree["up"]["bias"] + s * up.bias)
    expected = hidden @ (down.w + s * down.a @ down.b) + s * down.bias
    close(lora.lorafy(dense, strict=True)(tree, x), expected)


def test_the_start_is_the_identity_and_the_bias_trains():
    x = normal(4, 3, 5)
    config = lora.LoraConfig(rank=2, lora_bias=True)
    tree = lora.init(KEY, lora.plan(config, dense, DENSE, x), DENSE)
    np.testing.assert_array_equal(lora.lorafy(dense)(tree, x), dense(DENSE, x))
    trainable, frozen = lora.split(tree)

    def loss(trainable):
        return jnp.sum(lora.lorafy(dense)(lora.combine(trainable, frozen), x) ** 2)

    gradient = jax.grad(loss)(trainable)["down"]["kernel"].bias
    close(gradient, 2 * (16 / 2) * jnp.sum(dense(DENSE, x), axis=0))  # s = alpha / rank


def test_stacked_layers_and_split_heads():
    params = {"layers": {"q": {"kernel": normal(1, 3, 6, 2, 3)}}}

    def fn(params, x):
        def step(x, kernel):
            return jnp.tanh(jnp.einsum("td,dhk->thk", x, kernel)).reshape(-1, 6), None

        return jax.lax.scan(step, x, params["layers"]["q"]["kernel"])[0]

    x = normal(2, 4, 6)
    tree, _ = adapted(fn, params, x, target_modules=("q",))
    leaf = tree["layers"]["q"]["kernel"]
    assert leaf.bias.shape == (3, 2, 3)
    y = x
    for i in range(3):
        change = leaf.scale[i] * jnp.einsum("dr,rhk->dhk", leaf.a[i], leaf.b[i])
        y = jnp.einsum("td,dhk->thk", y, leaf.w[i] + change) + leaf.scale[i] * leaf.bias[i]
        y = jnp.tanh(y).reshape(-1, 6)
    close(lora.lorafy(fn, strict=True)(tree, x), y)


def test_a_convolution():
    params = {"conv": {"kernel": normal(1, 3, 4, 6)}}

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    x = normal(2, 2, 8, 4)
    tree, _ = adapted(fn, params, x)
    leaf = tree["conv"]["kernel"]
    merged = {"conv": {"kernel": leaf.w + lora.array.delta(leaf)}}
    close(lora.lorafy(fn)(tree, x), fn(merged, x) + leaf.scale * leaf.bias)


@pytest.mark.parametrize("axis", [0, 1])
def test_fused_kernels(axis):
    """Weights joined in the model: biases stand side by side, or add up where inputs do."""
    params = {n: {"kernel": normal(i, 4, 4)} for i, n in enumerate(("q", "k", "v"))}

    def fn(params, x):
        kernels = [params[n]["kernel"] for n in ("q", "k", "v")]
        return (x[:, : 4 if axis else 12]) @ jnp.concatenate(kernels, axis=axis)

    x = normal(9, 3, 12)
    tree, _ = adapted(fn, params, x, target_modules=("q", "v"))
    leaves = [tree[n]["kernel"] for n in ("q", "v")]
    biases = [leaf.scale * leaf.bias for leaf in leaves]
    plain = {**params, **{n: {"kernel": leaf.w + lora.array.delta(leaf)}
                          for n, leaf in zip(("q", "v"), leaves, strict=True)}}  # fmt: skip
    change = jnp.concatenate([biases[0], jnp.zeros(4), biases[1]]) if axis else sum(biases)
    close(lora.lorafy(fn, strict=True)(tree, x), fn(plain, x) + change)


def test_merge_adds_it_to_the_bases_bias_and_unmerge_takes_it_out():
    x = normal(4, 3, 5)
    tree, _ = adapted(dense, DENSE, x, target_modules=("up",))
    merged = lora.merge(tree)
    close(dense(merged, x), lora.lorafy(dense)(tree, x))
    back = lora.unmerge(merged, tree)
    jax.tree.map(np.testing.assert_array_equal, back, DENSE)
    further = {**merged, "up": {**merged["up"], "bias": merged["up"]["bias"] + 1}}
    close(lora.unmerge(further, tree)["up"]["bias"], DENSE["up"]["bias"] + 1)


def test_a_module_without_a_bias_cannot_be_merged():
    tree, _ = adapted(dense, DENSE, normal(4, 3, 5))
    with pytest.raises(ValueError, match="merged into a bias `down.bias` of the base, but there"):
        lora.merge(tree)
    narrow = {**tree, "down": {**tree["down"], "bias": jnp.zeros(1)}}
    with pytest.raises(ValueError, match=r"`down.bias` of the base, but that has shape \(1,\)"):
        lora.merge(narrow)


def test_where_a_bias_has_no_place_the_plan_says_so():
    def transposed(params, x):  # nothing is contracted: the weight itself is the result
        return x @ params["up"]["kernel"], params["up"]["kernel"] * 2 + 1

    def grouped(params, x):
        return jax.lax.ragged_dot(x, params["up"]["kernel"], jnp.array([1, 2]))

    experts = {"up": {"kernel": normal(1, 2, 5, 7)}}
    for fn, base in ((transposed, DENSE), (grouped, experts)):
        with pytest.raises(ValueError, match="`up.kernel` is used otherwise than in a product"):
            adapted(fn, base, normal(4, 3, 5), target_modules=("up",))

    def lookup(params, ids):
        return params["table"]["embedding"][ids]

    params = {"table": {"embedding": normal(1, 9, 4)}}
    with pytest.raises(ValueError, match="lora_bias=True does not work with the embedding"):
        adapted(lookup, params, jnp.arange(3), target_modules=("table",))
