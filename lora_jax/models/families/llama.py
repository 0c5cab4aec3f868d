"""Llama (SmolLM2 and many others with it) and Mistral, which only adds a window."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import Dialect


def _read_llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _write_llama(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Dialect(
    architecture="LlamaForCausalLM",
    fields=("attention_bias", "mlp_bias"),
    read=_read_llama,
    write=_write_llama,
)

MISTRAL = Dialect(
    architecture="MistralForCausalLM",
    fields=("sliding_window",),
    read=lambda raw: {"sliding_window": raw["sliding_window"]},
    write=lambda config: {"sliding_window": config.sliding_window},
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
