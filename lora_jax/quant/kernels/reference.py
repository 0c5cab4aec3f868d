"""Decoding and multiplying in plain jnp: what the kernels are tested against, and what a CPU runs.

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


def decode(
    packed: Integer[AnyArray, "p n"],  # noqa: F722
    scale: Float[AnyArray, "g n"],  # noqa: F722
    bias: Float[AnyArray, "g n"] | None,  # noqa: F722
    *,
    form: formats.Format,
    block: int,
    dtype: DTypeLike,
) -> Float[Array, "k n"]:  # noqa: F722
    """The matrix, K filled up to whole superblocks."""
    return formats.decode(packed, scale, bias, form, block, dtype)


def decode_blocks(
    packed: Integer[AnyArray, "s b n"],  # noqa: F722
    scale: Float[AnyArray, "s h n"],  # noqa: F722
    bias: Float[AnyArray, "s h n"] | None = None,  # noqa: F722
    *,
    form: formats.Format,
    dtype: DTypeLike,
) -> Float[Array, "s h b n"]:  # noqa: F722
    """`decode` with a dim for superblocks, as the kernels have it."""
    supers, block, cols = packed.shape
    bias = None if bias is None else bias.reshape(-1, cols)
    w = decode(packed.reshape(-1, cols), scale.reshape(-1, cols), bias, form=form, block=block,
               dtype=dtype)  # fmt: skip
    return w.reshape(supers, scale.shape[1], block, cols)


def product(
    x: AnyArray,
    w: AnyArray,
    *,
    transposed: bool,
    precision: Any = None,
    preferred: DTypeLike | None = None,
) -> Array:
    """`x · w`, or `x · wᵀ`: the last dim of `x` against the first, or last, of a matrix."""
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (1 if transposed else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred,
    )


def matmul(
    x: Float[AnyArray, "m _"],  # noqa: F722
    packed: Integer[AnyArray, "p n"],  # noqa: F722
    scale: Float[AnyArray, "g n"],  # noqa: F722
    bias: Float[AnyArray, "g n"] | None,  # noqa: F722
    *,
    form: formats.Format,
    block: int,
    transposed: bool,
    dtype: DTypeLike,
) -> Float[Array, "m _"]:  # noqa: F722
    """What fused kernels compute: `x (M, K) · w` or `x (M, N) · wᵀ`, sums in float32."""
    w = decode(packed, scale, bias, form=form, block=block, dtype=x.dtype)
    return product(x, w, transposed=transposed, preferred=jnp.float32).astype(dtype)
