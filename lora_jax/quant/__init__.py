"""Block-quantized base weights: NF4, int4, int8, and products that never keep a float copy."""

from lora_jax.quant.array import QuantArray as QuantArray
from lora_jax.quant.array import check as check
from lora_jax.quant.array import is_quant as is_quant
from lora_jax.quant.array import quantize_array as quantize_array
from lora_jax.quant.dispatch import ReferenceWarning as ReferenceWarning
from lora_jax.quant.foreign import from_bitsandbytes as from_bitsandbytes
from lora_jax.quant.foreign import from_codes as from_codes
from lora_jax.quant.foreign import from_gguf as from_gguf
from lora_jax.quant.foreign import stack_weights as stack_weights
from lora_jax.quant.foreign import to_bitsandbytes as to_bitsandbytes
from lora_jax.quant.loading import QuantConfig as QuantConfig
from lora_jax.quant.matmul import matmul as matmul
