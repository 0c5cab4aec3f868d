"""Does QLoRA learn as LoRA does? SmolLM2-135M on real text, float32 and quantized bases.

    python benchmarks/qlora.py [--steps 60] [--learning-rate 2e-4] [--rank 16] [--bases ...]

The same adapter, data, order and steps over the float32 base and over quantized ones: NF4 (block
64, bfloat16 scales; also from LoftQ's start, and with the block's size halved), signed int4 (block
32), and the GGUF file's own blocks. The text is GSM8K: questions of school arithmetic and their
worked answers, from its training file; the evaluation loss is that of answers from its test file.
Bound: it ends within two per cent of float32's. Every run is kept in `outputs/qlora`: a later call
adds bases to those that are there. Writes `results/<--name>.json`.
"""

import argparse
import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from common import add_data_option, report

import lora_jax as lora
from lora_jax import models, train
from lora_jax.files import kept
from lora_jax.quant import QuantConfig
from lora_jax.recipes import finetune

RUNS = Path(__file__).parents[1] / "outputs" / "qlora"
MOST_WORSE = 0.02


class Base(NamedTuple):
    """How a base is held, and how its adapter starts: arguments of `LoraConfig`."""

    quantize: QuantConfig | None
    start: dict


def loftq(turns: int) -> dict:
    """A start that makes up for what the quantization has lost."""
    return {"init": "loftq", "loftq_config": {"loftq_iter": turns}}


BASES = {
    "float32": Base(None, {}),
    "nf4, block 64": Base(QuantConfig(), {}),
    "nf4, block 64, LoftQ": Base(QuantConfig(), loftq(turns=1)),
    "nf4, block 64, LoftQ 5 times": Base(QuantConfig(), loftq(turns=5)),
    "nf4, block 32": Base(QuantConfig(block_size=32), {}),
    "int4, block 32": Base(QuantConfig(format="int4", block_size=32), {}),
    "the file's own blocks": Base(QuantConfig(format="file"), {}),
}


def examples(model, options, split: str, count: int) -> list:
    """The first questions of a split that are short enough, with their answers to be learned."""
    fields = {"prompt": "question", "completion": "answer"}
    records = train.load_jsonl(options.data / f"gsm8k_{split}.jsonl", fields=fields)[: 2 * count]
    length = options.length
    return train.examples(records, model.tokenizer, max_length=length, too_long="skip")[:count]


def adapter(start: dict, model, options):
    """A fresh adapter of all linear layers, scale 1."""
    config = lora.LoraConfig(
        rank=options.rank, alpha=options.rank, target_modules="all-linear", **start
    )
    weights = models.load(models.find_smollm2()).params if start else None
    return finetune.init_adapter(model, config, seed=0, weights=weights)


def path_of(name: str, options) -> Path:
    """Where one run's row is kept."""
    said = f"{name} rate {options.learning_rate:g} rank {options.rank} steps {options.steps}"
    said += f" of {options.batch} length {options.length} on {options.held_out}"
    return RUNS / f"{re.sub('[^a-zA-Z0-9.-]+', '_', said)}.json"


def row(name: str, options) -> dict:
    """One run."""
    base = BASES[name]
    model = models.load(models.find_smollm2(), remat="projections", quantize=base.quantize)
    data = examples(model, options, "train", options.steps * options.batch)
    held_out = examples(model, options, "test", options.held_out)
    params = adapter(base.start, model, options)
    settings = train.TrainConfig(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.learning_rate,
        progress=False,
    )
    result = train.fit(model, params, data, held_out, settings)
    losses = [r["eval_loss"] for r in result.history if "eval_loss" in r]
    stored = sum(x.nbytes for x in jax.tree.leaves(model.params))
    return {"base": name, "base_mib": stored / 2**20, "before": losses[0], "after": losses[-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=48, help="answers that are evaluated")
    add_data_option(parser, "gsm8k_*.jsonl")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--name", default="qlora", help="of the result")
    options = parser.parse_args()
    rows = []
    for name in options.bases:
        rows.append(kept(path_of(name, options), functools.partial(row, name, options)))
        print(rows[-1], flush=True)
    for each in rows:
        each["after_over_float32"] = each["after"] / rows[0]["after"]
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "name")}
    report(options.name, "QLoRA beside LoRA: SmolLM2-135M on GSM8K", rows, settings=settings)
    if any(each["after_over_float32"] > 1 + MOST_WORSE for each in rows):
        sys.exit(f"a quantized base ends more than {MOST_WORSE:.0%} above float32")


if __name__ == "__main__":
    main()
