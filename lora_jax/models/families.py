"""The model types that the decoder knows: what each says differently from Llama.

One entry a family; what an entry does not name is as in Llama.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import Family, LlamaConfig


def _read_llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias, "hidden_act": "silu"}


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        fields=("attention_bias", "mlp_bias"),
        read=_read_llama,
        write=_write_llama,
    ),
}
