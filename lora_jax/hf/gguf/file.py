"""Reading a GGUF file: its metadata, its weights under Hugging Face's names, its configuration.

The header is parsed here and not by `gguf.GGUFReader`, which trusts every count it reads (a false
one makes it allocate without limit) and takes seconds for a vocabulary. The formats of
quantized blocks are the `gguf` package's.

Layout: magic, version, tensor count, key count; keys with typed values; one record a tensor (name,
dimensions with the fastest first, type, offset); padding; data. Source: ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_jax.compat import require
from lora_jax.hf.checkpoint.weights import read_array

# "GGUF" read as a little-endian number, and the type numbers of keys' values.
_MAGIC = 0x46554747
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


# The fewest bytes that an element of an array, a key or a tensor's record can take: a count whose
# elements would not fit into the file is refused before anything is allocated.
_LEAST = {kind: struct.calcsize(code) for kind, code in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
# A key is a name's length (8), a type (4) and a value; a tensor's record a name's length (8), the
# number of dimensions (4), type (4) and offset (8). ggml has tensors of at most four dimensions.
_LEAST_KEY, _LEAST_RECORD = 13, 24
_MOST_DIMENSIONS, _MOST_NESTED = 4, 4


class TensorPlace(NamedTuple):
    """A tensor of the file: shape in Hugging Face's order, ggml type, first byte, bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class Gguf(NamedTuple):
    """A file's metadata and where its tensors lie."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]

    def stored(self, name: str, part: tuple[Any, ...] = ()) -> np.ndarray:
        """The bytes of a part of a tensor, whose last dim are the bytes of a row."""
        place = self.tensors[name]
        rows = place.shape[:-1]
        shape = (*rows, place.size // math.prod(rows))
        return read_array(self.path, place.start, np.uint8, shape, part=part)


def open_gguf(path: str | Path, *, kind: Literal["model", "adapter"] = "model") -> Gguf:
    """Opens a file and reads its header; tensors stay on disk.

    Args:
      path: the file.
      kind: what it must hold, its `general.type`: "model" or "adapter".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a GGUF file, cut short, a header that does not fit the file, or of another
        kind.
    """
    file = _opened(Path(path))
    _check_kind(file.metadata, kind, file.path)
    return file


def kind_of_file(path: str | Path) -> str:
    """The `general.type` of a file: "model", "adapter" or another.

    Raises:
      FileNotFoundError, ValueError: as `open_gguf`.
    """
    return str(_opened(Path(path)).metadata.get("general.type", "model"))


def _opened(path: Path) -> Gguf:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    # Magic, version and both counts.
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: not a GGUF file: only {path.stat().st_size} bytes")
    # Mapped, as the header's length is not known before its end.
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        try:
            metadata, tensors = _header(_Cursor(mapped))
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, _BadHeader) as error:
            raise ValueError(f"{path}: not a whole GGUF file: {_reason(error)}") from None
    return Gguf(path, metadata, tensors)


def _check_kind(metadata: Mapping[str, Any], wanted: str, path: Path) -> None:
    if isinstance(parts := metadata.get("split.count"), int) and parts > 1:
        raise ValueError(
            f"{path}: one of {parts} parts of a model; join them first (llama-gguf-split --merge)"
        )
    # A file without the key is a model.
    if (kind := metadata.get("general.type", "model")) != wanted:
        article = "an" if wanted[0] in "aeiou" else "a"
        raise ValueError(f'{path}: holds a GGUF of type "{kind}", not {article} {wanted}')


def rope_divisors(file: Gguf) -> np.ndarray | None:
    """Llama 3's divisor of each rotary frequency, where the file holds them."""
    return read_tensor(file, "rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None


class _BadHeader(Exception):
    """What is wrong with a header, in words."""


class _Cursor:
    """A place in the file that cannot run past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _BadHeader(f"{count} bytes wanted at byte {self.at}, past its end; cut short?")
        self.at += count
        return self.data[self.at - count : self.at]

    def string(self) -> str:
        return self.bytes(self.take("Q")).decode("utf-8")

    def count(self, code: str, least: int, what: str) -> int:
        """A count, refused if that many things of `least` bytes would not fit the file."""
        number = self.take(code)
        if number * least > len(self.data) - self.at:
            raise _BadHeader(f"its header claims {number} {what}, more than the file could hold")
        return number


def _reason(error: Exception) -> str:
    if isinstance(error, struct.error | IndexError):
        return "its header runs past its end; cut short?"
    if isinstance(error, KeyError):
        return f"a value of the unknown type {error}"
    return str(error)


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorPlace]]:
    if cursor.take("I") != _MAGIC:
        raise _BadHeader("it does not start with GGUF")
    # Version 1 has counts of 32 bits.
    if (version := cursor.take("I")) not in (2, 3):
        raise _BadHeader(f"version {version} is not 2 or 3 (little-endian)")
    tensors = cursor.count("Q", _LEAST_RECORD, "tensors")
    keys = cursor.count("Q", _LEAST_KEY, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.string()
        if name in metadata:
            raise _BadHeader(f"the key `{name}` is there twice")
        metadata[name] = _value(cursor, cursor.take("I"), 0)
    records = [_record(cursor) for _ in range(tensors)]
    return metadata, _place(records, metadata.get("general.alignment", 32), cursor)


def _value(cursor: _Cursor, kind: int, depth: int) -> Any:
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        value = cursor.take(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value
    if depth == _MOST_NESTED:
        raise _BadHeader("arrays nested too deep")
    inner = cursor.take("I")
    count = cursor.count("Q", _LEAST[inner], "elements of an array")
    if inner in _SCALARS:
        dtype = np.dtype("<" + _SCALARS[inner])
        return np.frombuffer(cursor.bytes(count * dtype.itemsize), dtype).tolist()
    return [_value(cursor, inner, depth + 1) for _ in range(count)]


def _record(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    if (dimensions := cursor.take("I")) > _MOST_DIMENSIONS:
        raise _BadHeader(f"tensor `{name}` has {dimensions} dimensions")
    # ggml writes the fastest dimension first, numpy last.
    shape = tuple(cursor.take("Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.take("I"), cursor.take("Q")


def _place(
    records: Sequence[tuple[str, tuple[int, ...], int, int]], alignment: Any, cursor: _Cursor
) -> dict[str, TensorPlace]:
    """Where each tensor lies, inside the file."""
    gguf = require("gguf")
    known = {int(kind): gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGMLQuantizationType}
    if type(alignment) is not int or alignment < 1:
        raise _BadHeader(f"`general.alignment` is {alignment!r}")
    # Offsets count from the first multiple of the alignment after the header.
    first, out, end = -(-cursor.at // alignment) * alignment, {}, 0
    for name, shape, kind, offset in records:
        if name in out:
            raise _BadHeader(f"tensor `{name}` is there twice")
        if kind not in known:
            raise _BadHeader(f"tensor `{name}` has the unknown type {kind}")
        if 0 in shape:
            raise _BadHeader(f"tensor `{name}` is empty, of shape {shape}")
        block, width = known[kind]
        if shape and shape[-1] % block:
            raise _BadHeader(
                f"tensor `{name}`: rows of {shape[-1]} are not whole blocks of {block}"
            )
        size = math.prod(shape) // block * width
        # Python's integers do not overflow, so a huge offset cannot wrap around into the file.
        if first + offset + size > len(cursor.data):
            raise _BadHeader(f"tensor `{name}` ends past the end of the file; cut short?")
        # llama.cpp, too, reads only files in which each tensor follows the one before: other places
        # mean an overlap, a hole, or a type that is not the data's.
        if offset != end:
            raise _BadHeader(
                f"tensor `{name}` begins at byte {offset} of the data, expected {end}, where the "
                "one before it ends by its type and shape; the file is damaged"
            )
        end = offset + -(-size // alignment) * alignment
        out[name] = TensorPlace(shape, kind, first + offset, size)
    if len(cursor.data) > first + end and records:
        raise _BadHeader(
            f"{len(cursor.data) - first - end} bytes follow the last tensor, `{records[-1][0]}`, "
            "which ends there by its type and shape; the file is damaged"
        )
    return out


def of_bytes(file: Gguf, name: str, part: tuple[Any, ...]) -> tuple[tuple[Any, ...], slice]:
    """The part of a tensor's bytes that has a part of its numbers, and their place in it."""
    place, gguf = file.tensors[name], require("gguf")
    if len(part) < len(place.shape) or not part:  # rows are whole
        return part, slice(None)
    *rows, columns = part
    # Only whole blocks can be decoded.
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(place.kind)]
    first, last = columns.start // block, -(-columns.stop // block)
    inside = slice(columns.start - first * block, columns.stop - first * block)
    return (*rows, slice(first * width, last * width)), inside


def read_tensor(file: Gguf, name: str, part: tuple[Any, ...] = ()) -> np.ndarray:
    """A tensor, or a part of one, in float32, dequantized by the `gguf` package.

    Args:
      file: of `open_gguf`.
      name: in the file.
      part: a slice of each dim, in the file's order of rows, or the numbers of rows.

    Raises:
      ValueError: a type that cannot be dequantized, or numbers that are not finite.
    """
    gguf = require("gguf")
    record = file.tensors[name]
    if part and len(record.shape) == 1:  # blocks of a vector are few
        return read_tensor(file, name)[part]
    kinds = gguf.GGMLQuantizationType
    kind = kinds(record.kind)
    there, inside = of_bytes(file, name, part)
    rows = file.stored(name, there)
    if kind == kinds.F32:
        tensor = rows.view(np.float32)
    else:
        # `gguf` takes bytes for quantized types, and numbers for F16.
        rows = rows.view(np.float16) if kind == kinds.F16 else rows
        try:
            # A scale that is damaged is found below.
            with np.errstate(invalid="ignore", over="ignore"):
                tensor = gguf.dequantize(rows, kind).astype(np.float32, copy=False)
        except NotImplementedError:
            raise ValueError(
                f"{file.path}: tensor `{name}` has type {kind.name}, which the gguf package cannot "
                "dequantize; use a file of another type (Q4_0, Q4_K_M, Q8_0, F16)"
            ) from None
    tensor = tensor[..., inside] if record.shape else tensor.reshape(())
    _check_finite(tensor, name, file)
    return tensor


def _check_finite(values: Any, name: str, file: Gguf) -> None:
    if not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"{file.path}: tensor `{name}` holds NaN or infinity; download it again")
