"""The model types that share Llama's decoder, and how the config of each differs from Llama's.

One entry per model type, one file per family; an entry lists only the differences. To add a family
with this decoder: a function that reads the fields its config.json adds, one that writes them, and
an entry here.
"""

from collections.abc import Mapping

from lora_jax.models.dialect import Dialect
from lora_jax.models.families import (
    cohere,
    experts,
    gemma,
    gemma4,
    glm,
    gpt_oss,
    grouped,
    llama,
    llama4,
    neox,
    olmo,
    phi3,
    qwen,
    qwen_next,
    starcoder2,
)

DIALECTS: Mapping[str, Dialect] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "gemma4_text": gemma4.GEMMA4,
    "phi3": phi3.PHI3,
    "ministral": llama.MINISTRAL,
    "smollm3": llama.SMOLLM3,
    "granite": llama.GRANITE,
    "seed_oss": llama.SEED_OSS,
    "arcee": llama.ARCEE,
    "olmo2": olmo.OLMO2,
    "olmo3": olmo.OLMO3,
    "exaone4": olmo.EXAONE4,
    "glm": glm.GLM,
    "glm4": glm.GLM4,
    "ernie4_5": glm.ERNIE4_5,
    "helium": glm.HELIUM,
    "cohere": cohere.COHERE,
    "cohere2": cohere.COHERE2,
    "stablelm": starcoder2.STABLELM,
    "starcoder2": starcoder2.STARCODER2,
    "gpt_neox": neox.GPT_NEOX,
    "phi": neox.PHI,
    "qwen3_next": qwen_next.QWEN3_NEXT,
    "qwen3_5_text": qwen_next.QWEN3_5,
    "qwen3_5_moe_text": qwen_next.QWEN3_5_MOE,
    "gpt_oss": gpt_oss.GPT_OSS,
    "mixtral": experts.MIXTRAL,
    "qwen2_moe": experts.QWEN2_MOE,
    "qwen3_moe": experts.QWEN3_MOE,
    "olmoe": experts.OLMOE,
    "llama4_text": llama4.LLAMA4,
    "glm4_moe": grouped.GLM4_MOE,
    "glm4_moe_lite": grouped.GLM4_MOE_LITE,
    "deepseek_v2": grouped.DEEPSEEK_V2,
    "deepseek_v3": grouped.DEEPSEEK_V3,
}
