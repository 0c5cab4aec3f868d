"""Initial values of the factors. Each start takes `(key, config, leaf, w)` and gives `(w, a, b)`.

`w` is changed only by starts that take a part of the weight into the factors (PiSSA, OLoRA), so
that `W + s·A·B` is still the weight that was given.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.array import dense, widened
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import factor_shapes, from_matrix, sizes, stack_dims, to_matrix
from lora_jax.plan.leaf import LeafPlan
from lora_jax.quant.array import is_quant


def default(key, config: LoraConfig, leaf: LeafPlan, w):
    """`A ~ U(±1/√fan_in)`, `B = 0`; for a lookup table `A = 0`, `B ~ N(0, 1)`, as in PEFT."""
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    if leaf.lookup:
        b = jax.random.normal(key, b_shape, dtype)
        return w, jnp.zeros(a_shape, dtype), mask(leaf, b, rank_axis="b")
    a = uniform(key, a_shape, 1 / np.sqrt(sizes(leaf.shape, leaf.roles)[1]), dtype)
    return w, mask(leaf, a, rank_axis="a"), jnp.zeros(b_shape, dtype)


def gaussian(key, config: LoraConfig, leaf: LeafPlan, w):
    """`A ~ N(0, 1/r)` with standard deviation `1/r`, `B = 0`."""
    if leaf.lookup:
        return default(key, config, leaf, w)
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    a = jax.random.normal(key, a_shape, dtype) / per_stack(leaf, np.maximum(leaf.ranks, 1), "a")
    return w, mask(leaf, a.astype(dtype), rank_axis="a"), jnp.zeros(b_shape, dtype)


def random(key, config: LoraConfig, leaf: LeafPlan, w):
    """`A ~ U(±1/√fan_in)`, `B ~ U(±1/√r)`: not the identity; for tests of other code."""
    first, second = jax.random.split(key)
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    a = uniform(first, a_shape, 1 / np.sqrt(sizes(leaf.shape, leaf.roles)[1]), dtype)
    bound = 1 / np.sqrt(np.maximum(leaf.ranks, 1))
    b = uniform(second, b_shape, 1.0, dtype) * per_stack(leaf, bound, "b")
    return w, mask(leaf, a, rank_axis="a"), mask(leaf, b.astype(dtype), rank_axis="b")


def orthogonal(key, config: LoraConfig, leaf: LeafPlan, w):
    """Factors over complementary halves of an orthogonal basis, `A·B = 0` with neither zero.

    Source: PEFT `init_lora_weights="orthogonal"`; the scale 1/10 is PEFT's.
    """
    if leaf.rank % 2:
        raise ValueError(f'init="orthogonal" needs an even rank, `{leaf.path}` has {leaf.rank}')
    uniform_rank(leaf, "orthogonal")
    stack, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
    keys = jax.random.split(key, 3)
    half = leaf.rank // 2
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*stack, leaf.rank, leaf.rank)))
    odd, even = q[..., 0::2, :], q[..., 1::2, :]
    a = jnp.matmul(jax.random.normal(keys[1], (*stack, fan_in, half)), odd) / 10
    b = jnp.matmul(jax.random.normal(keys[2], (*stack, fan_out, half)), even) / 10
    return w, *shaped(leaf, a, jnp.swapaxes(b, -1, -2))


def pissa(key, config: LoraConfig, leaf: LeafPlan, w):
    """The principal singular vectors go into the factors, the rest stays in the weight.

        A = U_r·√(S_r/s),  B = √(S_r/s)·V_rᵀ,  W ← W − s·A·B

    Source: Meng et al. 2024, "PiSSA", eq. 2 and 3.
    """
    uniform_rank(leaf, "pissa")
    s = scale_of(leaf)
    a, b = principal(matrix_of(leaf, w), leaf.rank, s)
    return residual(leaf, w, a, b, s), *shaped(leaf, a, b)


def olora(key, config: LoraConfig, leaf: LeafPlan, w):
    """Orthonormal start from the QR decomposition of `Wᵀ = Q·R`: `B = Q_rᵀ`, `A = R_rᵀ`.

    Source: Büyükakyüz 2024, "OLoRA"; as PEFT, without division by the scale.
    """
    uniform_rank(leaf, "olora")
    q, r = jnp.linalg.qr(jnp.swapaxes(matrix_of(leaf, w), -1, -2))
    a = jnp.swapaxes(r[..., : leaf.rank, :], -1, -2)
    b = jnp.swapaxes(q[..., : leaf.rank], -1, -2)
    return residual(leaf, w, a, b, scale_of(leaf)), *shaped(leaf, a, b)


def mica(key, config: LoraConfig, leaf: LeafPlan, w):
    raise ValueError(
        'init="mica" freezes B, which this version does not do: use "default", or merge the '
        "adapter with PEFT first"
    )


def eva(key, config: LoraConfig, leaf: LeafPlan, w):
    raise ValueError(
        'init="eva" starts from activations of training data, which this version does not '
        'collect yet: use "default" or "pissa"'
    )


def factor_dtype(leaf: LeafPlan):
    """float32, also over a 16-bit base (as PEFT); float64 over a float64 base."""
    return widened(leaf.dtype)


def uniform(key, shape, bound: float, dtype):
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def per_stack(leaf: LeafPlan, values, part: str):
    """One number a stack index, broadcast-ready against a factor."""
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    stack = [leaf.shape[d] for d in stack_dims(leaf.roles)]
    rest = len(a_shape if part == "a" else b_shape) - len(stack)
    return np.asarray(values, np.float32).reshape(*stack, *[1] * rest)


def mask(leaf: LeafPlan, factor, *, rank_axis: str):
    """Zeroes the padding of smaller ranks and of layers left out: zeros never train."""
    if len(set(leaf.ranks)) == 1:
        return factor
    stack = [leaf.shape[d] for d in stack_dims(leaf.roles)]
    keep = np.arange(leaf.rank)[None] < np.asarray(leaf.ranks)[:, None]
    extra = factor.ndim - len(stack) - 1
    shape = (*stack, *[1] * extra, leaf.rank)
    if rank_axis == "b":
        shape = (*stack, leaf.rank, *[1] * extra)
    return factor * keep.reshape(shape).astype(factor.dtype)


def uniform_rank(leaf: LeafPlan, name: str):
    if len(set(leaf.ranks)) > 1:
        raise ValueError(
            f'init="{name}" needs one rank for the whole stack `{leaf.path}`, got ranks '
            f"{sorted(set(leaf.ranks))}: use unstacked layers or one rank"
        )


def matrix_of(leaf: LeafPlan, w):
    """The weight as `(stack..., in, out)` in float32 or wider."""
    w = dense(w)
    return to_matrix(w.astype(widened(w.dtype)), leaf.roles)


def scale_of(leaf: LeafPlan) -> np.ndarray:
    """The scale of each matrix of the stack, `(stack..., 1, 1)`."""
    stack, _, _ = sizes(leaf.shape, leaf.roles)
    return np.asarray(leaf.scales, widened(leaf.dtype)).reshape(*stack, 1, 1)


def principal(matrix, rank: int, s: np.ndarray):
    """Factors with `s·A·B` the best approximation of that rank: `(stack..., in, r)`, `(..., out)`.

    A = U_r·√(S_r/s),  B = √(S_r/s)·V_rᵀ
    """
    u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[..., :rank] / s[..., 0])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def residual(leaf: LeafPlan, w, a, b, s: np.ndarray):
    """The weight without what the factors hold: `W − s·A·B`."""
    if is_quant(w):
        raise ValueError(f"`{leaf.path}` is quantized: this init changes the base, quantize after")
    change = s * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return (w.astype(a.dtype) - from_matrix(change, leaf.shape, leaf.roles)).astype(w.dtype)


def shaped(leaf: LeafPlan, a, b):
    """Matrices `(stack..., in, r)` and `(stack..., r, out)` in the factors' own shapes."""
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    return a.reshape(a_shape).astype(dtype), b.reshape(b_shape).astype(dtype)
