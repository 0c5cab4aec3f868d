"""One process that loads a model onto a mesh: `python loader.py '{"id": 0, "count": 2, ...}'`.

The last line that it prints is JSON: bytes that it read of the files, bytes of its shards, the
most memory it had while loading above what it had before, and a checksum of each shard.
"""

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from lora_jax import checkpoint, hf, models, processes, quant
from lora_jax.hf.checkpoint import safetensors, weights
from lora_jax.hf.gguf import file as gguf_file
from lora_jax.models.sharding import RULES
from lora_jax.paths import spell

from tests.support.mesh_runs import OWN


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is what there is, VmHWM the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def bytes_read() -> int:
    """Bytes that this process has read so far, of whatever files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def counted(read: list[int]) -> None:
    """Counts the bytes of every part that is read."""
    original = weights.read_array

    def count(*args: Any, **options: Any) -> np.ndarray:
        part = original(*args, **options)
        read.append(part.nbytes)
        return part

    safetensors.read_array = gguf_file.read_array = count  # pyright: ignore


def shards_of(params: Any) -> dict[str, str]:
    """A checksum of every shard of this process, by the leaf's path and the shard's place."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        for shard in x.addressable_shards:
            ends = [s.indices(n)[:2] for s, n in zip(shard.index, x.shape, strict=True)]
            data = np.asarray(shard.data).tobytes()
            found[f"{spell(path)} {ends}"] = hashlib.sha256(data).hexdigest()[:16]
    return found


def load(job: dict[str, Any]) -> dict[str, Any]:
    mesh = models.make_mesh(**job["mesh"])
    held = job["quantize"]
    held = quant.QuantConfig(**held) if isinstance(held, dict) else held
    read: list[int] = []
    counted(read)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    before = memory("VmRSS")
    params = models.load(job["source"], dtype="bfloat16", mesh=mesh, quantize=held).params
    jax.block_until_ready(params)
    peak = memory("VmHWM") - before
    shards = [s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards]
    found = {
        "read": sum(read), "largest": max(read), "held": sum(shards), "peak": peak,
        "shards": shards_of(params),
    }  # fmt: skip
    shapes = jax.eval_shape(lambda: params)
    if "own" in job:
        read.clear()
        mapped = hf.from_hugging_face(shapes, job["own"], OWN, mesh=mesh, rules=RULES)
        assert shards_of(mapped) == found["shards"]
        found["mapped"] = sum(read)
    if "params" in job:
        checkpoint.save_params(job["params"], params)
        before = bytes_read()
        again = checkpoint.restore_params(job["params"], shapes, mesh=mesh)
        jax.block_until_ready(again)
        found["restored"] = bytes_read() - before
        assert shards_of(again) == found["shards"]
    return found


if __name__ == "__main__":
    job: dict[str, Any] = json.loads(sys.argv[1])
    try:
        if job["count"] > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            processes.HEARTBEAT = 10
            processes.join(f"127.0.0.1:{job['port']}", job["count"], job["id"])
        print(json.dumps(load(job)), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", flush=True)
        processes.leave(1)
        os._exit(1)
