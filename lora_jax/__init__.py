"""lora_jax: LoRA as a transformation of parameter trees, for any JAX or Flax model.

    y = x @ W + s · (x @ A) @ B

LoraConfig, plan, init        which leaves are adapted, and the tree with adapters
lorafy                        the model's function, for such a tree
split, combine                the half that trains and the frozen one
masked, trainable_mask        the whole tree in an optimizer
grad, value_and_grad          gradients of what trains, of the whole tree
merge, unmerge, delta         plain parameters, and back
rebase                        a start that changed the base, taken back
quantize, dequantize, quant   a base in 4 or 8 bits
stack, select, replace        many adapters of one base
sharding                      trees over a mesh of devices
checkpoint, hf                files: Orbax; PEFT, GGUF, Hugging Face
linen, nnx                    Flax
models, train, finetune       language models
analysis, multi, recipes, cli

A sub-package is imported when it is used.
"""

import importlib as _importlib
import typing as _typing

from lora_jax import compat as _compat
from lora_jax import quant as quant
from lora_jax import sharding as sharding
from lora_jax.array import LoraArray as LoraArray
from lora_jax.array import RowsArray as RowsArray
from lora_jax.array import SavedArray as SavedArray
from lora_jax.array import delta as delta
from lora_jax.array import is_lora as is_lora
from lora_jax.compat import VERSION as __version__  # noqa: F401
from lora_jax.config.lora import LoraConfig as LoraConfig
from lora_jax.merge import merge as merge
from lora_jax.merge import unmerge as unmerge
from lora_jax.methods.rebase import rebase as rebase
from lora_jax.multi.single import replace as replace
from lora_jax.multi.stack import stack as stack
from lora_jax.optim import grad as grad
from lora_jax.optim import masked as masked
from lora_jax.optim import trainable_mask as trainable_mask
from lora_jax.optim import value_and_grad as value_and_grad
from lora_jax.plan.decide import LeftOutWarning as LeftOutWarning
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

if _typing.TYPE_CHECKING:
    from lora_jax import analysis as analysis
    from lora_jax import checkpoint as checkpoint
    from lora_jax import cli as cli
    from lora_jax import hf as hf
    from lora_jax import linen as linen
    from lora_jax import models as models
    from lora_jax import multi as multi
    from lora_jax import nnx as nnx
    from lora_jax import recipes as recipes
    from lora_jax import train as train
    from lora_jax.recipes import finetune as finetune

__all__ = [
    "Count",
    "DecodedWarning",
    "LeafPlan",
    "LeftOutWarning",
    "LoraArray",
    "LoraConfig",
    "MaterializedWarning",
    "Plan",
    "QuantArray",
    "RowsArray",
    "SavedArray",
    "analysis",
    "checkpoint",
    "cli",
    "combine",
    "count_parameters",
    "delta",
    "dequantize",
    "finetune",
    "format_trainable_parameters",
    "grad",
    "hf",
    "init",
    "is_lora",
    "linen",
    "lorafy",
    "masked",
    "merge",
    "models",
    "multi",
    "nnx",
    "partition_specs",
    "plan",
    "quant",
    "quantize",
    "rebase",
    "recipes",
    "replace",
    "select",
    "sharding",
    "split",
    "stack",
    "train",
    "trainable_mask",
    "unmerge",
    "value_and_grad",
]

# What is imported when it is first used -> its module. These need flax, orbax and the like.
_LAZY = {
    "analysis": "lora_jax.analysis",
    "checkpoint": "lora_jax.checkpoint",
    "cli": "lora_jax.cli",
    "finetune": "lora_jax.recipes.finetune",
    "hf": "lora_jax.hf",
    "linen": "lora_jax.linen",
    "models": "lora_jax.models",
    "multi": "lora_jax.multi",
    "nnx": "lora_jax.nnx",
    "recipes": "lora_jax.recipes",
    "train": "lora_jax.train",
}
_moved = _compat.moved(
    "lora_jax",
    {
        "answer": "lora_jax.recipes.generate",
        "describe": "lora_jax.recipes.inspect",
        "exchange": "lora_jax.recipes.convert",
    },
)


if not _typing.TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> _typing.Any:
        if name in _LAZY:
            return _importlib.import_module(_LAZY[name])
        return _moved(name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
