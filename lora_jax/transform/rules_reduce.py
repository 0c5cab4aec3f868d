"""Rules for sums over dims of a weight: whole, running, of squares, and Fourier transforms."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.transform.base_weight import base_array
from lora_jax.transform.implicit import (
    Implicit,
    Unsupported,
    folded,
    owned,
    rebuild,
    vector_as_array,
    wide_dtype,
    without_gain,
)
from lora_jax.transform.labels import RANK, labels, reorder
from lora_jax.transform.rules_join import with_same_roles
from lora_jax.transform.rules_product import check_rank, of_weights
from lora_jax.transform.rules_rearrange import squeeze


def reduce_sum(v: Implicit, bind: Callable, *, axes: Sequence[int]) -> Any:
    """The sum over dims: of A over its own, of B over its own, of copies as often as there are.

    Over a stack the ranks add up: `A₁·B₁ + A₂·B₂ + … = [A₁, A₂, …]·[B₁; B₂; …]`.

    Returns:
      The weight that is left; an array where it is a vector.
    """
    if all(v.shape[d] == 1 for d in axes):
        return squeeze(v, dimensions=axes)
    stacked = [d for d in axes if v.roles[d] == "s"]
    if stacked and v.bias is not None:
        raise Unsupported("sum of weights whose adapters have a bias")
    v = folded(v) if stacked else without_gain(v)
    # Copies add up to a multiple, which the scale takes.
    copies = math.prod(v.shape[d] for d in axes if v.roles[d] == "u")
    kept = [d for d in range(v.ndim) if d not in axes]
    w = bind(base_array(v, "reduce_sum"))
    v = _ranks_of_stack(v, stacked) if stacked else v

    def add_up(array: Array, dims: list) -> tuple[Array, list]:
        gone = tuple(i for i, d in enumerate(dims) if d in axes)
        have = [d if d == RANK else kept.index(d) for d in dims if d not in axes]
        return (jnp.sum(array, gone) if gone else array), have

    # Σ_i (A·B)_io = (Σ_i A_i)·B_o: each factor is summed over its own dims.
    result = rebuild(v, w, "".join(v.roles[d] for d in kept), add_up)
    return vector_as_array(dataclasses.replace(result, scale=result.scale * copies))


def _ranks_of_stack(v: Implicit, stacked: Sequence[int]) -> Implicit:
    """A weight whose factors have the indices of stack dims along their rank."""
    count = math.prod(v.shape[d] for d in stacked)
    shape = [1 if d in stacked else n for d, n in enumerate(v.shape)]
    check_rank([count * v.rank], v.roles, shape)
    roles = "".join("u" if d in stacked else r for d, r in enumerate(v.roles))
    parts: dict[str, Any] = {}
    for part in ("a", "b"):
        have, want = labels(v.roles, part), labels(roles, part)
        at = want.index(RANK)
        # The stack dims next to the rank, in front of it, so that one reshape joins them.
        array = reorder(getattr(v, part), have, [*want[:at], *stacked, *want[at:]])
        # (…, stack · r, …): the indices of the stack, and each one's ranks.
        sizes = [v.shape[d] if d != RANK else count * v.rank for d in want]
        parts[part] = array.reshape(sizes)
    for part in ("scale", "key"):
        array = getattr(v, part)
        if array is not None:  # the scale is 1, and one mask is drawn for all
            first = [0 if d in stacked else slice(None) for d in labels(v.roles, part)]
            parts[part] = array[tuple(first)]
    return dataclasses.replace(v, roles=roles, **parts)


def sum_of_products(left: Implicit, right: Implicit, axes: Sequence[int]) -> Array:
    """`Σ (W1 + A1·B1) ∘ (W2 + A2·B2)` over dims, such as the square of a norm.

    Over the dims of one factor it is a product of two weights in which all other dims are batched:
    a number for each of them, for which nothing of the weight's size is formed but `W1 ∘ W2`, and
    that only inside the sum.
    """
    left, right = with_same_roles([left, right])
    # One factor's dims first; what is left is a sum of numbers.
    roles = {left.roles[d] for d in axes if left.shape[d] != 1}
    first = [d for d in axes if left.roles[d] == ("i" if "i" in roles else "o")]
    rest = [d for d in range(left.ndim) if d not in first]

    def sum_up(w1: Array, w2: Array) -> Array:
        return jnp.sum(w1 * w2, tuple(first))

    result = of_weights(left, right, sum_up, ((first, first), (rest, rest)))
    return jnp.sum(result, tuple(i for i, d in enumerate(rest) if d in axes))


def cumsum(v: Implicit, bind: Callable, *, axis: int, reverse: bool, **_: Any) -> Implicit:
    """The running sum along a dim of a factor."""
    if v.roles[axis] == "s":
        raise Unsupported("running sum over a stack of weights")
    v = owned(v, [axis] if v.roles[axis] == "u" else [], "o")
    # Along an in dim a gain over the outputs is a common factor of the sum.
    v = without_gain(v) if v.roles[axis] == "o" else v

    def add_up(array: Array, dims: list) -> tuple[Array, list]:
        if axis not in dims:
            return array, dims
        return lax.cumsum(array, dims.index(axis), reverse=reverse), dims

    return rebuild(v, bind(base_array(v, "cumsum")), v.roles, add_up)


def fft(
    v: Implicit, bind: Callable, *, fft_type: lax.FftType, fft_lengths: Sequence[int], **_: Any
) -> Implicit:
    """The Fourier transform along the last dims: `F·(W + A·B) = F·W + (F·A)·B`, for B likewise."""
    axes = range(v.ndim - len(fft_lengths), v.ndim)
    if any(v.roles[d] == "s" for d in axes):
        raise Unsupported("a Fourier transform over a stack of weights")
    v = owned(v, [d for d in axes if v.roles[d] == "u"], v.roles[-1].replace("u", "o"))
    kind, last = lax.FftType(fft_type), v.roles[-1]
    other = v.b if last == "i" else v.a
    # The real part of a product of complex factors is no product of their real parts.
    spread = any(v.roles[d] != last for d in axes)
    if kind == lax.FftType.IRFFT and (spread or jnp.iscomplexobj(other)):
        raise Unsupported("an inverse Fourier transform to real numbers over both factors")
    # Along an in dim a gain over the outputs is a common factor of the sum.
    v = without_gain(v) if any(v.roles[d] == "o" for d in axes) else v
    before = {lax.FftType.RFFT: lax.FftType.FFT, lax.FftType.IRFFT: lax.FftType.IFFT}.get(
        kind, kind
    )

    def transform(array: Array, dims: list) -> tuple[Array, list]:
        own = [(d, n) for d, n in zip(axes, fft_lengths, strict=True) if d in dims]
        # The transform to real numbers is the last one, that of real numbers the first.
        for d, n in own if kind == lax.FftType.IRFFT else reversed(own):
            at, one = dims.index(d), kind if d == axes[-1] else before
            if one != lax.FftType.RFFT:
                array = array.astype(wide_dtype(array.dtype, jnp.complex64))
            array = jnp.moveaxis(lax.fft(jnp.moveaxis(array, at, -1), one, (n,)), -1, at)
        return array, dims

    return rebuild(v, bind(base_array(v, "fft")), v.roles, transform)
