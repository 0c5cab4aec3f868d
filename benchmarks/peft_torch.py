"""How many tokens a second does LoRA training reach beside HF PEFT on torch?

    python benchmarks/peft_torch.py [--data ../shared/data/sst2_train.tsv] [--rounds 6]

SmolLM2-135M from the same GGUF file in both, float32, rank 8 on all linear layers, AdamW, the
same real sentences, two threads each, in one process, interleaved. Once with the same padded
batches in both; once as each would really run: here the length buckets of `lora.train`, there
random batches padded to their longest row, as transformers' collator does. Tokens are real ones.
"""

import argparse
import itertools
import time
from pathlib import Path

import jax
import numpy as np
import torch
from common import ratio, report
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import lora_jax as lora
from lora_jax import models, train
from lora_jax.train.batches import iterate, loader
from lora_jax.train.evaluate import lora_loss
from lora_jax.train.step import Programs, init_state, make_step, optimizer


def sentences(path: Path, tokenizer, count: int) -> list:
    """SST-2 rows as examples of which every token is learned."""
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[:count]]
    texts = [f"Review: {text}\nSentiment: {('negative', 'positive')[int(y)]}" for text, y in rows]
    records = [train.record_of({"text": text}, source=f"row {i}") for i, text in enumerate(texts)]
    return train.examples(records, tokenizer, max_length=128, too_long="error")


def jax_side(model, data, *, rows: int, buckets, steps: int):
    """A function of an `Item` that takes one step, and the items of a run."""
    batches = loader(data, batch_size=rows, buckets=buckets, pad_id=model.tokenizer.pad_id, seed=0)
    config = lora.LoraConfig(rank=8, target_modules="all-linear")
    tokens = jax.ShapeDtypeStruct((rows, 16), "int32")
    plan = lora.plan(config, model.apply, model.params, tokens)
    trainable, frozen = lora.split(lora.init(jax.random.key(0), plan, model.params))
    tx = optimizer(train.TrainConfig(learning_rate=1e-4), steps)
    programs = Programs(make_step(lora_loss(model), tx), donate=(0,))
    state = [init_state(jax.random.key(0), trainable, tx)]

    def step(item):
        state[0], out = programs(state[0], frozen, item.batch)
        return float(out.loss)

    items = list(itertools.islice(iterate(batches, steps), steps))
    return step, items


def torch_side(source: str):
    """A function of `(tokens, mask)` that takes one step of HF PEFT."""
    path = Path(source)
    base = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = PeftConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(tokens, mask):
        ids, seen = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
        labels = ids.masked_fill(seen == 0, -100)
        loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        return float(loss.detach())

    return step


def padded(examples, length: int | None, pad_id: int):
    """Rows padded to `length`, or to the longest of them."""
    length = length or max(len(e.tokens) for e in examples)
    tokens = np.full((len(examples), length), pad_id, np.int32)
    mask = np.zeros((len(examples), length), np.int32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        mask[row, : len(example.tokens)] = 1
    return tokens, mask


def timed(run) -> float:
    # A library's worker threads spin for a while after its last call, on the cores that the other
    # one needs: whoever came second would pay for it.
    time.sleep(0.5)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alike(step, other, items, data, rounds: int) -> dict:
    """The same padded batches through both, in turn."""
    times: dict[str, list[float]] = {"lora_jax": [], "peft": []}
    losses = []
    for number, item in enumerate(items[: rounds + 1]):
        tokens = item.batch.tokens[0]
        mask = _mask(tokens, data)
        first = timed(lambda i=item: losses.append(step(i)))
        second = timed(lambda t=tokens, m=mask: losses.append(other(t, m)))
        if number:
            times["lora_jax"].append(item.tokens / first)
            times["peft"].append(item.tokens / second)
    assert abs(losses[0] - losses[1]) < 2e-2, losses[:2]  # the same weights, the same batch
    return times


def _mask(tokens: np.ndarray, data) -> np.ndarray:
    """1 at real tokens, by looking each row up among the examples."""
    known = {tuple(e.tokens): len(e.tokens) for e in data}
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(tokens):
        length = next(n for n in range(len(ids), 0, -1) if tuple(ids[:n]) in known)
        mask[row, :length] = 1
    return mask


def as_run(step, other, items, data, rows: int, pad_id: int, rounds: int) -> dict:
    """Buckets here against random batches padded to their longest there, several batches a turn."""
    times: dict[str, list[float]] = {"lora_jax": [], "peft": []}
    order = np.random.default_rng(0).permutation(len(data))
    seen: set = set()
    for item in items:  # every shape compiles before anything is timed
        if item.batch.tokens.shape not in seen:
            seen.add(item.batch.tokens.shape)
            step(item)
    group = max(1, len(items) // rounds)
    for number in range(rounds):
        mine = items[number * group : (number + 1) * group]
        seconds = timed(lambda m=mine: [step(i) for i in m])
        times["lora_jax"].append(sum(i.tokens for i in mine) / seconds)
        picks = order[number * group * rows : (number + 1) * group * rows].reshape(group, rows)
        theirs = [padded([data[i] for i in pick], None, pad_id) for pick in picks]
        seconds = timed(lambda t=theirs: [other(*b) for b in t])
        times["peft"].append(sum(int(m.sum()) for _, m in theirs) / seconds)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2_train.tsv"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(2)
    source = str(models.find_smollm2())
    model = models.load(source, remat="projections")  # as `lora-jax train` loads it
    data = sentences(options.data, model.tokenizer, 2000)
    other = torch_side(source)
    longest = max(len(e.tokens) for e in data)
    runs = {}
    one_rung = -(-longest // 8) * 8
    step, items = jax_side(
        model, data, rows=options.rows, buckets=(one_rung,), steps=options.rounds + 1
    )
    runs["padded alike"] = alike(step, other, items, data, options.rounds)
    step, items = jax_side(model, data, rows=options.rows, buckets=8, steps=options.rounds * 6)
    runs["as run"] = as_run(
        step, other, items, data, options.rows, model.tokenizer.pad_id, options.rounds
    )
    rows = [
        {
            "batches": name,
            "lora_jax tokens/s": float(np.median(times["lora_jax"])),
            "peft tokens/s": float(np.median(times["peft"])),
            "lora_jax / peft": ratio(times, "lora_jax", "peft"),
        }
        for name, times in runs.items()
    ]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    report("peft_torch", __doc__.splitlines()[0], rows, versions=versions)


if __name__ == "__main__":
    main()
