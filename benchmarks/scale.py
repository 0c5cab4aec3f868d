"""What bounds a training step on 8 H200s: compute, memory or the network?

    .venv-aot/bin/python benchmarks/scale.py [--only 8B]      (what `make aot` installs; no device)

The step of `train.fit` is compiled ahead of time for a mesh of devices that are not there. Read off
the compiled program: bytes of arguments and temporaries on a device, beside the estimate of
`lora-jax estimate --mesh`, and what a device sends in a step, by kind of collective, the layers'
loops counted as often as they run. From these and the chip's published figures follow the least
times of a step on each resource; the longest is the step's bound. Kernels reach a part of the
published peaks, so that a real step takes longer than any of them.
"""

import argparse
import dataclasses
import math
import re

import aot_targets as targets  # sets the environment: before jax is used
import jax
from common import report
from jax.extend import core

from lora_jax import LoraConfig
from lora_jax.analysis.step_memory import compiled
from lora_jax.analysis.step_memory import step as memory_step
from lora_jax.analysis.step_memory.estimate import estimate
from lora_jax.analysis.step_memory.shapes import config_of
from lora_jax.analysis.step_memory.step import StepSettings
from lora_jax.quant.formats import FormatName
from lora_jax.train.memory import tree_bytes

GIB = 2**30
LENGTH = 2048
COUNT = 8
# Published figures of an H200, per second: dense products in bfloat16, memory, and NVLink in one
# direction. Source: NVIDIA, "H200 Tensor Core GPU" data sheet.
FLOPS, MEMORY, NETWORK = 989e12, 4.8e12, 450e9
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}
ROWS: list[tuple[str, FormatName | None, dict[str, int]]] = [
    ("8B", None, {"data": 8}),
    ("8B", None, {"fsdp": 8}),
    ("8B", None, {"fsdp": 4, "tensor": 2}),
    ("8B", "nf4", {"fsdp": 8}),
    ("70B", None, {"fsdp": 8}),
    ("70B", None, {"fsdp": 4, "tensor": 2}),
    ("70B", "nf4", {"data": 8}),
    ("70B", "nf4", {"fsdp": 8}),
    ("405B", None, {"fsdp": 8}),
    ("405B", "nf4", {"fsdp": 8}),
]

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def sent(text: str) -> dict[str, float]:
    """Bytes that a device sends in a run of a compiled program, by kind of collective.

    With rings over n devices: (n-1)/n of what is gathered, scattered or exchanged, twice that of
    what is reduced, and all that is permuted.
    """
    bodies, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = "ENTRY" if line.startswith("ENTRY") else head[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def count(name: str) -> dict[str, float]:
        total = {kind: 0.0 for kind in KINDS.split("|")}
        for line in bodies[name]:
            if found := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
                total[found[2]] += _bytes(found[1], found[2], bool(found[3]), line)
            trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", line):
                times = int(trips[1]) if trips else 1
                for kind, size in count(callee).items():
                    total[kind] += times * size
        return total

    return count("ENTRY")


def _bytes(result: str, kind: str, started: bool, line: str) -> float:
    size = sum(
        math.prod(int(n) for n in dims.split(",") if n) * BYTES[dtype]
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
        if dtype in BYTES
    )
    n = _group(line)
    if kind == "collective-permute":
        return size / 2 if started else size
    if kind == "reduce-scatter":
        size *= n  # the result is a part
    if kind == "all-gather" and started:
        size *= n / (n + 1)  # the operand stands beside the result
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def _group(line: str) -> int:
    """The number of devices that a collective runs over."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(found[1].split(",")) if found else 1


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


def row(size: str, form: FormatName | None, mesh: dict[str, int]) -> dict:
    """A compiled step, and what bounds it."""
    _, config = config_of(MODELS[size])
    settings = StepSettings(
        adapter=LoraConfig(rank=16), quantize=form, batch=mesh.get("data", 1) * mesh.get("fsdp", 1),
        length=LENGTH, mesh=mesh,
    )  # fmt: skip
    devices = targets.devices("cuda", COUNT)
    at = compiled.placement(settings, devices)
    step = memory_step.abstract_step(config, settings, batch=settings.batch, at=at)
    places = memory_step.spread(step, settings)
    program = compiled.compiled(step, places, at, platform="cuda")
    found = estimate(size, config, settings)
    beside = compiled.temporaries(program)
    wire = sent(program.as_text())
    # Kernels of quantized products hide their products: those of the reference are counted.
    plain = dataclasses.replace(settings, backend="reference")
    step = memory_step.abstract_step(config, plain, batch=settings.batch)
    work = flops(jax.make_jaxpr(step.fn)(step.state, step.frozen, step.batch).jaxpr) / COUNT
    # A device reads the weights that it computes with for the forward pass, for its repetition and
    # for the backward pass.
    read = 3 * tree_bytes(step.base) / mesh.get("tensor", 1)
    times = {
        "compute_ms": 1e3 * work / FLOPS,
        "memory_ms": 1e3 * read / MEMORY,
        "network_ms": 1e3 * sum(wire.values()) / NETWORK,
    }
    return {
        "model": size,
        "base": f"QLoRA, {form}" if form else "LoRA, bfloat16",
        "mesh": " x ".join(f"{axis} {n}" for axis, n in mesh.items()),
        "rows": settings.batch,
        "arguments_gib": found.arguments / GIB,
        "temporaries_gib": beside / GIB,
        "total_gib": (found.arguments + beside) / GIB,
        "estimate_over_compiled": found.total / (found.arguments + beside),
        **{f"{kind}_gib": wire[kind] / GIB for kind in KINDS.split("|")},
        "tflop": work / 1e12,
        **times,
        "bound": max(times, key=lambda part: times[part]).removesuffix("_ms"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=MODELS, help="this model alone; nothing is written")
    only = parser.parse_args().only
    rows = []
    for asked in ROWS:
        if only in (None, asked[0]):
            rows.append(row(*asked))
            print(rows[-1], flush=True)
    if only is None:
        report(
            "scale", f"Training steps of {LENGTH} tokens a row, compiled for {COUNT} H200s", rows
        )


if __name__ == "__main__":
    main()
