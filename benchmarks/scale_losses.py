"""Do meshes and processes train as one device does? The measured part of `results/scale.json`.

    PYTHONPATH=. python benchmarks/scale_losses.py          (five minutes on two cores)

Ten steps of the tests' small Llama (`tests/support/mesh_runs.py`) in float32: on one device, on
eight virtual devices of this process, and in two and four processes of this machine. A row has the
largest relative difference of a loss from that of one device. The tests hold more kinds of models
to the same (`tests/train/test_mesh.py`, `test_processes.py`).
"""

import json
import os
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import numpy as np  # noqa: E402
from common import RESULTS, machine, table  # noqa: E402

from lora_jax import models  # noqa: E402

from tests.support.mesh_runs import KINDS, make, one_device, run  # noqa: E402
from tests.support.several import losses_of, start  # noqa: E402

MESHES: list[dict[str, int]] = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"tensor": 8},
]
# Of the tests' kinds: LoRA over a float32 and an NF4 base, and several texts a row.
CASES = ("lora", "nf4", "packed")
# Processes, devices of each, mesh, kind.
PROCESSES: list[tuple[int, int, dict[str, int], str]] = [
    (2, 2, {"fsdp": 4}, "lora"),
    (2, 4, {"data": 2, "fsdp": 4}, "nf4"),
    (4, 2, {"fsdp": 4, "tensor": 2}, "lora"),
    (4, 1, {"data": 4}, "dora"),
]


def row(kind: str, mesh: dict[str, int], losses: np.ndarray, processes: int) -> dict:
    want = one_device(kind)[0]
    return {
        "kind": kind,
        "mesh": " x ".join(f"{axis} {n}" for axis, n in mesh.items()),
        "processes": processes,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "largest_difference": float(np.max(np.abs(losses - want) / np.abs(want))),
    }


def rows():
    for kind in CASES:
        options, settings, training = KINDS[kind]
        for mesh in MESHES:
            losses, _ = run(make(**options), settings, training, models.make_mesh(**mesh))
            yield row(kind, mesh, losses, 1)
    for count, devices, mesh, kind in PROCESSES:
        losses = losses_of(start(count, devices, {"mesh": mesh, "kind": kind}))
        yield row(kind, mesh, losses, count)


def main():
    # Some of the tests' matrices are too small to be cut on every mesh.
    warnings.filterwarnings("ignore", message="every device holds all of")
    found = []
    for one in rows():
        print(one, flush=True)
        found.append(one)
    path = RESULTS / "scale.json"
    content = json.loads(path.read_text("utf-8"))
    content["losses"] = {
        "question": "Losses of ten steps on meshes and in processes beside one device's",
        "machine": machine(),
        "rows": found,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
