"""lora_jax: LoRA as a transformation of parameter trees, for any JAX or Flax model.

    y = x @ W + s · (x @ A) @ B

Everything public that is not in a sub-package is here; sub-packages are imported when used.
"""

import importlib as _importlib

from lora_jax.array import LoraArray as LoraArray
from lora_jax.array import RowsArray as RowsArray
from lora_jax.array import SavedArray as SavedArray
from lora_jax.array import delta as delta
from lora_jax.array import is_lora as is_lora
from lora_jax.compat import VERSION as __version__  # noqa: F401
from lora_jax.config.lora import LoraConfig as LoraConfig
from lora_jax.merge import merge as merge
from lora_jax.merge import unmerge as unmerge
from lora_jax.multi.single import replace as replace
from lora_jax.multi.stack import stack as stack
from lora_jax.optim import grad as grad
from lora_jax.optim import masked as masked
from lora_jax.optim import trainable_mask as trainable_mask
from lora_jax.optim import value_and_grad as value_and_grad
from lora_jax.plan.decide import plan as plan
from lora_jax.plan.leaf import LeafPlan as LeafPlan
from lora_jax.plan.leaf import Plan as Plan
from lora_jax.quant.array import QuantArray as QuantArray
from lora_jax.quantize import dequantize as dequantize
from lora_jax.quantize import quantize as quantize
from lora_jax.sharding import partition_specs as partition_specs
from lora_jax.transform import DecodedWarning as DecodedWarning
from lora_jax.transform import MaterializedWarning as MaterializedWarning
from lora_jax.transform.lorafy import lorafy as lorafy
from lora_jax.transform.many.rows import select as select
from lora_jax.tree import Count as Count
from lora_jax.tree import combine as combine
from lora_jax.tree import count_parameters as count_parameters
from lora_jax.tree import format_trainable_parameters as format_trainable_parameters
from lora_jax.tree import init as init
from lora_jax.tree import split as split

# Public name -> the module of this package that is imported when it is first asked for.
_LAZY = {
    "analysis": "analysis",
    "checkpoint": "checkpoint",
    "cli": "cli",
    "finetune": "recipes.finetune",
    "hf": "hf",
    "linen": "linen",
    "models": "models",
    "multi": "multi",
    "nnx": "nnx",
    "recipes": "recipes",
    "train": "train",
}


def __getattr__(name: str):
    if name in _LAZY:
        return _importlib.import_module(f"lora_jax.{_LAZY[name]}")
    raise AttributeError(f"module `lora_jax` has no attribute `{name}`")


def __dir__():
    return sorted({*globals(), *_LAZY})
