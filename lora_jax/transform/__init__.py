"""The forward transform: `lorafy(fn)` runs `fn` with weights that are never materialized."""

from lora_jax.transform.base_weight import DecodedWarning as DecodedWarning
from lora_jax.transform.interpret import MaterializedWarning as MaterializedWarning
from lora_jax.transform.lorafy import lorafy as lorafy
