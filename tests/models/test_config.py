"""Configurations: from config.json and back, and every field that is refused."""

import dataclasses
import math
from typing import Any

import pytest

from lora_jax.models import LlamaConfig
from lora_jax.models.families import DIALECTS
from lora_jax.models.registry import config_from_hf
from lora_jax.models.rope import RopeScaling

pytestmark = pytest.mark.once

RAW = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# What a real config.json of SmolLM2 says beside its sizes.
REAL = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 0],
    "hidden_act": "silu",
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "mlp_bias": False,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


# What other real config.json files say, and what of it must be read.
COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
}
SEEN = {
    "Llama 3.2": (
        {
            "attention_bias": False,
            "head_dim": 8,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        {"rope_theta": 500000.0, "tie_word_embeddings": True, "context": 131072},
    ),
    "Vicuna": (
        {"max_sequence_length": 2048, "_name_or_path": "vicuna-7b", "pad_token_id": 0},
        {"pad_token_id": 0, "tie_word_embeddings": False, "rope_scaling": None},
    ),
    "Mistral 0.1": (
        {
            "model_type": "mistral",
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
        },
        {"sliding_window": 4096, "qkv_bias": False},
    ),
    "Qwen2.5": (
        {
            "model_type": "qwen2",
            "max_window_layers": 24,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        {"sliding_window": None, "qkv_bias": True, "o_bias": False, "rope_theta": 1000000.0},
    ),
    "Qwen3": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        {"qk_norm": True, "head_dim": 128, "qkv_bias": False, "sliding_window": None},
    ),
}


def read(**fields):
    return LlamaConfig.from_hf({**RAW, **fields})


def test_defaults_are_transformers():
    config = read()
    assert config.num_key_value_heads == 4 and config.head_dim == 8
    assert config.rope_theta == 10000.0 and config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings and config.eos_token_ids == ()


# The sizes in a file that leaves everything else out.
STATED = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads max_position_embeddings n_embd n_layer n_head n_positions dim n_layers n_heads
hidden_dim d_model d_kv d_ff num_layers num_heads image_size patch_size num_channels
type_vocab_size embedding_size num_experts_per_tok""".split()
OTHERS = """bert roberta distilbert electra modernbert deberta-v2 xlm-roberta camembert gpt2 t5 umt5
mt5 vit""".split()
GIVEN: dict[str, Any] = {
    # Heads of 42 numbers, of which 21 turn: no model has the class's own sizes.
    "glm4_moe": {"head_dim": 128},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "gemma4_text": {"num_hidden_layers": 8},  # the last one sees all tokens
}
# Ids of tokens are not read off the class, and a width is what None means.
APART = {"bos_token_id", "eos_token_ids", "pooler_output_size"}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*DIALECTS, *OTHERS])
def test_what_a_file_leaves_out_is_the_default_of_transformers(kind):
    from transformers import CONFIG_MAPPING

    given = GIVEN.get(kind, {})
    whole = {**CONFIG_MAPPING[kind](**given).to_dict(), "model_type": kind}
    stated = {name: whole[name] for name in STATED if whole.get(name) is not None}
    read = config_from_hf({"model_type": kind, **stated, **given})
    there = config_from_hf(whole)
    names = {field.name for field in dataclasses.fields(there)} - APART
    assert {n: getattr(read, n) for n in names} == {n: getattr(there, n) for n in names}


def test_a_mixture_without_experts_for_a_token_is_refused():
    with pytest.raises(
        ValueError, match="config: `num_experts_per_tok` is missing: experts for ea"
    ):
        read(model_type="deepseek_v2", q_lora_rank=8)


def test_dots_name_of_its_scores_is_that_of_sigmoids():
    kind = dict(
        model_type="dots1", num_experts_per_tok=2, n_routed_experts=8, n_shared_experts=1,
        num_key_value_heads=2,
    )  # fmt: skip
    assert read(**kind, scoring_func="noaux_tc") == read(**kind)
    with pytest.raises(ValueError, match="`scoring_func` = 'softmax' is not supported"):
        read(**kind, scoring_func="softmax")


def test_a_real_config():
    config = read(**REAL)
    assert config.num_key_value_heads == 2 and config.rope_theta == 100000.0
    assert config.tie_word_embeddings and config.eos_token_ids == (2, 0)
    assert hash(config) == hash(read(**REAL))


@pytest.mark.parametrize("case", SEEN)
def test_other_real_configs(case):
    fields, want = SEEN[case]
    config = read(**{**COMMON, **fields})
    assert {name: getattr(config, name) for name in want} == want
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        REAL,
        {"attention_bias": True, "mlp_bias": True, "eos_token_id": 5},
        {"rope_scaling": LLAMA3},
        {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_to_hf_and_back(fields):
    config = read(**fields)
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_old_and_new_ways_to_state_rope_are_one():
    old = read(rope_theta=500.0, rope_scaling={**LLAMA3, "type": "llama3"})
    new = read(rope_parameters={**LLAMA3, "rope_theta": 500.0, "partial_rotary_factor": 1.0})
    oldest = read(rope_scaling={"type": "linear", "factor": 2.0})
    assert old == new and old.rope_scaling.original_max_position_embeddings == 16
    assert oldest.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0


def test_the_context_is_stretched_where_scaling_stretches_it():
    assert read().context == 64
    assert read(rope_scaling={"rope_type": "dynamic", "factor": 2.0}).context == 128
    assert read(rope_scaling=LLAMA3).context == 64
    assert read(rope_scaling={"rope_type": "yarn", "factor": 2.0}).context == 64


REFUSED = {
    "another family": ({"model_type": "mamba"}, "model_type `mamba` is not one of llama"),
    "no family": ({"model_type": None}, "model_type `None` is not one of"),
    "an unknown field": (
        {"residual_multiplier": 2.0},
        "field `residual_multiplier` = 2.0 is not known for model_type `llama` and may change",
    ),
    "another activation": ({"hidden_act": "xielu"}, "`hidden_activation` `xielu` is not one of"),
    "dropout": ({"attention_dropout": 2}, "`attention_dropout` must be"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` = 0.5 is not"),
    "interleaved": ({"rope_interleaved": True}, "`rope_interleaved` = True is not supported"),
    "quantized": (
        {"quantization_config": {"quant_method": "hqq"}},
        "the weights are quantized .*method `hqq`",
    ),
    "a size missing": ({"hidden_size": None}, "config.json lacks `hidden_size`"),
    "no blocks": ({"num_hidden_layers": 0}, "`num_hidden_layers` must be a whole number from 1"),
    "half a head": (
        {"hidden_size": 32.5},
        "`hidden_size` must be a whole number from 1 to 2.14748e.09, got 32.5",
    ),
    "uneven groups": (
        {"num_key_value_heads": 3},
        r"`num_attention_heads` \(4\) is not a multiple of `num_key_value_heads` \(3\)",
    ),
    "odd heads": ({"head_dim": 7}, "`head_dim` rotates 7 dims of a head, expected an even number"),
    "unknown rope": (
        {"rope_scaling": {"rope_type": "su", "factor": 2.0}},
        "rope_type `su` is not one of default, linear, .*, yarn, proportional, longrope",
    ),
    "rope lacks": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        r"of type `llama3`: missing \['low_freq_factor', 'high_freq_factor'\]",
    ),
    "rope has more": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        r"of type `linear`: missing nothing, unknown \['beta'\]",
    ),
    "rope shrinks": (
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "`rope_scaling`: `factor` must be a number from 1 to 1e.06, got 0.5",
    ),
    "rope no number": (
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        "`factor` must be a number from 1 to 1e.06, got 'two'",
    ),
    "rope edges": (
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}},
        "`low_freq_factor` must not be above `high_freq_factor`",
    ),
}


@pytest.mark.parametrize(
    "fields, window",
    [
        ({}, None),
        ({"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 0}, None),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, None),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7),
        (
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 3,
            },
            7,
        ),
    ],
)
def test_qwens_window(fields, window):
    config = read(model_type="qwen2", num_key_value_heads=2, **fields)
    assert config.sliding_window == window and config.qkv_bias and not config.o_bias
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_blocks_with_and_without_a_window():
    fields = {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8}
    window = {"sliding_window": 7, "use_sliding_window": True}
    config = read(**fields, **window, max_window_layers=1)
    assert config.sliding_layers == (False, True, True)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    kinds = ["sliding_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="`layer_types` has `chunked_attention`, which is neither"):
        read(**fields, **window, layer_types=kinds)
    with pytest.raises(ValueError, match="1 `layer_types` for 3 `num_hidden_layers`"):
        read(**fields, **window, layer_types=kinds[:1])
    with pytest.raises(ValueError, match="field `use_sliding_window` = True is not known|`use_sli"):
        read(use_sliding_window=True)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    fields, text = REFUSED[case]
    with pytest.raises(ValueError, match=text) as error:
        read(**fields)
    assert "\n" not in str(error.value)


def test_a_config_is_frozen_and_checked_when_made():
    config = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3
    with pytest.raises(ValueError, match="`vocab_size` must be a whole number from 1"):
        dataclasses.replace(config, vocab_size=-1)
    with pytest.raises(ValueError, match="`hidden_activation` `xielu` is not one of silu, swish"):
        dataclasses.replace(config, hidden_activation="xielu")


BERT = {"model_type": "bert", "architectures": ["BertModel"]}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize("base", [RAW, BERT, GPT2], ids=lambda raw: raw["model_type"])
def test_numbers_that_no_model_has_are_refused_by_name(base):
    names = {"llama": ("rms_norm_eps", "hidden_size", "num_attention_heads", "num_hidden_layers"),
             "bert": ("layer_norm_eps", "hidden_size", "num_attention_heads", "num_hidden_layers"),
             "gpt2": ("layer_norm_epsilon", "n_embd", "n_head", "n_layer")}  # fmt: skip
    small, *sizes = names[base["model_type"]]
    for value in (math.nan, math.inf, -1e-6, "1e-6", True, [1e-6], 1e300, 2**70):
        with pytest.raises(ValueError, match=f"`{small}` must be a number from 0 to 1, got"):
            config_from_hf({**base, small: value})
    for name in sizes:
        for value in (0, -1, 2.0, "4", True, [4], {}, 2**40):
            with pytest.raises(ValueError, match=f"`{name}` must be a whole number from 1 to"):
                config_from_hf({**base, name: value})
    for value in ("<s>", 1.5, True, [1, "x"]):
        with pytest.raises(ValueError, match="`eos_token_id` must be a whole number"):
            config_from_hf({**base, "eos_token_id": value})


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "10000", True, 1e39, 1e-60])
def test_a_wavelength_that_is_none_is_refused(value):
    for fields in ({"rope_theta": value}, {"rope_parameters": {"rope_theta": value}}):
        with pytest.raises(ValueError, match="`rope_theta` must be a number from 1 to 1e.15"):
            LlamaConfig.from_hf({**RAW, **fields})


@pytest.mark.parametrize("value", [math.nan, math.inf, "8", True])
def test_a_scaling_with_another_than_numbers_is_refused(value):
    with pytest.raises(ValueError, match="`factor` must be a number"):
        LlamaConfig.from_hf({**RAW, "rope_scaling": {**LLAMA3, "factor": value}})
    with pytest.raises(ValueError, match="`rope_scaling` must be an object"):
        LlamaConfig.from_hf({**RAW, "rope_scaling": "linear"})


@pytest.mark.parametrize("value", ["false", 0, 1.0])
def test_a_flag_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="`tie_word_embeddings` must be true or false"):
        LlamaConfig.from_hf({**RAW, "tie_word_embeddings": value})


# The fields that no test above has, by the families that read them.
ELSEWHERE = {
    "qwen2": {"max_window_layers": -1, "num_hidden_layers": 2**40, "use_sliding_window": 1},
    "gemma2": {"query_pre_attn_scalar": 0, "attn_logit_softcapping": "50", "layer_types": 3},
    "gemma3_text": {"sliding_window_pattern": 0, "rope_local_base_freq": math.nan},
    "granite": {"logits_scaling": 0, "residual_multiplier": 1e30},
    "cohere": {"logit_scale": 0},
    "exaone4": {"sliding_window_pattern": 1e20},
    "smollm3": {"no_rope_layer_interval": 0, "no_rope_layers": "1110"},
    "qwen3_moe": {"norm_topk_prob": "false", "router_aux_loss_coef": -1, "num_experts": 10**6},
    "gpt2": {"n_inner": -4, "attn_pdrop": "0.1", "scale_attn_weights": 1},
    "bert": {"hidden_dropout_prob": 2, "num_labels": 0, "id2label": ["a"], "pad_token_id": -2},
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_every_field_has_a_kind_and_a_range(kind):
    own = {"bert": BERT, "gpt2": GPT2}.get(kind, {**RAW, "model_type": kind})
    for name, value in ELSEWHERE[kind].items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*, got"):
            config_from_hf({**own, name: value})
        # null is the default.
        try:
            config_from_hf({**own, name: None})
        except ValueError as error:
            assert "must be" not in str(error)


def test_values_that_leave_nothing():
    with pytest.raises(ValueError, match="`sliding_window_pattern` = 'LGL' is not supported"):
        read(model_type="exaone4", sliding_window_pattern="LGL")
    with pytest.raises(ValueError, match="`no_rope_layers` must list 0 or 1"):
        read(model_type="smollm3", no_rope_layers=[1, 2, 1])
    roberta = {"model_type": "roberta", "architectures": ["RobertaModel"]}
    with pytest.raises(ValueError, match=r"`pad_token_id` \(600\) leaves no position"):
        config_from_hf({**roberta, "pad_token_id": 600})
    with pytest.raises(ValueError, match="`id2label` must have numbers as keys"):
        config_from_hf({**roberta, "id2label": {"a": "b"}})


def test_the_widest_numbers_of_public_checkpoints_are_read():
    config = read(rope_theta=3_580_165_449, rms_norm_eps=0, pad_token_id=-1, eos_token_id=[-1, 2])
    assert config.rope_theta == 3_580_165_449.0
    assert read(model_type="qwen2", num_key_value_heads=2, sliding_window=0).context == 64
