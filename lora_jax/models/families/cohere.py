"""Cohere's Command models, of the first and the second kind.

Attention and MLP both read the block's one norm, which subtracts the mean and has no bias. Numbers
that lie side by side are rotated together. Cohere 2 has a window in three of four blocks, and only
those rotate.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import SHARED, Dialect, check_fixed, read_windows, write_windows

_PERIOD = 4  # every fourth block has no window
_FIELDS = ("attention_bias", "layer_norm_eps", "logit_scale", "use_qk_norm")
_DEFAULTS = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "pad_token_id": 0,
}


# Fields of the hub's files, with the one value that the forward has.
_FIXED = {
    "layer_switch": _PERIOD,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
}


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _FIXED)
    bias = bool(raw.get("attention_bias", False))
    return {
        "norms": SHARED,
        "parallel_mlp": True,
        "norm_centered": True,
        "rms_norm_eps": raw["layer_norm_eps"],
        "rope_interleaved": True,
        "logits_scaling": 1 / raw["logit_scale"],
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _write(config: Any) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "layer_norm_eps": config.rms_norm_eps,
        "logit_scale": 1 / config.logits_scaling,
    }


def _read1(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Command R+ normalizes queries and keys.
    normed = bool(raw.get("use_qk_norm", False))
    return {**_read(raw), "qk_norm": normed, "qk_norm_by_head": normed}


def _write1(config: Any) -> dict[str, Any]:
    return {**_write(config), "use_qk_norm": config.qk_norm}


def _read2(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, {"use_qk_norm": False})
    windows = read_windows(raw, raw["sliding_window_pattern"])
    return {**_read(raw), **windows, "rope_layers": windows["sliding_layers"]}


def _write2(config: Any) -> dict[str, Any]:
    return {**_write(config), **write_windows(config)}


COHERE = Dialect(
    architecture="CohereForCausalLM",
    fields=(*_FIELDS, *_FIXED),
    read=_read1,
    write=_write1,
    defaults={**_DEFAULTS, "rope_theta": 5e5},
)

COHERE2 = Dialect(
    architecture="Cohere2ForCausalLM",
    fields=(*_FIELDS, *_FIXED, "layer_types", "sliding_window", "sliding_window_pattern"),
    read=_read2,
    write=_write2,
    defaults={**_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": _PERIOD},
)
