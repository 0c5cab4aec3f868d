"""Double quantization: the scales in 8 bits, exactly as bitsandbytes stores them.

    scale ≈ map[code] · scale2 + offset

`offset` is the mean of a matrix's scales; 256 scales, in the order of the weight `(N, K)` (outputs
first), share one `scale2`.

Source: Dettmers et al. 2023, "QLoRA", section 3; bitsandbytes `quantize_4bit`.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.quant.formats import dynamic_map

_BLOCK = 256


def compress(scale, blocks: int) -> dict:
    """Quantizes the scales of one matrix.

    Args:
      scale: float32 `(K/B, N)`, of which the last may only fill up a superblock.
      blocks: how many belong to the weight.

    Returns:
      `scale` as uint8 codes of the same shape, `scale2`, `offset` and `scale_map`.
    """
    rows, cols = scale.shape
    flat = scale[:blocks].T.reshape(-1)
    offset = jnp.mean(flat)
    count = -(-flat.size // _BLOCK)
    rest = jnp.pad(flat - offset, (0, count * _BLOCK - flat.size)).reshape(count, _BLOCK)
    scale2 = jnp.max(jnp.abs(rest), axis=1)
    scaled = rest * jnp.where(scale2 == 0, 0.0, 1 / jnp.where(scale2 == 0, 1.0, scale2))[:, None]
    table = dynamic_map()
    middles = (table[1:] + table[:-1]) / np.float32(2)
    codes = jnp.searchsorted(jnp.asarray(middles), scaled, side="left").astype(jnp.uint8)
    codes = codes.reshape(-1)[: flat.size].reshape(cols, blocks).T
    filled = jnp.zeros((rows - blocks, cols), jnp.uint8)
    return {
        "scale": jnp.concatenate([codes, filled]),
        "scale2": scale2,
        "offset": offset,
        "scale_map": jnp.asarray(table),
    }


def expand(codes, scale2, offset, scale_map, blocks: int):
    """The scales as float32 numbers, `(stack..., K/B, N)`.

    Args:
      codes: uint8 `(stack..., K/B, N)`.
      scale2, offset, scale_map: of `compress`, with the same stack.
      blocks: how many of `K/B` belong to the weight.
    """
    *stack, rows, cols = codes.shape
    row = jnp.minimum(lax.broadcasted_iota(jnp.int32, (rows, cols), 0), blocks - 1)
    group = (lax.broadcasted_iota(jnp.int32, (rows, cols), 1) * blocks + row) // _BLOCK
    number = codes.astype(jnp.int32).reshape(*stack, rows * cols)
    value = jnp.take_along_axis(scale_map, number, axis=-1).reshape(codes.shape)
    return value * jnp.take(scale2, group, axis=-1) + offset[..., None, None]
