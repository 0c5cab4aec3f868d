"""Which rank is enough, on two real tasks?

    python benchmarks/rank_sweeps.py sst2     MiniLM with a new head, SST-2 accuracy
    python benchmarks/rank_sweeps.py e2e      SmolLM2-135M, restaurant texts of E2E, BLEU

Both want the data of SST-2 (`sst2_{train,dev,test}.tsv`) and E2E (`e2e_{valid,test}.txt`) in
`--data`. Runs are kept in `outputs/rank_sweeps`: a stopped sweep goes on where it was, and one
with more ranks, seeds or learning rates takes over the runs that are there. Learning rates are
chosen by whole runs of the first seed; `--tune-steps` chooses by short ones, which take too high a
rate where only a long run diverges. The result is `results/rank_sweep_<task>.json` and `.png`.
"""

import argparse
import json
import random
from pathlib import Path

import jax.numpy as jnp
import minilm
import numpy as np
import optax
import sst2 as sst2_data
from common import RESULTS, add_data_option, machine

import lora_jax as lora
from lora_jax import analysis
from lora_jax.files import write_text
from lora_jax.recipes import sweep as language
from lora_jax.train import TrainConfig

RUNS = sst2_data.ROOT / "outputs" / "rank_sweeps"
RANKS = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    """Runs a sweep and writes what it found."""
    options = _options()
    found, settings = {"sst2": sst2, "e2e": e2e}[options.task](options)
    path = options.results / (options.name or f"rank_sweep_{options.task}")
    content = {"machine": machine(), "settings": settings, **found.to_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    found.plot(path.with_suffix(".png"), title=settings["title"])
    print(f"\n{found}\n\nwritten to {path}.json and .png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("sst2", "e2e"))
    add_data_option(parser, "sst2_*.tsv and e2e_*.txt")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder that keeps every run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--name", help="of the result, the task's by default")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tune-steps", type=int, help="of the runs that choose the learning rates")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--learning-rates", type=float, nargs="+", help="of the adapters")
    parser.add_argument("--full-learning-rates", type=float, nargs="+")
    parser.add_argument("--together", type=int, default=2, help="adapters of one batch")
    parser.add_argument("--most", type=int, help="texts to choose by and to score, to try it out")
    return parser.parse_args()


def _sweep_config(options, rates: tuple[float, ...], full_rates: tuple[float, ...]):
    return analysis.SweepConfig(
        ranks=tuple(options.ranks),
        learning_rates=tuple(options.learning_rates or rates),
        full_learning_rates=tuple(options.full_learning_rates or full_rates),
        seeds=tuple(options.seeds),
        tune_steps=options.tune_steps,
        together=options.together,
    )


def _read(folder: Path, name: str) -> list[str]:
    path = folder / name
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; say where the data is with --data")
    return path.read_text("utf-8").splitlines()


def _settings(title: str, config: TrainConfig, sweep: analysis.SweepConfig, **more) -> dict:
    return {
        "title": title,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "learning_rates": sweep.learning_rates,
        "full_learning_rates": sweep.full_learning_rates,
        "tune_steps": sweep.tune_steps,
        "seeds": sweep.seeds,
        "together": sweep.together,
        **more,
    }


# --- classification -------------------------------------------------------------------------------


def sst2(options) -> tuple[analysis.Sweep, dict]:
    """Sentiment of film reviews: all linear layers of MiniLM and a new head."""
    splits = {name: sst2_data.read(options.data, name) for name in sst2_data.SPLITS}
    for name in ("dev", "test"):
        splits[name] = splits[name][: options.most]
    model = minilm.load(0)
    coded = {name: minilm.coded(model, rows) for name, rows in splits.items()}
    config = TrainConfig(
        steps=options.steps or 100, batch_size=16, warmup=0.1, output_dir=options.runs / "sst2",
        resume=True,
    )  # fmt: skip
    sweep = _sweep_config(options, (3e-4, 1e-3, 4e-3), (5e-5, 1.5e-4, 5e-4))

    order = minilm.order(coded["test"])

    def loss(params, batch: minilm.Batch):
        found = model.apply(params, batch.tokens, mask=batch.mask)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, batch.labels))

    def tuning(params) -> float:
        found, labels = minilm.logits(model, params, coded["dev"]), coded["dev"].labels
        own = found[np.arange(len(labels)), labels]
        return float(np.mean(np.logaddexp(found[:, 0], found[:, 1]) - own))

    def score(params) -> np.ndarray:
        right = minilm.logits(model, params, coded["test"]).argmax(axis=1) == coded["test"].labels
        return right[order].astype(np.float64)

    task = analysis.Task(
        params=model.params,
        loss=loss,
        batches=lambda seed: minilm.batches(coded["train"], config.batch_size, seed),
        score=score,
        tuning=tuning,
        metric="accuracy",
        data=f"MiniLM on SST-2, {[len(rows) for rows in splits.values()]}",
    )
    adapters = lora.LoraConfig(rank=8, alpha=16, modules_to_save=("classifier",))
    found = analysis.rank_sweep(task, sweep, adapters, config)
    title = f"MiniLM (22 M) on SST-2: accuracy on {len(splits['test']):,} sentences"
    return found, _settings(title, config, sweep, scale=2, scored=len(splits["test"]))


# --- generation -----------------------------------------------------------------------------------


def e2e(options) -> tuple[analysis.Sweep, dict]:
    """Texts about restaurants from their attributes: all linear layers of SmolLM2."""
    options.runs.mkdir(parents=True, exist_ok=True)
    most = options.most or 64
    files = {"train": ("valid", 64, None), "tune": ("valid", 0, most), "test": ("test", 0, most)}
    for part, (split, start, stop) in files.items():
        lines = _e2e_lines(options.data, split, part, start, stop)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(options.runs / f"e2e_{part}.jsonl", text)
    config = TrainConfig(
        steps=options.steps or 40, batch_size=8, warmup=0.1, buckets=1,
        output_dir=options.runs / "e2e", resume=True,
    )  # fmt: skip
    sweep = _sweep_config(options, (1e-3, 4e-3), (3e-5, 2e-4))
    job = language.LanguageSweepConfig(
        model="smollm2",
        train_data=options.runs / "e2e_train.jsonl",
        tuning_data=options.runs / "e2e_tune.jsonl",
        eval_data=options.runs / "e2e_test.jsonl",
        metric="bleu",
        max_new_tokens=48,
        eval_batch=32,
    )
    adapters = lora.LoraConfig(rank=8, alpha=16)
    found = language.sweep_language_model(job, sweep, adapters, config)
    title = f"SmolLM2-135M on E2E: BLEU on {most} sets of attributes"
    return found, _settings(title, config, sweep, scale=2, scored=most)


def _e2e_lines(folder: Path, split: str, part: str, start: int, stop: int | None) -> list[dict]:
    """Lines of a file in an order of their own: neighbours there have the same attributes."""
    pairs = [line.split("||", 1) for line in _read(folder, f"e2e_{split}.txt") if "||" in line]
    made = [{"prompt": f"{said.strip()}\n", "completion": text.strip()} for said, text in pairs]
    if part == "test":  # that many sets of attributes with all their references
        prompts = list(dict.fromkeys(line["prompt"] for line in made))
        chosen = set(random.Random(0).sample(prompts, stop or 64))
        return [line for line in made if line["prompt"] in chosen]
    # Of like lengths, so that little is padded.
    made = [line for line in made if len(line["prompt"]) + len(line["completion"]) <= 230]
    random.Random(0).shuffle(made)
    return made[start:stop]


if __name__ == "__main__":
    main()
