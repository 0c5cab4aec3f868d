"""Llama 4's text model against transformers: pieces of texts, blocks of several kinds, experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models import config_from_hf

from tests.support.decoder_checks import (
    check_blocks_apart,
    check_greedy_text,
    check_logits,
    check_saved_again,
    check_steps,
    positions_of,
    quick_jit,
)
from tests.support.oracle import oracle
from tests.support.torch_models import DECODER_SIZES, TOLERANCE, greedy, saver, texts, theirs

pytestmark = pytest.mark.once

PLACE = "models/llama4"
CHUNKED, FULL = "chunked_attention", "full_attention"
SIZES = dict(
    DECODER_SIZES, model_type="llama4_text", head_dim=8, intermediate_size=20,
    intermediate_size_mlp=40, num_local_experts=4, num_hidden_layers=4, attention_chunk_size=5,
    pad_token_id=0,
)  # fmt: skip
# Both edges are 1 in Scout's files.
SCOUT = dict(
    SIZES, rope_theta=500.0, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=1.0,
        original_max_position_embeddings=16,
    ),
)  # fmt: skip
CASES = {
    "scout": SCOUT,
    "maverick": dict(SIZES, interleave_moe_layer_step=2, use_qk_norm=False, num_local_experts=8),
    "other blocks": dict(
        SIZES, num_experts_per_tok=3, moe_layers=[0, 3], no_rope_layers=[0, 1, 1, 0],
        layer_types=[FULL, CHUNKED, CHUNKED, FULL], attention_bias=True,
        attn_temperature_tuning=False,
    ),
    "all alike": dict(
        SIZES, num_experts_per_tok=2, no_rope_layers=[1] * 4, tie_word_embeddings=True,
        num_hidden_layers=2, layer_types=[CHUNKED] * 2, moe_layers=[0, 1],
    ),
    "growing": dict(SCOUT, floor_scale=3, attn_scale=0.7),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


# transformers counts padding on the left where queries grow with the text.
@pytest.mark.parametrize("case", [case for case in CASES if case != "growing"])
def test_logits_are_transformers(saved, case):
    check_logits(saved, PLACE, case)


@pytest.mark.parametrize("case", [pytest.param("scout", marks=pytest.mark.slow), "maverick"])
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scout", "maverick"])
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    check_saved_again(saved, PLACE, case, tmp_path)


def test_queries_grow_with_their_own_text(saved):
    """Wherever it stands in its row, and from a cache as at once."""
    there, directory = saved("growing")
    model = models.load(directory)
    tokens, mask = texts("right")
    positions = positions_of(mask)
    want = oracle(f"{PLACE}/growing.right", lambda: theirs(there(), tokens, mask, positions))
    apply = quick_jit(model.apply)
    got = np.asarray(apply(model.params, tokens, mask=jnp.asarray(mask)))
    assert np.abs(got - want)[mask].max() <= TOLERANCE
    # transformers would count the padding.
    left, seen = (
        np.stack([np.roll(t, 12 - n) for t, n in zip(tokens, mask.sum(1), strict=True)]),
        mask[:, ::-1],
    )
    moved = np.asarray(apply(model.params, left, mask=jnp.asarray(seen)))
    assert np.abs(moved[seen] - got[mask]).max() <= TOLERANCE
    prompt = tokens[:1]
    ones = np.ones_like(prompt)
    text = oracle(f"{PLACE}/growing.greedy", lambda: greedy(there(), prompt, ones, 16))
    assert models.generate(model, model.params, prompt.tolist(), max_new_tokens=16) == text


@pytest.mark.parametrize("new", [1, 3, 7])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_steps_over_a_cache_are_the_whole_text(saved, padding, new):
    """Calls that begin and end within pieces of five tokens."""
    check_steps(saved, "growing", padding, new)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(moe_layers=[]), "`interleave_moe_layer_step` leave no block with experts"),
        (dict(layer_types=["sliding_attention"] * 4), "which is neither `chunked_attention` nor"),
        (dict(layer_types=[CHUNKED] * 4), "those with a window must be those that do"),
        (dict(router_jitter_noise=0.1), "`router_jitter_noise` = 0.1 is not supported"),
        (dict(attention_chunk_size=0), "`attention_chunk_size` must be a whole number from 1 to"),
        (dict(num_experts_per_tok=5), "`num_experts_per_tok` is 5, of only 4 experts"),
        (dict(use_kernels=True), "field `use_kernels` = True is not known"),
    ],
)  # fmt: skip
def test_what_differs_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**SIZES, **fields})


COMMON = dict(
    _attn_implementation_autoset=True, attention_bias=False, attention_chunk_size=8192,
    attention_dropout=0.0, attn_scale=0.1, attn_temperature_tuning=4, bos_token_id=200000,
    cache_implementation="hybrid", eos_token_id=[200001, 200007, 200008], floor_scale=8192,
    for_llm_compressor=False, head_dim=16, hidden_act="silu", hidden_size=64,
    initializer_range=0.02, intermediate_size=48, intermediate_size_mlp=96,
    model_type="llama4_text", no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 12,
    num_attention_heads=4, num_experts_per_tok=1, num_hidden_layers=48, num_key_value_heads=2,
    output_router_logits=False, pad_token_id=200018, rms_norm_eps=1e-5, rope_theta=500000.0,
    router_aux_loss_coef=0.001, router_jitter_noise=0.0, torch_dtype="bfloat16", use_cache=True,
    vocab_size=202048,
)  # fmt: skip
# As text_config has them on the hub, with smaller sizes.
PUBLIC = {
    "Llama-4-Scout": dict(
        interleave_moe_layer_step=1, moe_layers=list(range(48)), num_local_experts=16,
        max_position_embeddings=10485760, use_qk_norm=True,
        rope_scaling=dict(
            factor=16.0, high_freq_factor=1.0, low_freq_factor=1.0, rope_type="llama3",
            original_max_position_embeddings=8192,
        ),
    ),
    "Llama-4-Maverick": dict(
        interleave_moe_layer_step=2, moe_layers=list(range(1, 48, 2)), num_local_experts=128,
        max_position_embeddings=1048576, use_qk_norm=False, rope_scaling=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_read_and_come_back(name):
    whole = dict(model_type="llama4", text_config={**COMMON, **PUBLIC[name]}, vision_config={})
    config = config_from_hf(whole)
    assert config.wrapper == "llama4" and config.floor_scale == 8192
    alone = config_from_hf({**COMMON, **PUBLIC[name]})
    assert config_from_hf(alone.to_hf()) == alone
