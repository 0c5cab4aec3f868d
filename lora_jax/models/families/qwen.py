"""Qwen2 and Qwen3: biases on queries, keys and values, or norms on queries and keys; windows."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import Dialect, read_layer_types, write_layer_types


def _read_qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, **_windows(raw)}


def _read_qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, **_windows(raw)}


def _windows(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Windows: in the blocks from `max_window_layers` on, unless `layer_types` lists them."""
    first = raw["max_window_layers"]
    blocks = tuple(block >= first for block in range(raw["num_hidden_layers"]))
    return {
        # Checkpoints state a `sliding_window` even where `use_sliding_window` is false.
        "sliding_window": raw["sliding_window"] if raw.get("use_sliding_window") else None,
        "sliding_layers": read_layer_types(raw, blocks),
    }


def _write(config: Any) -> dict[str, Any]:
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": write_layer_types(config),
        **({"attention_bias": config.qkv_bias} if config.qk_norm else {}),
    }


_FIELDS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
DEFAULTS = {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096}

QWEN2 = Dialect(
    architecture="Qwen2ForCausalLM",
    fields=_FIELDS,
    read=_read_qwen2,
    write=_write,
    defaults=DEFAULTS,
)

QWEN3 = Dialect(
    architecture="Qwen3ForCausalLM",
    fields=(*_FIELDS, "attention_bias"),
    read=_read_qwen3,
    write=_write,
    defaults={**DEFAULTS, "head_dim": 128},
)
