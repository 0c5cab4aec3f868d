"""Is `lora_jax.analysis.memory` right? Its figures beside the compiler's for an H200.

    python benchmarks/estimate.py             (a minute; nothing is compiled)

The steps are those of `memory.py`, whose results (`results/memory.json`) are XLA's own analysis of
programs compiled for an H200. Here the same steps are read, not compiled. Fails where the whole is
more than a tenth off; writes `results/estimate.json`.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import llama_step
from common import report

from lora_jax.analysis.memory_live import alive
from lora_jax.train.memory import tree_bytes

GIB = 2**30
MOST_OFF = 0.1
_FORMS = {"LoRA, bfloat16": None, "QLoRA, nf4": "nf4"}


def row(said: dict) -> dict:
    """An estimate beside what the compiler said of the same step."""
    length, form = said["tokens"], _FORMS[said["base"]]
    forward = llama_step.forward_of(said["model"], length=length)
    shapes = llama_step.lora_shapes(forward, form, rank=16, batch=1, length=length,
                                    backend="gpu")  # fmt: skip
    found = alive(llama_step.lora_step(forward), *shapes, donate=(0, 1))
    arguments = sum(tree_bytes(x) for x in jax.tree.leaves(shapes))
    total = (arguments + found.bytes) / GIB
    return {
        "model": said["model"],
        "base": said["base"],
        "arguments_gib": arguments / GIB,
        "temporaries_gib": found.bytes / GIB,
        "total_gib": total,
        "compiled_temporaries_gib": said["temporaries_gib"],
        "compiled_total_gib": said["total_gib"],
        "temporaries_over_compiled": found.bytes / GIB / said["temporaries_gib"],
        "total_over_compiled": total / said["total_gib"],
    }


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    source = Path(__file__).parent / "results" / "memory.json"
    rows = []
    for said in json.loads(source.read_text("utf-8"))["rows"]:
        if said["base"] in _FORMS:
            rows.append(row(said))
            print(rows[-1], flush=True)
    wrong = [
        f"{r['model']} {r['base']}: {r['total_over_compiled']:.3f} of the compiler's"
        for r in rows
        if abs(r["total_over_compiled"] - 1) > MOST_OFF
    ]
    report("estimate", "Estimated memory of a step beside XLA's, for an H200", rows, failures=wrong)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
