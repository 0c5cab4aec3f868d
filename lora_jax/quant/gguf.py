"""GGUF's blocks, held without loss: where each type has its codes and scales.

Codes and scales are only put in another order. Scales of scales stay as small as they are there.

Source: ggml's `block_q4_0` to `block_iq4_xs` (ggml-common.h).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import UInt8

from lora_jax.quant.array import QuantArray
from lora_jax.quant.foreign import codes_of, from_codes
from lora_jax.quant.formats import FormatName
from lora_jax.quant.scales import HeldName

_Bytes = UInt8[np.ndarray, "o blocks bytes"]
# Where an array lies in a block, and its dtype.
_Field = tuple[int, int, str]


class GgufKind(NamedTuple):
    """A type of GGUF's tensors.

    Attributes:
      format: ours with the same codes.
      size: bytes of a block of GGUF's.
      inputs: of such a block.
      block: inputs that share a scale.
      codes: the bytes of blocks to their codes, `(o, blocks, inputs)`.
      scale, bias, scale2: first byte, end and dtype in a block, or None.
    """

    format: FormatName | HeldName
    size: int
    inputs: int
    block: int
    codes: Callable[[_Bytes], np.ndarray]
    scale: _Field
    bias: _Field | None = None
    scale2: _Field | None = None


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


def _halves(first: int, last: int, group: int) -> Callable[[_Bytes], np.ndarray]:
    """Nibbles: the low four bits of each group of bytes, then their high four."""

    def read(raw: _Bytes) -> np.ndarray:
        starts = range(first, last, group)
        return _flat([raw[..., i : i + group] >> bits & 15 for i in starts for bits in (0, 4)])

    return read


def _fifths(high: int, first: int) -> Callable[[_Bytes], np.ndarray]:
    """32 codes of five bits: nibbles, and four bytes of high bits."""

    def read(raw: _Bytes) -> np.ndarray:
        bits = np.unpackbits(raw[..., high : high + 4], axis=-1, bitorder="little")
        return _halves(first, first + 16, 16)(raw) | bits << 4

    return read


def _crumbs(first: int) -> Callable[[_Bytes], np.ndarray]:
    """256 codes of two bits: of 32 bytes the lowest two, then the next."""

    def read(raw: _Bytes) -> np.ndarray:
        starts = (first, first + 32)
        return _flat([raw[..., i : i + 32] >> bits & 3 for i in starts for bits in (0, 2, 4, 6)])

    return read


def _q3_k(raw: _Bytes) -> np.ndarray:
    return _crumbs(32)(raw) | _flat([raw[..., :32] >> bit & 1 for bit in range(8)]) << 2


def _q5_k(raw: _Bytes) -> np.ndarray:
    return _halves(48, 176, 32)(raw) | _flat([raw[..., 16:48] >> bit & 1 for bit in range(8)]) << 4


def _q6_k(raw: _Bytes) -> np.ndarray:
    return _halves(0, 128, 64)(raw) | _crumbs(128)(raw) << 4


def _q8_0(raw: _Bytes) -> np.ndarray:
    return raw[..., 2:].view(np.int8)


_F16 = "float16"
_FIRST: _Field = (0, 2, _F16)
_SECOND: _Field = (2, 4, _F16)
GGUF_KINDS: Mapping[str, GgufKind] = {
    # (code - 8) · scale, code · scale + minimum, and so on.
    "Q4_0": GgufKind("int4", 18, 32, 32, _halves(2, 18, 16), _FIRST),
    "Q4_1": GgufKind("uint4", 20, 32, 32, _halves(4, 20, 16), _FIRST, _SECOND),
    "Q5_0": GgufKind("int5", 22, 32, 32, _fifths(2, 6), _FIRST),
    "Q5_1": GgufKind("uint5", 24, 32, 32, _fifths(4, 8), _FIRST, _SECOND),
    "Q8_0": GgufKind("int8", 34, 32, 32, _q8_0, _FIRST),
    "IQ4_NL": GgufKind("iq4", 18, 32, 32, _halves(2, 18, 16), _FIRST),
    "Q2_K": GgufKind(
        "q2_k", 84, 256, 16, _crumbs(16), (0, 16, "uint8"), (82, 84, _F16), (80, 82, _F16)
    ),
    "Q3_K": GgufKind("q3_k", 110, 256, 16, _q3_k, (96, 108, "uint8"), None, (108, 110, _F16)),
    "Q4_K": GgufKind("q4_k", 144, 256, 32, _halves(16, 144, 32), (4, 16, "uint8"), _SECOND, _FIRST),
    "Q5_K": GgufKind("q5_k", 176, 256, 32, _q5_k, (4, 16, "uint8"), _SECOND, _FIRST),
    "Q6_K": GgufKind("q6_k", 210, 256, 16, _q6_k, (192, 208, "int8"), None, (208, 210, _F16)),
    "IQ4_XS": GgufKind("iq4_xs", 136, 256, 32, _halves(8, 136, 16), (2, 8, "uint8"), None, _FIRST),
}


def _field(raw: _Bytes, field: _Field | None) -> np.ndarray | None:
    """An array of the blocks as `(rows, outputs)`."""
    if field is None:
        return None
    first, last, dtype = field
    return np.ascontiguousarray(raw[..., first:last]).view(dtype).reshape(len(raw), -1).T


def from_gguf(
    blocks: np.ndarray,
    kind: str,
    *,
    roles: str = "io",
    shape: Sequence[int] | None = None,
    order: np.ndarray | None = None,
    slab: int | None = None,
    dtype: DTypeLike = "float32",
    name: str = "w",
) -> QuantArray:
    """A `QuantArray` of a GGUF tensor, in its own blocks and with its own scales.

    Args:
      blocks: the tensor's bytes, uint8 `(outputs, bytes a row)`; rows keep their order.
      kind: a name of `GGUF_KINDS`.
      roles: "io" for a kernel `(in, out)`, "oi" for one `(out, in)` such as an embedding table,
        or more letters with `shape`.
      shape: of the weight, where it is not a matrix.
      order: the input that each number of a row belongs to, if not the one at its place.
      slab: as in `from_codes`.
      dtype: of the weight.
      name: of the weight, for errors.

    Returns:
      The weight; `dequantize()` gives the gguf package's numbers to the bit.

    Raises:
      ValueError: another kind, or rows that are not whole blocks.
    """
    if kind not in GGUF_KINDS:
        raise ValueError(
            f"`{name}` has GGUF type {kind}: only {', '.join(GGUF_KINDS)} are held as they are; "
            f"dequantize it, then `lora.quantize`"
        )
    held = GGUF_KINDS[kind]
    if blocks.ndim != 2 or blocks.dtype != np.uint8 or blocks.shape[1] % held.size:
        raise ValueError(
            f"`{name}`: expected the bytes of whole {kind} blocks, uint8 (outputs, n·{held.size}), "
            f"got {blocks.dtype}{list(blocks.shape)}"
        )
    raw = blocks.reshape(len(blocks), -1, held.size)  # (outputs, blocks of a row, bytes)
    outputs, fan_in = len(blocks), raw.shape[1] * held.inputs
    if shape is None:
        shape = (fan_in, outputs) if roles.index("i") < roles.index("o") else (outputs, fan_in)
    return from_codes(
        # GGUF's rows are outputs.
        held.codes(raw).reshape(outputs, fan_in).T,
        _field(raw, held.scale),
        _field(raw, held.bias),
        _field(raw, held.scale2),
        format=held.format,
        block_size=held.block,
        slab=slab,
        order=order,
        roles=roles,
        shape=shape,
        dtype=dtype,
        name=name,
    )


def as_q5_k(blocks: UInt8[np.ndarray, "o bytes"]) -> UInt8[np.ndarray, "o wide"]:
    """Rows of Q4_K's blocks as Q5_K's, with the same numbers: the fifth bit of each code is 0."""
    raw = blocks.reshape(len(blocks), -1, GGUF_KINDS["Q4_K"].size)
    # Scales and minima in 16 bytes, then Q5_K's fifth bits, then four bits of each code.
    wide = np.insert(raw, [16] * 32, 0, axis=-1)
    return wide.reshape(len(blocks), -1)


def to_gguf(q: QuantArray, kind: str) -> UInt8[np.ndarray, "o bytes"]:
    """The bytes of a matrix's blocks, a row for each output: the inverse of `from_gguf`."""
    held = GGUF_KINDS[kind]
    codes = codes_of(q).T
    outputs, fan_in = codes.shape
    places, numbers = _places(kind)
    raw = np.empty((outputs, fan_in // held.inputs, held.size), np.uint8)
    # A byte for each bit, so a part of the rows at a time.
    step = max(1, (1 << 22) // fan_in)
    for first in range(0, outputs, step):
        part = np.ascontiguousarray(codes[first : first + step]).view(np.uint8)
        wide = np.unpackbits(part.reshape(-1, held.inputs), axis=-1, bitorder="little")
        bits = np.zeros((len(wide), 8 * held.size), np.uint8)
        bits[:, places] = wide[:, numbers]
        packed = np.packbits(bits, axis=-1, bitorder="little")
        raw[first : first + step] = packed.reshape(len(part), -1, held.size)
    for field, array in ((held.scale, q.scale), (held.bias, q.bias), (held.scale2, q.scale2)):
        if field is not None:
            start, end, dtype = field
            rows = np.ascontiguousarray(np.asarray(array).T.astype(dtype))  # (outputs, numbers)
            raw[..., start:end] = rows.view(np.uint8).reshape(*raw.shape[:2], end - start)
    return raw.reshape(outputs, -1)


@lru_cache
def _places(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Which bits of a block are bits of codes, and which of their bits each is.

    Found by reading blocks of which one bit is set.
    """
    held = GGUF_KINDS[kind]
    count = 8 * held.size
    single = np.packbits(np.eye(count, dtype=np.uint8), axis=-1, bitorder="little")
    codes = held.codes(single.reshape(count, 1, held.size)).reshape(count, held.inputs)
    found = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little")
    places, numbers = np.nonzero(found)
    return places, numbers
