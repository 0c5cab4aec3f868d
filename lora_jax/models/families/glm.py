"""GLM-4, ERNIE 4.5 and Helium: decoders that rotate numbers that lie side by side.

GLM-4 fuses gate and up, and rotates half of a head; its models of 2025 (`glm4`) have norms after
attention and MLP too. ERNIE 4.5 and Helium are Llama's decoder else.

Sources: arXiv:2406.12793; for Helium, arXiv:2410.00037.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_jax.models.dialect import BEFORE, PART, Dialect, Norms, read_partial_rope
from lora_jax.models.families.llama import LLAMA

_NORMS = Norms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm",
    "post_mlp_layernorm",
)  # fmt: skip


def _read_glm(raw: Mapping[str, Any], *, norms: Norms) -> dict[str, Any]:
    return {
        "norms": norms,
        "fused_mlp": True,
        "rope_interleaved": True,
        "qkv_bias": bool(raw["attention_bias"]),
    }


def _write_glm(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, PART: config.partial_rotary_factor}


def _read_ernie(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw["use_bias"])
    return {"rope_interleaved": True, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}


def _read_helium(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Its output projection has no bias, whatever `attention_bias` is.
    return {**LLAMA.read(raw), "rope_interleaved": True, "norm_wide": True, "o_bias": False}


GLM = Dialect(
    architecture="GlmForCausalLM",
    fields=("attention_bias", PART),
    read=partial(_read_glm, norms=BEFORE),
    write=_write_glm,
    defaults={
        "attention_bias": True,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "pad_token_id": 151329,
        "eos_token_id": [151329, 151336, 151338],
    },
    rope=partial(read_partial_rope, share=0.5),
)

GLM4 = GLM._replace(architecture="Glm4ForCausalLM", read=partial(_read_glm, norms=_NORMS))

ERNIE4_5 = Dialect(
    architecture="Ernie4_5ForCausalLM",
    fields=("use_bias",),
    read=_read_ernie,
    write=lambda config: {"use_bias": config.qkv_bias},
    defaults={
        "use_bias": False,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)

HELIUM = Dialect(
    architecture="HeliumForCausalLM",
    fields=LLAMA.fields,
    read=_read_helium,
    write=LLAMA.write,
    defaults={
        "head_dim": 128,
        "rms_norm_eps": 1e-8,
        "rope_theta": 1e5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
)
