"""Is the change of full fine-tuning of low rank, and does LoRA find it? SmolLM2-135M on SST-2.

    python benchmarks/sst2_spectrum.py [--data DIR] [--steps 80] [--full-rate 5e-5 1e-4]

SST-2 as text, `Review: ...` and `Sentiment:` to ` positive` or ` negative`, the loss on that token
only. Full fine-tuning and LoRA of rank 8 on all linear layers, each at its own learning rate (of
several given, the one with the better accuracy on dev), same data, order and steps. Then the
singular values of what changed: the rank that holds 90 % and 99 % of the energy, stable rank,
σ1/σ10, what the best change of LoRA's rank would hold, the directions both share, and intruder
dimensions; beside random matrices of the same shapes.

Trained parts are kept in `outputs/sst2_spectrum`: a stopped run goes on where it was. Writes
`results/sst2_spectrum.json` and `.png`, and `results/sst2_spectrum_matrices.json`, a line a matrix.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import numpy as np
import sst2
import sst2_spectrum_report as reporting
from common import RESULTS, add_data_option, report
from tqdm import tqdm

import lora_jax as lora
from lora_jax import analysis, train
from lora_jax.files import kept
from lora_jax.recipes import finetune

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LABELS = (" negative", " positive")
RUNS = sst2.ROOT / "outputs" / "sst2_spectrum"


def load(layers: int | None):
    """SmolLM2-135M-Instruct, or its first layers."""
    model = finetune.load_model("smollm2")
    if layers is None:
        return model
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    inner = model.params["model"]
    cut = jax.tree.map(lambda x: x[:layers], inner["layers"])
    return dataclasses.replace(
        model,
        forward=dataclasses.replace(model.forward, config=config),
        params={**model.params, "model": {**inner, "layers": cut}},
    )


def label_tokens(tokenizer) -> list[int]:
    """The one token of each label."""
    found = [tokenizer.encode(label) for label in LABELS]
    if any(len(tokens) != 1 for tokens in found):
        raise SystemExit(f"the labels {LABELS} are not one token each: {found}")
    return [tokens[0] for tokens in found]


def examples(model, sentences: list[sst2.Sentence]) -> list[train.Example]:
    """Prompts with their label, which alone is learned."""
    labels = label_tokens(model.tokenizer)
    found = []
    for sentence in sentences:
        prompt = model.tokenizer.encode(f"Review: {sentence.text}\nSentiment:")
        tokens = np.asarray([*prompt, labels[sentence.label]], np.int32)
        found.append(train.Example(tokens, np.arange(len(tokens)) == len(prompt), sentence.source))
    return found


@cache
def label_logits(model) -> Callable:
    """`(params, tokens, positions) -> logits of the two labels`; compiled once for all its uses."""
    outputs = lora.lorafy(train.outputs_of(model))
    labels = np.asarray(label_tokens(model.tokenizer))
    return jax.jit(lambda params, tokens, at: outputs(params, tokens, at)[:, labels])


def score(model, params, data: list[train.Example], name: str) -> dict:
    """Accuracy between the two labels, and the mean loss of choosing between them."""
    _, positive = label_tokens(model.tokenizer)
    both, correct, loss = label_logits(model), 0, 0.0
    batches = train.once(train.loader(data, batch_size=32, buckets=3))
    for batch in tqdm(batches, desc=f"accuracy {name}", leave=False):
        logits = np.asarray(both(params, batch.tokens[0], batch.positions[0]), np.float64)
        truth, real = batch.targets[0] == positive, batch.weights[0] > 0
        margin = np.where(truth, 1, -1) * (logits[:, 1] - logits[:, 0])
        correct += int(np.sum(margin[real] > 0))
        loss += float(np.sum(np.logaddexp(0, -margin[real])))
    share, interval = correct / len(data), sst2.wilson(correct, len(data))
    return {"accuracy": share, "interval": interval, "loss": loss / len(data)}


def trained(model, data, options, *, full: bool, rate: float):
    """Trains, or reads what an earlier run trained.

    Returns:
      The parameters, and the run's numbers.
    """
    kind = "full" if full else f"lora{options.rank}"
    name = f"{kind}-lr{rate:g}-{stem(options)}"
    adapter = lora.LoraConfig(
        rank=options.rank, alpha=2 * options.rank, target_modules="all-linear"
    )
    params = model.params if full else finetune.init_adapter(model, adapter, seed=options.seed)
    config = train.TrainConfig(
        output_dir=RUNS / name, resume=True, steps=options.steps, batch_size=options.batch,
        learning_rate=rate, warmup=0.1, seed=options.seed, buckets=3, keep=1, tensorboard=False,
        save_every=max(10, options.steps // 2) if full else 20,
    )  # fmt: skip
    print(f"\ntraining {name}")
    result = train.fit(
        model, params, data["train"], None, config, full=full,
        lora_config=None if full else adapter,
    )  # fmt: skip
    steps = [r for r in result.history if r["kind"] == "train"]
    numbers = kept(RUNS / name / f"dev{options.dev}.json",
                   lambda: score(model, result.lora_params, data["dev"], name))  # fmt: skip
    sizes = lora.count_parameters(result.lora_params)
    return result.lora_params, {
        "name": name,
        "learning_rate": rate,
        "trained_parameters": sizes.total if full else sizes.trainable,
        "step_seconds": statistics.median(r["seconds"] for r in steps),
        "training_loss": [round(r["loss"], 4) for r in steps],
        "dev": numbers,
    }


def best(model, data, options, *, full: bool):
    """The run with the best accuracy on dev (at equal accuracy, the lower loss), and all runs."""
    rates = options.full_rate if full else options.lora_rate
    chosen, rows = None, []
    for rate in rates:
        params, row = trained(model, data, options, full=full, rate=rate)
        rows.append(row)
        if chosen is None or _rank(row) > _rank(chosen[1]):
            chosen = (params, row)
    return *chosen, rows


def _rank(row: dict) -> tuple[float, float]:
    return row["dev"]["accuracy"], -row["dev"]["loss"]


def stem(options) -> str:
    """What every training depends on, as part of a file's name."""
    layers = "" if options.layers is None else f"-layers{options.layers}"
    return f"{options.steps}x{options.batch}-seed{options.seed}{layers}"


def spectra(before, after, name: str) -> analysis.Spectrum:
    """The spectrum of all linear layers, kept."""

    def make() -> dict:
        found = []
        for kind in tqdm(LINEAR, desc=f"singular values of {name}"):
            found += analysis.spectrum(before, after, where=(kind,)).matrices
        return json.loads(analysis.Spectrum(tuple(found)).to_json())

    return analysis.Spectrum.from_json(json.dumps(kept(RUNS / name / "spectrum.json", make)))


def overlaps(before, full, adapted, names: tuple[str, str], rank: int) -> list[dict]:
    """The directions that both trainings share, kept."""

    def make() -> dict:
        found = []
        for kind in tqdm(LINEAR, desc="directions in common"):
            found += analysis.overlap(before, full, adapted, top=rank, where=(kind,))
        return {"matrices": [dataclasses.asdict(o) for o in found]}

    return kept(RUNS / names[1] / f"overlap-{names[0]}.json", make)["matrices"]


def intruders(before, after, name: str) -> dict[str, int]:
    """Intruder dimensions among the ten largest directions, kept."""

    def make() -> dict:
        found = {}
        for kind in tqdm(LINEAR, desc=f"intruder dimensions of {name}"):
            found |= analysis.intruder_dimensions(before, after, where=(kind,))
        return found

    return kept(RUNS / name / "intruders.json", make)


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_option(parser, "sst2_*.tsv")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full-rate", type=float, nargs="+", default=[5e-5])
    parser.add_argument("--lora-rate", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dev", type=int, default=872, help="sentences the accuracy is taken on")
    parser.add_argument("--layers", type=int, help="only the model's first layers, to try it out")
    parser.add_argument("--name", default="sst2_spectrum", help="of the result's files")
    return parser.parse_args()


def main():
    options = settings()
    texts = {split: sst2.read(options.data, split) for split in ("train", "dev")}
    texts["dev"] = texts["dev"][: options.dev]
    model = load(options.layers)
    data = {split: examples(model, rows) for split, rows in texts.items()}
    before = kept(RUNS / f"base{options.layers or ''}-dev{options.dev}.json",
                  lambda: score(model, model.params, data["dev"], "before"))  # fmt: skip
    print(f"before: {sst2.percent(before['accuracy'], before['interval'])} on dev")
    full, full_row, full_rows = best(model, data, options, full=True)
    changed = spectra(model.params, full, full_row["name"])
    full_intruders = intruders(model.params, full, full_row["name"])
    adapted, lora_row, lora_rows = best(model, data, options, full=False)
    names = (full_row["name"], lora_row["name"])
    found = reporting.Found(
        before=before,
        full=full_row,
        lora=lora_row,
        changed=changed,
        adapted=spectra(model.params, adapted, names[1]),
        overlaps=overlaps(model.params, full, adapted, names, options.rank),
        full_intruders=full_intruders,
        lora_intruders=intruders(model.params, adapted, names[1]),
        rank=options.rank,
    )
    path = RESULTS / f"{options.name}.png"
    reporting.draw(path, found)
    conclusions = reporting.conclusions(found)
    report(
        options.name, __doc__.splitlines()[0], reporting.rows(found),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
                  if k != "data"},
        accuracy={"before": before, "full": full_rows, "lora": lora_rows},
        conclusions=conclusions, decay=reporting.decay(found),
    )  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in reporting.matrices(found))
    RESULTS.joinpath(f"{options.name}_matrices.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    print(f"and to {path.name}\n\n" + "\n".join(f"* {line}" for line in conclusions))


if __name__ == "__main__":
    main()
