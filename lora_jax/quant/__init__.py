"""Block-quantized base weights (NF4, int4, FP8, ...), and products that keep no float copy."""

from lora_jax.quant.array import QuantArray, check, is_quant
from lora_jax.quant.dispatch import ReferenceWarning
from lora_jax.quant.encode import quantize_array
from lora_jax.quant.foreign import (
    from_bitsandbytes,
    from_codes,
    stack_weights,
    to_bitsandbytes,
)
from lora_jax.quant.gguf import from_gguf
from lora_jax.quant.loading import QuantConfig
from lora_jax.quant.matmul import matmul

__all__ = [
    "QuantArray",
    "QuantConfig",
    "ReferenceWarning",
    "check",
    "from_bitsandbytes",
    "from_codes",
    "from_gguf",
    "is_quant",
    "matmul",
    "quantize_array",
    "stack_weights",
    "to_bitsandbytes",
]


def __dir__() -> list[str]:
    return __all__
