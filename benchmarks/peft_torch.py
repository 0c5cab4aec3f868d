"""How many tokens a second does LoRA training reach beside HF PEFT on torch?

    python benchmarks/peft_torch.py [--data ../shared/data] [--rounds 5] [--tokens 2000]

SmolLM2-135M from the same GGUF file in both, float32, rank 8 on all linear layers, AdamW, the same
real texts, two threads each, in one process and in turn; tokens are real ones.

    alike     the same padded batches in both, every token learned
    as run    answers learned; length buckets here, there random batches padded to their longest
              row, as transformers' collator does
    packed    answers learned; packed rows here, there one row of all texts without padding and with
              positions that begin again, as transformers' DataCollatorWithFlattening does

The numbers of a row are those of one round, the one with the median ratio. `of the rate` is the
share of what the machine's own matrix products reach at the shapes of the model.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from common import add_data_option, report
from cpu_step import items_of, matrix_rate, timed
from packing import DATA, LENGTH, Steps, examples
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lora_jax import models, train

CASES = (("SST-2", 8), ("SST-2", 32), ("GSM8K", 4))
NOT_LEARNED = -100  # torch's label of a token that is not learned


class Round(NamedTuple):
    """Tokens a second of one round, and the FLOP/s here."""

    ours: float
    theirs: float
    flops: float


class Theirs:
    """Steps of PEFT on transformers' model."""

    def __init__(self, source) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, use_cache=False
        )
        config = PeftConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)

    def __call__(self, batch: dict[str, np.ndarray]) -> float:
        """Takes a step; its loss."""
        loss = self.model(**{k: torch.from_numpy(v) for k, v in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        return float(loss.detach())


def padded(chosen: Sequence[train.Example], length: int | None = None) -> dict[str, np.ndarray]:
    """Rows padded to `length`, or to the longest of them."""
    length = length or max(len(e.tokens) for e in chosen)
    ids = np.zeros((len(chosen), length), np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, NOT_LEARNED)
    for row, example in enumerate(chosen):
        count = len(example.tokens)
        ids[row, :count], mask[row, :count] = example.tokens, 1
        labels[row, :count] = labels_of(example)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flattened(chosen: Sequence[train.Example]) -> dict[str, np.ndarray]:
    """All texts in one row; attention in transformers follows the positions."""
    ids = np.concatenate([e.tokens for e in chosen])
    places = np.concatenate([np.arange(len(e.tokens)) for e in chosen])
    labels = np.concatenate([labels_of(e) for e in chosen])
    rows = {"input_ids": ids, "position_ids": places, "labels": labels}
    return {name: row[None].astype(np.int64) for name, row in rows.items()}


def labels_of(example: train.Example) -> np.ndarray:
    return np.where(example.learned, example.tokens, NOT_LEARNED)


def whole(example: train.Example) -> train.Example:
    """The same text, every token of it learned."""
    # The first token of a text has nothing before it that could predict it.
    return example._replace(learned=np.arange(len(example.tokens)) > 0)


def batches_of(data, rows: int, collate: Callable) -> Iterator[dict[str, np.ndarray]]:
    """Batches of random texts, as transformers' Trainer draws them."""
    order = np.random.default_rng(0).permutation(len(data))
    for start in itertools.cycle(range(0, len(data) - rows, rows)):
        yield collate([data[i] for i in order[start : start + rows]])


def real_tokens(batch: dict[str, np.ndarray]) -> int:
    return int(batch.get("attention_mask", np.ones_like(batch["input_ids"])).sum())


def taken(stream: Iterator, tokens: int, count: Callable) -> tuple[list, int]:
    """Batches of about so many tokens."""
    found, total = [], 0
    while total < tokens:
        found.append(next(stream))
        total += count(found[-1])
    return found, total


def compare(
    ours: Steps, theirs: Theirs, items: Iterator, batches: Iterator, *, rounds: int, tokens: int
) -> list[Round]:
    """Rounds of about so many tokens on both sides, in turn; the first is not counted."""
    found = []
    for _ in range(rounds + 1):
        mine, count = taken(items, tokens, lambda item: item.tokens)
        seconds = timed(lambda mine=mine: [ours(item) for item in mine])
        other, theirs_count = taken(batches, tokens, real_tokens)
        theirs_seconds = timed(lambda other=other: [theirs(batch) for batch in other])
        flops = sum(ours.flops(item) for item in mine)
        found.append(Round(count / seconds, theirs_count / theirs_seconds, flops / seconds))
    return found[1:]


def same_batches(items: Sequence, data: Sequence[train.Example]) -> list[dict[str, np.ndarray]]:
    """The rows of batches that are padded alike, for the other side."""
    known = {tuple(e.tokens): e for e in data}

    def of_row(ids: np.ndarray) -> train.Example:
        ends = range(len(ids), 0, -1)
        return next(known[key] for n in ends if (key := tuple(ids[:n])) in known)

    return [
        padded([of_row(row) for row in item.batch.tokens[0]], item.batch.tokens.shape[-1])
        for item in items
    ]


def check_same(model, theirs: Theirs, data: Sequence[train.Example]) -> None:
    """Both sides have the same loss of some texts, however they are laid out."""
    arrays = [
        {name: torch.from_numpy(array) for name, array in collate(data).items()}
        for collate in (padded, flattened)
    ]
    with torch.no_grad():
        found = [float(theirs.model(**batch).loss) for batch in arrays]
    expected = train.evaluate(model, model.params, data)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser, "the files of SST-2 and GSM8K")
    parser.add_argument("--rounds", type=int, default=5, help="an odd number")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a round")
    options = parser.parse_args()
    torch.set_num_threads(2)
    source = models.find_smollm2()
    model = models.load(source, remat="projections")  # as `lora-jax train` loads it
    ours, theirs = Steps(model), Theirs(source)
    texts = {
        name: examples(DATA[name](options.data), model.tokenizer)
        for name in dict.fromkeys(name for name, _ in CASES)
    }
    for data in texts.values():
        check_same(model, theirs, data[:4])
    rates = {count: matrix_rate(model, count) for count in (256, 1024)}
    rows = []
    for name, size in CASES:
        data = texts[name]
        longest = -(-max(len(e.tokens) for e in data) // 8) * 8
        every = [whole(e) for e in data]
        stream = items_of(model, every, ours, batch_size=size, buckets=(longest,))
        alike = list(itertools.islice(stream, 40))
        average = sum(len(e.tokens) for e in data) / len(data)
        packed_rows = max(1, round(size * average / longest))
        pairs = {
            "alike": (itertools.cycle(alike), itertools.cycle(same_batches(alike, every))),
            "as run": (
                items_of(model, data, ours, batch_size=size),
                batches_of(data, size, padded),
            ),
            "packed": (
                items_of(model, data, ours, batch_size=packed_rows, packing=True),
                batches_of(data, size, flattened),
            ),
        }
        for kind, (items, batches) in pairs.items():
            found = compare(
                ours, theirs, items, batches, rounds=options.rounds, tokens=options.tokens
            )
            middle = sorted(found, key=lambda r: r.ours / r.theirs)[len(found) // 2]
            rows.append(
                {
                    "texts": name,
                    "rows": size,
                    "batches": kind,
                    "lora_jax tokens/s": middle.ours,
                    "peft tokens/s": middle.theirs,
                    "lora_jax / peft": middle.ours / middle.theirs,
                    "GFLOP/s": middle.flops / 1e9,
                    "of the rate": middle.flops / max(rates.values()),
                }
            )
            print(rows[-1], flush=True)
    report(
        "peft_torch",
        __doc__.splitlines()[0],
        rows,
        versions={"torch": torch.__version__, "threads": torch.get_num_threads()},
        matrix_gflops={str(count): rate / 1e9 for count, rate in rates.items()},
        rounds=options.rounds,
        longest=LENGTH,
    )


if __name__ == "__main__":
    main()
