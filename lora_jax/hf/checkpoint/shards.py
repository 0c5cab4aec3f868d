"""Writing safetensors one tensor at a time, in one file or in shards with an index.

The library's own writer takes all tensors of a file at once; here names and shapes are known
beforehand, so that the header can be written first and each tensor's bytes as they come.

Format: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, data_offsets,
and `__metadata__`), the data. https://github.com/huggingface/safetensors
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lora_jax.hf.checkpoint.safetensors import INDEX, NUMPY, SINGLE

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def dtype_of(name: str) -> np.dtype:
    """The dtype in which tensors are written.

    Raises:
      ValueError: no dtype that files are written in.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


_NAMES = {np.dtype(here): there for there, here in NUMPY.items()}
# Hugging Face counts GB in powers of ten, GiB in powers of two.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class NewTensor(NamedTuple):
    """A tensor that will be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def size_of(text: int | str) -> int:
    """Bytes, from a number of them or as Hugging Face writes it: `5GB`, `500MB`, `2GiB`.

    Raises:
      ValueError: it is neither, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", str(text).strip().upper())
    size = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise ValueError(f"`max_shard_size` must be bytes or like `5GB` or `2GiB`, got {text!r}")
    return size


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A tensor in the dtype that it is written in.

    Raises:
      ValueError: it has a number that is not finite there.
    """
    with np.errstate(over="ignore"):  # found below
        tensor = np.asarray(tensor.astype(dtype, copy=False), order="C")
    if not np.isfinite(tensor).all():
        raise ValueError(
            f"tensor `{name}` has a number that {dtype} cannot hold; take another dtype, or look "
            "at the adapter: it may have diverged; nothing was written"
        )
    return tensor


def write_shards(
    directory: Path,
    entries: Sequence[NewTensor],
    values: Iterable[np.ndarray],
    *,
    max_shard_size: int,
) -> None:
    """Writes tensors as a Hugging Face model's weights.

    One file `model.safetensors` if it holds them all, else `model-00001-of-0000N.safetensors` and
    `model.safetensors.index.json`. No more than one tensor is held at a time.

    Args:
      directory: where; the files are not there yet.
      entries: every tensor.
      values: the tensors in the same order, of those dtypes.
      max_shard_size: bytes of tensors in a file; a tensor larger than that has a file of its own.

    Raises:
      ValueError: a tensor has another shape or dtype than its entry.
      OSError: a file cannot be written.
    """
    shards = list(_shards(entries, max_shard_size))
    values, placed = iter(values), {}
    for number, shard in enumerate(shards, 1):
        many = len(shards) > 1
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if many else SINGLE
        # `values` is lazy: each shard takes its own, one at a time.
        _write(directory / file, shard, islice(values, len(shard)))
        placed.update({entry.name: file for entry in shard})
    if len(shards) > 1:
        # Bytes of tensors, without headers, as Hugging Face counts.
        total = sum(map(_bytes, entries))
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX).write_text(text, encoding="utf-8")


def _shards(entries: Sequence[NewTensor], most: int) -> Iterator[list[NewTensor]]:
    shard, held = [], 0
    for entry in entries:
        size = _bytes(entry)
        if shard and held + size > most:
            yield shard
            shard, held = [], 0
        shard.append(entry)
        held += size
    yield shard


def _bytes(entry: NewTensor) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _write(path: Path, entries: list[NewTensor], values: Iterable) -> None:
    # "x": an existing file is an error.
    with path.open("xb") as file:
        file.write(_header(entries))
        for entry, value in zip(entries, values, strict=True):
            if value.shape != entry.shape or value.dtype != entry.dtype:
                raise ValueError(
                    f"`{entry.name}` is {value.dtype} {value.shape}, expected {entry.dtype} "
                    f"{entry.shape}"
                )
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _header(entries: list[NewTensor]) -> bytes:
    # transformers refuses a file without this entry.
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + _bytes(entry)
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
