"""How much memory does a training step take: full fine-tuning, LoRA, QLoRA, by model size?

    python benchmarks/memory.py [--tiny]          (`make aot` installs what it needs)

LoRA and QLoRA steps (rank 16 on every linear layer, AdamW, batch 1, rematerialized blocks) are
compiled for an H200 ahead of time; arguments and temporaries are what the compiler says. Full
fine-tuning is counted: bfloat16 weights and gradients, AdamW's moments and master weights in
float32, 16 bytes a parameter, before any activation.
"""

import argparse
import math
import sys

import aot_targets as targets  # sets the environment: before jax
import jax
import llama_step
from common import report

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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sizes", nargs="*", default=["7B", "13B", "70B"])
    options = parser.parse_args()
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
        report("memory", "Memory of a training step, compiled for an H200", rows, failures=wrong)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
