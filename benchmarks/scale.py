"""What bounds a training step on many chips: compute, memory or the network?

    .venv-aot/bin/python benchmarks/scale.py [--chip H200] [--only 8B]    (what `make aot` installs)

The step of `train.fit` is compiled ahead of time for a mesh of devices that are not there. Read off
the compiled program: bytes of arguments and temporaries on a device, beside the estimate of
`lora-jax estimate --mesh`, and what a device sends in a step, by kind of collective, the layers'
loops counted as often as they run. From these and the chip's published figures follow the least
times of a step on each resource; the longest is the step's bound. Kernels reach a part of the
published peaks, so that a real step takes longer than any of them. Rows that were not asked for
stay as they were in `results/scale.json`. A row takes half a minute for a GPU, two for a TPU.
"""

import argparse
import dataclasses
import json
import math
import os
from typing import NamedTuple

import aot_targets as targets  # sets the environment: before jax is used
import jax
from collectives import KINDS, collectives
from common import RESULTS, report
from jax.extend import core

from lora_jax import LoraConfig
from lora_jax.analysis.step_memory import compiled
from lora_jax.analysis.step_memory import step as memory_step
from lora_jax.analysis.step_memory.estimate import estimate
from lora_jax.analysis.step_memory.shapes import config_of
from lora_jax.analysis.step_memory.step import StepSettings
from lora_jax.models.kernels import AttentionName
from lora_jax.quant.array import Backend
from lora_jax.quant.formats import FormatName
from lora_jax.train.memory import tree_bytes

# Kernels state how they are partitioned where the process has several devices.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

GIB = 2**30
LENGTH = 2048  # tokens of a row
LONG = 32768  # of a row that a mesh with the axis `context` spreads


class Chip(NamedTuple):
    """A kind of device and how many there are.

    Attributes:
      platform: as `aot_targets.devices` names it.
      topology: libtpu's name of the slice.
      count: devices.
      backend: the kernels of quantized products.
      attention: its implementation. Kernels hide their products, which are counted here; XLA's in
        parts takes the most memory (`memory.py` has the others).
      flops: dense products in bfloat16, per second.
      memory: bytes per second.
      network: bytes per second that a chip sends to the others.
    """

    platform: str
    topology: str | None
    count: int
    backend: Backend
    attention: AttentionName
    flops: float
    memory: float
    network: float


# Published figures. NVIDIA, "H200 Tensor Core GPU" data sheet, NVLink in one direction. Google
# Cloud, "TPU v5e" and "TPU v5p": the interconnect is that of all links of a chip together.
CHIPS = {
    "H200": Chip("cuda", None, 8, "gpu", "xla", 989e12, 4.8e12, 450e9),
    "v5e": Chip("tpu", "v5e:4x4", 16, "tpu", "xla", 197e12, 819e9, 200e9),
    "v5p": Chip("tpu", "v5p:2x2x4", 16, "tpu", "xla", 459e12, 2765e9, 600e9),
}
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}
ROWS: list[tuple[str, str, FormatName | None, dict[str, int]]] = [
    ("H200", "8B", None, {"data": 8}),
    ("H200", "8B", None, {"fsdp": 8}),
    ("H200", "8B", None, {"fsdp": 4, "tensor": 2}),
    ("H200", "8B", "nf4", {"fsdp": 8}),
    ("H200", "70B", None, {"fsdp": 8}),
    ("H200", "70B", None, {"fsdp": 4, "tensor": 2}),
    ("H200", "70B", "nf4", {"data": 8}),
    ("H200", "70B", "nf4", {"fsdp": 8}),
    ("H200", "405B", None, {"fsdp": 8}),
    ("H200", "405B", "nf4", {"fsdp": 8}),
    ("H200", "8B", None, {"context": 8}),
    ("H200", "8B", None, {"fsdp": 2, "context": 4}),
    ("H200", "70B", "nf4", {"fsdp": 2, "context": 4}),
    ("v5e", "8B", None, {"fsdp": 16}),
    ("v5e", "8B", "nf4", {"fsdp": 16}),
    ("v5e", "70B", "nf4", {"fsdp": 16}),
    ("v5p", "70B", None, {"fsdp": 16}),
    ("v5p", "70B", None, {"fsdp": 8, "tensor": 2}),
    ("v5p", "405B", "nf4", {"fsdp": 16}),
]
KEY = ("chip", "model", "base", "mesh")  # what names a row


def flops(jaxpr: core.Jaxpr) -> float:
    """Floating-point operations of a program's matrix products, recomputation included."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            # Only the abstract values of arrays have shapes.
            shape, out = (getattr(v.aval, "shape") for v in (eqn.invars[0], eqn.outvars[0]))  # noqa: B009
            total += 2 * math.prod(out) * math.prod(shape[d] for d in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                total += times * flops(getattr(part, "jaxpr", part))
    return total


def _is_jaxpr(x) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def sent(text: str) -> dict[str, float]:
    """Bytes that a device sends in a run of a compiled program, by kind of collective."""
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for one in collectives(text):
        total[one.kind] += one.times * one.sent
    return total


def row(name: str, size: str, form: FormatName | None, mesh: dict[str, int]) -> dict:
    """A compiled step, and what bounds it."""
    chip, (_, config) = CHIPS[name], config_of(MODELS[size])
    settings = StepSettings(
        adapter=LoraConfig(rank=16), quantize=form, batch=mesh.get("data", 1) * mesh.get("fsdp", 1),
        length=LONG if "context" in mesh else LENGTH, mesh=mesh, backend=chip.backend,
        attention=chip.attention,
    )  # fmt: skip
    devices = targets.devices(chip.platform, chip.count, topology=chip.topology)
    at = compiled.placement(settings, devices)
    step = memory_step.abstract_step(config, settings, at=at)
    places = memory_step.spread(step, settings)
    program = compiled.compiled(step, places, at, platform=chip.platform)
    found = estimate(size, config, settings)
    beside = compiled.temporaries(program)
    wire = sent(program.as_text())
    # Kernels of quantized products hide their products: those of the reference are counted.
    plain = dataclasses.replace(settings, backend="reference")
    step = memory_step.abstract_step(config, plain)
    work = flops(jax.make_jaxpr(step.fn)(step.state, step.frozen, step.batch).jaxpr) / chip.count
    # A device reads the weights that it computes with for the forward pass, for its repetition and
    # for the backward pass.
    read = 3 * tree_bytes(step.base) / mesh.get("tensor", 1)
    times = {
        "compute_ms": 1e3 * work / chip.flops,
        "memory_ms": 1e3 * read / chip.memory,
        "network_ms": 1e3 * sum(wire.values()) / chip.network,
    }
    return {
        "chip": f"{chip.count} {name}",
        "model": size,
        "base": f"QLoRA, {form}" if form else "LoRA, bfloat16",
        "mesh": " x ".join(f"{axis} {n}" for axis, n in mesh.items()),
        "rows": settings.batch,
        "length": settings.length,
        "arguments_gib": found.arguments / GIB,
        "temporaries_gib": beside / GIB,
        "total_gib": (found.arguments + beside) / GIB,
        "estimate_over_compiled": found.total / (found.arguments + beside),
        **{f"{kind}_gib": wire[kind] / GIB for kind in KINDS},
        "tflop": work / 1e12,
        **times,
        "bound": max(times, key=lambda part: times[part]).removesuffix("_ms"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", choices=CHIPS, help="rows of this chip alone")
    parser.add_argument("--only", choices=MODELS, help="rows of this model alone")
    asked = parser.parse_args()
    path = RESULTS / "scale.json"
    old = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rows = {tuple(r[k] for k in KEY): r for r in old.get("rows", ())}
    for chip, size, form, mesh in ROWS:
        if asked.chip in (None, chip) and asked.only in (None, size):
            new = row(chip, size, form, mesh)
            print(new, flush=True)
            rows[tuple(new[k] for k in KEY)] = new
    # `scale_losses.py` writes the losses.
    others = {"losses": old["losses"]} if "losses" in old else {}
    report("scale", "Training steps on many chips", list(rows.values()), **others)


if __name__ == "__main__":
    main()
