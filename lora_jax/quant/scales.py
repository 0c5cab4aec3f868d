"""Scales that are not stored as floats: how they lie, and the floats that they stand for.

Two ways. Scales are quantized again with bitsandbytes' own 8-bit codes, in any format whose scales
are magnitudes; or a row of `HELD` says how files of some kind have them: one for a whole output,
one for 128 outputs, powers of two, small integers times a scale of their own, with zero points.

Products know none of this: `lora_jax.quant.array.expanded` first makes of a matrix's scales the
floats `(K/B, N)` of a plain format, which are few beside the weight, and which no pass keeps.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer

from lora_jax import compat
from lora_jax.dims import AnyArray
from lora_jax.quant.formats import FORMATS, Format, code_values, inverse

ScaleDtype = Literal["float32", "bfloat16", "float16"]
SCALE_DTYPES: tuple[ScaleDtype, ...] = get_args(ScaleDtype)

# The keys of `HELD`, for annotations.
HeldName = Literal[
    "fp8_channel", "fp8_block", "mxfp4", "uint4_zero", "int8_channel", "nvfp4", "q2_k", "q3_k",
    "q4_k", "q5_k", "q6_k", "iq4_xs",
]  # fmt: skip
# Of a matrix (stack..., K/B, N): scales and biases.
Scales = tuple[Float[Array, "*s b n"], Float[Array, "*s b n"] | None]


class Stored(NamedTuple):
    """An array of a weight's scales: `rows` rows for some blocks of inputs, a column for an output.

    Attributes:
      dtypes: that it may have.
      blocks: how many blocks have the rows together; 0 is all of them.
      rows: of those blocks.
      outputs: how many outputs share a column.
    """

    dtypes: tuple[str, ...] = SCALE_DTYPES
    blocks: int = 1
    rows: int = 1
    outputs: int = 1

    def shape(self, blocks: int, outputs: int) -> tuple[int, int]:
        """Rows and columns of a matrix of so many blocks and outputs."""
        rows = -(-blocks // self.blocks) * self.rows if self.blocks else self.rows
        return rows, -(-outputs // self.outputs)


class Held(NamedTuple):
    """A format of files, whose weights are held as they come.

    Attributes:
      name: its own.
      form: the plain format with the same codes.
      block: inputs that share a scale in the files of the format, mostly.
      floats: `(scale, bias, scale2, blocks, outputs)`, as they are stored, to those of `form`.
      scale, bias, scale2: how they are stored, or None.
    """

    name: HeldName
    form: Format
    block: int
    floats: Callable[..., Scales]
    scale: Stored = Stored()
    bias: Stored | None = None
    scale2: Stored | None = None

    @property
    def arrays(self) -> dict[str, Stored | None]:
        """How each array is stored, by its field."""
        return {"scale": self.scale, "bias": self.bias, "scale2": self.scale2}

    @property
    def units(self) -> tuple[int, int]:
        """Blocks of inputs, and outputs, that no shard may divide."""
        parts = [x for x in self.arrays.values() if x is not None]
        return max(x.blocks for x in parts), max(x.outputs for x in parts)


def _shared(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """Scales that all blocks of an output share, or 128 outputs."""
    if scale.shape[-1] != outputs:
        scale = jnp.repeat(scale, 128, axis=-1)[..., :outputs]
    return jnp.broadcast_to(scale, (*scale.shape[:-2], blocks, outputs)), None


def _powers(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """Powers of two: `2^(scale - 127)`."""
    # The exponent's bits of a float32; 2^-127 has none, and half a mantissa.
    wide = scale.astype(jnp.int32)
    bits = jnp.where(wide == 0, 1 << 22, wide << 23)
    return lax.bitcast_convert_type(bits, jnp.float32), None


def _of_float8(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """8-bit floats, divided by a float of the output."""
    return code_values(scale, FORMATS["fp8"]) / scale2, None


def _zero_points(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """Zero points in four bits, of two blocks in a byte: `(code - zero) · scale`."""
    zeros = _rows_of([bias & 15, bias >> 4])[..., :blocks, :]  # the last byte may have one
    # Exact: a product of four and of 11 bits.
    return scale, -(zeros * scale.astype(jnp.float32))


def _rows_of(parts: list) -> Float[Array, "*s b n"]:
    """Rows in turns from each part, as float32."""
    stacked = jnp.stack(parts, axis=-2)
    return stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1]).astype(jnp.float32)


def _grouped(raw: Any, count: int) -> list:
    """The rows of an array by their place in each group of `count` rows."""
    groups = raw.reshape(*raw.shape[:-2], -1, count, raw.shape[-1])
    return [groups[..., i, :] for i in range(count)]


def _times(scale2: Any, scale: Float[Array, "*s b n"]) -> Float[Array, "*s b n"]:
    """Each row times the float16 of its group of 256 inputs."""
    each = scale.shape[-2] // scale2.shape[-2]
    return scale * jnp.repeat(scale2.astype(jnp.float32), each, axis=-2)


def _q2_k(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """Scale and minimum of a block in four bits each."""
    low, high = (x.astype(jnp.float32) for x in (scale & 15, scale >> 4))
    return _times(scale2, low), -_times(bias, high)


def _q3_k(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """16 scales of six bits in 12 bytes, less 32."""
    raw = _grouped(scale, 12)
    low = [raw[j % 8] >> 4 * (j // 8) & 15 for j in range(16)]
    high = [raw[8 + j % 4] >> 2 * (j // 4) & 3 for j in range(16)]
    six = _rows_of([a | (b << 4) for a, b in zip(low, high, strict=True)])
    return _times(scale2, six - 32), None


def _q4_k(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """8 scales and 8 minima of six bits in 12 bytes."""
    raw = _grouped(scale, 12)
    first = [x & 63 for x in raw[:4]], [x & 63 for x in raw[4:8]]
    scales = _rows_of([*first[0], *((raw[8 + j] & 15) | (raw[j] >> 6 << 4) for j in range(4))])
    minima = _rows_of([*first[1], *((raw[8 + j] >> 4) | (raw[4 + j] >> 6 << 4) for j in range(4))])
    return _times(scale2, scales), -_times(bias, minima)


def _q6_k(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """Scales of eight bits."""
    return _times(scale2, scale.astype(jnp.float32)), None


def _iq4_xs(scale: Any, bias: Any, scale2: Any, blocks: int, outputs: int) -> Scales:
    """8 scales of six bits, less 32: two bits of each in two bytes, four in the next four."""
    raw = _grouped(scale, 6)
    low = [raw[2 + j // 2] >> 4 * (j % 2) & 15 for j in range(8)]
    high = [raw[j // 4] >> 2 * (j % 4) & 3 for j in range(8)]
    six = _rows_of([a | (b << 4) for a, b in zip(low, high, strict=True)])
    return _times(scale2, six - 32), None


_HALF, _BYTE = ("float16",), ("uint8",)
_HALF_FIRST = ("float16", "bfloat16", "float32")
_EIGHTS, _SIXTEENS = Stored(_HALF, blocks=8), Stored(_HALF, blocks=16)
# Source of the last six: ggml's `block_q2_K` to `block_q6_K` and `block_iq4_xs`.
HELD: Mapping[str, Held] = {
    "fp8_channel": Held("fp8_channel", FORMATS["fp8"], 128, _shared, Stored(blocks=0)),
    "fp8_block": Held("fp8_block", FORMATS["fp8"], 128, _shared, Stored(outputs=128)),
    "mxfp4": Held("mxfp4", FORMATS["e2m1"], 32, _powers, Stored(_BYTE)),
    "uint4_zero": Held(
        "uint4_zero",
        FORMATS["uint4"],
        128,
        _zero_points,
        Stored(_HALF_FIRST),
        bias=Stored(_BYTE, blocks=2),
    ),
    "int8_channel": Held("int8_channel", FORMATS["int8"], 128, _shared, Stored(blocks=0)),
    "nvfp4": Held(
        "nvfp4",
        FORMATS["e2m1"],
        16,
        _of_float8,
        Stored(_BYTE),
        scale2=Stored(("float32",), blocks=0),
    ),
    "q2_k": Held("q2_k", FORMATS["uint2"], 16, _q2_k, Stored(_BYTE), _SIXTEENS, _SIXTEENS),
    "q3_k": Held(
        "q3_k", FORMATS["int3"], 16, _q3_k, Stored(_BYTE, blocks=16, rows=12), scale2=_SIXTEENS
    ),
    "q4_k": Held(
        "q4_k", FORMATS["uint4"], 32, _q4_k, Stored(_BYTE, blocks=8, rows=12), _EIGHTS, _EIGHTS
    ),
    "q5_k": Held(
        "q5_k", FORMATS["uint5"], 32, _q4_k, Stored(_BYTE, blocks=8, rows=12), _EIGHTS, _EIGHTS
    ),
    "q6_k": Held("q6_k", FORMATS["int6"], 16, _q6_k, Stored(("int8",)), scale2=_SIXTEENS),
    "iq4_xs": Held(
        "iq4_xs", FORMATS["iq4"], 32, _iq4_xs, Stored(_BYTE, blocks=8, rows=6), scale2=_EIGHTS
    ),
}


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
    begin, end = np.float32(first), np.float32(last)
    # torch adds and multiplies at once: only the sum is rounded.
    step = np.float64((end - begin) / np.float32(count - 1))
    number = np.arange(count)
    points = np.where(number < count / 2, begin + step * number, end - step * (count - 1 - number))
    return points.astype(np.float32)


SCALE_BLOCK = 256  # scales that share a scale


def compress_scales(
    scale: Float[Array, "b n"], blocks: int, offset: Float[Array, ""] | None = None
) -> dict:
    """Quantizes the scales of one matrix.

    Args:
      scale: float32 `(K/B, N)`; the last blocks may be padding.
      blocks: how many are not padding.
      offset: what is subtracted first; None is their mean.

    Returns:
      The fields of a `QuantArray`: `scale` as uint8 codes, `scale2`, `offset` and `scale_map`.
    """
    rows, cols = scale.shape
    # bitsandbytes numbers scales along the rows of `(N, K)`. They are all positive: without their
    # mean they use both halves of the signed map.
    flat = scale[:blocks].T.reshape(-1)
    offset = jnp.mean(flat) if offset is None else offset
    count = -(-flat.size // SCALE_BLOCK)
    rest = jnp.pad(flat - offset, (0, count * SCALE_BLOCK - flat.size)).reshape(count, SCALE_BLOCK)
    scale2 = jnp.max(jnp.abs(rest), axis=1)
    scaled = rest * inverse(scale2)[:, None]
    table = dynamic_map()
    middles = (table[1:] + table[:-1]) / np.float32(2)
    # "left" gives a tie the lower code, as in `formats.nearest`.
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
    look_up: Callable = functools.partial(_look_up, place=_place(codes, len(stack)))
    for _ in stack:
        look_up = jax.vmap(look_up)
    value = look_up(jnp.asarray(scale_map), jnp.asarray(codes).astype(jnp.int32))
    return value * jnp.take(scale2, group, axis=-1) + offset[..., None, None]


def _look_up(table: Float[Array, "256"], number: Integer[Array, "b n"], *, place: Any) -> Array:
    return table.at[number].get(out_sharding=place)


def _place(codes: Integer[AnyArray, "*s b n"], stacked: int) -> NamedSharding | None:
    """The sharding of the codes of one matrix under explicit axes, where a lookup needs it."""
    mesh, spec = compat.explicit_mesh(codes), compat.spec_of(codes)
    return None if spec is None else NamedSharding(mesh, PartitionSpec(*spec[stacked:]))
