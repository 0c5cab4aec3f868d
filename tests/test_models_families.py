"""Gemma, Gemma 2, Gemma 3, Phi-3, GPT-2, and Qwen's mixed windows, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_models import both_paddings, saver, theirs

from lora_jax import models
from lora_jax.models import config_from_hf

pytestmark = pytest.mark.torch

# float32 products summed in another order, over three blocks.
TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA2 = dict(SIZES, model_type="gemma2", head_dim=16, sliding_window=4, query_pre_attn_scalar=9)
GEMMA3 = dict(
    SIZES, model_type="gemma3_text", head_dim=16, sliding_window=4, query_pre_attn_scalar=24
)
PHI3 = dict(SIZES, model_type="phi3")
GPT2 = dict(
    model_type="gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 2.0, 3.0, 7.0],
)
MIXED = dict(use_sliding_window=True, sliding_window=4)
CASES = {
    "gemma": dict(SIZES, model_type="gemma", head_dim=16),
    "gemma with biases": dict(SIZES, model_type="gemma", head_dim=8, attention_bias=True),
    # Caps so low that they bite.
    "gemma2": dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2 without caps": dict(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": dict(GEMMA3, sliding_window_pattern=2),
    "gemma3 that reaches far": dict(
        GEMMA3,
        layer_types=[SLIDING, FULL, FULL],
        rope_scaling=dict(rope_type="linear", factor=8.0),
        rope_theta=500.0,
        rope_local_base_freq=20.0,
    ),
    "phi3": PHI3,
    "phi3 that rotates half": dict(PHI3, partial_rotary_factor=0.5, sliding_window=4),
    # 12 tokens are beyond the trained context, 40 are not.
    "phi3 long": dict(PHI3, rope_scaling=LONGROPE, original_max_position_embeddings=8),
    "phi3 short": dict(PHI3, rope_scaling=LONGROPE, original_max_position_embeddings=40),
    "qwen2 mixed": dict(SIZES, **MIXED, model_type="qwen2", max_window_layers=2),
    "qwen3 mixed": dict(
        SIZES, **MIXED, model_type="qwen3", head_dim=8, layer_types=[FULL, SLIDING, FULL]
    ),
    "gpt2": GPT2,
    "gpt2 with a head of its own": dict(
        GPT2, tie_word_embeddings=False, n_inner=40, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2 unscaled": dict(GPT2, scale_attn_weights=False, activation_function="relu"),
}
ONE_EACH = ["gemma", "gemma2", "gemma3", "phi3 that rotates half", "qwen2 mixed", "gpt2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(CASES, tmp_path_factory)


def positions_of(mask):
    return np.maximum(mask.cumsum(1) - 1, 0)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(saved, case):
    oracle, directory = saved(case)
    model = models.load(directory)
    tokens, mask = both_paddings()
    want = theirs(oracle, tokens, mask, torch.tensor(positions_of(mask)))
    got = np.asarray(jax.jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    assert got.dtype == np.float32
    assert np.abs(got - want)[mask].max() <= TOLERANCE
    assert config_from_hf(model.config.to_hf()) == model.config
