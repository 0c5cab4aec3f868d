"""The decoder under the transform: every adapted weight keeps its low-rank form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models

from tests.support.random_arrays import moved
from tests.support.tiny import SMALL

pytestmark = pytest.mark.once

CONFIG = dataclasses.replace(SMALL, tie_word_embeddings=True)
EVERYWHERE = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
TOKENS = np.asarray(jax.random.randint(jax.random.key(5), (2, 9), 0, 61))
MASK = np.arange(9) >= np.array([[0], [4]])


def adapted(targets, **options):
    """A model and adapters that change its logits."""
    model = models.init(jax.random.key(0), CONFIG, **options)
    config = lora.LoraConfig(rank=3, alpha=6, target_modules=targets)
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return model, moved(lora.init(jax.random.key(1), plan, model.params), 2, 0.05)


@pytest.mark.parametrize("options", [{}, {"scan": False}, {"remat": True}], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", EVERYWHERE], ids=["linear", "tied table too"])
def test_logits_equal_those_of_merged_weights(targets, options):
    model, params = adapted(targets, **options)
    mask, plain = jnp.asarray(MASK), jax.jit(model.apply)
    got = np.asarray(jax.jit(lora.lorafy(model.apply, strict=True))(params, TOKENS, mask=mask))
    want = np.asarray(plain(jax.jit(lora.merge)(params), TOKENS, mask=mask))
    base = np.asarray(plain(model.params, TOKENS, mask=mask))
    assert np.abs(want - base)[MASK].max() > 0.5
    # Logits of about 10 in float32.
    np.testing.assert_allclose(got[MASK], want[MASK], atol=1e-4)


def test_generation_takes_adapters():
    model, params = adapted(EVERYWHERE)
    prompts = [[5, 9, 11], [8], [1, 2, 3, 4]]
    got = models.generate(model, params, prompts, max_new_tokens=10)
    assert got == models.generate(model, lora.merge(params), prompts, max_new_tokens=10)
    assert got != models.generate(model, model.params, prompts, max_new_tokens=10)


def test_the_cache_is_not_touched_by_the_transform():
    model, params = adapted("all-linear")
    apply = jax.jit(lora.lorafy(model.apply, strict=True))
    whole = np.asarray(apply(params, TOKENS))
    cache, parts = model.init_cache(2, 9), []
    for at in (slice(0, 5), slice(5, 6), slice(6, 9)):
        out, cache = apply(params, TOKENS[:, at], cache=cache)
        parts.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-4)
