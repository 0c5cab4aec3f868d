"""Is `lora_jax.analysis.memory` right? Its figures beside the compiler's, on one device and many.

    python benchmarks/estimate.py                     (a minute; nothing is compiled)
    python benchmarks/estimate.py --mesh cpu          (8 virtual devices, 5 minutes)
    .venv-aot/bin/python benchmarks/estimate.py --mesh cuda      (8 H200s; what `make aot` installs)

The steps on one device are those of `memory.py`, whose results (`results/memory.json`) are XLA's
own analysis of programs compiled for an H200; here the same steps are read, not compiled. Those on
a mesh are compiled here, ahead of time, for devices that need not be there. What was not asked for
stays as it was in `results/estimate.json`. Fails where the whole is out of
`BOUNDS`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import aot_targets as targets  # sets the environment: before jax is used
import jax
import llama_step
from common import report

from lora_jax import LoraConfig
from lora_jax.analysis.step_memory import compiled
from lora_jax.analysis.step_memory import step as memory_step
from lora_jax.analysis.step_memory.estimate import estimate
from lora_jax.analysis.step_memory.liveness import alive
from lora_jax.analysis.step_memory.program import HABITS
from lora_jax.analysis.step_memory.shapes import SHAPES, config_of
from lora_jax.train.memory import tree_bytes

GIB = 2**30
# The least and the most of the compiler's figure. For a CPU, XLA gathers all weights of a layer
# before the first is used, which the estimate, made for GPUs and TPUs, does not count.
BOUNDS = {"H200": (0.9, 1.1), "CPU": (0.7, 1.1)}
RESULT = Path(__file__).parent / "results" / "estimate.json"
_FORMS = {"LoRA, bfloat16": None, "QLoRA, nf4": "nf4"}
# A Llama whose weights and activations are of the sizes that decide: 0.5 billion parameters.
SHAPE = {
    **SHAPES["llama-2-7b"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
_LORA = {"adapter": LoraConfig(rank=16)}
METHODS = {"full": {"adapter": None}, "LoRA": _LORA, "QLoRA": {**_LORA, "quantize": "nf4"}}
# XLA's figure for a CPU is of float32, as it would hold float32 copies of bfloat16.
KINDS = {
    "cpu": dict(dtype="float32", backend="reference", batch=8, length=512),
    # cuDNN's attention cannot be compiled without its libraries.
    "cuda": dict(dtype="bfloat16", backend="gpu", batch=8, length=1024, attention="xla"),
}
MESHES = {
    "cpu": [
        ("LoRA", {"data": 8}), ("LoRA", {"fsdp": 8}), ("LoRA", {"fsdp": 2, "tensor": 4}),
        ("full", {"data": 8}), ("full", {"fsdp": 8}), ("full", {"tensor": 4}),
        ("full", {"fsdp": 2, "tensor": 4}), ("QLoRA", {"fsdp": 8}),
    ],
    "cuda": [
        ("LoRA", {"fsdp": 8}), ("full", {"fsdp": 8}), ("LoRA", {"fsdp": 2, "tensor": 4}),
        ("full", {"fsdp": 2, "tensor": 4}),
    ],
}  # fmt: skip


def mesh_row(kind: str, method: str, mesh: dict) -> dict:
    """An estimate on a mesh beside what the compiler says of the step."""
    settings = memory_step.StepSettings(mesh=mesh, **KINDS[kind], **METHODS[method])
    _, config = config_of(SHAPE)
    found = estimate("0.5B", config, settings)
    devices = jax.devices() if kind == "cpu" else targets.devices(kind, 8)
    at = compiled.placement(settings, devices)
    step = memory_step.abstract_step(config, settings, at=at)
    places = memory_step.spread(step, settings)
    program = compiled.compiled(step, places, at, platform=kind)
    said = compiled.temporaries(program)
    total = found.arguments + said
    return {
        "model": found.model,
        "base": f"{method}, {settings.dtype}",
        "device": {"cpu": "CPU", "cuda": "H200"}[kind],
        "mesh": " x ".join(f"{axis} {n}" for axis, n in mesh.items()),
        "arguments_gib": found.arguments / GIB,
        "temporaries_gib": found.temporaries / GIB,
        "total_gib": found.total / GIB,
        "compiled_temporaries_gib": said / GIB,
        "compiled_total_gib": total / GIB,
        "temporaries_over_compiled": found.temporaries / said,
        "total_over_compiled": found.total / total,
    }


def row(said: dict) -> dict:
    """An estimate beside what the compiler said of the same step."""
    length, form = said["tokens"], _FORMS[said["base"]]
    forward = llama_step.forward_of(said["model"], length=length)
    shapes = llama_step.lora_shapes(forward, form, rank=16, batch=1, length=length,
                                    backend="gpu")  # fmt: skip
    step = llama_step.lora_step(forward)
    found = alive(step, *shapes, donate=(0, 1), habits=HABITS["gpu"])
    arguments = sum(tree_bytes(x) for x in jax.tree.leaves(shapes))
    total = (arguments + found.bytes) / GIB
    return {
        "model": said["model"],
        "base": said["base"],
        "device": "H200",
        "mesh": "",
        "arguments_gib": arguments / GIB,
        "temporaries_gib": found.bytes / GIB,
        "total_gib": total,
        "compiled_temporaries_gib": said["temporaries_gib"],
        "compiled_total_gib": said["total_gib"],
        "temporaries_over_compiled": found.bytes / GIB / said["temporaries_gib"],
        "total_over_compiled": total / said["total_gib"],
    }


def one_device_rows():
    source = RESULT.parent / "memory.json"
    for said in json.loads(source.read_text("utf-8"))["rows"]:
        if said["base"] in _FORMS:
            yield row(said)


def same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("model", "base", "device", "mesh"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", choices=MESHES, help="rows of meshes of these devices")
    kind = parser.parse_args().mesh
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    found = []
    for one in one_device_rows() if kind is None else (mesh_row(kind, *x) for x in MESHES[kind]):
        print(one, flush=True)
        found.append(one)
    rows = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.exists() else []
    rows = [old for old in rows if "mesh" in old and not any(same(old, new) for new in found)]
    rows += found
    wrong = [
        f"{r['base']}, {r['device']} {r['mesh']}: {r['total_over_compiled']:.3f} of the compiler's"
        for r in rows
        if not BOUNDS[r["device"]][0] < r["total_over_compiled"] < BOUNDS[r["device"]][1]
    ]
    report("estimate", "Estimated memory of a step beside XLA's", rows, failures=wrong)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
