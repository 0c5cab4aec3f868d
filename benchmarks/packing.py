"""How much of the batches is padding, and how many tokens a second are trained, packed or not?

    python benchmarks/packing.py [--data ../shared/data] [--rounds 5]

Whole data sets at `max_length` 512, prompts and answers, under SmolLM2's tokenizer: padded alike,
in four buckets, in packed rows of the longest example, and in ones of 512 tokens. The steps are
those of `lora_jax.train` over the first layers of SmolLM2-135M, float32, rank 8 on all linear
layers, in turn in one process; tokens are real ones. Of rows of 512 a step has as many as take the
memory of eight rows of the longest example.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from common import add_data_option, ratio, report

import lora_jax as lora
from lora_jax import models, train
from lora_jax.train.batches import iterate, padding_share
from lora_jax.train.evaluate import lora_loss
from lora_jax.train.flops import StepFlops
from lora_jax.train.preparation import layout
from lora_jax.train.step import Programs, init_state, make_step, optimizer

ROWS, LENGTH = 8, 512
KINDS = ("alike", "buckets", "packed", "packed 512")


def sst2(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "sst2_train.tsv").read_text("utf-8").splitlines()
    words = ("negative", "positive")
    pairs = (line.split("\t") for line in lines)
    return [(f"Review: {text}\nSentiment: ", words[int(label)]) for text, label in pairs]


def gsm8k(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "gsm8k_train.jsonl").read_text("utf-8").splitlines()
    return [(f"{row['question']}\n", row["answer"]) for row in map(json.loads, lines)]


def e2e(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "e2e_valid.txt").read_text("utf-8").splitlines()
    pairs = (line.split("||") for line in lines if line.strip())
    return [(f"{meaning.strip()}\n", text.strip()) for meaning, text in pairs]


DATA: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "SST-2": sst2, "GSM8K": gsm8k, "E2E": e2e,
}  # fmt: skip


def examples(pairs: list[tuple[str, str]], tokenizer) -> list[train.Example]:
    records = [
        train.record_of({"prompt": prompt, "completion": completion}, source=f"row {i}")
        for i, (prompt, completion) in enumerate(pairs)
    ]
    return train.examples(records, tokenizer, max_length=LENGTH, too_long="truncate")


def first_layers(count: int) -> models.Model:
    """SmolLM2 of so many layers, as `lora-jax train` loads it."""
    whole = models.load(models.find_smollm2(), remat="projections")
    config = dataclasses.replace(whole.config, num_hidden_layers=count)
    layers = jax.tree.map(lambda x: x[:count], whole.params["model"]["layers"])
    params = {**whole.params, "model": {**whole.params["model"], "layers": layers}}
    forward = dataclasses.replace(whole.forward, config=config)
    return dataclasses.replace(whole, forward=forward, params=params)


def layouts(model, data: list[train.Example]) -> dict:
    longest = -(-max(len(e.tokens) for e in data) // 8) * 8
    usual = {"batch_size": ROWS, "epochs": 1.0, "seed": 0}
    long = {"packed_length": LENGTH, "batch_size": max(1, ROWS * longest // LENGTH)}
    options = (
        {"buckets": (longest,)}, {"buckets": 4}, {"packing": True}, {"packing": True, **long},
    )  # fmt: skip
    return {
        kind: layout(model, data, train.TrainConfig(**{**usual, **own}))
        for kind, own in zip(KINDS, options, strict=True)
    }


class Steps:
    """Steps of `lora_jax.train` with rank 8 on all linear layers."""

    def __init__(self, model: models.Model) -> None:
        config = lora.LoraConfig(rank=8, target_modules="all-linear")
        plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 16), "int32"))
        trainable, self.frozen = lora.split(lora.init(jax.random.key(0), plan, model.params))
        tx = optimizer(train.TrainConfig(learning_rate=1e-4), 1000)
        loss = lora_loss(model)
        # One for packed rows, whose batches have one more array.
        self.programs = {packed: Programs(make_step(loss, tx), donate=(0,)) for packed in (0, 1)}
        self.counted = {packed: StepFlops(loss, 1) for packed in (0, 1)}
        self.state = init_state(jax.random.key(0), trainable, tx)

    def __call__(self, item) -> float:
        """Takes a step; its loss."""
        packed = item.batch.segments is not None
        self.state, out = self.programs[packed](self.state, self.frozen, item.batch)
        return float(out.loss)

    def flops(self, item) -> float:
        """Floating-point operations of a step, padding included."""
        packed = item.batch.segments is not None
        return self.counted[packed](self.state.trainable, self.frozen, item.batch) or float("nan")

    def warm(self, found) -> list:
        """The first 400 items of a layout at most, after a step of every shape, which compiles."""
        count = min(found.steps, 400)
        items = list(itertools.islice(iterate(found.loader, found.steps), count))
        for item in {(x.batch.tokens.shape, x.batch.positions.shape): x for x in items}.values():
            self(item)
        return items


def speeds(step: Steps, planned: dict, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Real tokens a second of each layout, in turn; a round has about so many tokens of each."""
    streams = {kind: itertools.cycle(step.warm(found)) for kind, found in planned.items()}
    times: dict[str, list[float]] = {kind: [] for kind in planned}
    for _ in range(rounds):
        for kind, stream in streams.items():
            start, done = time.perf_counter(), 0
            while done < tokens:
                item = next(stream)
                step(item)
                done += item.tokens
            times[kind].append(done / (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser, "the files of SST-2, GSM8K and E2E")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of a round")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    model = first_layers(options.layers)
    rows = []
    for name, read in DATA.items():
        data = examples(read(options.data), model.tokenizer)
        planned = layouts(model, data)
        times = speeds(Steps(model), planned, options.rounds, options.tokens)
        chosen = layout(model, data, train.TrainConfig(batch_size=ROWS, packing="auto"))
        auto = "buckets" if chosen.loader.by_rank is None else "packed"
        for kind, found in planned.items():
            rows.append(
                {
                    "data": name,
                    "rows": kind,
                    "batch": f"{found.loader.batch_size} x {max(found.loader.ladder)}",
                    "padding": padding_share(found.loader),
                    "examples a step": len(data) / found.steps,
                    "tokens/s": float(np.median(times[kind])),
                    "of alike": ratio(times, kind, "alike"),
                    "of buckets": ratio(times, kind, "buckets"),
                    '"auto"': "here" if kind == auto else "",
                }
            )
    report("packing", __doc__.splitlines()[0], rows, layers=options.layers)


if __name__ == "__main__":
    main()
