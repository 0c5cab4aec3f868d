"""What torch, transformers and peft answered, recorded under tests/golden/oracles.

    want = oracle("models/llama/plain.logits", lambda: theirs(model(), tokens))

gives the recorded answer without importing torch. LORA_JAX_ORACLES=live asks again and compares
(`make test-all`), and so does a version of torch, transformers or peft that is not the recorded
one; LORA_JAX_ORACLES=record writes the answers anew (`make oracles`).
"""

import functools
import importlib.metadata
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.support.places import GOLDEN

FOLDER = GOLDEN / "oracles"
MODE = os.environ.get("LORA_JAX_ORACLES", "recorded")
PACKAGES = ("torch", "transformers", "peft")
# Another processor may sum float32 in another order.
TOLERANCE = 1e-4
MOST_BYTES = 200_000


def oracle(name: str, compute: Callable[[], Any]) -> Any:
    """The answer of torch's side.

    Args:
      name: `room/file/case.question`, unique among all tests.
      compute: asks torch; lists and dicts of arrays and of what JSON has. Imports torch itself.
    """
    path = FOLDER / (re.sub(r"[^\w./-]+", "_", name) + ".safetensors")
    if MODE == "record":
        write(path, compute())
        return read(path)[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not recorded: run `make oracles`")
    want, versions = read(path)
    if MODE == "live" or (installed() and installed() != versions):
        assert_same(compute(), want, name)
    return want


@functools.cache
def installed() -> dict[str, str]:
    """Versions of torch, transformers and peft; empty where one of them is missing."""
    try:
        found = {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {name: version.partition("+")[0] for name, version in found.items()}


def write(path: Path, value) -> None:
    """Writes an answer and the versions that gave it."""
    arrays: dict[str, np.ndarray] = {}

    def pack(x):
        if isinstance(x, np.ndarray):
            arrays[str(len(arrays))] = np.ascontiguousarray(x)
            return {"array": str(len(arrays) - 1)}
        if isinstance(x, dict):
            return {"dict": [[k, pack(v)] for k, v in x.items()]}
        if isinstance(x, list | tuple):
            return {"list": [pack(v) for v in x]}
        return {"value": x}

    packed = json.dumps(pack(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two files of tests, on two workers, may record the same answer.
    fresh = path.with_suffix(f".{os.getpid()}")
    save_file(arrays, fresh, {"answer": packed, "versions": json.dumps(installed())})
    assert fresh.stat().st_size <= MOST_BYTES, f"{path}: too large to keep; record less of it"
    # safetensors orders the metadata at random: a file whose contents are the same is kept.
    if path.is_file() and contents(path) == contents(fresh):
        fresh.unlink()
    else:
        fresh.replace(path)


def contents(path: Path) -> tuple[dict[str, str], dict[str, tuple]]:
    """The metadata and, by name, the type, shape and bytes of each array of a file."""
    metadata, arrays = load(path)
    return metadata, {key: (x.dtype, x.shape, x.tobytes()) for key, x in arrays.items()}


def load(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a file."""
    with safe_open(str(path), "numpy") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read(path: Path) -> tuple[Any, dict[str, str]]:
    """An answer and the versions that gave it."""
    metadata, arrays = load(path)

    def unpack(x):
        ((kind, inner),) = x.items()
        if kind == "array":
            return arrays[inner]
        if kind == "dict":
            return {k: unpack(v) for k, v in inner}
        return [unpack(v) for v in inner] if kind == "list" else inner

    return unpack(json.loads(metadata["answer"])), json.loads(metadata["versions"])


def assert_same(got, want, name: str) -> None:
    """Arrays are near, relative to their largest value; all else is equal."""
    if isinstance(want, dict):
        assert list(got) == list(want), name
        # A saved config names the release that wrote it.
        for key in want.keys() - {"transformers_version"}:
            assert_same(got[key], want[key], f"{name}: {key}")
    elif isinstance(want, list):
        assert len(got) == len(want), name
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            assert_same(x, y, f"{name}[{i}]")
    elif isinstance(want, np.ndarray):
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        size = float(np.abs(want).max(initial=0)) if want.dtype.kind in "fiu" else 1.0
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * size, err_msg=name)
    else:
        assert got == want, (name, got, want)


def seeded(name: str, shape, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Normal float32 numbers that depend on a tensor's name alone: they need no recording."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (mean + scale * rng.standard_normal(shape)).astype(np.float32)
