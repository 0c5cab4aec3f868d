"""How much memory does a training step take: full fine-tuning, LoRA, QLoRA, by model size?

    python benchmarks/memory.py [--tiny]          (`make aot` installs what it needs)
    python benchmarks/memory.py --long cuda       (and tpu; lengths of rows from 2k to 32k)

LoRA and QLoRA steps (rank 16 on every linear layer, AdamW, batch 1, rematerialized blocks) are
compiled for an H200 ahead of time; arguments and temporaries are what the compiler says. Full
fine-tuning is counted: bfloat16 weights and gradients, AdamW's moments and master weights in
float32, 16 bytes a parameter, before any activation.

`--long` compiles the step of `train.fit` with the attention that `auto` takes on the device, for an
H200 and for four TPU v5e (`fsdp`, a row on each). Temporaries must grow with the length of a row;
what was not asked for stays as it was in `results/memory.json`.
"""

import argparse
import json
import math
import re
import sys

import aot_targets as targets  # sets the environment: before jax
import jax
import llama_step
from common import RESULTS, report

from lora_jax import LoraConfig
from lora_jax.analysis.step_memory import compiled
from lora_jax.analysis.step_memory import step as memory_step
from lora_jax.analysis.step_memory.estimate import estimate
from lora_jax.analysis.step_memory.shapes import config_of

GIB = 2**30
BOUNDS = {("70B", "nf4"): 46.0, ("7B", "nf4"): 6.0}
FULL_BYTES = 16  # weight 2, gradient 2, two moments 4 each, master weight 4


def parameters(forward) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(forward.shapes()))


def row(size: str, form: str | None, *, rank: int, length: int) -> dict:
    """One compiled step."""
    forward = llama_step.forward_of(size, length=length)
    shapes = llama_step.lora_shapes(forward, form, rank=rank, batch=1, length=length,
                                    backend="gpu")  # fmt: skip
    done = targets.compiled(llama_step.lora_step(forward), *shapes, donate=(0, 1))
    memory = done.memory_analysis()
    arguments = memory.argument_size_in_bytes
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    base = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes[2]))
    return {
        "model": size,
        "parameters": parameters(forward),
        "base": "LoRA, bfloat16" if form is None else f"QLoRA, {form}",
        "tokens": length,
        "base_gib": base / GIB,
        "arguments_gib": arguments / GIB,
        "temporaries_gib": extra / GIB,
        "total_gib": (arguments + extra) / GIB,
    }


def full_row(size: str, *, length: int) -> dict:
    forward = llama_step.forward_of(size, length=length)
    count = parameters(forward)
    return {
        "model": size, "parameters": count, "base": "full, AdamW (counted)", "tokens": length,
        "base_gib": 2 * count / GIB, "arguments_gib": FULL_BYTES * count / GIB,
        "temporaries_gib": 0.0, "total_gib": FULL_BYTES * count / GIB,
    }  # fmt: skip


LENGTHS = (2048, 8192, 32768)
_8B = {"model": "llama-3.1-8b"}
LONG = {
    "cuda": [
        *({**_8B, "length": n, "packing": packing} for packing in (False, True) for n in LENGTHS),
        {"model": "llama-3.1-70b", "quantize": "nf4", "length": 8192, "packing": True},
        {"model": "llama-3.1-70b", "quantize": "nf4", "length": 8192},
    ],
    "tpu": [
        {**_8B, "length": n, "packing": True, "batch": 4, "mesh": {"fsdp": 4}} for n in LENGTHS
    ],
}  # fmt: skip


def long_row(kind: str, model: str, **options) -> dict:
    """The step of `train.fit`, compiled for a device with the attention that it takes there."""
    settings = memory_step.StepSettings(
        adapter=LoraConfig(rank=16, target_modules="all-linear"),
        backend={"cuda": "gpu", "tpu": "tpu"}[kind], **options,
    )  # fmt: skip
    _, config = config_of(model)
    at = compiled.placement(settings, targets.devices(kind, math.prod(settings.mesh.values())))
    step = memory_step.abstract_step(config, settings, at=at)
    places = memory_step.spread(step, settings)
    found = estimate(model, config, settings)
    row = {
        "model": model, "base": f"{settings.method}, {settings.quantize or settings.dtype}",
        "device": {"cuda": "H200", "tpu": "TPU v5e"}[kind], "devices": found.devices,
        "tokens": settings.length, "packed": settings.packing, "remat": settings.remat,
        "arguments_gib": found.arguments / GIB, "estimated_gib": found.temporaries / GIB,
    }  # fmt: skip
    try:
        with targets.cudnn():
            program = compiled.compiled(step, places, at, platform=kind)
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler refuses what does not fit, and gives the bytes.
        needed = re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))
        if needed is None:
            raise
        size = float(needed[1])
        total = found.arguments / GIB + size
        return row | {"temporaries_gib": size, "total_gib": total, "fits": False}
    text = program.as_text()
    kernels = {"cudnn": "__cudnn$fmha", "splash": "splash_m"}
    size = compiled.temporaries(program) / GIB
    return row | {
        "attention": next((name for name, mark in kernels.items() if mark in text), "xla"),
        "temporaries_gib": size, "total_gib": found.arguments / GIB + size, "fits": True,
    }  # fmt: skip


def long(kind: str) -> list[str]:
    """Compiles the rows of a device and writes them; returns what does not hold."""
    path = RESULTS / "memory.json"
    old = json.loads(path.read_text("utf-8"))
    rows = []
    for case in LONG[kind]:
        rows.append(long_row(kind, **case))
        print(rows[-1], flush=True)
    others = [row for row in old.get("long", []) if row["device"] != rows[0]["device"]]
    wrong = []
    for short, row in zip(rows, rows[1:], strict=False):
        if short["model"] == row["model"] and short["packed"] == row["packed"]:
            times = row["tokens"] / short["tokens"]
            if times > 1 and row["temporaries_gib"] > 1.05 * times * short["temporaries_gib"]:
                wrong.append(f"{row['model']}: {short['tokens']} to {row['tokens']} tokens")
    report("memory", old["question"], old["rows"], failures=old["failures"],
           long=[*others, *rows], long_failures=wrong)  # fmt: skip
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sizes", nargs="*", default=["7B", "13B", "70B"])
    parser.add_argument("--long", choices=LONG, help="rows of 2k to 32k tokens for this device")
    options = parser.parse_args()
    if options.long:
        if wrong := long(options.long):
            sys.exit("\n".join(["temporaries grow faster than rows:", *wrong]))
        return
    length = 256 if options.tiny else 2048
    rows, wrong = [], []
    for size in ["tiny"] if options.tiny else options.sizes:
        rows.append(full_row(size, length=length))
        for form in (None, "nf4"):
            rows.append(row(size, form, rank=16, length=length))
            print(rows[-1], flush=True)
            bound = BOUNDS.get((size, form or ""), math.inf)
            if rows[-1]["total_gib"] > bound:
                wrong.append(f"{size} {form}: {rows[-1]['total_gib']:.2f} GiB, at most {bound}")
    if not options.tiny:
        path = RESULTS / "memory.json"
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        kept = {name: old[name] for name in ("long", "long_failures") if name in old}
        report("memory", "Memory of a training step, compiled for an H200", rows, failures=wrong,
               **kept)  # fmt: skip
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
