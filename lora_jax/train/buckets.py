"""Length buckets: few batch shapes, little padding.

A *ladder* is a tuple of lengths in increasing order, its *rungs*. A batch holds examples whose
lengths share a rung and is padded to it, so a ladder of k rungs means at most k shapes and k
compilations. `best_ladder` finds the k rungs that pad a dataset least.

An epoch is planned as a whole by a pure function of (lengths, seed, epoch), so batch n of a run is
known without making the n - 1 batches before it. This makes a run resumable.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.models.sharding import check_length
from lora_jax.train.examples import Example, check_data

MULTIPLE = 8  # rungs are multiples of this: whole vector registers on a CPU, tiles elsewhere

_MOST_RUNGS = 512

# The default: between so many rungs, where each costs as much to compile as so many steps of the
# longest batch.
_LEAST, _MOST, _COMPILATION = 4, 16, 8


class Bucket(NamedTuple):
    """The plan of one batch: a length and the examples padded to it.

    Attributes:
      rung: the padded length.
      rows: for each row, at most those of a batch, the index of its example in the dataset; of a
        packed row an array of several.
    """

    rung: int
    rows: np.ndarray | Sequence[np.ndarray]

    @property
    def examples(self) -> np.ndarray:
        """The indices of all its examples."""
        return np.concatenate([np.atleast_1d(row) for row in self.rows])


def ladder_for(
    data: Sequence[Example],
    lengths: Sequence[int],
    buckets: int | Sequence[int] | None,
    *,
    rows: int,
    spans: int,
) -> tuple[int, ...]:
    """The ladder of a dataset, see `ladder_of`; images have the one length of their patches."""
    if data[0].image is not None and not isinstance(buckets, Sequence):
        return (max(lengths),)
    return ladder_of(buckets, lengths, rows=rows, spans=spans)


def widths_for(data: Sequence[Example], ladder: Sequence[int]) -> dict[int, tuple[int, ...]] | None:
    """Of each rung the padded length of tokens and of `read`; None where examples lack it."""
    return None if data[0].read is None else widths_of([sizes_of(e) for e in data], ladder)


def lengths_of(data: Sequence[Example]) -> list[int]:
    """The number of tokens of each example.

    Raises:
      TypeError: they are something else.
      ValueError: there are none.
    """
    check_data("data", data)
    if len(data) == 0:
        raise ValueError("the dataset is empty; give at least one example")
    return [sum(sizes_of(e)) for e in data]


def sizes_of(example: Example) -> tuple[int, int]:
    """The lengths of an example's tokens, and of what an encoder reads before."""
    return len(example.tokens), 0 if example.read is None else len(example.read)


def ladder_of(
    buckets: int | Sequence[int] | None, lengths: Sequence[int], *, rows: int, spans: int = 1
) -> tuple[int, ...]:
    """The ladder of so many rungs that pads these lengths least, or the one that is given.

    Args:
      buckets: the number of rungs, or the rungs; None takes 4 to 16, those with the least work in
        an epoch, where the compilation of a shape counts as eight steps of the longest batch.
      lengths: tokens of each example.
      rows: examples of a step.
      spans: the number of devices that the tokens of a row are spread over.

    Raises:
      ValueError: as `best_ladder` and `check_ladder`, or a rung that the devices do not divide.
    """
    multiple = row_multiple(spans)
    if isinstance(buckets, int):
        return best_ladder(lengths, buckets, multiple=multiple)
    if buckets is None:
        ladders = _best_ladders(lengths, _MOST, multiple)
        return min(ladders[_LEAST - 1 :] or ladders[-1:], key=lambda x: _work(x, lengths, rows))
    ladder = check_ladder(buckets, lengths)
    for rung in ladder:
        check_length("buckets", rung, spans)
    return ladder


def _work(ladder: Sequence[int], lengths: Sequence[int], rows: int) -> int:
    """The work of an epoch with its compilations, in tokens of a row."""
    rungs = [batch.rung for batch in plan_once(lengths, ladder, rows)]
    return sum(rungs) + len(set(rungs)) * _COMPILATION * ladder[-1]


def row_multiple(spans: int) -> int:
    """What the length of a row is a multiple of, on so many devices."""
    return math.lcm(MULTIPLE, spans)


def check_ladder(ladder: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    """The ladder as a tuple, if it is increasing and its top holds the longest example.

    Raises:
      ValueError: it is empty, not increasing, or too low.
    """
    ladder = tuple(int(rung) for rung in ladder)
    if not ladder or ladder[0] < 1 or any(a >= b for a, b in zip(ladder, ladder[1:], strict=False)):
        raise ValueError(f"`buckets` must be increasing lengths of at least 1, got {ladder}")
    if ladder[-1] < max(lengths):
        raise ValueError(
            f"`buckets` end at {ladder[-1]} tokens, but an example has {max(lengths)}; add a longer"
            " one, or shorten the examples"
        )
    return ladder


def best_ladder(lengths: Sequence[int], count: int, *, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """The ladder of at most `count` rungs that pads these lengths least.

    Exact, by dynamic programming over the distinct lengths rounded up to `multiple` (which is
    doubled while that leaves more than 512 of them: the table is that number squared).

    Args:
      lengths: tokens of each example.
      count: maximum number of rungs, at least 1.
      multiple: every rung is a multiple of it.
    """
    if count < 1:
        raise ValueError(f"`buckets` must be at least 1, got {count}")
    return _best_ladders(lengths, count, multiple)[-1]


def _best_ladders(lengths: Sequence[int], count: int, multiple: int) -> list[tuple[int, ...]]:
    """The best ladders of at most 1, 2, ... `count` rungs; fewer where there are fewer lengths."""
    while True:
        rounded = -(-np.asarray(lengths, np.int64) // multiple) * multiple
        rungs, examples = np.unique(rounded, return_counts=True)
        if len(rungs) <= _MOST_RUNGS:
            break
        multiple *= 2
    below = np.concatenate([[0], np.cumsum(examples)])
    # cost[j]: fewest padded tokens when the first j rungs' examples are placed; cut[k][j]: where
    # the last of k buckets begins.
    cost = np.concatenate([[0.0], np.full(len(rungs), np.inf)])
    cuts = []
    for _ in range(min(count, len(rungs))):
        through = cost[:-1, None] + (below[None, 1:] - below[:-1, None]) * rungs[None, :]
        through[np.tril_indices(len(rungs), -1)] = np.inf  # a bucket ends where it begins or later
        cuts.append(through.argmin(0))
        cost = np.concatenate([[0.0], through.min(0)])
    return [_traced(rungs, cuts[:n]) for n in range(1, len(cuts) + 1)]


def _traced(rungs: np.ndarray, cuts: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The ladder that the cuts lead to, from its top."""
    ladder, end = [], len(rungs)
    for cut in reversed(cuts):
        if end == 0:
            break
        ladder.append(int(rungs[end - 1]))
        end = int(cut[end - 1])
    return tuple(reversed(ladder))


def rung_of(ladder: Sequence[int], lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """The smallest rung that holds each length. int (n,) -> int (n,)."""
    return np.asarray(ladder)[np.searchsorted(ladder, lengths)]


def widths_of(
    sizes: Sequence[tuple[int, ...]], ladder: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Of each rung, what the parts of its examples, or of lower rungs', are padded to.

    Args:
      sizes: tokens of each example's parts, which its length is the sum of.
      ladder: of the lengths.
    """
    each, found = np.array(sizes), {}
    for rung in ladder:
        most = each[each.sum(axis=1) <= rung].max(axis=0, initial=1)
        found[rung] = tuple((-(-most // MULTIPLE) * MULTIPLE).tolist())
    return found


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` numbers that depends only on `seed` and `epoch`.

    It sorts the raw output of Philox, whose stream is stable across NumPy versions; the methods of
    `numpy.random.Generator` are not guaranteed to be.
    """
    raw = np.random.Philox(key=[seed, epoch]).random_raw(count)
    return np.argsort(raw, kind="stable")


def plan_epoch(
    lengths: Sequence[int], ladder: Sequence[int], rows: int, *, seed: int, epoch: int
) -> list[Bucket]:
    """Distributes the examples of an epoch over batches of one rung each, every example once.

    The remainder of a rung moves up to the next one, so at most one batch has fewer than `rows`
    examples (padded to the rung of its longest), and all epochs have equally many batches.

    Args:
      lengths: tokens of each example.
      ladder: from `best_ladder` or `check_ladder`.
      rows: examples of a batch.
      seed: seed of the run.
      epoch: 0, 1, 2, ...

    Returns:
      The batches in training order.
    """
    # Shuffled before they are dealt: which examples share a batch changes from epoch to epoch.
    order = shuffled(len(lengths), seed, epoch)
    return shuffle(_deal(order, np.asarray(lengths), ladder, rows), seed, epoch)


def plan_once(lengths: Sequence[int], ladder: Sequence[int], rows: int) -> list[Bucket]:
    """Every example once in a fixed order, for evaluation."""
    return _deal(np.arange(len(lengths)), np.asarray(lengths), ladder, rows)


def _deal(order: np.ndarray, lengths: np.ndarray, ladder: Sequence[int], rows: int) -> list[Bucket]:
    rungs = rung_of(ladder, lengths[order])
    planned, left = [], order[:0]
    for rung in ladder:
        members = np.concatenate([left, order[rungs == rung]])
        whole = len(members) // rows * rows
        planned += [Bucket(rung, m) for m in members[:whole].reshape(-1, rows)]
        left = members[whole:]
    if len(left):
        planned.append(Bucket(int(rung_of(ladder, [lengths[left].max()])[0]), left))
    return planned


def shuffle(planned: list, seed: int, epoch: int) -> list:
    """Batches or rows of an epoch in another order."""
    # Another counter than in `shuffled`: with the same stream the two orders would be correlated.
    raw = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]).random_raw(len(planned))
    return [planned[i] for i in np.argsort(raw, kind="stable")]
