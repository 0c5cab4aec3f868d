"""What the config.json of each family says: real ones, what is refused, and the way back."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models import GPT2Config, LlamaConfig, config_from_hf
from lora_jax.models.dialect import BEFORE, BOTH
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.rope import RopeScaling

from tests.support.oracle import oracle

pytestmark = pytest.mark.once

# What published config.json files say, and what of it must be read.
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA = {
    **COMMON,
    "model_type": "gemma",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
GEMMA2 = {
    **GEMMA,
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = {
    **COMMON,
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
PHI3 = {
    **COMMON,
    "model_type": "phi3",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
LONGROPE = {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [2.5] * 48}
PHI3_LONG = {**PHI3, "max_position_embeddings": 131072, "rope_scaling": LONGROPE}
PHI4 = {
    **PHI3_LONG,
    "full_attn_mod": 1,
    "hidden_size": 64,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5] * 6},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
SEEN = {
    "Gemma": (
        GEMMA,
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "norm_offset": True,
            "scale_embeddings": True,
            "tie_word_embeddings": True,
            "norms": BEFORE,
            "sliding_window": None,
        },
    ),
    "Gemma 2": (
        GEMMA2,
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "norms": BOTH,
            "qk_norm": False,
            "query_pre_attn_scalar": 256,
            "sliding_layers": (True, False, True, False),
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 3": (
        GEMMA3,
        {
            "attn_logit_softcapping": None,
            "eos_token_ids": (1, 106),
            "qk_norm": True,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_layers": (True, True, True, True, True, False, True),
            "sliding_window": 512,
        },
    ),
    "Gemma 3 with eyes": (
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eos_token_id": [1, 106],
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        {
            "eos_token_ids": (1, 106),
            "model_type": "gemma3_text",
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": RopeScaling(rope_type="linear", factor=8.0),
            "vocab_size": 262208,
        },
    ),
    "Phi-3 mini": (
        PHI3,
        {
            "fused_projections": True,
            "rope_scaling": None,
            "sliding_layers": None,
            "sliding_window": 2047,
            "longrope_limit": None,
        },
    ),
    "Phi-3 mini long": (PHI3_LONG, {"context": 131072, "longrope_limit": 4096, "rotary_dim": 96}),
    "Phi-4 mini": (PHI4, {"rotary_dim": 12, "tie_word_embeddings": True, "longrope_limit": 4096}),
    "GPT-2": (
        GPT2,
        {
            "context": 1024,
            "dropout": (0.1, 0.1, 0.1),
            "eos_token_ids": (50256,),
            "head_dim": 64,
            "intermediate_size": None,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("case", SEEN)
def test_real_configs(case):
    raw, want = SEEN[case]
    config = config_from_hf(raw)
    assert {name: getattr(config, name) for name in want} == want
    # What is written is the text model alone.
    alone = dataclasses.replace(config, wrapper=None) if isinstance(config, LlamaConfig) else config
    assert config_from_hf(config.to_hf()) == alone
    assert hash(config) == hash(config_from_hf(raw))


def test_softcaps_that_are_left_out_are_not_those_that_are_null():
    named = {k: v for k, v in GEMMA2.items() if not k.endswith("softcapping")}
    assert config_from_hf(named).attn_logit_softcapping == 50.0
    null = {**named, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = config_from_hf(null)
    assert config.attn_logit_softcapping is None and config.final_logit_softcapping is None
    assert config_from_hf(config.to_hf()) == config


def test_two_rotary_embeddings_in_the_old_and_the_new_spelling():
    scaled = {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    bare = {k: v for k, v in GEMMA3.items() if not k.startswith("rope")}
    new = {
        **bare,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
        },
    }
    assert config_from_hf(scaled) == config_from_hf(new)
    assert config_from_hf(bare) == config_from_hf(GEMMA3)  # the defaults


def test_longrope_in_the_spellings_of_every_version():
    new = {k: v for k, v in PHI3_LONG.items() if not k.startswith("rope")}
    new["rope_parameters"] = {
        **{k: v for k, v in LONGROPE.items() if k != "type"},
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
    }
    old = {**PHI3_LONG, "rope_scaling": {**LONGROPE, "type": "su"}}
    assert config_from_hf(new) == config_from_hf(old) == config_from_hf(PHI3_LONG)


REFUSED = {
    "another activation": (GEMMA2, {"hidden_activation": "xielu"}, "`hidden_activation` `xielu`"),
    "another activation of the first": (
        GEMMA,
        {"hidden_activation": "relu"},
        "`hidden_activation` = 'relu' is not supported",
    ),
    "both ways": (GEMMA3, {"use_bidirectional_attention": True}, "`use_bidirectional_attention` ="),
    "eyes only": ({"model_type": "gemma3"}, {}, "a `gemma3` needs a `text_config`, an object"),
    "a scaled local rope": (
        GEMMA3,
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "`rope_parameters` of type `linear` in `sliding_attention` are not supported",
    ),
    "no window": (
        GEMMA3,
        {"sliding_window": 0},
        "`sliding_window` must be a whole number",
    ),
    "sliding without a window": (
        GEMMA3,
        {"sliding_window": None},
        "`sliding_attention` blocks without a `sliding_window` are not supported",
    ),
    "dropout": (PHI3, {"resid_pdrop": 0.1}, "`resid_pdrop` = 0.1 is not supported"),
    "too few factors": (
        PHI3,
        {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}},
        "`long_factor` lists 1 numbers, expected 48",
    ),
    "factors that are none": (
        PHI3,
        {"rope_scaling": {**LONGROPE, "long_factor": ["a"] * 48}},
        "`long_factor` must be a number from 1e-06 to 1e.06, got .a.",
    ),
    "two trained contexts": (
        PHI3,
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8}},
        "`original_max_position_embeddings` is 4096, but 8 in `rope_scaling`",
    ),
    "odd part": (
        PHI3,
        {"partial_rotary_factor": 0.1},
        r"`partial_rotary_factor` .* 0.1 of `head_dim` 96 rotates 9 dims.*; 0.104167 does",
    ),
    "two contexts": (GPT2, {"n_ctx": 512}, "`n_ctx` is 512, but `n_positions` 1024"),
    "no activation": (GPT2, {"activation_function": "xielu"}, "`xielu` is not one of silu"),
    "uneven heads": (GPT2, {"n_head": 7}, r"`n_embd` \(768\) is not a multiple of `n_head` \(7\)"),
    "no heads": (GPT2, {"n_head": 0}, "`n_head` must be a whole number from 1 to .*, got 0"),
    "cross attention": (GPT2, {"add_cross_attention": True}, "`add_cross_attention` = True is not"),
    "unknown": (GPT2, {"n_experts": 3}, "field `n_experts` = 3 is not known for model_type `gpt2`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    raw, fields, text = REFUSED[case]
    with pytest.raises(ValueError, match=text) as error:
        config_from_hf({**raw, **fields})
    assert "\n" not in str(error.value)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip


def test_what_holds_where_a_config_says_nothing():
    glm = config_from_hf({**SIZES, "model_type": "glm"})
    assert glm.partial_rotary_factor == 0.5
    # Helium's output projection has no bias, whatever the field says.
    helium = config_from_hf({**SIZES, "model_type": "helium", "attention_bias": True})
    assert (helium.qkv_bias, helium.o_bias) == (True, False)


def test_blocks_with_experts_are_each_so_many():
    raw = {**SIZES, "model_type": "qwen3_moe", "moe_intermediate_size": 8}
    raw |= {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = config_from_hf(raw)
    assert config.dense_layers == (True, False, True, True)
    assert config_from_hf(config.to_hf()).dense_layers == config.dense_layers


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_moe", "qwen3_moe"])
def test_each_qwens_windows_are_in_its_own_blocks(kind):
    from transformers import AutoConfig

    given = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    config = config_from_hf({**SIZES, "model_type": kind, **given})
    theirs = AutoConfig.for_model(kind, **SIZES, **given)
    # transformers' Qwen3-MoE knows no kinds of blocks: all of them have the window.
    blocks = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 4
    slides = config.sliding_layers or (True,) * 4
    assert list(slides) == [block == "sliding_attention" for block in blocks]
    assert config.sliding_window == theirs.sliding_window == 8


@pytest.mark.parametrize("flag", [False, True])
def test_the_sum_of_an_olmoes_experts_is_what_its_config_says(flag):
    config = config_from_hf({**SIZES, "model_type": "olmoe", "norm_topk_prob": flag})
    assert config.norm_topk_prob is config.to_hf()["norm_topk_prob"] is flag


@pytest.mark.parametrize("local, full, written", [
    (None, 5e5, None), (1e4, 5e5, (1e4, 5e5)), (1e4, 1e4, (1e4, 1e4)), (None, 1e6, (1e6, 1e6)),
])  # fmt: skip
def test_both_rotary_bases_of_an_olmo_3_are_written(local, full, written):
    """transformers 5 takes a flat field for the blocks without a window only."""
    config = dataclasses.replace(
        config_from_hf({**SIZES, "model_type": "olmo3"}),
        rope_local_base_freq=local,
        rope_theta=full,
    )
    ropes = config.to_hf().get("rope_parameters")
    kinds = ("sliding_attention", "full_attention")
    assert (ropes and tuple(ropes[kind]["rope_theta"] for kind in kinds)) == written


def test_the_window_of_a_gpt_oss_is_written():
    raw = {**SIZES, "model_type": "gpt_oss", "num_local_experts": 4, "sliding_window": 16}
    config = config_from_hf(raw)
    assert config.to_hf()["sliding_window"] == config.sliding_window == 16 and config.norm_wide


def test_every_architecture_is_known_by_its_name():
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"} < set(models.ARCHITECTURES)
    with pytest.raises(ValueError, match="model_type `mamba` is not one of llama, mistral"):
        config_from_hf({"model_type": "mamba"})
    assert isinstance(config_from_hf(GEMMA), LlamaConfig)
    assert isinstance(config_from_hf(GPT2), GPT2Config)


def test_activations_are_transformers():
    numbers = np.linspace(-12, 12, 97, dtype=np.float32)

    def theirs():
        import torch
        from transformers.activations import ACT2FN

        return {name: ACT2FN[name](torch.tensor(numbers)).numpy() for name in ACTIVATIONS}

    want = oracle("models/dialects/activations", theirs)
    for name, ours in ACTIVATIONS.items():
        # float32: exponentials and error functions of two libraries.
        np.testing.assert_allclose(
            ours(jnp.asarray(numbers)), want[name], rtol=2e-6, atol=2e-6, err_msg=name
        )
