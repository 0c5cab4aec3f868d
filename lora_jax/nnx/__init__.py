"""Flax NNX: a module as a pure function of its parameters, and a module with adapters inside.

There is no arithmetic here.
"""

from lora_jax.nnx.adapted import Adapted, FrozenParam, LoraParam, adapt, merged
from lora_jax.nnx.functional import Functional, functional

__all__ = ["Adapted", "FrozenParam", "Functional", "LoraParam", "adapt", "functional", "merged"]


def __dir__() -> list[str]:
    return __all__
