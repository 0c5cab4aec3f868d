"""Checksums of the arrays of a folder and of the JSON beside them.

Orbax has none for arrays: a byte that a disk or a copy has changed would be read as another number.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import processes
from lora_jax.checkpoint.flat import describe

CHECKSUMS = "checksums"


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or holds other bytes than were written."""


def with_checksums(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a folder with checksums of itself and of the arrays beside it.

    Args:
      meta: JSON values.
      arrays: the arrays by name.
    """
    sums = _sums(arrays)
    return {**meta, CHECKSUMS: {"meta": _digest_of_json([meta, sums]), "arrays": sums}}


def _sums(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: _sum(x) for name, x in sorted(arrays.items())}


def split_checksums(meta: Any, directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The JSON without its checksums, and those of the arrays: `float32[576,8] 9f86d081...`.

    Raises:
      DamagedError: the JSON has changed since it was written.
    """
    try:
        plain = {name: value for name, value in meta.items() if name != CHECKSUMS}
        arrays = dict(meta[CHECKSUMS]["arrays"])
        intact = meta[CHECKSUMS]["meta"] == _digest_of_json([plain, arrays])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedError(
            f"{directory}: its `meta` has no checksums: it is damaged, or written by a version "
            "without them"
        ) from None
    if not intact:
        raise DamagedError(f"{directory}: its `meta` has changed since it was written")
    return plain, arrays


def check_arrays(arrays: Mapping[str, Any], sums: Mapping[str, str], directory: Path) -> None:
    """Compares arrays with their checksums.

    Raises:
      DamagedError: an array is missing or has changed since it was written.
    """
    # In one order, as processes take turns with arrays that several of them hold.
    for name, expected in sorted(sums.items()):
        if name not in arrays:
            raise DamagedError(f"{directory}: array `{name}` is missing")
        if _sum(arrays[name]) != expected:
            raise DamagedError(f"{directory}: array `{name}` has changed since it was written")


_HASHED = 1 << 23  # bytes of a spread array that are put together on the host at a time


def _sum(array: Any) -> str:
    # Of the bytes in C order: the same for every sharding and device.
    digest = hashlib.sha256()
    for rows in _rows(array):
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return f"{describe(array)} {digest.hexdigest()[:16]}"


def _rows(array: Any) -> Iterator[np.ndarray]:
    """An array on the host: some rows after the others if devices of this process share it."""
    spread = isinstance(array, jax.Array) and array.is_fully_addressable and array.ndim > 0
    if not spread or array.is_fully_replicated:
        yield np.asarray(jax.device_get(processes.whole(_alias(array))))
        return
    # On a CPU these are views.
    shards = [
        (s.index, np.asarray(s.data)) for s in _alias(array).addressable_shards if s.replica_id == 0
    ]
    step = max(_HASHED * array.shape[0] // max(array.nbytes, 1), 1)
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        out = np.empty((stop - start, *array.shape[1:]), array.dtype)
        for index, data in shards:
            first, end, _ = index[0].indices(array.shape[0])
            low, high = max(start, first), min(stop, end)
            if low < high:
                out[(slice(low - start, high - start), *index[1:])] = data[
                    low - first : high - first
                ]
        yield out


def _alias(x: Any) -> Any:
    """Another array of the same buffers: the copy on the host that JAX keeps with it goes away."""
    if not isinstance(x, jax.Array):
        return x
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def _digest_of_json(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
