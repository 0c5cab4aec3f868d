"""Products with a quantized weight that keep only its codes for the backward pass.

    y = x · W        dx = g · Wᵀ        (no dW; W is decoded again in the backward pass)

Plain autodiff saves the decoded `W` of every layer, which undoes the saving; a decoding that XLA
can share between forward and backward does the same in an unrolled model. So the rule is a
`custom_vjp` whose residual is the packed weight, and on accelerators the decoding is a kernel that
XLA cannot see into, under another name in the backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from lora_jax import compat
from lora_jax.dims import AnyArray, from_matrix
from lora_jax.quant import dispatch
from lora_jax.quant.array import QuantArray, check_quant, expanded, form_of, in_order, matrix_sizes
from lora_jax.quant.formats import Coded, Pass
from lora_jax.quant.kernels import reference
from lora_jax.quant.scales import HELD


@dataclasses.dataclass(frozen=True)
class _Form:
    """The static part of a product, which is hashable.

    Attributes:
      transposed: whether outputs are contracted.
      precision: as in `lax.dot_general`.
      preferred: dtype of the result.
      spread: mesh axes along which, inside a `shard_map`, the weight varies and `x` does not.
    """

    transposed: bool
    precision: Any
    preferred: Any
    spread: tuple[str, ...] = ()


def matmul(
    x: Float[AnyArray, "*b _"],
    q: QuantArray,
    *,
    transposed: bool = False,
    precision: Any = None,
    preferred: DTypeLike | None = None,
) -> Float[Array, "*b _"]:
    """`x · W` with the stacked matrices of a quantized weight, differentiable in `x`.

    Args:
      x: `(stack..., ..., K)`, or `(stack..., ..., N)` when transposed; K and N are products of
        the weight's in and out dims.
      q: the weight; a stacked one multiplies each index's `x` with its own matrix.
      transposed: multiply with the transposed matrices.
      precision: as in `lax.dot_general`.
      preferred: dtype of the result, `x`'s by default.

    Returns:
      `(stack..., ..., N)`, or `(stack..., ..., K)` when transposed.

    Raises:
      ValueError: the dims do not fit.
      TypeError: forward-mode differentiation (JAX's error); use reverse mode.

    Source: Dettmers et al. 2023, "QLoRA", eq. 5 and 6.
    """
    check_quant(q)
    stack, fan_in, fan_out = matrix_sizes(q)
    want = fan_out if transposed else fan_in
    if x.shape[: len(stack)] != stack or x.ndim <= len(stack) or x.shape[-1] != want:
        raise ValueError(
            f"`x` of shape {x.shape} does not fit a quantized weight of shape {q.shape} (roles "
            f"{q.roles}): expected {(*stack, '...', want)}"
        )
    spread = compat.varying_axes(q.packed) - compat.varying_axes(x)
    preferred = jnp.dtype(preferred or x.dtype)
    y: Any = _product(_Form(transposed, precision, preferred, tuple(sorted(spread))), x, q)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(form: _Form, x: AnyArray, q: QuantArray) -> Array:
    return _multiply(form, x, expanded(q), "forward")


# What the backward pass keeps: the codes, and an empty array of the dtype of `x`.
_Saved = tuple[QuantArray, Float[Array, "0"]]


def _product_forward(form: _Form, x: AnyArray, q: QuantArray) -> tuple[Array, _Saved]:
    return _multiply(form, x, expanded(q), "forward"), (q, jnp.zeros((0,), x.dtype))


def _product_backward(form: _Form, saved: _Saved, g: Array) -> tuple[Array, None]:
    q, like = saved
    back = dataclasses.replace(form, transposed=not form.transposed, preferred=like.dtype)
    # The backward pass is the same product the other way round, from the same bytes.
    dx = _multiply(back, g.astype(like.dtype), expanded(_apart(q)), "backward")
    # Each device has the part of `dx` from its own weight; where `x` is the same on all of them,
    # its gradient is their sum. None is the zero gradient of the weight, integer codes included.
    return (lax.psum(dx, form.spread) if form.spread else dx), None


_product.defvjp(_product_forward, _product_backward)


def _apart(q: QuantArray) -> QuantArray:
    """The same weight behind a barrier, so that XLA does not keep the forward pass's scales."""
    if q.scale_map is None and q.format not in HELD and q.slab is None:
        return q
    return dataclasses.replace(q, **lax.optimization_barrier({"scale": q.scale, "bias": q.bias}))


def _multiply(form: _Form, x: AnyArray, q: QuantArray, direction: Pass) -> Array:
    """The products of a stack in turn, so that only one matrix is decoded at a time."""
    if q.order is not None and not form.transposed:
        x = _taken(x, q.order)
    # (stack..., m..., K) · (stack..., K, N)
    y = _each_matrix(q, lambda w, x: _single(form, x, w, q=q, direction=direction), x)
    return _taken(y, jnp.argsort(q.order)) if q.order is not None and form.transposed else y


def _taken(x: Float[AnyArray, "*m k"], order: Integer[AnyArray, "*s k"]) -> Float[Array, "*m k"]:
    """The last dim of `x` (stack..., m..., K) in an order of each matrix."""
    take = functools.partial(jnp.take, axis=-1)
    for _ in order.shape[:-1]:
        take = jax.vmap(take)
    return take(x, order)


def _each_matrix(q: QuantArray, call: Callable[..., Array], *arrays: AnyArray) -> Array:
    """`call(w, *arrays)` of every matrix of a stack in turn, the results stacked.

    Args:
      q: the weight, its scales in floats.
      call: of a `Coded` matrix, and of the part of each array that belongs to it.
      arrays: `(stack..., ...)`.
    """
    stack, _, _ = matrix_sizes(q)
    form = form_of(q)
    if not stack:
        return call(Coded(q.packed, q.scale, q.bias, form=form, block=q.block), *arrays)

    def one(each: tuple) -> Array:
        (packed, scale, bias), *parts = each
        return call(Coded(packed, scale, bias, form=form, block=q.block), *parts)

    count = math.prod(stack)
    flat = jax.tree.map(
        lambda a: a.reshape(count, *a.shape[len(stack) :]), ((q.packed, q.scale, q.bias), *arrays)
    )
    out = lax.map(one, flat)
    return out.reshape(*stack, *out.shape[1:])


def _single(
    form: _Form, x: Float[AnyArray, "*m _"], w: Coded, *, q: QuantArray, direction: Pass
) -> Float[Array, "*m _"]:
    """The product with one matrix `w` of the weight `q`."""
    _, fan_in, fan_out = matrix_sizes(q)
    rows = math.prod(x.shape[:-1])
    kernel = dispatch.choose_kernel(
        q, rows, w.packed.shape, transposed=form.transposed, dtype=x.dtype
    )
    if kernel.matmul is not None:
        flat = x.reshape(rows, x.shape[-1])
        padding = w.scale.shape[0] * w.block - fan_in
        if padding and not form.transposed:
            # A fused kernel contracts K with its padding; zeros add nothing.
            flat = jnp.pad(flat, ((0, 0), (0, padding)))
        y = kernel.matmul(flat, w, transposed=form.transposed, dtype=form.preferred)
        y = y[:, : fan_in if form.transposed else fan_out]
        return y.reshape(*x.shape[:-1], y.shape[-1])
    dense = kernel.decode(w, dtype=x.dtype, name=direction)
    if dense.shape[0] != fan_in:
        # Without the padding of K.
        dense = lax.slice_in_dim(dense, 0, fan_in)
    precision = form.precision
    if direction == "backward" and x.dtype.itemsize == 2 and not kernel.is_reference:
        # XLA would merge this product with the adapter's, which also takes `g`: both weights
        # copied into one, and all layers' results kept. Another precision, which 16-bit operands
        # do not have, keeps them apart.
        precision = lax.Precision.HIGHEST
    return reference.product(
        x, dense, transposed=form.transposed, precision=precision, preferred=form.preferred
    )


def linear(op: Callable[..., Array], x: AnyArray, q: QuantArray, *rest: Any) -> Array:
    """Any `op(x, W, *rest)` that is linear in `x`, keeping only the codes of `W`.

    For convolutions, grouped products and contractions of some of a group's dims, which `matmul`
    does not cover.

    Args:
      op: of arrays.
      x: the differentiable operand.
      q: the weight.
      rest: further operands, constant under differentiation.
    """
    return _linear(op, x, q, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(op: Callable[..., Array], x: AnyArray, q: QuantArray, rest: tuple) -> Array:
    return op(x, _decoded(q, "forward"), *rest)


def _linear_forward(
    op: Callable[..., Array], x: AnyArray, q: QuantArray, rest: tuple
) -> tuple[Array, tuple]:
    # Inside a `shard_map` an array's type has the axes along which it varies: an empty part of `x`
    # keeps it.
    empty = x.reshape(-1)[:0] if compat.varying_axes(x) else None
    place = jax.typeof(x).sharding if compat.explicit_mesh(x) else None
    like = _Like(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place))
    return op(x, _decoded(q, "forward"), *rest), (q, rest, like, empty)


def _linear_backward(op: Callable[..., Array], saved: tuple, g: Array) -> tuple[Array, None, None]:
    q, rest, like, empty = saved
    w = _decoded(_apart(q), "backward")
    x = like.aval
    # `op` is linear in `x`, so its transpose needs the type of `x` and not its values. Where `x` is
    # the same on devices with parts of `W`, JAX's transpose sums over them.
    if empty is None:
        (dx,) = jax.linear_transpose(lambda x: op(x, w, *rest), x)(g)
    else:
        zeros = jnp.zeros(x.shape, x.dtype) + jnp.sum(empty)
        (dx,) = jax.vjp(lambda x: op(x, w, *rest), zeros)[1](g)
    return dx, None, None


_linear.defvjp(_linear_forward, _linear_backward)


def _decoded(q: QuantArray, direction: Pass) -> Float[Array, "..."]:
    """The whole weight, decoded by the device's kernel, one matrix of a stack at a time."""
    kernel = dispatch.choose_kernel(
        q, math.inf, q.packed.shape[-2:], transposed=False, dtype=q.dtype
    )
    if kernel.is_reference:
        return q.dequantize()
    m = _each_matrix(expanded(q), lambda w: kernel.decode(w, dtype=q.dtype, name=direction))
    return from_matrix(in_order(m, q), q.shape, q.roles)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Like:
    """An array's shape and dtype, as a residual of a custom derivative."""

    # Static, because a residual may hold arrays and static data, but no bare shape.
    aval: jax.ShapeDtypeStruct = dataclasses.field(metadata={"static": True})
