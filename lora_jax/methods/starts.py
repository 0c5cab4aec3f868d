"""Initial values of the factors: functions from `(key, config, leaf, w)` to `(w, a, b)`.

A start has the name of its row in `lora_jax.config.starts`. Only a start with `base_change` there
changes `w`: it moves a part of the weight into the factors, and `W + s·A·B` is still that weight.
A lookup table starts as by `default` whatever the start, as in PEFT, except by LoftQ.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from lora_jax.config.lora import LoraConfig
from lora_jax.dims import factor_shapes, sizes
from lora_jax.methods.factors import (
    Started,
    cut,
    factor_dtype,
    mask,
    matrix_of,
    per_stack,
    principal,
    residual,
    scale_of,
    shaped,
    uniform,
    uniform_rank,
)
from lora_jax.plan.leaf import LeafPlan


def default(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    """`A ~ U(±1/√fan_in)`, `B = 0`; for a lookup table `A = 0`, `B ~ N(0, 1)`, as in PEFT."""
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    if leaf.lookup:
        b = jax.random.normal(key, b_shape, dtype)
        return w, jnp.zeros(a_shape, dtype), mask(leaf, b, rank_axis="b")
    a = uniform(key, a_shape, 1 / np.sqrt(sizes(leaf.shape, leaf.roles)[1]), dtype)
    return w, mask(leaf, a, rank_axis="a"), jnp.zeros(b_shape, dtype)


def gaussian(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    """`A ~ N(0, 1/r)` with standard deviation `1/r`, `B = 0`."""
    if leaf.lookup:
        return default(key, config, leaf, w)
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    # A left-out layer has rank 0: any divisor does, because `mask` clears its numbers.
    a = jax.random.normal(key, a_shape, dtype) / per_stack(leaf, np.maximum(leaf.ranks, 1), "a")
    return w, mask(leaf, a.astype(dtype), rank_axis="a"), jnp.zeros(b_shape, dtype)


def random(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    """`A ~ U(±1/√fan_in)`, `B ~ U(±1/√r)`: not the identity, for tests; as in PEFT."""
    first, second = jax.random.split(key)
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    a = uniform(first, a_shape, 1 / np.sqrt(sizes(leaf.shape, leaf.roles)[1]), dtype)
    bound = 1 / np.sqrt(np.maximum(leaf.ranks, 1))
    b = uniform(second, b_shape, 1.0, dtype) * per_stack(leaf, bound, "b")
    return w, mask(leaf, a, rank_axis="a"), mask(leaf, b.astype(dtype), rank_axis="b")


def orthogonal(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    """Factors over complementary halves of an orthogonal basis, `A·B = 0` with neither zero.

    Source: PEFT `init_lora_weights="orthogonal"`; the scale 1/10 is PEFT's.
    """
    if leaf.lookup:
        return default(key, config, leaf, w)
    if leaf.rank % 2:
        raise ValueError(
            f'init="orthogonal" needs an even rank, got {leaf.rank} for `{leaf.path}`: change '
            "`rank` or `rank_pattern`"
        )
    uniform_rank(leaf, "orthogonal")
    stack, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
    keys = jax.random.split(key, 3)
    half = leaf.rank // 2
    # Odd and even rows of one orthogonal matrix are orthogonal: their product is zero.
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*stack, leaf.rank, leaf.rank)))
    odd, even = q[..., 0::2, :], q[..., 1::2, :]
    a = jnp.matmul(jax.random.normal(keys[1], (*stack, fan_in, half)), odd) / 10
    b = jnp.matmul(jax.random.normal(keys[2], (*stack, fan_out, half)), even) / 10
    return w, *shaped(leaf, a, jnp.swapaxes(b, -1, -2))


def pissa(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    """The largest singular values go into the factors, the rest stays in the weight.

        A = U_r·√(S_r/s),  B = √(S_r/s)·V_rᵀ,  W ← W − s·A·B

    Source: Meng et al. 2024, "PiSSA", eq. 2 and 3.
    """
    if leaf.lookup:
        return default(key, config, leaf, w)
    s = scale_of(leaf)
    a, b = cut(leaf, *principal(matrix_of(leaf, w), leaf.rank, s))
    return residual(leaf, w, a, b, s=s), *shaped(leaf, a, b)


def olora(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    """Orthonormal start from the QR decomposition of `Wᵀ = Q·R`: `B = Q_rᵀ`, `A = R_rᵀ`.

    Source: Büyükakyüz 2024, "OLoRA"; as PEFT, without division by the scale.
    """
    if leaf.lookup:
        return default(key, config, leaf, w)
    # PEFT decomposes torch's (out, in), which is the transpose of ours.
    q, r = jnp.linalg.qr(jnp.swapaxes(matrix_of(leaf, w), -1, -2))
    a = jnp.swapaxes(r[..., : leaf.rank, :], -1, -2)
    a, b = cut(leaf, a, jnp.swapaxes(q[..., : leaf.rank], -1, -2))
    return residual(leaf, w, a, b, s=scale_of(leaf)), *shaped(leaf, a, b)


def mica(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    raise ValueError(
        'init="mica" freezes B, which is not supported: use "default", or merge the adapter in PEFT'
    )


def eva(key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any) -> Started:
    raise ValueError(
        'init="eva" starts from activations of training data, which is not supported: use '
        '"default" or "pissa"'
    )
