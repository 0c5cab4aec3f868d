"""Full fine-tuning in the same loop: the baseline that an adapter is to be measured against."""

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.array import is_lora
from lora_jax.quant.array import is_leaf, is_quant


def split_full(params):
    """The counterpart of `lora.split` where everything trains.

    Args:
      params: plain parameters, every leaf an array of floats.

    Returns:
      `(trainable, frozen)`: `params` itself, and its structure with None in every place.

    Raises:
      ValueError: a leaf has an adapter, is quantized or holds no floats: it has no gradient of its
        own.
    """
    for key_path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        found = _untrainable(x)
        if found is not None:
            raise ValueError(
                f"full fine-tuning trains every leaf, but `{paths.spell(key_path)}` {found}"
            )
    if not jax.tree.leaves(params):
        raise ValueError("full fine-tuning has nothing to train: `lora_params` has no leaves")
    return params, jax.tree.map(lambda x: None, params)


def _untrainable(x) -> str | None:
    if is_lora(x):
        return "has an adapter; merge it first (lora.merge), or train the adapter alone"
    if is_quant(x):
        return f"is quantized ({x.format}); load the model without `quantize`, or train an adapter"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"holds {x.dtype}, which has no gradient; keep it out of the parameters"
    return None
