"""A weight's new numbers in the format that it was held in.

Formats of `lora_jax.quant.formats` encode as ever. Of a format of files (`scales.HELD`) scales are
searched first: of some near the one that reaches the outermost number of a block, that with the
least squared error, and of that one the scale (and bias) of least squares. Then they are rounded as
the format stores them, and codes are chosen for the rounded ones.

Source: ggml's `make_qkx2_quants` and `make_qx_quants` (the search), compressed-tensors and
DeepSeek-V3 (one scale an output or a square).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from lora_jax.dims import to_matrix
from lora_jax.quant import formats
from lora_jax.quant.array import QuantArray, form_of, known, stored_inputs
from lora_jax.quant.foreign import from_codes
from lora_jax.quant.formats import Format, code_values, inverse, magnitude, nearest
from lora_jax.quant.scales import HeldName, compress_scales

# The arrays `scale`, `bias` and `scale2` of a weight.
_Parts = tuple[Any, Any, Any]
# Of the scale that reaches the outermost number.
_FACTORS = tuple(np.linspace(0.7, 1.1, 17).tolist())


def requantized(w: Float[Array, "..."], like: QuantArray, *, name: str) -> QuantArray:
    """A weight in the format, the blocks and the order of inputs of another of its shape.

    Args:
      w: its numbers.
      like: how it was held.
      name: of the weight, for errors.

    Raises:
      ValueError: numbers or scales that are not finite, or a format that is only read.
    """
    if not np.isfinite(np.asarray(w)).all():
        raise ValueError(f"`{name}` is not finite (NaN or infinity): it cannot be quantized")
    form, held = known(like.format)
    if held is not None and held.name not in STORED:
        raise ValueError(
            f"`{name}` is held in {like.format}, which cannot be written, only {', '.join(STORED)} "
            "and formats of codes with plain scales; merge without `requantize`"
        )
    m = to_matrix(jnp.asarray(w, jnp.float32), like.roles)
    if like.order is not None:
        m = jnp.take_along_axis(m, like.order[..., None], axis=-2)
    fill = -m.shape[-2] % like.block
    blocks = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, fill), (0, 0)])
    if held is None:
        double = like.scale_map is not None
        dtype = jnp.float32 if double else like.scale.dtype
        codes, scale, bias = formats.encode(blocks, form, like.block, dtype)
        if double:
            return _doubled(codes, scale, like)
        parts = scale, bias, None
    else:
        parts = STORED[held.name](blocks, like)
        count, outputs = blocks.shape[-2] // like.block, blocks.shape[-1]
        codes = _codes(blocks, held.floats(*parts, count, outputs), form, like.block)
    return from_codes(
        codes[..., : m.shape[-2], :], *parts, format=like.format, block_size=like.block,
        slab=like.slab_size, order=like.order, roles=like.roles, shape=like.shape,
        dtype=like.dtype, name=name,
    )  # fmt: skip


def _doubled(codes: Array, scale: Array, like: QuantArray) -> QuantArray:
    """A matrix whose scales are quantized too, with the offset that those of `like` have."""
    stored = stored_inputs(like)
    fill = [(0, stored - codes.shape[-2]), (0, 0)]
    codes = jnp.pad(codes, fill, constant_values=form_of(like).zero)
    wide = jnp.pad(scale, [(0, stored // like.block - len(scale)), (0, 0)])
    found = compress_scales(wide, len(scale), like.offset)
    packed = formats.pack(codes, form_of(like), like.slab_size)
    # Its map is bitsandbytes' own, up to the last bit.
    return dataclasses.replace(like, packed=packed, **{**found, "scale_map": like.scale_map})


def _codes(
    m: Float[Array, "*s k n"], scales: Any, form: Format, block: int
) -> Integer[Array, "*s k n"]:
    """The codes nearest to a matrix, with these scales and biases `(..., K/B, N)`."""
    scale, bias = scales
    blocks = m.reshape(*m.shape[:-2], -1, block, m.shape[-1])
    if bias is not None:
        blocks = blocks - bias[..., None, :]
    wide = scale.astype(jnp.float32)
    return nearest(blocks * inverse(wide)[..., None, :], form).reshape(m.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _searched(
    m: Float[Array, "*s k n"], form: Format, block: int
) -> tuple[Float[Array, "*s b n"], Float[Array, "*s b n"]]:
    """Scale and bias (0 but in affine formats, where it is at most 0) of each block."""
    x = m.reshape(*m.shape[:-2], -1, block, m.shape[-1])
    low = jnp.minimum(jnp.min(x, axis=-2), 0.0) if form.affine else jnp.zeros_like(x[..., 0, :])
    reach = (jnp.max(x, axis=-2) - low) / form.ends[1] if form.affine else magnitude(x, form)
    best = (jnp.full_like(low, jnp.inf), reach, low)
    for factor in _FACTORS:
        raw = (x - low[..., None, :]) * inverse(reach * factor)[..., None, :]
        values = code_values(nearest(raw, form), form)
        scale, bias = _least_squares(x, values, affine=form.affine)
        error = jnp.sum((values * scale[..., None, :] + bias[..., None, :] - x) ** 2, axis=-2)
        found = (error, scale, bias)
        best = jax.tree.map(lambda a, b, less=error < best[0]: jnp.where(less, a, b), found, best)
    return best[1], best[2]


def _least_squares(
    x: Float[Array, "*s k n"], values: Float[Array, "*s k n"], *, affine: bool
) -> tuple[Float[Array, "*s n"], Float[Array, "*s n"]]:
    """Scale and bias with the least squared error for these values of codes."""

    def mean(y: Array) -> Array:
        return jnp.mean(y, axis=-2)

    alone = mean(x * values) * inverse(mean(values**2))
    if not affine:
        return alone, jnp.zeros_like(alone)
    inside = mean(x * values) - mean(x) * mean(values)
    scale = inside * inverse(mean(values**2) - mean(values) ** 2)
    bias = mean(x) - scale * mean(values)
    # No format has a bias above 0: the scale is then the best without one.
    fine = (bias <= 0) & (scale > 0)
    return jnp.where(fine, scale, alone), jnp.where(fine, bias, 0.0)


def _in_units(
    x: Float[Array, "*s b n"], count: int, most: int, *, signed: bool = False
) -> tuple[Integer[Array, "*s g c n"], Array]:
    """Integers of at most `most`, and the float16 of each `count` rows that they multiply."""
    groups = x.reshape(*x.shape[:-2], -1, count, x.shape[-1])
    if signed:  # the outermost number takes the lowest integer
        top, bottom = jnp.max(groups, axis=-2), jnp.min(groups, axis=-2)
        unit = jnp.where(top > -bottom, top, bottom) / -(most + 1)
    else:
        unit = jnp.max(groups, axis=-2) / most
    unit = unit.astype(jnp.float16)
    whole = jnp.round(groups * inverse(unit.astype(jnp.float32))[..., None, :])
    return jnp.clip(whole, -(most + 1) if signed else 0, most).astype(jnp.int32), unit


def _rows(parts: list) -> Array:
    """Rows of bytes, in turns from each part: `(..., groups, n)` each."""
    stacked = jnp.stack(parts, axis=-2).astype(jnp.uint8)
    return stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1])


def _q2_k(m: Array, like: QuantArray) -> _Parts:
    scale, bias = _searched(m, known(like.format)[0], like.block)
    (low, unit), (high, minimum) = _in_units(scale, 16, 15), _in_units(-bias, 16, 15)
    codes = low | high << 4
    return codes.reshape(scale.shape).astype(jnp.uint8), minimum, unit


def _q3_k(m: Array, like: QuantArray) -> _Parts:
    scale, _ = _searched(m, known(like.format)[0], like.block)
    signed, unit = _in_units(scale, 16, 31, signed=True)
    six = [signed[..., j, :] + 32 for j in range(16)]
    low = [(six[j] & 15) | (six[j + 8] & 15) << 4 for j in range(8)]
    high = [sum((six[j + 4 * i] >> 4) << 2 * i for i in range(4)) for j in range(4)]
    return _rows([*low, *high]), None, unit


def _q4_k(m: Array, like: QuantArray) -> _Parts:
    scale, bias = _searched(m, known(like.format)[0], like.block)
    (low, unit), (high, minimum) = _in_units(scale, 8, 63), _in_units(-bias, 8, 63)
    s, b = ([x[..., j, :] for j in range(8)] for x in (low, high))
    first = [x[j] | (x[j + 4] >> 4) << 6 for x in (s, b) for j in range(4)]
    rest = [(s[j + 4] & 15) | (b[j + 4] & 15) << 4 for j in range(4)]
    return _rows([*first, *rest]), minimum, unit


def _q6_k(m: Array, like: QuantArray) -> _Parts:
    scale, _ = _searched(m, known(like.format)[0], like.block)
    signed, unit = _in_units(scale, 16, 127, signed=True)
    return signed.reshape(scale.shape).astype(jnp.int8), None, unit


def _iq4_xs(m: Array, like: QuantArray) -> _Parts:
    scale, _ = _searched(m, known(like.format)[0], like.block)
    signed, unit = _in_units(scale, 8, 31, signed=True)
    six = [signed[..., j, :] + 32 for j in range(8)]
    high = [sum((six[j + 4 * i] >> 4) << 2 * j for j in range(4)) for i in range(2)]
    low = [(six[2 * i] & 15) | (six[2 * i + 1] & 15) << 4 for i in range(4)]
    return _rows([*high, *low]), None, unit


def _shared(m: Array, like: QuantArray) -> _Parts:
    """One scale for all inputs of an output, or for those of 128 outputs, or for all."""
    form, wanted = known(like.format)[0], like.scale
    x = m.reshape(*m.shape[:-2], -1, like.block, m.shape[-1])
    scale = jnp.max(jnp.abs(x), axis=-2) / form.ends[1]
    if like.format == "fp8_block":
        outputs = wanted.shape[-1]
        filled = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, 128 * outputs - m.shape[-1])])
        scale = jnp.max(filled.reshape(*scale.shape[:-1], outputs, 128), axis=-1)
    else:
        scale = jnp.max(scale, axis=-2, keepdims=True)
        if bool(jnp.all(wanted == wanted[..., :1])):  # a tensor has one
            scale = jnp.broadcast_to(jnp.max(scale, axis=-1, keepdims=True), scale.shape)
    return _above(scale, wanted.dtype), None, None


def _above(scale: Array, dtype: Any) -> Array:
    """Scales as they are stored, rounded up: no number lies beyond the last code."""
    kept = scale.astype(dtype)
    short = kept.astype(jnp.float32) < scale
    return jnp.where(short, jnp.nextafter(kept, jnp.asarray(jnp.inf, dtype)), kept)


def _uint4_zero(m: Array, like: QuantArray) -> _Parts:
    """A scale and a zero point for each group of inputs, of one block or of several."""
    count = m.shape[-2] // like.block
    scales, zeros = like.scale[..., :count, :], _zeros(like, count)
    each = _together(scales, zeros)
    form = known(like.format)[0]
    if bool(jnp.all(zeros == 8)):  # symmetric
        scale, _ = _searched(m, formats.FORMATS["int4"], like.block * each)
        # Eight of them are below zero, seven above: the sign of the scale chooses.
        zero = jnp.full(scale.shape, 8)
    else:
        scale, bias = _searched(m, form, like.block * each)
        zero = jnp.clip(jnp.round(-bias * inverse(scale)), 0, 15).astype(jnp.int32)
    scale, zero = (jnp.repeat(x, each, axis=-2) for x in (scale, zero))
    even = jnp.pad(zero, [(0, 0)] * (zero.ndim - 2) + [(0, count % 2), (0, 0)]).astype(jnp.uint8)
    return scale.astype(like.scale.dtype), even[..., ::2, :] | even[..., 1::2, :] << 4, None


def _zeros(q: QuantArray, count: int) -> Array:
    """The zero points of the blocks, of which a byte has two."""
    each = jnp.stack([q.bias & 15, q.bias >> 4], axis=-2)
    return each.reshape(*q.bias.shape[:-2], -1, q.bias.shape[-1])[..., :count, :]


def _together(scales: Array, zeros: Array) -> int:
    """How many blocks one after another are a group of the file: they have one scale."""
    count = scales.shape[-2]
    for each in range(count, 0, -1):
        groups = [x.reshape(*x.shape[:-2], -1, each, x.shape[-1]) for x in (scales, zeros)] if (
            count % each == 0
        ) else []  # fmt: skip
        if groups and all(bool(jnp.all(x == x[..., :1, :])) for x in groups):
            return each
    return 1


# How each format stores the scales of a matrix.
STORED: Mapping[HeldName, Callable[[Array, QuantArray], _Parts]] = {
    "fp8_channel": _shared,
    "fp8_block": _shared,
    "int8_channel": _shared,
    "uint4_zero": _uint4_zero,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q4_k,
    "q6_k": _q6_k,
    "iq4_xs": _iq4_xs,
}
