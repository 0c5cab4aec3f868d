"""Decoding and multiplying in plain jnp: the oracle, and what runs on a CPU.

XLA's CPU compiler always writes the decoded matrix down; with layers under `scan` one at a time.
"""

import jax.numpy as jnp
from jax import lax

from lora_jax.quant import formats


def decode(packed, scale, bias, *, form: formats.Format, block: int, dtype):
    """The matrix `(K, N)`, K filled up to whole superblocks."""
    return formats.decode(packed, scale, bias, form, block, dtype)


def decode_blocks(packed, scale, bias=None, *, form: formats.Format, dtype):
    """As the kernels have it: of codes `(S, B, N)` and scales `(S, h, N)`, `(S, h, B, N)`."""
    supers, block, cols = packed.shape
    parts = (a if a is None else a.reshape(-1, cols) for a in (packed, scale, bias))
    w = decode(*parts, form=form, block=block, dtype=dtype)
    return w.reshape(supers, scale.shape[1], block, cols)


def product(x, w, *, transposed: bool, precision=None, preferred=None):
    """`x · w`, or `x · wᵀ`: the last dim of `x` against the first, or last, of a matrix."""
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (1 if transposed else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred,
    )


def matmul(x, packed, scale, bias, *, form, block: int, transposed: bool, dtype):
    """The fused kernels' contract: `x (M, K) · w` or `x (M, N) · wᵀ`, sums in float32."""
    w = decode(packed, scale, bias, form=form, block=block, dtype=x.dtype)
    return product(x, w, transposed=transposed, preferred=jnp.float32).astype(dtype)
