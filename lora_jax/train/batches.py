"""Batches of optimizer steps: shuffled, prefetched and resumable through grain.

For each of its A microbatches a batch has the tokens of B rows padded to one rung T, and P
*positions* of the flattened (B, T) grid at which the model's output is needed. P is a constant of
the rung, the maximum over the batches of the planned epochs. If most of many batches need far
fewer, the rung has a second, smaller P. So each rung compiles once or twice.

On a mesh the rows are divided into as many parts as they are spread over, and each part has its
share of the positions, so that no device needs the outputs of another one's rows. Where the tokens
of a row are spread too, P is every place, in the order of the devices.

Packed rows have one rung, and several examples side by side, told apart by `segments`.

Positions that only fill up P have weight 0. All P are distinct, so that the gradient is a scatter
without collisions, which is deterministic on every device.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lora_jax.compat import require
from lora_jax.train.buckets import (
    Bucket,
    ladder_for,
    lengths_of,
    plan_epoch,
    plan_once,
    sizes_of,
    widths_for,
)
from lora_jax.train.examples import Example
from lora_jax.train.loss import TOGETHER, Rows
from lora_jax.train.packing import pack_epoch, pack_once, rows_by_rank

# Above this share of the grid, selecting positions costs more than the outputs it saves.
_DENSE = 0.9
_ROUND = 16
# A second P costs a compilation: it must save this share of a rung's positions, in at least this
# many batches.
_SPARED = 0.15
_BATCHES = 64


class Batch(NamedTuple):
    """The arrays of one optimizer step.

    Attributes:
      tokens: int32 (A, B, T), padded on the right.
      positions: int32 (A, P), increasing places of the flattened (B, T) grid where a learned
        token is predicted (the token before it), or that have a target of their own; P == B*T means
        every place, in order.
      targets: int32 (A, P), the token to be predicted there, or what `Example.targets` has.
      weights: float32 (A, P), 1 where a learned token is predicted, 0 at fillers.
      segments: int32 (A, B, T): 1, 2, ... in a row's examples, or in both texts of its pair, 0 at
        padding; None of rows that are not packed, unless the loader is `segmented`.
      reads: int32 (A, B, S): what an encoder-decoder's encoder reads, -1 at padding; else None.
      images: float32 (A, B, C, H, W), what an encoder of images reads; else None.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray | None = None
    reads: np.ndarray | None = None
    images: np.ndarray | None = None


class Item(NamedTuple):
    """A batch and its numbers that the compiled step does not need.

    Attributes:
      batch: the arrays.
      tokens: number of tokens without padding.
      epoch: its pass over the dataset, from 0.
    """

    batch: Batch
    tokens: int
    epoch: int


class Loader(NamedTuple):
    """A dataset prepared for training: pure data that determines every batch of every epoch.

    Attributes:
      examples: the dataset.
      ladder: lengths that batches are padded to.
      places: the one or two P of each rung, in increasing order; of one part.
      epochs: the number of epochs for which `places` is sufficient.
      batch_size: B, rows of a microbatch.
      accumulation: A, microbatches of a step.
      pad_id: the padding token.
      seed: seed of the order.
      rows: how a microbatch is spread over a mesh, in parts of equally many rows and tokens.
      by_rank: of packed rows, the row of each example, see `rows_by_rank`.
      segmented: batches have `segments` even where rows are not packed.
      widths: of each rung the length of tokens and of `reads`, where examples have both.
    """

    examples: Sequence[Example]
    ladder: tuple[int, ...]
    places: Mapping[int, tuple[int, ...]]
    epochs: int
    batch_size: int
    accumulation: int
    pad_id: int
    seed: int
    rows: Rows = TOGETHER
    by_rank: np.ndarray | None = None
    segmented: bool = False
    widths: Mapping[int, tuple[int, ...]] | None = None

    def width(self, rung: int) -> int:
        """The padded length of a rung's tokens."""
        return rung if self.widths is None else self.widths[rung][0]


def loader(
    data: Sequence[Example],
    *,
    batch_size: int,
    accumulation: int = 1,
    buckets: int | Sequence[int] | None = None,
    pad_id: int = 0,
    seed: int = 0,
    epochs: int = 1,
    rows: Rows = TOGETHER,
    packed: int | None = None,
    segmented: bool = False,
) -> Loader:
    """Prepares a dataset in length buckets, or packed.

    Args:
      data: tokenized examples, at least one.
      batch_size: rows of one forward pass.
      accumulation: forward passes of one optimizer step.
      buckets: number of lengths (chosen to pad least), or the lengths themselves; by default 4 to
        16, as many as save an epoch more than they take to compile.
      pad_id: the padding token.
      seed: seed of the shuffle.
      epochs: maximum number of epochs.
      rows: how the rows of a forward pass are spread over a mesh.
      packed: tokens of a row that holds several examples, in place of buckets.
      segmented: batches have `segments` even where rows are not packed.

    Raises:
      ValueError: the dataset is empty, or the buckets or rows are too short.
    """
    lengths = lengths_of(data)
    prepared = Loader(
        examples=data,
        ladder=ladder_for(data, lengths, buckets, rows=batch_size * accumulation, spans=rows.spans)
        if packed is None
        else (packed,),
        places={},
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        pad_id=pad_id,
        seed=seed,
        rows=rows,
        by_rank=None if packed is None else rows_by_rank(lengths, packed),
        segmented=segmented or packed is not None,
    )
    prepared = prepared._replace(widths=widths_for(data, prepared.ladder))
    if rows.spans > 1:
        # How many of a span's tokens are learned depends on where each example begins.
        whole = {rung: (batch_size // rows.parts * rung,) for rung in prepared.ladder}
        return prepared._replace(places=whole)
    # All epochs are planned here, because P is the maximum over them.
    plans = [_once(prepared), *(_epoch(prepared, e) for e in range(epochs))]
    return prepared._replace(places=_places(prepared, batch_size // rows.parts, plans))


def grid_of(batch: Batch) -> int:
    """The number of tokens of a batch with its padding, those of an encoder included."""
    return batch.tokens.size + (0 if batch.reads is None else batch.reads.size)


def _places(loader: Loader, size: int, plans: Sequence[list[Bucket]]) -> dict[int, tuple[int, ...]]:
    """The one or two P of each rung that the batches of these plans need."""
    learned = np.array([e.count for e in loader.examples])
    needs: dict[int, list[int]] = {}
    for bucket in (bucket for plan in plans for bucket in plan):
        needs.setdefault(bucket.rung, []).append(_needed(learned, bucket, size))
    return {rung: _places_of(counts, size * loader.width(rung)) for rung, counts in needs.items()}


def _needed(learned: np.ndarray, bucket: Bucket, size: int) -> int:
    """The most learned tokens that `size` rows of a bucket have."""
    counts = [int(learned[row].sum()) for row in bucket.rows]
    return max(sum(counts[i : i + size]) for i in range(0, len(counts), size))


def _places_of(counts: Sequence[int], grid: int) -> tuple[int, ...]:
    rounded = np.sort(-(-np.asarray(counts) // _ROUND) * _ROUND)
    top = int(rounded[-1])
    top = grid if top > _DENSE * grid else top
    # If the k smallest needs use the k-th of them, k (top - need_k) positions are saved.
    spared = np.arange(1, len(rounded) + 1) * (top - rounded)
    best = int(spared.argmax())
    if spared[best] < _SPARED * top * len(rounded) or best + 1 < _BATCHES:
        return (top,)
    return (int(rounded[best]), top)


def batches_per_epoch(loader: Loader) -> int:
    """Optimizer steps in one pass over the dataset."""
    count = len(loader.examples) if loader.by_rank is None else int(loader.by_rank.max()) + 1
    return -(-count // _rows(loader))


def _rows(loader: Loader) -> int:
    return loader.batch_size * loader.accumulation


def _epoch(loader: Loader, epoch: int) -> list[Bucket]:
    lengths = lengths_of(loader.examples)
    draw = {"seed": loader.seed, "epoch": epoch}
    if loader.by_rank is None:
        return plan_epoch(lengths, loader.ladder, _rows(loader), **draw)
    return pack_epoch(lengths, loader.by_rank, loader.ladder[0], rows=_rows(loader), **draw)


def _once(loader: Loader) -> list[Bucket]:
    lengths = lengths_of(loader.examples)
    if loader.by_rank is None:
        return plan_once(lengths, loader.ladder, _rows(loader))
    return pack_once(lengths, loader.by_rank, loader.ladder[0], rows=_rows(loader))


class _Batches:
    """The batches of a run by number: the random-access source grain reads from."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.loader = loader
        self.steps = steps
        self.size = batches_per_epoch(loader)
        # Two: batches are prepared ahead, over the end of an epoch.
        self.epoch = lru_cache(maxsize=2)(lambda epoch: _epoch(loader, epoch))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Item:
        epoch, number = divmod(int(index), self.size)
        bucket = self.epoch(epoch)[number]
        tokens = sum(sum(sizes_of(self.loader.examples[i])) for i in bucket.examples)
        return Item(make_batch(self.loader, bucket), tokens, epoch)


def iterate(loader: Loader, steps: int, *, prefetch: int = 2) -> Any:
    """The batches of a run as a grain iterator, prepared ahead by a thread.

    Args:
      loader: from `loader`.
      steps: number of batches, over as many epochs as needed.
      prefetch: batches prepared ahead.

    Returns:
      A `grain.DatasetIterator` of `Item`. `get_state()` is a small dict of JSON values, and
      `set_state` jumps to that batch without making those before it.
    """
    grain = require("grain")
    if steps > loader.epochs * batches_per_epoch(loader):
        plural = "" if loader.epochs == 1 else "s"
        raise ValueError(
            f"`steps` is {steps}, but the loader was laid out for {loader.epochs} epoch{plural} of"
            f" {batches_per_epoch(loader)} steps; lay it out with more `epochs`"
        )
    source = grain.MapDataset.source(_Batches(loader, steps))
    # More threads would only contend for Python's lock: a batch is made by NumPy in microseconds.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch))
    return iter(source.to_iter_dataset(options))


def once(loader: Loader) -> list[Batch]:
    """Every example once, in batches of a fixed order, for evaluation."""
    return list(one_by_one(loader))


def one_by_one(loader: Loader) -> Iterator[Batch]:
    """The batches of `once`, each made when it is asked for."""
    return (make_batch(loader, bucket) for bucket in _once(loader))


def make_batch(loader: Loader, bucket: Bucket) -> Batch:
    """The padded batch of a bucket."""
    rows = [[loader.examples[i] for i in np.atleast_1d(row)] for row in bucket.rows]
    size, length = loader.batch_size // loader.rows.parts, loader.width(bucket.rung)
    learned = [sum(e.count for e in row) for row in rows]
    needed = max(sum(learned[i : i + size]) for i in range(0, len(rows), size))
    places = next(p for p in loader.places[bucket.rung] if p >= needed)
    # Missing rows of an epoch's last batch repeat the first one without learned tokens: in a row of
    # only padding, attention would take a softmax over no token.
    spare = [e.spare() for e in rows[0]]
    rows += [spare] * (_rows(loader) - len(rows))
    parts = [
        _part(rows[i : i + size], length, places, loader.pad_id) for i in range(0, len(rows), size)
    ]
    tokens, segments, *placed = (np.stack(part) for part in zip(*parts, strict=True))
    if loader.rows.spans > 1:
        placed = (_by_span(x, size, loader.rows.spans) for x in placed)
    positions, *others = placed
    # Positions count through all parts of a microbatch, in which part i begins at row i * size.
    starts = np.arange(len(parts), dtype=np.int32) % loader.rows.parts * (size * length)
    positions += starts[:, None]
    shape = (loader.accumulation, -1, length)
    return Batch(
        tokens.reshape(shape),
        *(x.reshape(loader.accumulation, -1, *x.shape[2:]) for x in (positions, *others)),
        segments=segments.reshape(shape) if loader.segmented else None,
        reads=_reads(loader, rows, bucket.rung),
        images=_images(loader, rows),
    )


def _reads(loader: Loader, rows: Sequence[Sequence[Example]], rung: int) -> np.ndarray | None:
    """What the encoder reads of each row, (A, B, S)."""
    if loader.widths is None:
        return None
    reads = np.full((len(rows), loader.widths[rung][1]), -1, np.int32)
    for row, (example,) in zip(reads, rows, strict=True):
        assert example.read is not None
        row[: len(example.read)] = example.read
    return reads.reshape(loader.accumulation, -1, reads.shape[1])


def _images(loader: Loader, rows: Sequence[Sequence[Example]]) -> np.ndarray | None:
    """What the model reads of each row's image."""
    pixels = [example.image.floats() for (example, *_) in rows if example.image is not None]
    return np.reshape(pixels, (loader.accumulation, -1, *pixels[0].shape)) if pixels else None


def by_place(batch: Batch) -> tuple[np.ndarray, ...]:
    """What a batch holds, in an order that is the same on every mesh: tokens, and targets.

    The targets are those of all places, -1 where nothing is learned.
    """
    tokens, positions = np.asarray(batch.tokens), np.asarray(batch.positions)
    targets, weights = np.asarray(batch.targets), np.asarray(batch.weights)
    places, *one = positions.shape[:-1], *targets.shape[positions.ndim :]
    # A batch of one forward pass has no axis of microbatches.
    whole = np.full((*places, tokens.shape[-2] * tokens.shape[-1], *one), -1, targets.dtype)
    spread = (*positions.shape, *(1 for _ in one))
    learned = np.where(weights.reshape(spread) > 0, targets, -1)
    np.put_along_axis(whole, positions.reshape(spread), learned, axis=positions.ndim - 1)
    read = (batch.segments, batch.reads, batch.images)
    others = (np.asarray(x) for x in read if x is not None)
    return (tokens, whole, *others)


def _part(
    rows: Sequence[Sequence[Example]], rung: int, places: int, pad_id: int
) -> tuple[np.ndarray, ...]:
    """Tokens and segments (rows, rung); positions, targets and weights (places,)."""
    tokens = np.full((len(rows), rung), pad_id, np.int32)
    segments = np.zeros((len(rows), rung), np.int32)
    predicts = np.zeros((len(rows), rung), bool)
    _, one = rows[0][0].predicted()
    targets = np.zeros((len(rows), rung, *one.shape[1:]), one.dtype)
    for i, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            end = start + len(example.tokens)
            tokens[i, start:end] = example.tokens
            segments[i, start:end] = number if example.types is None else number + example.types
            # The last token of one example does not predict the first of the next.
            predicts[i, start:end], targets[i, start:end] = example.predicted()
            start = end
    positions = _pick(predicts.reshape(-1), places)
    weights = predicts.reshape(-1)[positions].astype(np.float32)
    targets = targets.reshape(-1, *one.shape[1:])[positions]
    targets[weights == 0] = 0
    return tokens, segments, positions, targets, weights


def _by_span(x: np.ndarray, size: int, spans: int) -> np.ndarray:
    """What (parts, rows · tokens) have, first of all rows' first tokens."""
    apart = x.reshape(len(x), size, spans, x.shape[1] // (size * spans), *x.shape[2:])
    return apart.swapaxes(1, 2).reshape(x.shape)


def _pick(wanted: np.ndarray, places: int) -> np.ndarray:
    """The wanted positions, filled up with the first others to the given number, in order."""
    fill = places - int(wanted.sum())
    chosen = wanted.copy()
    chosen[np.flatnonzero(~wanted)[:fill]] = True
    return np.flatnonzero(chosen).astype(np.int32)


def padding_share(loader: Loader) -> float:
    """The share of an epoch's grid that is padding, 0 to 1."""
    widths = loader.widths or {rung: (rung,) for rung in loader.ladder}
    grid = sum(sum(widths[bucket.rung]) * _rows(loader) for bucket in _epoch(loader, 0))
    return 1 - sum(lengths_of(loader.examples)) / grid
