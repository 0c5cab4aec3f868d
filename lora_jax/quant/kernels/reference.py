"""Products in plain jnp: what the kernels are tested against, and what a CPU runs.

XLA's CPU compiler always writes the decoded matrix to memory: under a `scan` over layers, one
matrix at a time.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from lora_jax.dims import AnyArray
from lora_jax.quant import formats


def decode_blocks(
    packed: Integer[AnyArray, "s p b n"],
    scale: Float[AnyArray, "s h n"],
    bias: Float[AnyArray, "s h n"] | None = None,
    *,
    form: formats.Format,
    dtype: DTypeLike,
) -> Float[Array, "s h b n"]:
    """`formats.decode` with a dim for superblocks, as the kernels have it."""
    supers, _, block, cols = packed.shape
    bias = None if bias is None else bias.reshape(-1, cols)
    w = formats.Coded(
        packed.reshape(-1, cols), scale.reshape(-1, cols), bias, form=form, block=block
    )
    return formats.decode(w, dtype).reshape(supers, scale.shape[1], block, cols)


def product(
    x: Float[AnyArray, "*m _"],
    w: Float[AnyArray, "k n"],
    *,
    transposed: bool,
    precision: Any = None,
    preferred: DTypeLike | None = None,
) -> Float[Array, "*m _"]:
    """`x · w`, or `x · wᵀ`: the last dim of `x` against the first, or last, of a matrix."""
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (1 if transposed else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred,
    )


def matmul(
    x: Float[AnyArray, "m _"],
    w: formats.Coded,
    *,
    transposed: bool,
    dtype: DTypeLike,
) -> Float[Array, "m _"]:
    """What fused kernels compute: `x (M, K) · w` or `x (M, N) · wᵀ`, sums in float32."""
    dense = formats.decode(w, x.dtype)
    return product(x, dense, transposed=transposed, preferred=jnp.float32).astype(dtype)
