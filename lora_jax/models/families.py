"""The model types that the decoder knows: what each says differently from Llama.

One entry a family; what an entry does not name is as in Llama. To add a family whose decoder is
this one: a function that reads what its config.json adds, one that writes it, and an entry.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import Family, LlamaConfig


def _read_llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": raw.get("sliding_window")}


def _write_mistral(config: LlamaConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _read_qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_window": _one_window(raw)}


def _read_qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    window = _one_window(raw)
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "sliding_window": window}


def _write_qwen(config: LlamaConfig) -> dict[str, Any]:
    slides = config.sliding_window is not None
    kind = "sliding_attention" if slides else "full_attention"
    return {
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window,
        "layer_types": [kind] * config.num_hidden_layers,
        **({"attention_bias": config.qkv_bias} if config.qk_norm else {}),
    }


def _one_window(raw: Mapping[str, Any]) -> int | None:
    """Qwen's window, which must be the same in every block: the blocks are one scanned block."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    if window is None:
        return None
    first = raw.get("max_window_layers", 28)
    blocks = range(raw["num_hidden_layers"])
    kinds = raw.get("layer_types") or [
        "sliding_attention" if block >= first else "full_attention" for block in blocks
    ]
    if len(set(kinds)) > 1:
        raise ValueError("config: blocks with and without a sliding window are not supported")
    return window if kinds[0] == "sliding_attention" else None


_QWEN = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        fields=("attention_bias", "mlp_bias"),
        read=_read_llama,
        write=_write_llama,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        fields=("sliding_window",),
        read=_read_mistral,
        write=_write_mistral,
        defaults={"num_key_value_heads": 8},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fields=_QWEN,
        read=_read_qwen2,
        write=_write_qwen,
        defaults={"num_key_value_heads": 32},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fields=(*_QWEN, "attention_bias"),
        read=_read_qwen3,
        write=_write_qwen,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
}
