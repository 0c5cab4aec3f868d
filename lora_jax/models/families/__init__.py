"""The model types that Llama's decoder knows: what each says differently from Llama.

One entry a model type, one file a family; what an entry does not name is as in Llama. To add a
family whose decoder is this one: a function that reads what its config.json adds, one that writes
it, an entry here and one in `lora_jax.models.registry`.
"""

from collections.abc import Mapping

from lora_jax.models.dialect import Dialect
from lora_jax.models.families import gemma, llama, phi3, qwen

DIALECTS: Mapping[str, Dialect] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "phi3": phi3.PHI3,
}
