"""Block formats: the values of codes, and how a matrix becomes codes and scales, and back.

    w ≈ codebook[code] · scale (+ bias)

with one scale (and, in the affine format, one bias) for each block of `B` consecutive inputs of
one output. All arrays here are of matrices `(..., K, N)`: K inputs, N outputs.

Two 4-bit codes share a byte. The rows of a superblock of `2B` inputs are stored in `B` bytes, its
first half in the low and its second half in the high four bits, so that unpacking gives two
contiguous slabs with one scale row each, in the forward and in the transposed product:

    packed[jB + r, n] = code(2jB + r, n) | code(2jB + B + r, n) << 4

Codes of 3, 5 and 6 bits are cut into planes of 1, 2 or 4 bits, each of which is stored so; the
planes of a superblock follow each other, the lowest bits first.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E (NF4's values are bitsandbytes').
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from lora_jax.dims import AnyArray

# bitsandbytes' tables; NF4 is its create_normal_map(offset=0.9677083).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4's codes are sign, exponent and mantissa bits, so their values are not in order.
_FP4_POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(x / 12 for x in _FP4_POSITIVE) + tuple(-x / 12 for x in _FP4_POSITIVE)


# FP4 with two bits of exponent and one of mantissa: MXFP4, NVFP4.
_E2M1_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = _E2M1_POSITIVE + tuple(-x for x in _E2M1_POSITIVE)
# ggml's table for IQ4_NL and IQ4_XS.
_IQ4 = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
)  # fmt: skip


# The keys of `FORMATS`, for annotations.
FormatName = Literal[
    "nf4", "fp4", "int4", "uint4", "int8", "fp8", "e2m1", "iq4", "uint2", "int3", "int5", "uint5",
    "int6",
]  # fmt: skip
# What a weight is decoded for; kernels have it in their names, see `lora_jax.quant.matmul`.
Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How codes share bytes, for JAX and NumPy arrays and inside kernels.

    A superblock has as many blocks (slabs) as codes of the narrowest plane share a byte.

    Attributes:
      planes: bits of each plane, the lowest first; 1, 2, 4 or 8.
      dtype: of the packed array.
    """

    planes: tuple[int, ...]
    dtype: Literal["uint8", "int8"] = "uint8"

    @property
    def slabs(self) -> int:
        """Blocks of a superblock, whose codes share their bytes."""
        return 8 // min(self.planes)

    @property
    def rows(self) -> int:
        """Blocks of bytes that a superblock takes."""
        return self.slabs * sum(self.planes) // 8

    def join(self, slabs: list) -> list:
        """The codes of each slab (unsigned where several share a byte) to blocks of bytes."""
        out, low = [], 0
        for bits in self.planes:
            cut = [_bits(slab, low, bits) for slab in slabs] if len(self.planes) > 1 else slabs
            for first in range(0, len(cut), 8 // bits):
                byte, *others = cut[first : first + 8 // bits]
                for place, codes in enumerate(others, start=1):
                    byte = byte | (codes << bits * place)
                out.append(byte)
            low += bits
        return out

    def split(self, blocks: Sequence) -> list:
        """Blocks of bytes to the codes of each slab."""
        slabs, low, at = [0] * self.slabs, 0, 0
        for bits in self.planes:
            for slab in range(self.slabs):
                block, place = divmod(slab, 8 // bits)
                part = _bits(blocks[at + block], bits * place, bits)
                slabs[slab] = part if low == 0 else slabs[slab] | (part << low)
            low, at = low + bits, at + self.slabs * bits // 8
        return slabs


def _bits(byte: Any, low: int, count: int) -> Any:
    """Some bits of a byte, as a number."""
    part = byte >> low if low else byte
    return part if low + count == 8 else part & (2**count - 1)


NIBBLES = Packing((4,))
BYTES = Packing((8,), "int8")


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format.

    Attributes:
      name: as in `quantize(format=)`.
      packing: how its codes share bytes.
      codebook: value of each code; None for codes that are their own value, "e4m3" for those that
        are the bits of an 8-bit float.
      scale: "absmax" (the largest magnitude becomes the codebook's), "signed" (it becomes the first
        code, so the scale takes its sign: an eighth less error than a symmetric one), or "range"
        (lowest and highest value become the first and the last code, and there is a bias).
      zero: the code that padding is filled with; its value is 0 (or its scale is).
    """

    name: FormatName
    packing: Packing
    codebook: tuple[float, ...] | Literal["e4m3"] | None
    scale: Literal["absmax", "signed", "range"]
    zero: int

    @property
    def affine(self) -> bool:
        return self.scale == "range"

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value of a code; -128 stays unused."""
        if isinstance(self.codebook, tuple):
            return min(self.codebook), max(self.codebook)
        return (-127.0, 127.0) if self.codebook is None else (-448.0, 448.0)

    @property
    def table(self) -> tuple[float, ...] | None:
        """The codebook, where values cannot be computed from codes."""
        if not isinstance(self.codebook, tuple) or np.all(np.diff(self.codebook) == 1.0):
            return None
        return self.codebook

    def rows(self, block: int) -> int:
        """Inputs of one superblock: their codes lie together."""
        return self.packing.slabs * block


def _integers(bits: int, first: int = 0) -> tuple[float, ...]:
    return tuple(float(first + c) for c in range(2**bits))


FORMATS: dict[str, Format] = {
    # Codes start at the lowest value, and 7 is NF4's exact zero.
    "nf4": Format("nf4", NIBBLES, _NF4, scale="absmax", zero=7),
    "fp4": Format("fp4", NIBBLES, _FP4, scale="absmax", zero=0),
    "int4": Format("int4", NIBBLES, _integers(4, -8), scale="signed", zero=8),
    "uint4": Format("uint4", NIBBLES, _integers(4), scale="range", zero=0),
    "int8": Format("int8", BYTES, None, scale="absmax", zero=0),
    "fp8": Format("fp8", Packing((8,)), "e4m3", scale="absmax", zero=0),
    "e2m1": Format("e2m1", NIBBLES, _E2M1, scale="absmax", zero=0),
    "iq4": Format("iq4", NIBBLES, _IQ4, scale="signed", zero=8),
    "uint2": Format("uint2", Packing((2,)), _integers(2), scale="range", zero=0),
    "int3": Format("int3", Packing((2, 1)), _integers(3, -4), scale="signed", zero=4),
    "int5": Format("int5", Packing((4, 1)), _integers(5, -16), scale="signed", zero=16),
    "uint5": Format("uint5", Packing((4, 1)), _integers(5), scale="range", zero=0),
    "int6": Format("int6", Packing((4, 2)), _integers(6, -32), scale="signed", zero=32),
}
# Of slabs that are a part of a block.
_NARROWEST, _WIDEST = 4, 1024
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Coded:
    """Matrices as they are stored, and how to read them.

    Attributes:
      packed: bytes of the codes.
      scale: one number a block and output.
      bias: likewise in the affine format, else None.
      form: the block format.
      block: inputs that share a scale.
    """

    packed: Integer[AnyArray, "*s p n"]
    scale: Float[AnyArray, "*s b n"]
    bias: Float[AnyArray, "*s b n"] | None
    form: Format
    block: int


def known_format(name: str) -> Format:
    """A format by name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def slab_of(inputs: int, form: Format, block: int) -> int:
    """Inputs of a slab: a block, or a part of one where blocks would not fill superblocks.

    The scales of such a weight are repeated before a product, one for each slab.
    """
    each, left = divmod(inputs, form.packing.slabs)
    if left or inputs % form.rows(block) == 0:
        return block
    return slab if (slab := math.gcd(block, each, _WIDEST)) >= _NARROWEST else block


def padded_inputs(inputs: int, form: Format, block: int) -> int:
    """How many inputs are stored: whole superblocks."""
    rows = form.rows(block)
    return -(-inputs // rows) * rows


def code_values(codes: Integer[Array, "*c"], form: Format) -> Float[Array, "*c"]:
    """The codebook's value of each code, float32: arithmetic and selects only, no gather."""
    if form.codebook is None:
        return codes.astype(jnp.float32)
    wide = codes.astype(jnp.int32)
    if form.codebook == "e4m3":
        return _e4m3(wide)
    # Codebooks of consecutive integers need no table.
    if form.table is None:
        return wide.astype(jnp.float32) + np.float32(form.codebook[0])
    # The lowest bit chooses between two constants. As a select XLA:CPU would move both, at the
    # weight's full size, out of a loop over layers: 16 float32 copies of it.
    # 0 or -1: a mask of no or all 32 bits.
    odd = -(wide & 1)
    bits = np.asarray(form.codebook, np.float32).view(np.int32)
    level = [
        lax.bitcast_convert_type((odd & (low ^ high)) ^ low, jnp.float32)
        for low, high in zip(bits[::2], bits[1::2], strict=True)
    ]
    for bit in range(1, 4):  # a tree of selects: a gather of 16 entries is a scalar loop on a CPU
        chosen = (wide & (1 << bit)) != 0
        level = [
            jnp.where(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def _e4m3(bits: Integer[Array, "*c"]) -> Float[Array, "*c"]:
    """The 8-bit floats with four bits of exponent and three of mantissa, without infinity.

    In integers, because devices flush the small float32 that a shift of the bits would give.
    """
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    # Numbers whose exponent is 0 have no leading 1, and the step of those above them.
    whole = jnp.where(exponent == 0, mantissa, mantissa + 8).astype(jnp.float32)
    # The bits of a float32 that is a power of two: its step is 2^(exponent - 10).
    step = lax.bitcast_convert_type((jnp.maximum(exponent, 1) + 117) << 23, jnp.float32)
    return jnp.where(bits >= 128, -whole, whole) * step


def pack(codes: Integer[AnyArray, "*s k n"], form: Format, block: int) -> Any:
    """Puts the codes of whole superblocks into bytes."""
    packing = form.packing
    *stack, rows, cols = codes.shape
    # K is (superblock, slab, row of the slab); the slabs of a superblock share their bytes.
    by_slab = codes.reshape(*stack, rows // form.rows(block), packing.slabs, block, cols)
    blocks = packing.join([by_slab[..., i, :, :] for i in range(packing.slabs)])
    stacked = blocks[0] if len(blocks) == 1 else _stack(blocks)
    stored = rows * packing.rows // packing.slabs
    return stacked.astype(packing.dtype).reshape(*stack, stored, cols)


def _stack(parts: Sequence[AnyArray]) -> Any:
    """Blocks of rows one below the other: `(..., s, b, n)`."""
    of = jnp if isinstance(parts[0], jax.Array) else np
    return of.stack(parts, axis=-3)


def unpack(
    packed: Integer[AnyArray, "*s p n"], form: Format, block: int
) -> Integer[Array, "*s k n"]:
    """The codes `(..., K, N)`: the inverse of `pack`."""
    *stack, stored, cols = packed.shape
    packing = form.packing
    blocks = packed.reshape(*stack, stored // (packing.rows * block), packing.rows, block, cols)
    slabs = packing.split([blocks[..., i, :, :] for i in range(packing.rows)])
    # The slab goes between superblock and row, so that flattening restores the order of K.
    rows = stored // packing.rows * packing.slabs
    return jnp.stack(slabs, axis=-3).reshape(*stack, rows, cols)


def unpack_rows(
    packed: Integer[AnyArray, "*s p n"], rows: Integer[AnyArray, " m"], form: Format, block: int
) -> Integer[Array, "*s m n"]:
    """The codes of some rows of a matrix, without unpacking the others.

    Args:
      packed: of the matrix, perhaps with stack dims before it.
      rows: below K.
      form, block: how to read it.
    """
    superblock, inside = rows // form.rows(block), rows % form.rows(block)
    first_byte = superblock * form.packing.rows * block + inside % block
    take = functools.partial(jnp.take, packed, axis=packed.ndim - 2)
    bytes_ = [take(first_byte + i * block) for i in range(form.packing.rows)]
    first, *others = form.packing.split(bytes_)
    for slab, codes in enumerate(others, start=1):
        first = jnp.where((inside // block == slab)[:, None], codes, first)
    return first


def encode(
    w: Float[Array, "*s k n"], form: Format, block: int, scale_dtype: DTypeLike
) -> tuple[Integer[Array, "*s k n"], Float[Array, "*s b n"], Float[Array, "*s b n"] | None]:
    """Codes, scales and biases of a matrix of whole superblocks.

    Codes are chosen for the scale as it is stored, so that its rounding costs nothing.

    Args:
      w: float32.
      form, block: the format and the inputs of one block.
      scale_dtype: of scales and biases.

    Returns:
      `(codes uint8 or int8 (..., K, N), scale (..., K/B, N), bias likewise or None)`.
    """
    *stack, rows, cols = w.shape
    blocks = w.astype(jnp.float32).reshape(*stack, rows // block, block, cols)
    bias = None
    if form.affine:
        low = jnp.min(blocks, axis=-2)
        bias = low.astype(scale_dtype)
        # Counted from the bias as it is stored, so that its rounding shifts codes, not the weight.
        scale = (jnp.max(blocks, axis=-2) - low) / form.ends[1]
        blocks = blocks - bias.astype(jnp.float32)[..., None, :]
    else:
        scale = magnitude(blocks, form)
    scale = scale.astype(scale_dtype)
    factor = inverse(scale.astype(jnp.float32))[..., None, :]
    codes = nearest(blocks * factor, form)
    return codes.reshape(*stack, rows, cols), scale, bias


def magnitude(blocks: Float[Array, "*s b k n"], form: Format) -> Float[Array, "*s b n"]:
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    # Of int4 only -8 has magnitude 8: the extreme value takes it, whichever sign it has.
    if form.scale == "signed":
        top, bottom = jnp.max(blocks, axis=-2), jnp.min(blocks, axis=-2)
        return jnp.where(top > -bottom, top, bottom) / form.ends[0]
    return largest / form.ends[1]


def inverse(scale: Float[AnyArray, "*s"]) -> Float[Array, "*s"]:
    """1 / scale, and 0 for a scale of 0."""
    # Like bitsandbytes, one division a block and then products: codes at a tie depend on it.
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def nearest(x: Float[Array, "*s"], form: Format) -> Integer[Array, "*s"]:
    first, last = form.ends
    if form.codebook is None:
        return jnp.clip(jnp.round(x), first, last).astype(jnp.int8)
    if form.codebook == "e4m3":
        # The scale is rounded, so that a value may lie beyond the last one, which has no code.
        float8 = jnp.clip(x, first, last).astype(jnp.float8_e4m3fn)
        return lax.bitcast_convert_type(float8, jnp.uint8)
    if form.table is None:
        return (jnp.clip(jnp.round(x), first, last) - first).astype(jnp.uint8)
    order, middles = _ladder(form)
    place: Any = sum((x > m).astype(jnp.uint8) for m in middles)  # a tie takes the lower code
    if np.array_equal(order, np.arange(16)):
        return place
    return jnp.take(jnp.asarray(order, jnp.uint8), place)


def _ladder(form: Format) -> tuple[np.ndarray, np.ndarray]:
    """The codes in the order of their values (one code for each value), and the midpoints."""
    values = np.asarray(form.codebook, np.float32)
    # FP4 has two zeros, +0 and -0: `unique` keeps the first, code 0.
    _, order = np.unique(values, return_index=True)
    ordered = values[order]
    return order, (ordered[1:] + ordered[:-1]) / np.float32(2)


def decode(w: Coded, dtype: DTypeLike) -> Float[Array, "*s k n"]:
    """The matrices, K filled up to whole superblocks: computed in float32, rounded once."""
    codes = unpack(w.packed, w.form, w.block)
    *stack, rows, cols = codes.shape
    # float32 up to the last step, like bitsandbytes, whose weights come out to the bit.
    values = code_values(codes, w.form).reshape(*stack, rows // w.block, w.block, cols)
    values = values * w.scale.astype(jnp.float32)[..., None, :]
    if w.bias is not None:
        values = values + w.bias.astype(jnp.float32)[..., None, :]
    return values.reshape(*stack, rows, cols).astype(dtype)
