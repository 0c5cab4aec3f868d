"""Packed rows: several examples side by side in a row, which leaves little padding.

Which lengths share a row is found once, by best fit decreasing: from the longest example to the
shortest, each goes into the fullest row that has room for it. It depends on the lengths alone, so
all epochs have equally many rows. What an epoch draws by its seed is which of the examples of a
length takes which of their places, and the order of the rows. So batch n of a run is known without
the batches before it, as with buckets.

grain's packing datasets fill rows as a stream flows by: their batch n depends on those before it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.train.buckets import Bucket, plan_once, shuffle, shuffled

# "auto" packs where the work is at most this share of that in buckets, and an epoch keeps so many
# optimizer steps: a step of packed rows learns more examples, and an epoch has fewer steps.
WORTH = 0.9
LEAST_STEPS = 100
# Attention over so many keys, times the model's width, costs a token about as much as all else:
# on a CPU, of a width of 576, rows of 1,024 tokens take twice the time of ones of 32 (masked scores
# are computed too).
KEYS = 2


class Choice(NamedTuple):
    """How a dataset is laid out.

    Attributes:
      length: tokens of a packed row; None pads examples in buckets.
      steps: optimizer steps of an epoch.
      text: the choice and the share of padding, for the log of a run.
      padding: the share of padding in packed rows, and in buckets.
    """

    length: int | None
    steps: int
    text: str
    padding: tuple[float, float]


def rows_by_rank(lengths: Sequence[int], length: int) -> np.ndarray:
    """The row of each example, from the longest example to the shortest.

    Args:
      lengths: tokens of each example.
      length: tokens of a row.

    Returns:
      int64 (examples,): entry k is the row of the k-th longest example; rows are numbered from 0.

    Raises:
      ValueError: an example is longer than a row.
    """
    if max(lengths) > length:
        raise ValueError(
            f"`packed_length` is {length} tokens, but an example has {max(lengths)}; give longer "
            "rows or shorten the examples"
        )
    # Rows by the room that they have left. Bit r of `open_` is set where rows have room for r
    # tokens, so that the fullest row is found by one operation on bits.
    rows_with: list[list[int]] = [[] for _ in range(length + 1)]
    open_, count = 0, 0
    found = np.empty(len(lengths), np.int64)
    for rank, size in enumerate(sorted(map(int, lengths), reverse=True)):
        fitting = open_ >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                open_ &= ~(1 << room)
        else:
            room, row, count = length, count, count + 1
        found[rank] = row
        if left := room - size:
            rows_with[left].append(row)
            open_ |= 1 << left
    return found


def pack_epoch(
    lengths: Sequence[int], by_rank: np.ndarray, length: int, *, rows: int, seed: int, epoch: int
) -> list[Bucket]:
    """Distributes the examples of an epoch over batches of packed rows, every example once.

    Args:
      lengths: tokens of each example.
      by_rank: from `rows_by_rank`.
      length: tokens of a row.
      rows: rows of a batch; the last batch may have fewer.
      seed: seed of the run.
      epoch: 0, 1, 2, ...
    """
    order = shuffled(len(lengths), seed, epoch)
    packed = _filled(order, np.asarray(lengths), by_rank)
    return _batches(shuffle(packed, seed, epoch), length, rows)


def pack_once(
    lengths: Sequence[int], by_rank: np.ndarray, length: int, *, rows: int
) -> list[Bucket]:
    """Every example once in a fixed order, for evaluation."""
    order = np.arange(len(lengths))
    return _batches(_filled(order, np.asarray(lengths), by_rank), length, rows)


def _filled(order: np.ndarray, lengths: np.ndarray, by_rank: np.ndarray) -> list[np.ndarray]:
    """The examples of each row; those of equal length take their places in the given order."""
    ranked = order[np.argsort(-lengths[order], kind="stable")]
    row_by_row = np.argsort(by_rank, kind="stable")
    ends = np.cumsum(np.bincount(by_rank))[:-1]
    return np.split(ranked[row_by_row], ends)


def _batches(packed: list[np.ndarray], length: int, rows: int) -> list[Bucket]:
    return [Bucket(length, packed[i : i + rows]) for i in range(0, len(packed), rows)]


def choose(
    lengths: Sequence[int],
    ladder: Sequence[int],
    length: int,
    *,
    rows: int,
    width: int,
    packing: str | bool | None,
    widths: Mapping[int, tuple[int, ...]] | None = None,
) -> Choice:
    """Whether to pack a dataset, and a sentence about it.

    Args:
      lengths: tokens of each example.
      ladder: the buckets to compare with.
      length: tokens of a packed row.
      rows: rows of a step.
      width: of the model's residual stream.
      packing: as in `TrainConfig`; None where the model takes no packed rows.
      widths: of each bucket what the texts of a pair are padded to, where a row is one.
    """
    # A row that is too short is an error only where it is to be used.
    if not packing:
        length = max(length, *lengths)
    by_rank = rows_by_rank(lengths, length)
    # The rows that fill up the last batch are computed too.
    steps = -(-(int(by_rank.max()) + 1) // rows)
    packed = [(length, steps * rows)]
    padded = {rung: rung if widths is None else sum(widths[rung]) for rung in ladder}
    buckets = [(padded[b.rung], rows) for b in plan_once(lengths, ladder, rows)]
    real = sum(map(int, lengths))
    packed_share, bucket_share = (
        1 - real / sum(t * n for t, n in shapes) for shapes in (packed, buckets)
    )
    saves = steps >= LEAST_STEPS and _work(packed, width) <= WORTH * _work(buckets, width)
    if packing is True or (packing == "auto" and saves):
        text = f"packed rows of {length} tokens, {packed_share:.1%} padding"
        beside = f" ({bucket_share:.1%} in buckets)"
        chosen, steps = length, steps
    else:
        text = f"buckets of {', '.join(map(str, ladder))} tokens, {bucket_share:.1%} padding"
        beside = "" if packing is None else f" ({packed_share:.1%} in packed rows of {length})"
        chosen, steps = None, len(buckets)
    plural = "" if steps == 1 else "s"
    text = f"{text}{beside}, {steps:,} step{plural} an epoch"
    return Choice(chosen, steps, text, (packed_share, bucket_share))


def _work(shapes: Sequence[tuple[int, int]], width: int) -> float:
    """The work of rows, as (tokens, rows); its unit is that of a token without attention."""
    return sum(n * t * (1 + t / (KEYS * width)) for t, n in shapes)
