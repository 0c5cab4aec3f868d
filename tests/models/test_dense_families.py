"""Decoders that differ from Llama in a few fields, against transformers."""

import pytest

from lora_jax.models import config_from_hf

from tests.support.decoder_checks import (
    check_blocks_apart,
    check_greedy_text,
    check_logits,
    check_saved_again,
)
from tests.support.torch_models import (
    DECODER_SIZES,
    saver,
)

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "models/dense_families"
SIZES = dict(DECODER_SIZES, pad_token_id=0, eos_token_id=1)
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = dict(sliding_window=4)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8)
LLAMA3 = dict(rope_type="llama3", factor=8.0, high_freq_factor=4.0)
NEOX = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"model_type": "gpt_neox"}
CASES = {
    "olmo": dict(SIZES, model_type="olmo", clip_qkv=0.5, attention_bias=True),
    "granite_swa": dict(
        SIZES, **WINDOW, model_type="granite_swa", layer_types=[SLIDING, FULL, SLIDING],
        layer_rope_theta=[300.0, 500.0, 300.0], attention_multiplier=0.2, residual_multiplier=0.4,
        attention_bias=True,
    ),
    "granite_swa that rotates in windows": dict(
        SIZES, **WINDOW, model_type="granite_swa", num_hidden_layers=5,
        layer_rope_theta=[0, 300.0, 300.0, 300.0, 0],
    ),
    "olmo2": dict(SIZES, model_type="olmo2"),
    "olmo3": dict(
        SIZES, **WINDOW, model_type="olmo3", layer_types=[SLIDING, FULL, SLIDING],
        rope_scaling=YARN, rope_theta=500.0,
    ),
    "olmo3 by default": dict(SIZES, **WINDOW, model_type="olmo3", num_hidden_layers=4),
    "exaone4": dict(SIZES, **WINDOW, model_type="exaone4", sliding_window_pattern=3),
    "exaone4 without windows": dict(
        SIZES, model_type="exaone4", sliding_window=None, layer_types=[FULL] * 3
    ),
    "glm4": dict(SIZES, model_type="glm4", head_dim=8),
    "glm4 that rotates all": dict(
        SIZES, model_type="glm4", head_dim=8, partial_rotary_factor=1.0, attention_bias=False
    ),
    "glm": dict(SIZES, model_type="glm", head_dim=8),
    "ernie4_5": dict(SIZES, model_type="ernie4_5", head_dim=8, use_bias=True),
    "helium": dict(SIZES, model_type="helium", head_dim=8, attention_bias=True, mlp_bias=True),
    "stablelm": dict(SIZES, model_type="stablelm", partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm side by side": dict(
        SIZES, model_type="stablelm", partial_rotary_factor=0.5, use_parallel_residual=True
    ),
    "stablelm with norms of queries and keys": dict(
        SIZES, model_type="stablelm", partial_rotary_factor=0.5, qk_layernorm=True,
        hidden_act="mish",
    ),
    "smollm3": dict(SIZES, model_type="smollm3", no_rope_layers=[1, 0, 1]),
    "smollm3 by default": dict(
        SIZES, model_type="smollm3", num_hidden_layers=4, attention_bias=True,
        tie_word_embeddings=False,
    ),
    "granite": dict(
        SIZES, model_type="granite", embedding_multiplier=3, residual_multiplier=0.4,
        logits_scaling=1.5, attention_multiplier=0.2, attention_bias=True,
    ),
    "seed_oss": dict(SIZES, model_type="seed_oss", head_dim=8),
    "seed_oss with other biases": dict(
        SIZES, model_type="seed_oss", head_dim=8, attention_bias=False, attention_out_bias=True,
        mlp_bias=True,
    ),
    "arcee": dict(SIZES, model_type="arcee", mlp_bias=True),
    "cohere": dict(SIZES, model_type="cohere", logit_scale=0.5),
    "cohere with norms of queries and keys": dict(
        SIZES, model_type="cohere", use_qk_norm=True, hidden_act="quick_gelu"
    ),
    "cohere2": dict(
        SIZES, **WINDOW, model_type="cohere2", layer_types=[SLIDING, FULL, SLIDING],
        attention_bias=True,
    ),
    "cohere2 by default": dict(SIZES, **WINDOW, model_type="cohere2", num_hidden_layers=4),
    "starcoder2": dict(SIZES, **WINDOW, model_type="starcoder2"),
    "starcoder2 without biases": dict(
        SIZES, model_type="starcoder2", use_bias=False, tie_word_embeddings=False
    ),
    "gpt_neox": dict(NEOX, rotary_pct=0.5),
    "gpt_neox in a row": dict(
        NEOX, use_parallel_residual=False, rotary_pct=1.0, attention_bias=False, hidden_act="relu"
    ),
    "phi": dict(SIZES, model_type="phi"),
    "phi that rotates all": dict(
        SIZES, model_type="phi", partial_rotary_factor=1.0,
        rope_scaling=dict(rope_type="linear", factor=2.0),
    ),
    "phi with norms of queries and keys": dict(SIZES, model_type="phi", qk_layernorm=True),
    "apertus": dict(SIZES, model_type="apertus", head_dim=8, attention_bias=True),
    "apertus with an activation without numbers": dict(
        SIZES, model_type="apertus", hidden_act="relu2",
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
    ),
    "cwm": dict(
        SIZES, **WINDOW, model_type="cwm", head_dim=8, num_hidden_layers=5, mlp_bias=True,
        rope_scaling=dict(
            LLAMA3, rope_theta=500.0, low_freq_factor=1.0, original_max_position_embeddings=8
        ),
    ),
    "hyperclovax": dict(
        SIZES, model_type="hyperclovax", head_dim=8, embedding_multiplier=3.0,
        residual_multiplier=0.4, logits_scaling=1.5, attention_multiplier=0.2, attention_bias=True,
    ),
    "hyperclovax with plain norms": dict(SIZES, model_type="hyperclovax", use_post_norm=False),
    "internlm3": dict(SIZES, model_type="internlm3", head_dim=8, qkv_bias=True, bias=True),
    "iquestcoder": dict(SIZES, model_type="iquestcoder", head_dim=8),
    "jais2": dict(SIZES, model_type="jais2"),
    "ministral3": dict(
        SIZES, model_type="ministral3", head_dim=8,
        rope_parameters=dict(
            YARN, rope_theta=500.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.4,
        ),
    ),
    "nemotron": dict(SIZES, model_type="nemotron", attention_bias=True, head_dim=8),
    "vaultgemma": dict(SIZES, **WINDOW, model_type="vaultgemma", head_dim=8),
    # Its class in transformers clears the row of padding when it loads.
    "youtu": dict(
        SIZES | {"pad_token_id": None}, model_type="youtu", num_key_value_heads=4,
        kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "ministral": dict(
        SIZES, **WINDOW, model_type="ministral", head_dim=8, layer_types=[SLIDING, FULL, SLIDING]
    ),
}  # fmt: skip
ONE_EACH = (
    "olmo3",
    "exaone4",
    "glm4",
    "smollm3",
    "granite",
    "seed_oss",
    "arcee",
    "ministral",
    "cohere2",
    "starcoder2",
    "gpt_neox",
    "phi",
)
NEWER = (
    "olmo", "granite_swa", "granite_swa that rotates in windows",
    "apertus", "cwm", "hyperclovax", "internlm3", "iquestcoder", "jais2", "ministral3", "nemotron",
    "vaultgemma", "youtu",
)  # fmt: skip
COSTLY = [c if c in ONE_EACH else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


@pytest.mark.parametrize("case", COSTLY)
def test_logits_are_transformers(saved, case):
    check_logits(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "olmo3",
        "exaone4",
        "glm4",
        "smollm3",
        "granite",
        "arcee",
        "cohere2",
        "starcoder2",
        "gpt_neox",
        "phi",
        "glm",
        "ernie4_5",
        "helium",
        "stablelm",
        "cohere with norms of queries and keys",
        "stablelm with norms of queries and keys",
        "phi with norms of queries and keys",
        *NEWER,
    ],
)
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["exaone4", "smollm3", "gpt_neox"])
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    check_saved_again(saved, PLACE, case, tmp_path)


COMMON = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, use_cache=True,
    torch_dtype="bfloat16", initializer_range=0.02, attention_dropout=0.0, attention_bias=False,
    rope_scaling=None,
)  # fmt: skip
# The fields that files on the hub have beside these, with their values.
PUBLIC = {
    "SmolLM3-3B": dict(
        model_type="smollm3", max_window_layers=28, no_rope_layer_interval=4, pretraining_tp=2,
        no_rope_layers=[1, 1, 1, 0], layer_types=[FULL] * 4, sliding_window=None,
        use_sliding_window=False, mlp_bias=False, rms_norm_eps=1e-6, rope_theta=5e6,
    ),
    "OLMo-1B": dict(
        model_type="olmo", clip_qkv=None, hidden_act="silu", pretraining_tp=1, rope_theta=10000.0,
        tie_word_embeddings=True, pad_token_id=1, eos_token_id=50279,
    ),
    "granite-3.0-2b": dict(
        model_type="granite", attention_dropout=0.1, attention_multiplier=0.015625,
        embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, mlp_bias=False,
    ),
    "Seed-OSS-36B": dict(
        model_type="seed_oss", attention_bias=True, attention_dropout=0.1, residual_dropout=0.1,
        attention_out_bias=False, head_dim=16, mlp_bias=False, pretraining_tp=1,
    ),
    "Olmo-3-7B": dict(
        model_type="olmo3", sliding_window=4096, layer_types=[SLIDING, SLIDING, SLIDING, FULL],
        rope_theta=500000, rms_norm_eps=1e-6,
        rope_scaling=dict(
            YARN, attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0
        ),
    ),
    "EXAONE-4.0-32B": dict(
        model_type="exaone4", sliding_window=4096, sliding_window_pattern="LLLG", head_dim=16,
        rope_theta=1000000, layer_types=[SLIDING, SLIDING, SLIDING, FULL],
    ),
    "EXAONE-4.0-1.2B": dict(
        model_type="exaone4", sliding_window=None, sliding_window_pattern=None, head_dim=16,
        layer_types=[FULL] * 4,
    ),
    "GLM-4-9B-0414": dict(
        model_type="glm4", head_dim=16, partial_rotary_factor=0.5, rms_norm_eps=1e-5,
        eos_token_id=[151329, 151336, 151338], pad_token_id=151329,
    ),
    "c4ai-command-r7b": dict(
        model_type="cohere2", cache_implementation="hybrid", head_dim=16, layer_norm_eps=1e-5,
        layer_switch=4, logit_scale=0.25, order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj", rotary_pct=1.0, sliding_window=4096,
        sliding_window_pattern=4, use_embedding_sharing=True, use_gated_activation=True,
        use_parallel_block=True, use_parallel_embedding=True, use_qk_norm=False,
    ),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", decoder_sparse_step=1, head_dim=16, max_window_layers=4,
        mlp_only_layers=[], moe_intermediate_size=24, norm_topk_prob=True, num_experts=8,
        num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.001,
        sliding_window=None, use_sliding_window=False,
    ),
    "Qwen1.5-MoE-A2.7B": dict(
        model_type="qwen2_moe", decoder_sparse_step=1, max_window_layers=4, sliding_window=32768,
        moe_intermediate_size=24, norm_topk_prob=False, num_experts=8, num_experts_per_tok=4,
        output_router_logits=False, router_aux_loss_coef=0.001, use_sliding_window=False,
        shared_expert_intermediate_size=96,
    ),
    "GLM-4.5-Air": dict(
        model_type="glm4_moe", attention_bias=True, head_dim=16, first_k_dense_replace=1,
        moe_intermediate_size=24, n_group=1, topk_group=1, n_routed_experts=8, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=2, num_nextn_predict_layers=1,
        partial_rotary_factor=0.5, rope_theta=1000000, routed_scaling_factor=1.0,
        use_qk_norm=False, eos_token_id=[151329, 151336, 151338], pad_token_id=151329,
    ),
    "DeepSeek-V2-Lite": dict(
        model_type="deepseek_v2", num_key_value_heads=4, aux_loss_alpha=0.001, ep_size=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=24, moe_layer_freq=1, n_group=1,
        n_routed_experts=8, n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=2,
        topk_group=1, topk_method="greedy", routed_scaling_factor=1.0, scoring_func="softmax",
        seq_aux=True, rope_theta=10000,
        rope_scaling=dict(
            beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707,
            original_max_position_embeddings=4096, type="yarn",
        ),
    ),
    "DeepSeek-V3": dict(
        model_type="deepseek_v3", num_key_value_heads=4, ep_size=1, first_k_dense_replace=3,
        kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        moe_intermediate_size=24, moe_layer_freq=1, n_group=4, n_routed_experts=8,
        n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=2, topk_group=2,
        num_nextn_predict_layers=1, routed_scaling_factor=2.5, scoring_func="sigmoid",
        topk_method="noaux_tc", aux_loss_alpha=0.001, seq_aux=True, rope_theta=10000,
        rope_scaling=dict(
            beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=4096, type="yarn",
        ),
    ),
    "Mixtral-8x7B": dict(
        model_type="mixtral", num_experts_per_tok=2, num_local_experts=8, sliding_window=None,
        output_router_logits=False, router_aux_loss_coef=0.02, rms_norm_eps=1e-5,
    ),
    "OLMoE-1B-7B": dict(
        model_type="olmoe", clip_qkv=None, norm_topk_prob=False, num_experts=64,
        num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.01,
    ),
    "gpt-oss-20b-BF16": dict(
        model_type="gpt_oss", attention_bias=True, experts_per_token=2, head_dim=16,
        initial_context_length=4096, num_experts_per_tok=2, num_local_experts=8,
        output_router_logits=False, router_aux_loss_coef=0.9, rms_norm_eps=1e-5,
        rope_theta=150000, sliding_window=128, swiglu_limit=7.0, hidden_act="silu",
        layer_types=[SLIDING, FULL, SLIDING, FULL], eos_token_id=200002, pad_token_id=199999,
        rope_scaling=dict(
            beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096,
            rope_type="yarn", truncate=False,
        ),
    ),
    "stablelm-2-1_6b": dict(
        model_type="stablelm", hidden_dropout=0.0, layer_norm_eps=1e-5, partial_rotary_factor=0.25,
        qk_layernorm=False, use_parallel_residual=False, use_qkv_bias=True, rope_theta=10000,
        hidden_act="silu", num_key_value_heads=4,
    ),
    "ERNIE-4.5-0.3B": dict(
        model_type="ernie4_5", head_dim=16, hidden_act="silu", use_bias=False, rope_theta=500000.0,
        rms_norm_eps=1e-5, tie_word_embeddings=True, pad_token_id=0,
    ),
    "glm-4-9b-chat-hf": dict(
        model_type="glm", attention_bias=True, head_dim=16, partial_rotary_factor=0.5,
        rms_norm_eps=1.5625e-7, rope_theta=10000.0, eos_token_id=[151329, 151336, 151338],
    ),
    "pythia-1b": dict(
        model_type="gpt_neox", num_key_value_heads=None, attention_bias=True, bos_token_id=0,
        eos_token_id=0, hidden_act="gelu", layer_norm_eps=1e-5, rotary_emb_base=10000,
        rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True,
        classifier_dropout=0.1, hidden_dropout=0.0,
    ),
    "phi-2": dict(
        model_type="phi", num_key_value_heads=4, embd_pdrop=0.0, resid_pdrop=0.1,
        hidden_act="gelu_new", layer_norm_eps=1e-5, partial_rotary_factor=0.5,
        qk_layernorm=False, rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=50256,
    ),
    "Apertus-8B": dict(
        model_type="apertus", attention_bias=False, hidden_act="xielu", hidden_dropout=0.0,
        mlp_bias=False, post_norm=False, qk_norm=True, rms_norm_eps=1e-5, rope_theta=12000000,
        rope_scaling=dict(LLAMA3, low_freq_factor=1.0, original_max_position_embeddings=8192),
        tie_word_embeddings=False,
    ),
    "Ministral-3-3B": dict(
        model_type="ministral3", head_dim=16, hidden_act="silu", rms_norm_eps=1e-5,
        sliding_window=None, tie_word_embeddings=True,
        rope_parameters=dict(
            beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0,
            mscale_all_dim=1.0, original_max_position_embeddings=16384, rope_theta=1000000.0,
            rope_type="yarn", type="yarn",
        ),
    ),
    "Minitron-4B": dict(
        model_type="nemotron", head_dim=16, hidden_act="relu2", mlp_bias=False, norm_eps=1e-5,
        partial_rotary_factor=0.5, rope_theta=10000, initializer_range=0.0134,
    ),
    "internlm3-8b": dict(
        model_type="internlm3", bias=False, head_dim=16, hidden_act="silu", qkv_bias=False,
        rms_norm_eps=1e-5, rope_theta=50000000, rope_scaling=dict(factor=6.0, rope_type="dynamic"),
    ),
    "starcoder2-3b": dict(
        model_type="starcoder2", activation_function="gelu_pytorch_tanh",
        attention_softmax_in_fp32=True, embedding_dropout=0.1, residual_dropout=0.1,
        hidden_act="gelu_pytorch_tanh", layer_norm_epsilon=1e-5, norm_epsilon=1e-5,
        mlp_type="default", norm_type="layer_norm", rope_theta=999999.4420358813,
        scale_attention_softmax_in_fp32=True, scale_attn_weights=True, sliding_window=4096,
        use_bias=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_read_and_come_back(name):
    config = config_from_hf({**COMMON, **PUBLIC[name]})
    assert config.model_type == PUBLIC[name]["model_type"]
    assert config_from_hf(config.to_hf()) == config


def test_ministral3_is_read_inside_of_mistral3():
    text = {**COMMON, **PUBLIC["Ministral-3-3B"]}
    config = config_from_hf({"model_type": "mistral3", "text_config": text})
    assert (config.model_type, config.wrapper) == ("ministral3", "mistral3")
    assert (config.floor_scale, config.attn_scale) == (16384, 0.1)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="cohere2", use_qk_norm=True), "`use_qk_norm` = True is not supported"),
        (
            dict(model_type="ministral3", rope_parameters=dict(YARN)),
            "`rope_parameters` lacks `llama_4_scaling_beta`",
        ),
        (
            dict(model_type="granite_swa", layer_rope_theta=[1, 2, 3], sliding_window=4),
            "`layer_rope_theta` .* must be one number for blocks with a window",
        ),
        (
            dict(model_type="granite_swa", layer_rope_theta=[300.0, 0, 0], sliding_window=4),
            "those with a window must be those that do",
        ),
        (dict(model_type="olmo", layer_norm_eps=1e-6), "`layer_norm_eps` = 1e-06 is not supported"),
        (dict(model_type="cohere2", rotary_pct=0.5), "`rotary_pct` = 0.5 is not supported"),
        (dict(model_type="smollm3", use_sliding_window=True), "`use_sliding_window` is not"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "1 `rope_layers` for 3"),
        (dict(model_type="phi", tie_word_embeddings=True), "`tie_word_embeddings` = True is not"),
        (dict(model_type="starcoder2", norm_type="rms_norm"), "`norm_type` = 'rms_norm' is not"),
        (dict(model_type="olmo4"), "nearest: `olmo`.* see guides/name-map"),
    ],
)
def test_what_differs_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**SIZES, **fields})
