"""What the page of families says of every decoder: quantized bases, and weights over a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models.sharding import RULES
from lora_jax.quant.array import is_quant
from lora_jax.quant.loading import is_kernel
from lora_jax.recipes.finetune import plan_model
from lora_jax.train.examples import Example

from tests.support.decoder_checks import check_steps_of
from tests.support.decoders import FAMILIES, family
from tests.support.random_arrays import moved
from tests.support.torch_models import texts

# Matrices that one axis of the mesh does not divide stay whole; ranks above a matrix' are left out.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]

DRAW = np.random.default_rng(0)
TOKENS = DRAW.integers(0, 61, (2, 9))
EXAMPLES = [
    Example(DRAW.integers(0, 61, size=n).astype(np.int32), np.arange(n) > 0, f"example {n}")
    for n in (9, 12, 10, 8, 11, 7, 13, 12)
]
CONFIG = lora.LoraConfig(rank=2, alpha=4, target_modules="all-linear")


def adapted(model, params):
    return lora.init(jax.random.key(1), plan_model(model, CONFIG), params)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "int4"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_quantized_base_has_the_gradients_of_its_numbers(kind, format):
    model = family(kind)
    held = lora.quantize(model.params, is_kernel, format=format, block_size=16, pad=True)
    assert any(map(is_quant, jax.tree.leaves(held, is_leaf=is_quant)))
    model = dataclasses.replace(model, params=held)

    def slopes(tree):
        trained, frozen = lora.split(moved(tree, 2, 0.05))

        def loss(trained):
            return jnp.sin(lora.lorafy(model.apply)(lora.combine(trained, frozen), TOKENS)).sum()

        return jax.jit(jax.value_and_grad(loss))(trained)

    tree = adapted(model, held)
    got, want = slopes(tree), slopes(lora.dequantize(tree))
    # The same numbers, multiplied in another order.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_steps_over_a_cache_are_the_whole_text(kind):
    model = family(kind)
    for padding, new in (("left", 1), ("right", 4)):
        tokens, mask = texts(padding)
        check_steps_of(model, tokens % 61, mask, new)


# The meshes, for the page of families.
SPREAD: dict[str, Any] = dict.fromkeys(FAMILIES, dict(fsdp=2, context=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_mesh_has_the_losses_of_one_device(kind):
    model = family(kind)
    settings = train.TrainConfig(
        batch_size=8, steps=2, buckets=1, learning_rate=1e-2, epsilon=1e-3, progress=False
    )
    found = []
    for sizes in (None, SPREAD[kind]):
        tree = moved(adapted(model, model.params), 2, 0.05)
        if sizes is not None:
            tree = lora.sharding.place(tree, models.make_mesh(**sizes), RULES)
        history = train.fit(model, tree, EXAMPLES, None, settings).history
        found.append([record["loss"] for record in history if record["kind"] == "train"])
    # The second loss is after a step of the optimizer.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_convolutions_of_a_channel_each_stay_floats():
    leaf = jax.ShapeDtypeStruct((3, 4, 1, 48), jnp.float32)
    assert not is_kernel("model.layers.linear_attn.conv1d.kernel", leaf)
    assert is_kernel("model.layers.mlp.up_proj.kernel", jax.ShapeDtypeStruct((3, 4, 48), "float32"))


def test_biases_of_experts_stay_floats():
    # (layers, experts, outputs): a matrix by its shape alone.
    bias = jax.ShapeDtypeStruct((3, 64, 48), "float32")
    assert not is_kernel("model.layers.mlp.experts.down_proj_bias", bias)
    weights = jax.ShapeDtypeStruct((3, 64, 48, 32), "float32")
    assert is_kernel("model.layers.mlp.experts.down_proj", weights)
