"""DoRA: the weight's direction is adapted by LoRA, its magnitude is trained by itself.

    W' = m · (W + s·A·B) / ‖W + s·A·B‖

with one magnitude and one norm for each output; the norm is a constant of the gradient
(Liu et al. 2024, "DoRA", eq. 5 and section 4.3).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lora_jax import compat
from lora_jax.array import LoraArray, LoraStack, dense, widened
from lora_jax.dims import out_dims, sizes, to_matrix


@jax.jit
def norm(x: LoraArray) -> Float[Array, "..."]:
    """`‖W + s·A·B‖` over the in dims, for each stack index and output, in float32 or wider.

    The `(in, out)` sum is never formed:
    `‖W + s·A·B‖² = ‖W‖² + 2s·Σ_r (Aᵀ W)·B + s²·Σ_r B·(AᵀA)·B`.

    Returns:
      An array `(stack..., out...)`.
    """
    stack, fan_in, fan_out = sizes(x.shape, x.roles)
    w = to_matrix(dense(x.w), x.roles)  # (stack..., in, out)
    wide = widened(w.dtype)
    a = x.a.astype(wide).reshape(*stack, fan_in, x.rank)
    b = x.b.astype(wide).reshape(*stack, x.rank, fan_out)
    s = x.scale.astype(wide)[..., None]  # (stack..., 1)
    at = jnp.swapaxes(a, -1, -2)
    # Σ_i W_io·(A·B)_io = Σ_r (Aᵀ·W)_ro·B_ro: the thin product first.
    cross = jnp.sum(_matmul(at, w.astype(wide)) * b, axis=-2)  # (stack..., out)
    # ‖A·B‖² for each output is Bᵀ·(Aᵀ·A)·B, from an (r, r) matrix.
    gram = _matmul(_matmul(at, a), b)  # (stack..., r, out)
    square = jnp.sum(jnp.square(w.astype(wide)), axis=-2)  # (stack..., out)
    square = square + 2 * s * cross + s * s * jnp.sum(gram * b, axis=-2)
    outs = [x.shape[d] for d in out_dims(x.roles)]
    # The three terms cancel where s·A·B is near -W, and may round to below zero.
    return jnp.sqrt(jnp.maximum(square, 0)).reshape(*stack, *outs)


def _matmul(x: Array, y: Array) -> Array:
    """A product in full precision, which keeps the mesh axes of its rows and columns."""
    rows, columns = compat.spec_of(x), compat.spec_of(y)
    out = None
    # Under an explicit mesh a contraction over a sharded dim must state its result's axes.
    if rows is not None and columns is not None and rows[-1] is not None:
        out = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*rows[:-1], columns[-1]))
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST, out_sharding=out)


def gain(x: LoraArray) -> Float[Array, "..."]:
    """`m / ‖W + s·A·B‖`; the norm is a constant of the gradient."""
    # Stopped at the inputs too, so that no tangent of the norm is traced at all.
    return x.m / lax.stop_gradient(norm(jax.tree.map(lax.stop_gradient, x)))


def magnitude(x: LoraArray) -> Float[Array, "..."]:
    """The magnitude that makes DoRA the identity at init: `‖W + s·A·B‖`."""
    return norm(x)


def gains(x: LoraStack) -> Float[Array, "..."] | None:
    """The gain of every adapter of a stack, or None where none uses DoRA."""
    if x.m is None:
        return x.gain
    # Each adapter's gain over the one shared base.
    at = x.axis
    return jax.vmap(
        lambda a, b, scale, m: gain(LoraArray(x.w, a=a, b=b, scale=scale, m=m, roles=x.roles)),
        in_axes=(at, at, at, at),
        out_axes=at,
    )(x.a, x.b, x.scale, x.m)
