"""Attention in parts is attention; where it runs, cuDNN's is taken instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import compat, models
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


@pytest.mark.parametrize(
    ("tokens", "dtype", "masked", "taken"),
    [
        (128, "bfloat16", False, True), (127, "bfloat16", False, False),
        (128, "float32", False, False), (128, "bfloat16", True, False),
    ],
)  # fmt: skip
def test_cudnn_attends_to_long_unmasked_texts_in_16_bits(tokens, dtype, masked, taken, monkeypatch):
    asked, plain = [], jax.nn.dot_product_attention

    def recorded(*args, implementation=None, **options):
        asked.append(implementation)
        return plain(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr(compat, "has_flash_attention", lambda: True)
    q = jnp.ones((1, tokens, 2, 8), dtype)
    mask = jnp.ones((1, tokens), bool) if masked else None
    mixing = attention.Mixing(slides=(False,))
    attend_of, _, _ = attention.attention(
        q[:, :, 0, 0], mask, None, mixing=mixing, rotations=lambda slides: None
    )
    first = jnp.int32(0)
    mixed, _ = jax.eval_shape(lambda q: attend_of(False)(q, q, q, stored=None, block=first), q)
    assert mixed.shape == q.shape and asked == ["cudnn" if taken else None]


def test_only_a_lone_nvidia_gpu_since_ampere_has_flash_attention(monkeypatch):
    def found(capability, count=1):
        device = type("Device", (), {"compute_capability": capability})()
        monkeypatch.setattr(compat, "default_device", lambda: device)
        monkeypatch.setattr(jax, "device_count", lambda: count)
        return compat.has_flash_attention()

    assert not compat.has_flash_attention()  # a CPU
    assert found("9.0") and not found("7.5") and not found("gfx942") and not found("9.0", 2)
