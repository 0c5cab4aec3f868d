"""Arithmetic that several starts share: shapes and masks of factors, decompositions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from lora_jax import compat
from lora_jax.array import dense, widened
from lora_jax.config.arguments import SettingsError
from lora_jax.dims import factor_shapes, from_matrix, sizes, stack_dims, to_matrix
from lora_jax.plan.leaf import LeafPlan
from lora_jax.quant.array import is_quant

# What a start returns: the base weight, A and B.
Started = tuple[Any, Array, Array]


def factor_dtype(leaf: LeafPlan) -> np.dtype:
    """float32, also over a 16-bit base (as PEFT); float64 over a float64 base."""
    return widened(leaf.dtype)


def uniform(key: PRNGKeyArray, shape: Sequence[int], bound: float, dtype: np.dtype) -> Array:
    """Random numbers in ±bound."""
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def per_stack(leaf: LeafPlan, values: Sequence[float] | np.ndarray, part: str) -> np.ndarray:
    """One number for each stack index, shaped to broadcast against a factor."""
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    stack = [leaf.shape[d] for d in stack_dims(leaf.roles)]
    rest = len(a_shape if part == "a" else b_shape) - len(stack)
    return np.asarray(values, np.float32).reshape(*stack, *[1] * rest)


def mask(leaf: LeafPlan, factor: Array, *, rank_axis: str) -> Array:
    """Zeroes the padding of smaller ranks and of left-out layers.

    Padding is zero in both factors, so its gradients are zero and it stays zero.
    """
    # All layers have one rank, so there is no padding.
    if len(set(leaf.ranks)) == 1:
        return factor
    stack = [leaf.shape[d] for d in stack_dims(leaf.roles)]
    keep = np.arange(leaf.rank)[None] < np.asarray(leaf.ranks)[:, None]  # (stack, r)
    extra = factor.ndim - len(stack) - 1
    shape = (*stack, *[1] * extra, leaf.rank)
    if rank_axis == "b":
        shape = (*stack, leaf.rank, *[1] * extra)
    return factor * keep.reshape(shape).astype(factor.dtype)


def cut(leaf: LeafPlan, a: Array, b: Array) -> tuple[Array, Array]:
    """Factors `(stack..., in, r)` and `(stack..., r, out)` of each layer's own rank.

    A principal part or a QR decomposition of a smaller rank is the start of a larger one.
    """
    stack, _, _ = sizes(leaf.shape, leaf.roles)
    keep = np.arange(leaf.rank) < np.asarray(leaf.ranks)[:, None]
    keep = keep.reshape(*stack, leaf.rank)
    # Not a product: the scale of a layer that is left out is 0, by which `principal` divides.
    return jnp.where(keep[..., None, :], a, 0), jnp.where(keep[..., :, None], b, 0)


def uniform_rank(leaf: LeafPlan, name: str) -> None:
    """Raises `ValueError` where the layers of a stack have different ranks."""
    # The numbers of a start of one rank are not among those of a larger one.
    if len(set(leaf.ranks)) > 1:
        raise ValueError(
            f'init="{name}" needs one rank for the whole stack `{leaf.path}`, got ranks '
            f"{sorted(set(leaf.ranks))}: unstack the layers, or give them one rank"
        )


def matrix_of(leaf: LeafPlan, w: Any) -> Float[Array, "*s i o"]:
    """The weight as `(stack..., in, out)` in float32 or wider."""
    w = dense(w)
    if compat.spec_of(w) is not None:
        # Under an explicit mesh JAX decomposes only matrices that are not sharded.
        w = jax.sharding.reshard(w, NamedSharding(jax.typeof(w).sharding.mesh, PartitionSpec()))
    return to_matrix(w.astype(widened(w.dtype)), leaf.roles)


def scale_of(leaf: LeafPlan) -> np.ndarray:
    """The scale of each matrix of the stack, `(stack..., 1, 1)`."""
    stack, _, _ = sizes(leaf.shape, leaf.roles)
    return np.asarray(leaf.scales, widened(leaf.dtype)).reshape(*stack, 1, 1)


def principal(
    matrix: Float[Array, "*s i o"], rank: int, s: np.ndarray
) -> tuple[Float[Array, "*s i r"], Float[Array, "*s r o"]]:
    """Factors with `s·A·B` the best approximation of a rank (Eckart and Young 1936).

    A = U_r·√(S_r/s),  B = √(S_r/s)·V_rᵀ
    """
    u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
    # Divided by s, because the adapter multiplies by it.
    root = jnp.sqrt(values[..., :rank] / s[..., 0])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def residual(leaf: LeafPlan, w: Any, a: Array, b: Array, *, s: np.ndarray) -> Array:
    """The weight without the factors' product: `W − s·A·B`."""
    # The residual would have to be quantized once more, with a new error.
    if is_quant(w):
        raise SettingsError(
            f"`{leaf.path}` is quantized, and this `init` changes the base: start from the floats, "
            'then quantize; or use init="default" or init="loftq"'
        )
    change = s * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    rest = w.astype(a.dtype) - from_matrix(change, leaf.shape, leaf.roles)
    return rest.astype(compat.held(w.dtype))


def shaped(leaf: LeafPlan, a: Array, b: Array) -> tuple[Array, Array]:
    """Reshapes `(stack..., in, r)` and `(stack..., r, out)` to the shapes of the factors."""
    a_shape, b_shape = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    dtype = factor_dtype(leaf)
    return a.reshape(a_shape).astype(dtype), b.reshape(b_shape).astype(dtype)
