"""Decoders of 2024 to 2026 that are Llama's but for a few fields.

Apertus has norms of queries and keys and an activation that is learned, CWM windows in three of
four blocks, Ministral 3 queries that grow with the text, HyperCLOVA X Granite's factors and norms
after attention and MLP too, Jais 2 and Nemotron GPT-2's norms and an MLP without a gate; InternLM 3
and IQuest-Coder have names of their own.

Sources: arXiv:2509.14233 (Apertus), arXiv:2510.02387 (CWM), arXiv:2402.16819 (Nemotron).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    BEFORE,
    PART,
    Dialect,
    Norms,
    check_fixed,
    layer_norms,
    read_layer_types,
    read_partial_rope,
    read_rope,
    write_windows,
)
from lora_jax.models.families.llama import FACTORS, GRANITE, LLAMA
from lora_jax.models.rope import scaling_to_hf

_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_LONG_LLAMA3 = {**_LLAMA3, "rope_theta": 1.2e7, "factor": 8.0}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_BETA, _LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"


def _rope_of(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The object of RoPE, which is `default` where there is none."""
    return dict(given.get("rope_parameters") or given.get("rope_scaling") or default)


def _write_rope(config: Any) -> dict[str, Any]:
    scaling = scaling_to_hf(config.rope_scaling) or {"rope_type": "default"}
    # transformers takes the older field before this one.
    rope = {**scaling, "rope_theta": config.rope_theta}
    return {"rope_scaling": None, "rope_parameters": rope}


def _read_apertus(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, {**_APERTUS, "mlp_bias": False})
    bias = bool(raw.get("attention_bias", False))
    norms = Norms("attention_layernorm", None, "feedforward_layernorm", None)
    return {"norms": norms, "qk_norm": True, "gated_mlp": False, "qkv_bias": bias, "o_bias": bias}


def _read_cwm(raw: Mapping[str, Any]) -> dict[str, Any]:
    slides = tuple(block % 4 != 0 for block in range(raw["num_hidden_layers"]))
    return {
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "sliding_window": raw["sliding_window"],
        "sliding_layers": read_layer_types(raw, slides),
    }


def _write_cwm(config: Any) -> dict[str, Any]:
    return {**write_windows(config), **_write_rope(config), "mlp_bias": config.mlp_bias}


def _read_internlm(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("qkv_bias", raw.get("attention_bias", False)))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("bias", bias))}


def _read_hyperclovax(raw: Mapping[str, Any]) -> dict[str, Any]:
    after = raw["use_post_norm"]
    norms = Norms("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2")
    size = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    scale = raw.get("attention_multiplier") or size**-0.5
    # It multiplies logits by what Granite divides them by.
    read = GRANITE.read({**raw, "attention_multiplier": scale})
    return {
        **read,
        "logits_scaling": 1 / read["logits_scaling"],
        "norms": norms if after else BEFORE,
    }


def _write_hyperclovax(config: Any) -> dict[str, Any]:
    scaling, after = 1 / config.logits_scaling, config.norms != BEFORE
    return {**GRANITE.write(config), "logits_scaling": scaling, "use_post_norm": after}


def _read_jais(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**LLAMA.read(raw), **layer_norms(raw["layer_norm_eps"]), "gated_mlp": False}


def _write_jais(config: Any) -> dict[str, Any]:
    return {**LLAMA.write(config), "layer_norm_eps": config.rms_norm_eps}


def _read_nemotron(raw: Mapping[str, Any]) -> dict[str, Any]:
    own = {**layer_norms(raw["norm_eps"]), "norm_offset": True, "gated_mlp": False}
    return {**LLAMA.read(raw), **own}


def _write_nemotron(config: Any) -> dict[str, Any]:
    part = config.partial_rotary_factor
    return {**LLAMA.write(config), "norm_eps": config.rms_norm_eps, PART: part}


def _read_ministral3(raw: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope_of(raw, _YARN)
    if rope.get(_BETA) is None or rope.get(_LENGTH) is None:
        raise ValueError(f"config: `rope_parameters` lacks `{_BETA}` or `{_LENGTH}`")
    return {
        "sliding_window": raw["sliding_window"],
        "floor_scale": rope[_LENGTH],
        "attn_scale": rope[_BETA],
        "floor_everywhere": True,
    }


def _read_ministral3_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    # The context is stated beside it, and again inside.
    own = (_BETA, "max_position_embeddings")
    rope = {name: x for name, x in _rope_of(given, _YARN).items() if name not in own}
    return read_rope({**given, "rope_parameters": rope, "rope_scaling": None})


def _write_ministral3(config: Any) -> dict[str, Any]:
    own = {_LENGTH: config.floor_scale, _BETA: config.attn_scale}
    rope = _write_rope(config)
    return {
        **rope,
        "rope_parameters": {**rope["rope_parameters"], **own},
        "sliding_window": config.sliding_window,
    }


_APERTUS = {"qk_norm": True, "post_norm": False}

APERTUS = Dialect(
    architecture="ApertusForCausalLM",
    fields=(*LLAMA.fields, *_APERTUS, "hidden_dropout"),
    read=_read_apertus,
    write=lambda config: {"attention_bias": config.qkv_bias, **_write_rope(config)},
    rope=lambda given: read_rope({**given, "rope_parameters": _rope_of(given, _LONG_LLAMA3)}),
    act="xielu",
    names=names.APERTUS,
    defaults={**_IDS, "rms_norm_eps": 1e-5, "rope_theta": 1.2e7, "pad_token_id": 3},
)

CWM = Dialect(
    architecture="CwmForCausalLM",
    fields=("layer_types", "mlp_bias", "sliding_window"),
    read=_read_cwm,
    write=_write_cwm,
    rope=lambda given: read_rope({**given, "rope_parameters": _rope_of(given, _LLAMA3)}),
    defaults={
        "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": 8192, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    },
)  # fmt: skip

# transformers runs both with Llama's classes.
INTERNLM3 = LLAMA._replace(
    fields=(*LLAMA.fields, "bias", "qkv_bias"),
    read=_read_internlm,
    defaults={
        **_IDS, "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "pad_token_id": 2
    },
)  # fmt: skip

IQUESTCODER = LLAMA._replace(
    defaults={**_IDS, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
)

HYPERCLOVAX = Dialect(
    architecture="HyperCLOVAXForCausalLM",
    fields=(*GRANITE.fields, "use_post_norm"),
    read=_read_hyperclovax,
    write=_write_hyperclovax,
    names=names.HYPERCLOVAX,
    defaults={**dict.fromkeys(FACTORS, 1.0), **_IDS, "use_post_norm": True,
              "attention_multiplier": None},
)  # fmt: skip

JAIS2 = Dialect(
    architecture="Jais2ForCausalLM",
    fields=(*LLAMA.fields, "layer_norm_eps"),
    read=_read_jais,
    write=_write_jais,
    act="relu2",
    defaults={
        "attention_bias": True, "mlp_bias": True, "layer_norm_eps": 1e-5, "bos_token_id": 0,
        "eos_token_id": 150024,
    },
)  # fmt: skip

NEMOTRON = Dialect(
    architecture="NemotronForCausalLM",
    fields=(*LLAMA.fields, PART, "norm_eps"),
    read=_read_nemotron,
    write=_write_nemotron,
    act="relu2",
    rope=partial(read_partial_rope, share=0.5),
    defaults={
        "norm_eps": 1e-5, "initializer_range": 0.0134, "bos_token_id": 2, "eos_token_id": 3
    },
)  # fmt: skip

MINISTRAL3 = Dialect(
    architecture="Ministral3ForCausalLM",
    fields=("sliding_window",),
    read=_read_ministral3,
    write=_write_ministral3,
    rope=_read_ministral3_rope,
    defaults={
        **_IDS, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "pad_token_id": 11,
        "sliding_window": None,
    },
)  # fmt: skip
