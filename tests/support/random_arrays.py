"""Random numbers of NumPy's for test data.

`jax.random.normal` compiles a program for every shape, which takes longer than most tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import lora_jax as lora


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Normally distributed numbers of standard deviation `scale`."""
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values.astype(np.float32), dtype)


def moved(lora_params: PyTree, seed: int = 3, spread: float = 1.0) -> PyTree:
    """The tree with every trained array moved from its start, as by training.

    Args:
      lora_params: a tree with adapters.
      seed: of the numbers.
      spread: the standard deviation of the changes.
    """
    trainable, frozen = lora.split(lora_params)
    rng = np.random.default_rng(seed)

    def move(x: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(x) + spread * rng.normal(size=x.shape), x.dtype)

    return lora.combine(jax.tree.map(move, trainable), frozen)
