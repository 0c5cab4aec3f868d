"""Attention of some heads at a time is attention, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models import attention

pytestmark = pytest.mark.once


def test_heads_in_parts_give_the_same_logits_and_gradients(monkeypatch):
    config = models.LlamaConfig.from_hf(
        {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "vocab_size": 64, "max_position_embeddings": 64, "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        }
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    mask = jnp.arange(8) >= jnp.array([[0], [3]])

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, tokens, mask=mask)) * mask[..., None])

    want = jax.jit(jax.value_and_grad(loss))(model.params)
    monkeypatch.setattr(attention, "MOST_SCORES", 4 * 2 * 8 * 8 * 8 // 2)  # two heads of four
    got = jax.jit(lambda p: jax.value_and_grad(loss)(p))(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
