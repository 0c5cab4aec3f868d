"""Gemma 4's text model against transformers: heads of two sizes, shared keys, vectors, experts."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lora_jax import models
from lora_jax.models import config_from_hf
from lora_jax.models.layers import groups_of
from lora_jax.models.llama_parts import Attention

from tests.support.decoder_checks import (
    check_blocks_apart,
    check_greedy_text,
    check_logits,
    check_saved_again,
    check_steps,
)
from tests.support.torch_models import DECODER_SIZES, saver

pytestmark = pytest.mark.once

PLACE = "models/gemma4"
SLIDING, FULL = "sliding_attention", "full_attention"
# Products of queries and keys are not scaled down: larger weights make steep softmaxes, in which
# the rounding of float32 grows to 4e-5 between transformers in float32 and in float64.
SIZES = dict(
    DECODER_SIZES, model_type="gemma4_text", initializer_range=0.1, head_dim=8, global_head_dim=16,
    sliding_window=4, pad_token_id=0, hidden_size_per_layer_input=0, num_hidden_layers=4,
    layer_types=[SLIDING, FULL] * 2,
)  # fmt: skip
CASES = {
    # As 31B: values that are keys, fewer and larger heads.
    "31B": dict(
        SIZES, attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=3.0,
        use_bidirectional_attention="vision",
    ),
    # As E2B: seven blocks of which three share keys and have a wider MLP.
    "E2B": dict(
        SIZES, hidden_size_per_layer_input=6, vocab_size_per_layer_input=97,
        num_kv_shared_layers=3, use_double_wide_mlp=True, num_hidden_layers=7,
        final_logit_softcapping=30.0,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
    ),
    "E4B": dict(
        SIZES, hidden_size_per_layer_input=6, vocab_size_per_layer_input=97,
        num_kv_shared_layers=2, num_hidden_layers=6, layer_types=[SLIDING, FULL] * 3,
    ),
    # As 26B-A4B: experts beside each MLP.
    "26B-A4B": dict(
        SIZES, attention_k_eq_v=True, num_global_key_value_heads=1, enable_moe_block=True,
        num_experts=4, top_k_experts=2, moe_intermediate_size=12,
    ),
    "plain": dict(
        SIZES, attention_bias=True, num_hidden_layers=2, layer_types=[FULL] * 2,
        tie_word_embeddings=False, rope_parameters={
            FULL: dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=50.0,
                       factor=2.0),
            SLIDING: dict(rope_type="default", rope_theta=10.0),
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


ONE_EACH = ("E2B", "26B-A4B")
COSTLY = [c if c in ONE_EACH else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", COSTLY)
def test_logits_are_transformers(saved, case):
    check_logits(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["31B", "E2B", "26B-A4B"])
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["31B", "E2B", "26B-A4B"])
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    check_saved_again(saved, PLACE, case, tmp_path)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("case", ["E2B", pytest.param("26B-A4B", marks=pytest.mark.slow)])
def test_steps_over_a_cache_are_the_whole_text(saved, case, new):
    check_steps(saved, case, "left", new)


def test_values_that_are_keys_have_the_gradient_of_both():
    config = config_from_hf(CASES["31B"])
    kind = next(kind for kind in config.kinds if kind.slides is False)
    options = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    block = Attention(config, kind, **options)
    x = jnp.ones((1, 1, config.hidden_size))
    for part in (1, 2):
        gradient = nnx.grad(lambda b, part=part: jnp.sum(b.project(x)[part]))(block)
        # The sum of x·W over its outputs.
        np.testing.assert_array_equal(gradient.k_proj.kernel[...], 1.0)


def test_a_cache_has_no_room_for_blocks_that_share(saved):
    cache = models.load(saved("E2B")[1]).init_cache(2, 9)
    shapes = {slides: keys.shape for slides, keys in cache.keys.items()}
    assert shapes == {True: (2, 2, 9, 2, 8), False: (2, 2, 9, 2, 16)}


def test_projections_of_blocks_that_share_are_left_out(saved, tmp_path):
    """Files on the hub have them."""
    directory = saved("E4B")[1]
    tensors = load_file(directory / "model.safetensors")
    more = {
        f"model.layers.5.self_attn.{name}.weight": np.ones((2, 2), np.float32)
        for name in ("k_proj", "v_proj", "k_norm", "v_norm")
    }
    for file in directory.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    assert models.load(tmp_path).config == models.load(directory).config


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(use_bidirectional_attention="all"), "`use_bidirectional_attention` = 'all' is not"),
        (dict(num_kv_shared_layers=3), "`num_kv_shared_layers` 3 leaves no keys to the last blo"),
        (dict(per_layer_config={"0": dict(head_dim=16)}), "`per_layer_config` is not supported,"),
        (dict(per_layer_config={"1": dict(hidden_size=2)}), "`per_layer_config` is not supported"),
        (dict(num_kv_shared_layers=-1), "`num_kv_shared_layers` must be a whole number from 0 to"),
        (dict(activation_sparsity=0.5), "field `activation_sparsity` = 0.5 is not known"),
    ],
)
def test_what_differs_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**SIZES, **fields})


COMMON = dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=2, dtype="bfloat16",
    enable_moe_block=False, eos_token_id=1, final_logit_softcapping=30.0, global_head_dim=32,
    head_dim=16, hidden_activation="gelu_pytorch_tanh", hidden_size=64, initializer_range=0.02,
    intermediate_size=96, max_position_embeddings=131072, model_type="gemma4_text",
    num_attention_heads=4, pad_token_id=0, rms_norm_eps=1e-6, use_cache=True, vocab_size=262144,
    vocab_size_per_layer_input=262144, moe_intermediate_size=None, num_experts=None,
    top_k_experts=None, tie_word_embeddings=True, rope_parameters={
        FULL: dict(partial_rotary_factor=0.25, rope_theta=1e6, rope_type="proportional"),
        SLIDING: dict(rope_theta=1e4, rope_type="default"),
    },
)  # fmt: skip
# As text_config has them on the hub, with smaller sizes.
PUBLIC = {
    "gemma-4-E2B": dict(
        attention_k_eq_v=False, hidden_size_per_layer_input=256, num_hidden_layers=35,
        num_key_value_heads=1, num_global_key_value_heads=None, num_kv_shared_layers=20,
        layer_types=[*[SLIDING] * 4, FULL] * 7, sliding_window=512, use_double_wide_mlp=True,
        use_bidirectional_attention=None,
    ),
    "gemma-4-E4B": dict(
        attention_k_eq_v=False, hidden_size_per_layer_input=256, num_hidden_layers=42,
        num_key_value_heads=2, num_global_key_value_heads=None, num_kv_shared_layers=18,
        layer_types=[*[SLIDING] * 5, FULL] * 7, sliding_window=512, use_double_wide_mlp=False,
        use_bidirectional_attention=None,
    ),
    "gemma-4-31B": dict(
        attention_k_eq_v=True, hidden_size_per_layer_input=0, num_hidden_layers=60,
        num_key_value_heads=4, num_global_key_value_heads=2, num_kv_shared_layers=0,
        layer_types=[*[SLIDING] * 5, FULL] * 10, sliding_window=1024, use_double_wide_mlp=False,
        use_bidirectional_attention="vision",
    ),
    "gemma-4-26B-A4B": dict(
        attention_k_eq_v=True, hidden_size_per_layer_input=0, num_hidden_layers=30,
        num_key_value_heads=4, num_global_key_value_heads=2, num_kv_shared_layers=0,
        layer_types=[*[SLIDING] * 5, FULL] * 5, sliding_window=1024, use_double_wide_mlp=False,
        use_bidirectional_attention="vision", enable_moe_block=True, moe_intermediate_size=24,
        num_experts=128, top_k_experts=8,
    ),
}  # fmt: skip
# Stacks of blocks: a period, or two of blocks with and without keys of their own.
STACKS = {"gemma-4-E2B": 10, "gemma-4-E4B": 12, "gemma-4-31B": 6, "gemma-4-26B-A4B": 6}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_read_and_come_back(name):
    whole = dict(model_type="gemma4", text_config={**COMMON, **PUBLIC[name]}, audio_config=None)
    assert config_from_hf(whole).wrapper == "gemma4"
    config = config_from_hf({**COMMON, **PUBLIC[name]})
    assert config_from_hf(config.to_hf()) == config
    assert len(groups_of(config.kinds)) == STACKS[name]
