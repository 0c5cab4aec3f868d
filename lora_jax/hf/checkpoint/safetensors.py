"""Reading safetensors weights, in one file or in shards, without torch.

A header is read only as far as the file reaches, and every tensor in it is checked against the
file before anything is allocated. Pickle files are refused: reading one runs whatever code is in
it.

Format: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, data_offsets,
and `__metadata__`), the data. https://github.com/huggingface/safetensors
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from lora_jax.files import parse_json, read_json, read_object
from lora_jax.hf.checkpoint import bnb, quantized
from lora_jax.hf.checkpoint.weights import Part, Weights, read_array

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# numpy's dtype of each of safetensors'.
NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_INDICES = ("I64", "I32", "BOOL")
# The safetensors library's own limit.
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """One tensor of a file: its dtype in safetensors' spelling, its shape, its first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numpy(self) -> np.dtype:
        """numpy's dtype."""
        return np.dtype(NUMPY[self.dtype])


def read_header(path: str | Path) -> dict[str, Entry]:
    """Reads and checks the header of one file.

    Args:
      path: a safetensors file.

    Returns:
      Name -> dtype, shape and place of every tensor.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a safetensors file, cut short, or a header that does not fit its file.
    """
    path = Path(path)
    refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    # The header's length is compared with the file before that many bytes are read.
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise ValueError(
                f"{path}: not a whole safetensors file: it has {size} bytes; download it again"
            )
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path}: not a whole safetensors file: its header claims {length} bytes, the file "
                f"has {size}; download it again"
            )
        raw = file.read(length)
    entries = _parse(raw, path)
    _check_extents(entries, size - 8 - length, path)
    # Offsets count from the end of the header.
    return {
        name: Entry(e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }


def load_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every tensor of one file; bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
      FileNotFoundError, ValueError: as `read_header`.
    """
    return {name: _read(Path(path), entry) for name, entry in read_header(path).items()}


def _read(path: Path, entry: Entry, part: Part = ()) -> np.ndarray:
    return read_array(path, entry.start, entry.numpy, entry.shape, part=part)


def open_directory(directory: str | Path) -> Weights:
    """Opens the weights of a Hugging Face directory, single or sharded.

    Quantized weights are dequantized when they are read (`lora_jax.hf.checkpoint.bnb`, and
    `quantized` beside it for the methods that config.json may state).
    Indices may be there, as old checkpoints' position numbers are, but not be read.

    Args:
      directory: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Returns:
      The weights; each tensor is read when it is used.

    Raises:
      FileNotFoundError: no weights, or a shard is missing.
      ValueError: only pickle weights, or files that do not hold what they claim.
    """
    directory = Path(directory)
    files = _files(directory)
    entries = {name: entry for names in files.values() for name, entry in names.items()}
    owner = {name: file for file, names in files.items() for name in names}

    def read(name: str, part: Part = ()) -> np.ndarray:
        if entries[name].dtype in _INDICES:
            raise ValueError(_not_a_weight(owner[name], name, entries[name].dtype))
        tensor = _read(owner[name], entries[name], part)
        _check_finite(tensor, name, owner[name], part)
        return tensor

    def stored(name: str, dtype: DTypeLike, shape: tuple[int, ...], part: Part = ()) -> np.ndarray:
        return read_array(owner[name], entries[name].start, dtype, shape, part=part)

    weights = Weights(
        source=str(directory),
        shapes={name: entry.shape for name, entry in entries.items()},
        read=read,
        where=lambda name: owner[name].name,
    )
    if bnb.is_quantized(entries):
        dtypes = {name: entry.dtype for name, entry in entries.items()}
        return bnb.dequantized(weights, dtypes, stored)
    settings = settings_of(directory)
    if quantized.is_known(settings):
        dtypes = {name: entry.dtype for name, entry in entries.items()}
        return quantized.held(quantized.File(weights, dtypes, stored, settings))
    for name, entry in entries.items():
        if entry.dtype not in (*_FLOATS, *_INDICES):
            raise ValueError(_not_a_weight(owner[name], name, entry.dtype))
    return weights


def settings_of(directory: Path) -> Any:
    """The `quantization_config` of config.json, or None."""
    config = read_object(directory / "config.json", optional=True)
    inner = config.get("text_config")
    inside = inner.get("quantization_config") if isinstance(inner, dict) else None
    return config.get("quantization_config") or inside


def overwrite(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors into the files of a directory, which have them in the same shapes and dtypes.

    Raises:
      FileNotFoundError, ValueError: as `open_directory`, or a tensor that the files lack.
    """
    for path, entries in _files(directory).items():
        with path.open("r+b") as file:
            for name in entries.keys() & tensors.keys():
                entry, array = entries[name], np.ascontiguousarray(tensors[name])
                if (array.dtype, array.shape) != (entry.numpy, entry.shape):
                    raise ValueError(
                        f"{path}: tensor `{name}` is {entry.dtype} of shape {entry.shape}, and "
                        f"{array.dtype} of shape {array.shape} was to be written"
                    )
                file.seek(entry.start)
                file.write(array.reshape(-1).view(np.uint8).data)


def open_exact(
    directory: str | Path,
) -> tuple[dict[str, Entry], Callable[[str], np.ndarray]]:
    """Every tensor of a Hugging Face directory as its files have it, indices and codes too.

    Returns:
      Name -> dtype and shape, and a function that reads a tensor.

    Raises:
      FileNotFoundError, ValueError: as `open_directory`.
    """
    files = _files(Path(directory))
    owner = {name: file for file, names in files.items() for name in names}
    entries = {name: entry for names in files.values() for name, entry in names.items()}
    return entries, lambda name: _read(owner[name], entries[name])


def _check_finite(tensor: np.ndarray, name: str, path: Path, part: Part) -> None:
    """Refuses NaN and infinity: a model with one in a weight generates nothing."""
    if tensor.dtype.itemsize == 2 and tensor.dtype.kind in "fV":
        # All bits of the exponent set. numpy's own test of 16-bit floats takes ten times as long.
        exponent = np.uint16(0x7C00 if tensor.dtype == np.float16 else 0x7F80)
        bad = (tensor.view(np.uint16) & exponent) == exponent
    elif tensor.dtype.kind == "f":
        bad = ~np.isfinite(tensor)
    else:
        return
    if bad.any():
        starts = [s.start for s in part] or [0] * bad.ndim
        place = ", ".join(str(i + n) for i, n in zip(np.argwhere(bad)[0], starts, strict=True))
        raise ValueError(
            f"{path}: tensor `{name}` has {int(bad.sum())} values that are NaN or infinite, the "
            f"first at [{place}]: the file is damaged, or the model diverged; download it again"
        )


def _not_a_weight(path: Path, name: str, dtype: str) -> str:
    return (
        f"{path}: tensor `{name}` has dtype {dtype}; only {', '.join(_FLOATS)} weights can be "
        "read, not quantized ones"
    )


def refuse_pickle(path: str | Path) -> None:
    """Raises ValueError if the name is a pickle file's."""
    if Path(path).suffix in PICKLES:
        raise ValueError(
            f"{path}: a pickle file, refused: reading one runs whatever code is in it; convert it "
            "to safetensors (transformers: model.save_pretrained(..., safe_serialization=True))"
        )


def _files(directory: Path) -> dict[Path, dict[str, Entry]]:
    """Every weight file with its tensors."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if (single := directory / SINGLE).exists():
        return {single: read_header(single)}
    if (directory / INDEX).exists():
        return _shards(directory)
    # Refused by name, because "no weights" would not help: these have to be converted.
    for pickle in sorted(p for p in directory.iterdir() if p.suffix in PICKLES):
        refuse_pickle(pickle)
    raise FileNotFoundError(f"{directory}: no weights: neither {SINGLE} nor {INDEX} is there")


def _shards(directory: Path) -> dict[Path, dict[str, Entry]]:
    index = directory / INDEX
    table = read_json(index)
    placed = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index}: has no `weight_map` object that names tensors and files")
    files = {}
    for name, file in placed.items():
        # Names only are compared: in a hub cache the shards are links to files elsewhere.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{index}: tensor `{name}` lies outside the directory: {file!r}")
        if directory / file not in files:
            if not (directory / file).is_file():
                raise FileNotFoundError(f"{directory / file}: shard missing, named in {INDEX}")
            files[directory / file] = read_header(directory / file)
    _check_index(placed, files, index)
    return files


def _check_index(placed: Mapping[str, str], files: Mapping[Path, Mapping], index: Path) -> None:
    """The index and the shards name the same tensors, each once."""
    for path, entries in files.items():
        for name in entries:
            if name not in placed:
                raise ValueError(f"{path}: tensor `{name}` is not in {index.name}")
            if placed[name] != path.name:
                raise ValueError(
                    f"{path}: tensor `{name}` is a duplicate: {index.name} places it in "
                    f"{placed[name]}"
                )
    for name, file in placed.items():
        if name not in files[index.parent / file]:
            raise ValueError(f"{index}: tensor `{name}` is not in {file}, where it should be")


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = parse_json(raw)
    except ValueError as error:
        reason = str(error).lstrip(":1 ")
        raise ValueError(f"{path}: not a safetensors file: header is not JSON: {reason}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file: header is not a JSON object")
    more = header.pop("__metadata__", None)
    texts = more.values() if isinstance(more, dict) else ()
    if more is not None and not (isinstance(more, dict) and all(isinstance(t, str) for t in texts)):
        raise ValueError(f"{path}: the header's `__metadata__` must be texts by name, got {more!r}")
    return header


def _check_extents(entries: Mapping[str, Any], size: int, path: Path) -> None:
    """Each tensor's bytes are as many as its shape takes; together they are the file's, once."""
    spans = []
    for name, entry in entries.items():
        dtype, shape, (begin, end) = _fields(name, entry, path)
        if end - begin != (size_there := math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize):
            raise ValueError(
                f"{path}: the header lies: tensor `{name}` ({dtype} {shape}) takes "
                f"{size_there} bytes, its offsets span {end - begin}"
            )
        if end > size:
            raise ValueError(
                f"{path}: cut short: tensor `{name}` ends at byte {end} of the data, the file has "
                f"{size}; download it again"
            )
        spans.append((begin, end, name))
    # The format allows no holes: hidden bytes could be anything.
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: the header lies: a gap or an overlap before `{name}`")
        position = end
    if position != size:
        raise ValueError(f"{path}: {size - position} bytes after the last tensor; not a whole file")


def _fields(name: str, entry: Any, path: Path) -> tuple[str, list[int], tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: the header's entry for `{name}` is not a tensor's") from None
    if not isinstance(dtype, str) or dtype not in NUMPY:
        raise ValueError(f"{path}: tensor `{name}` has the unknown dtype {dtype!r}")
    # `type`, not `isinstance`: JSON's true is an `int` of Python.
    if any(type(n) is not int or n < 0 for n in numbers) or begin > end:
        raise ValueError(f"{path}: the header lies: tensor `{name}` has impossible sizes")
    return dtype, shape, (begin, end)
