"""Does QLoRA learn as LoRA does? SmolLM2-135M on real text, float32 and quantized bases.

    python benchmarks/qlora.py [--steps 60] [--batch 4] [--length 128] [--tiny]

The same adapter, data, order and steps over the float32 base, the same in NF4 (block 64, bfloat16
scales), signed int4 (block 32), and in the GGUF file's own blocks. The text is this repository's
own documentation (its README and the docstrings of the library), an eighth of it held out. Bound:
the quantized base's evaluation loss is within two per cent of float32's. Writes
`results/qlora.json`.
"""

import argparse
import ast
import sys
from pathlib import Path

import jax
from common import report

import lora_jax as lora
from lora_jax import models, train
from lora_jax.quant import QuantConfig

ROOT = Path(__file__).parent.parent
MOST_WORSE = 0.02
BASES = {
    "float32": None,
    "nf4, block 64": QuantConfig(),
    "int4, block 32": QuantConfig(format="int4", block_size=32),
    "the file's own blocks": QuantConfig(format="file"),
}


def texts() -> list[str]:
    """Paragraphs of the README and docstrings of the library, in a fixed order."""
    found = (ROOT / "README.md").read_text("utf-8").split("\n\n")
    for path in sorted((ROOT / "lora_jax").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Module)]
        found += [text for n in nodes if (text := ast.get_docstring(n))]
    return [text for text in found if len(text) > 200]


def row(name: str, quantize: QuantConfig | None, records: list, options) -> dict:
    """One run."""
    model = models.load(models.find_smollm2(), remat="projections", quantize=quantize)
    data = train.examples(records, model.tokenizer, max_length=options.length, too_long="truncate")
    config = lora.LoraConfig(rank=16, alpha=16, target_modules="all-linear")
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    plan = lora.plan(config, model.apply, model.params, tokens)
    params = lora.init(jax.random.key(0), plan, model.params)
    settings = train.TrainConfig(
        steps=options.steps, batch_size=options.batch, learning_rate=2e-4, progress=False
    )
    result = train.fit(model, params, data[8:], data[: len(data) // 8], settings)
    losses = [r["eval_loss"] for r in result.history if "eval_loss" in r]
    stored = sum(x.nbytes for x in jax.tree.leaves(model.params))
    return {"base": name, "base_mib": stored / 2**20, "before": losses[0], "after": losses[-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--most", type=int, default=400, help="texts that are used")
    parser.add_argument("--bases", nargs="*", default=list(BASES))
    options = parser.parse_args()
    some = texts()[:: max(1, len(texts()) // options.most)]
    records = [train.record_of({"text": text}) for text in some]
    rows = [row(name, BASES[name], records, options) for name in options.bases]
    for each in rows:
        each["after_over_float32"] = each["after"] / rows[0]["after"]
    report("qlora", "QLoRA beside LoRA: SmolLM2-135M on this repository's documentation", rows,
           settings=vars(options))  # fmt: skip
    if any(each["after_over_float32"] > 1 + MOST_WORSE for each in rows):
        sys.exit(f"a quantized base ends more than {MOST_WORSE:.0%} above float32")


if __name__ == "__main__":
    main()
