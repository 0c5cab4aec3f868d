"""Block formats: the values of codes, and how a matrix becomes codes and scales, and back.

    w ≈ codebook[code] · scale (+ bias)

with one scale (and, in the affine format, one bias) for each block of `B` consecutive inputs of
one output. All arrays here are of matrices `(..., K, N)`: K inputs, N outputs.

Two 4-bit codes share a byte. The rows of a superblock of `2B` inputs are stored in `B` bytes, its
first half in the low and its second half in the high four bits, so that unpacking gives two
contiguous slabs with one scale row each, in the forward and in the transposed product:

    packed[jB + r, n] = code(2jB + r, n) | code(2jB + B + r, n) << 4

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E (NF4's values are bitsandbytes').
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

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


# The keys of `FORMATS`, for annotations.
FormatName = Literal["nf4", "fp4", "int4", "uint4", "int8"]
# What a weight is decoded for; kernels have it in their names, see `lora_jax.quant.matmul`.
Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How codes share bytes, for JAX and NumPy arrays and inside kernels.

    Attributes:
      dtype: of the packed array.
      slabs: blocks of a superblock, whose codes share their bytes.
      join: the codes of each slab (unsigned where several share a byte) to bytes.
      split: bytes to the codes of each slab.
    """

    dtype: Literal["uint8", "int8"]
    slabs: int
    join: Callable[[list], Any]
    split: Callable[[Any], list]


NIBBLES = Packing(
    "uint8",
    2,
    lambda halves: halves[0] | (halves[1] << 4),
    lambda packed: [packed & 15, packed >> 4],
)
BYTES = Packing("int8", 1, lambda slabs: slabs[0], lambda byte: [byte])


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format.

    Attributes:
      name: as in `quantize(format=)`.
      packing: how its codes share bytes.
      codebook: value of each code; None for codes that are their own value.
      scale: "absmax" (largest magnitude becomes 1), "signed" (it becomes the lowest code, so the
        scale takes its sign: an eighth less error than a symmetric one), or "range" (lowest and
        highest value become the first and the last code, and there is a bias).
      zero: the code that padding is filled with; its value is 0 (or its scale is).
    """

    name: FormatName
    packing: Packing
    codebook: tuple[float, ...] | None
    scale: Literal["absmax", "signed", "range"]
    zero: int

    @property
    def affine(self) -> bool:
        return self.scale == "range"

    def rows(self, block: int) -> int:
        """Inputs of one superblock: their codes lie together."""
        return self.packing.slabs * block


_SIGNED = tuple(float(c - 8) for c in range(16))
_UNSIGNED = tuple(float(c) for c in range(16))
FORMATS: dict[str, Format] = {
    # Codes start at the lowest value, and 7 is NF4's exact zero.
    "nf4": Format("nf4", NIBBLES, _NF4, scale="absmax", zero=7),
    "fp4": Format("fp4", NIBBLES, _FP4, scale="absmax", zero=0),
    "int4": Format("int4", NIBBLES, _SIGNED, scale="signed", zero=8),
    "uint4": Format("uint4", NIBBLES, _UNSIGNED, scale="range", zero=0),
    "int8": Format("int8", BYTES, None, scale="absmax", zero=0),
}
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


def padded_inputs(inputs: int, form: Format, block: int) -> int:
    """How many inputs are stored: whole superblocks."""
    rows = form.rows(block)
    return -(-inputs // rows) * rows


def code_values(codes: Integer[Array, "*c"], form: Format) -> Float[Array, "*c"]:
    """The codebook's value of each code, float32: arithmetic and selects only, no gather."""
    if form.codebook is None:
        return codes.astype(jnp.float32)
    # Codebooks of consecutive integers need no table.
    steps = np.diff(form.codebook)
    if np.all(steps == 1.0):
        return codes.astype(jnp.int32).astype(jnp.float32) + np.float32(form.codebook[0])
    wide = codes.astype(jnp.int32)
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


def pack(codes: Integer[AnyArray, "*s k n"], form: Format, block: int) -> Any:
    """Puts the codes of whole superblocks into bytes."""
    packing = form.packing
    *stack, rows, cols = codes.shape
    # K is (superblock, slab, row of the slab); the slabs of a superblock share their bytes.
    by_slab = codes.reshape(*stack, rows // form.rows(block), packing.slabs, block, cols)
    packed = packing.join([by_slab[..., i, :, :] for i in range(packing.slabs)])
    return packed.astype(packing.dtype).reshape(*stack, rows // packing.slabs, cols)


def unpack(
    packed: Integer[AnyArray, "*s p n"], form: Format, block: int
) -> Integer[Array, "*s k n"]:
    """The codes `(..., K, N)`: the inverse of `pack`."""
    *stack, rows, cols = packed.shape
    slabs = form.packing.split(packed.reshape(*stack, rows // block, block, cols))
    # The slab goes between superblock and row, so that flattening restores the order of K.
    return jnp.stack(slabs, axis=-3).reshape(*stack, len(slabs) * rows, cols)


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
    byte = jnp.take(packed, superblock * block + inside % block, axis=packed.ndim - 2)
    first, *others = form.packing.split(byte)
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
        # 16 codes span 15 steps. Codes are counted from the bias as it is stored, so its rounding
        # shifts them and not the weight.
        scale = (jnp.max(blocks, axis=-2) - low) / 15
        blocks = blocks - bias.astype(jnp.float32)[..., None, :]
    else:
        scale = _magnitude(blocks, form)
    scale = scale.astype(scale_dtype)
    inverse = _inverse(scale.astype(jnp.float32))[..., None, :]
    codes = _nearest(blocks * inverse, form)
    return codes.reshape(*stack, rows, cols), scale, bias


def _magnitude(blocks: Float[Array, "*s b k n"], form: Format) -> Float[Array, "*s b n"]:
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    # Only -8 has magnitude 8: the extreme value takes it, whichever sign it has.
    if form.scale == "signed":
        top, bottom = jnp.max(blocks, axis=-2), jnp.min(blocks, axis=-2)
        return jnp.where(top > -bottom, top, bottom) / -8
    # -128 stays unused, so that both signs reach equally far.
    return largest / 127 if form.codebook is None else largest


def _inverse(scale: Float[AnyArray, "*s"]) -> Float[Array, "*s"]:
    # Like bitsandbytes, one division a block and then products: codes at a tie depend on it.
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _nearest(x: Float[Array, "*s"], form: Format) -> Integer[Array, "*s"]:
    if form.codebook is None:
        return jnp.clip(jnp.round(x), -127, 127).astype(jnp.int8)
    first, last = form.codebook[0], form.codebook[-1]
    if form.scale != "absmax":
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


def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed dynamic map: the 256 values of an 8-bit code of a scale, ascending.

    Source: Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning", section 2.1.3;
    bitsandbytes `create_dynamic_map(signed=True)`.
    """
    # 254 midpoints of both signs follow, which reach neither 0 nor 1; together 256 codes.
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        tens = np.float32(10.0 ** (exponent - 6))
        values += [*(tens * means).tolist(), *(-tens * means).tolist()]
    return np.sort(np.asarray(values, np.float32))


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """float32 points counted from both ends, as torch.linspace does, whose bits the map has."""
    step = np.float32((np.float32(last) - np.float32(first)) / np.float32(count - 1))
    number = np.arange(count)
    up = np.float32(first) + step * number.astype(np.float32)
    down = np.float32(last) - step * (count - 1 - number).astype(np.float32)
    return np.where(number < count / 2, up, down).astype(np.float32)


SCALE_BLOCK = 256  # scales that share a scale


def compress_scales(scale: Float[Array, "b n"], blocks: int) -> dict:
    """Quantizes the scales of one matrix.

    Args:
      scale: float32 `(K/B, N)`; the last blocks may be padding.
      blocks: how many are not padding.

    Returns:
      The fields of a `QuantArray`: `scale` as uint8 codes, `scale2`, `offset` and `scale_map`.
    """
    rows, cols = scale.shape
    # bitsandbytes numbers scales along the rows of `(N, K)`. They are all positive: without their
    # mean they use both halves of the signed map.
    flat = scale[:blocks].T.reshape(-1)
    offset = jnp.mean(flat)
    count = -(-flat.size // SCALE_BLOCK)
    rest = jnp.pad(flat - offset, (0, count * SCALE_BLOCK - flat.size)).reshape(count, SCALE_BLOCK)
    scale2 = jnp.max(jnp.abs(rest), axis=1)
    scaled = rest * _inverse(scale2)[:, None]
    table = dynamic_map()
    middles = (table[1:] + table[:-1]) / np.float32(2)
    # "left" gives a tie the lower code, as in `_nearest`.
    codes = jnp.searchsorted(jnp.asarray(middles), scaled, side="left").astype(jnp.uint8)
    codes = codes.reshape(-1)[: flat.size].reshape(cols, blocks).T
    filled = jnp.zeros((rows - blocks, cols), jnp.uint8)
    return {
        "scale": jnp.concatenate([codes, filled]),
        "scale2": scale2,
        "offset": offset,
        "scale_map": jnp.asarray(table),
    }


def expand_scales(
    codes: Integer[AnyArray, "*s b n"],
    scale2: Float[AnyArray, "*s groups"],
    offset: Float[AnyArray, "*s"],
    scale_map: Float[AnyArray, "*s 256"],
    *,
    blocks: int,
) -> Float[Array, "*s b n"]:
    """The scales as float32 numbers, `(stack..., K/B, N)`.

    Args:
      codes: uint8 `(stack..., K/B, N)`.
      scale2, offset, scale_map: of `compress_scales`, with the same stack.
      blocks: how many of `K/B` are not padding.
    """
    *stack, rows, cols = codes.shape
    # Padding takes the group of the last true block: the index must exist, and the codes under it
    # decode to 0 with any scale.
    row = jnp.minimum(lax.broadcasted_iota(jnp.int32, (rows, cols), 0), blocks - 1)
    group = (lax.broadcasted_iota(jnp.int32, (rows, cols), 1) * blocks + row) // SCALE_BLOCK
    number = codes.astype(jnp.int32).reshape(*stack, rows * cols)
    value = jnp.take_along_axis(scale_map, number, axis=-1).reshape(codes.shape)
    return value * jnp.take(scale2, group, axis=-1) + offset[..., None, None]
