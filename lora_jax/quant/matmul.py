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

from lora_jax import compat
from lora_jax.dims import from_matrix
from lora_jax.quant import dispatch
from lora_jax.quant.array import QuantArray, expanded, form_of, matrix_sizes
from lora_jax.quant.kernels import reference


@dataclasses.dataclass(frozen=True)
class _Form:
    """The static part of a product, which is hashable.

    Attributes:
      transposed: whether outputs are contracted.
      precision, preferred: as in `lax.dot_general`.
      spread: mesh axes along which, inside a `shard_map`, the weight varies and `x` does not.
    """

    transposed: bool
    precision: Any
    preferred: Any
    spread: tuple = ()


def matmul(x, q: QuantArray, *, transposed: bool = False, precision=None, preferred=None):
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
    stack, fan_in, fan_out = matrix_sizes(q)
    want = fan_out if transposed else fan_in
    if x.shape[: len(stack)] != stack or x.ndim <= len(stack) or x.shape[-1] != want:
        raise ValueError(
            f"`x` of shape {x.shape} does not fit a quantized weight of shape {q.shape} (roles "
            f"{q.roles}): expected {(*stack, '...', want)}"
        )
    spread = _spread(x, q)
    preferred = jnp.dtype(preferred or x.dtype)
    y: Any = _product(_Form(transposed, precision, preferred, spread), x, q)
    return y


def _spread(x, q: QuantArray) -> tuple:
    return tuple(sorted(compat.varying_axes(q.packed) - compat.varying_axes(x)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(form: _Form, x, q: QuantArray):
    return _multiply(form, x, expanded(q), "forward")


def _product_forward(form: _Form, x, q: QuantArray):
    # The backward pass needs only the dtype of `x`: an empty array holds it.
    return _multiply(form, x, expanded(q), "forward"), (q, jnp.zeros((0,), x.dtype))


def _product_backward(form: _Form, saved, g):
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
    if q.scale2 is None:
        return q
    return dataclasses.replace(q, scale=lax.optimization_barrier(q.scale))


def _multiply(form: _Form, x, q: QuantArray, direction: str):
    """The products of a stack in turn, so that only one matrix is decoded at a time."""
    stack, _, _ = matrix_sizes(q)
    if not stack:
        return _single(form, x, q.packed, q.scale, q.bias, q, direction)
    count = len(stack)

    def flat(a):
        return None if a is None else a.reshape(math.prod(stack), *a.shape[count:])

    def one(each):
        x, packed, scale, bias = each
        return _single(form, x, packed, scale, bias, q, direction)

    y = lax.map(one, (flat(x), flat(q.packed), flat(q.scale), flat(q.bias)))
    return y.reshape(*stack, *y.shape[1:])


def _single(form: _Form, x, packed, scale, bias, q: QuantArray, direction: str):
    _, fan_in, fan_out = matrix_sizes(q)
    rows = math.prod(x.shape[:-1])
    kernel = dispatch.choose_kernel(
        q, rows, packed.shape, transposed=form.transposed, dtype=x.dtype
    )
    kind = form_of(q)
    if kernel.matmul is not None:
        flat = x.reshape(rows, x.shape[-1])
        if not form.transposed:
            # A fused kernel contracts K with its padding; zeros add nothing.
            flat = _fill_columns(flat, packed.shape[0] * kind.packing.slabs)
        y = kernel.matmul(flat, packed, scale, bias, form=kind, block=q.block,
                       transposed=form.transposed, dtype=form.preferred)  # fmt: skip
        y = y[:, : fan_in if form.transposed else fan_out]
        return y.reshape(*x.shape[:-1], y.shape[-1])
    w = kernel.decode(packed, scale, bias, form=kind, block=q.block, dtype=x.dtype, name=direction)
    if w.shape[0] != fan_in:
        # Without the padding of K.
        w = lax.slice_in_dim(w, 0, fan_in)
    precision = form.precision
    if direction == "backward" and x.dtype.itemsize == 2 and not kernel.is_reference:
        # XLA would merge this product with the adapter's, which also takes `g`: both weights
        # copied into one, and all layers' results kept. Another precision, which 16-bit operands
        # do not have, keeps them apart.
        precision = lax.Precision.HIGHEST
    return reference.product(x, w, transposed=form.transposed, precision=precision,
                             preferred=form.preferred)  # fmt: skip


def _fill_columns(x, count: int):
    return x if x.shape[1] == count else jnp.pad(x, ((0, 0), (0, count - x.shape[1])))


def linear(op: Callable, x, q: QuantArray, *rest):
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
def _linear(op: Callable, x, q: QuantArray, rest):
    return op(x, _decoded(q, "forward"), *rest)


def _linear_forward(op, x, q, rest):
    # Inside a `shard_map` an array's type has the axes along which it varies: an empty part of `x`
    # keeps it.
    empty = x.reshape(-1)[:0] if compat.varying_axes(x) else None
    return op(x, _decoded(q, "forward"), *rest), (q, rest, _like(x), empty)


def _linear_backward(op, saved, g):
    q, rest, like, empty = saved
    w = _decoded(_apart(q), "backward")
    x = like.get()
    # `op` is linear in `x`, so its transpose needs the type of `x` and not its values. Where `x` is
    # the same on devices with parts of `W`, JAX's transpose sums over them.
    if empty is None:
        (dx,) = jax.linear_transpose(lambda x: op(x, w, *rest), x)(g)
    else:
        zeros = jnp.zeros(x.shape, x.dtype) + jnp.sum(empty)
        (dx,) = jax.vjp(lambda x: op(x, w, *rest), zeros)[1](g)
    return dx, None, None


_linear.defvjp(_linear_forward, _linear_backward)


def _decoded(q: QuantArray, direction: str):
    """The whole weight, decoded by the device's kernel, one matrix of a stack at a time."""
    stack, _, _ = matrix_sizes(q)
    kernel = dispatch.choose_kernel(
        q, math.inf, q.packed.shape[-2:], transposed=False, dtype=q.dtype
    )
    if kernel.is_reference:
        return q.dequantize()
    q, count = expanded(q), len(stack)

    def one(each):
        return kernel.decode(*each, form=form_of(q), block=q.block, dtype=q.dtype, name=direction)

    def flat(a):
        return None if a is None else a.reshape(math.prod(stack), *a.shape[count:])

    parts = (q.packed, q.scale, q.bias)
    if not stack:
        return from_matrix(one(parts), q.shape, q.roles)
    m = lax.map(one, tuple(map(flat, parts)))
    return from_matrix(m.reshape(*stack, *m.shape[1:]), q.shape, q.roles)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Like:
    """An array's shape and dtype, as a residual of a custom derivative."""

    # Static, because a residual may hold arrays and static data, but no bare shape.
    aval: Any = dataclasses.field(metadata={"static": True})

    def get(self) -> jax.ShapeDtypeStruct:
        return self.aval


def _like(x) -> _Like:
    return _Like(jax.ShapeDtypeStruct(x.shape, x.dtype))
