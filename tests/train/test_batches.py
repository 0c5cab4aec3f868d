"""Buckets and batches: every example once, little padding, and the right targets."""

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.train import Example, batches_per_epoch, best_ladder, iterate, loader, once
from lora_jax.train.batches import _places_of, grid_of, padding_share
from lora_jax.train.buckets import (
    ladder_of,
    plan_epoch,
    plan_once,
    rung_of,
    shuffled,
    widths_of,
)
from lora_jax.train.examples import data_hash
from lora_jax.train.packing import choose

pytestmark = pytest.mark.once

PAD = 0


def example(length, seed=0, learned=None):
    """Distinct tokens, all but the first `learned` from the end unlearned."""
    tokens = np.random.default_rng([seed, length]).permutation(10_000)[:length] + 1
    mask = np.arange(length) >= length - (learned or length - 1)
    mask[0] = False
    return Example(tokens.astype(np.int32), mask, f"e{seed}")


def dataset(count=50, seed=0):
    lengths = np.random.default_rng(seed).integers(2, 70, count)
    return [example(int(n), seed=i, learned=1 + int(n) // 3) for i, n in enumerate(lengths)]


def padded(lengths, ladder):
    return int(rung_of(ladder, lengths).sum())


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_best_ladder_is_the_best(lengths, count):
    ladder = best_ladder(lengths, count)
    assert len(ladder) <= count and ladder[-1] >= max(lengths)
    rungs = range(8, -(-max(lengths) // 8) * 8 + 1, 8)
    every = (c for n in range(1, count + 1) for c in itertools.combinations(rungs, n))
    best = min(padded(lengths, c) for c in every if c[-1] >= max(lengths))
    assert padded(lengths, ladder) == best


def test_best_ladder_coarsens_a_long_tail():
    # 512 multiples of 8 are not too many.
    assert list(best_ladder(range(16, 8 * 514, 8), 1)) == [8 * 513]
    lengths = np.arange(1, 100_000, 7)
    ladder = best_ladder(lengths.tolist(), 4)
    assert len(ladder) == 4 and padded(lengths, ladder) < 1.3 * lengths.sum()


@pytest.mark.parametrize(("count", "rungs"), [(40, 4), (3200, 7), (40_000, 16)])
def test_more_lengths_where_an_epoch_repays_their_compilation(count, rungs):
    lengths = np.random.default_rng(0).geometric(0.01, count).clip(max=400).tolist()
    ladder = ladder_of(None, lengths, rows=4)
    assert len(ladder) == rungs

    def steps(ladder):
        """Of an epoch, in steps of the longest batch; a compilation counts as eight of them."""
        batches = plan_once(lengths, ladder, 4)
        return sum(b.rung for b in batches) / 400 + 8 * len({b.rung for b in batches})

    others = [ladder_of(n, lengths, rows=4) for n in range(4, 17)]
    assert steps(ladder) == min(map(steps, others))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_example_once(lengths, rows, epoch):
    ladder = best_ladder(lengths, 3)
    slots = plan_epoch(lengths, ladder, rows, seed=1, epoch=epoch)
    dealt = np.concatenate([s.rows for s in slots])
    assert sorted(dealt.tolist()) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in s.rows) <= s.rung for s in slots)
    assert sum(len(s.rows) < rows for s in slots) <= 1
    assert len(slots) == len(plan_once(lengths, ladder, rows)) == -(-len(lengths) // rows)


def test_what_is_left_is_padded_to_its_longest_and_no_further():
    # Rungs 8 and 16 have one example too many for batches of two, and none is as long as 64.
    (first, last) = plan_once([3, 5, 12], (8, 16, 64), 2)
    assert (first.rung, last.rung) == (8, 16) and last.rows.tolist() == [2]
    (only,) = plan_once([3], (8, 16, 64), 2)
    assert only.rung == 8


def test_epochs_differ_and_repeat():
    lengths = [len(e.tokens) for e in dataset()]
    plans = [
        [s.rows.tolist() for s in plan_epoch(lengths, (80,), 4, seed=s, epoch=e)]
        for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert plans[0] == plans[3]
    assert plans[0] != plans[1] and plans[0] != plans[2] and plans[1] != plans[2]
    # Other examples stand together, too, not the same batches in another order.
    together = [sorted(map(sorted, plan)) for plan in plans]
    assert together[0] != together[1] and together[0] != together[2]


def test_batches_are_shuffled_otherwise_than_examples():
    order = shuffled(50, 0, 0)
    plan = plan_epoch([5] * 50, (8,), 1, seed=0, epoch=0)
    # What one permutation gives when it is applied twice.
    assert [int(batch.rows[0]) for batch in plan] != order[order].tolist()


def pairs(batch):
    """(token, next token) of every learned place, out of the batch's arrays."""
    found = []
    for tokens, at, targets, weights in zip(*batch[:4], strict=True):
        before = tokens.reshape(-1)[at]
        found += [p for p, w in zip(zip(before, targets, strict=True), weights, strict=True) if w]
    return sorted((int(a), int(b)) for a, b in found)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("learned", [None, 2])
def test_batches_ask_for_exactly_what_is_learned(accumulation, learned):
    data = [example(int(n), seed=i, learned=learned) for i, n in enumerate([5, 9, 17, 30, 8, 3, 3])]
    layout = loader(data, batch_size=2, accumulation=accumulation, buckets=(8, 16, 32), pad_id=PAD)
    batches = once(layout)
    expected = sorted(
        (int(e.tokens[t - 1]), int(e.tokens[t])) for e in data for t in np.flatnonzero(e.learned)
    )
    assert sorted(p for b in batches for p in pairs(b)) == expected
    for batch in batches:
        a, b, t = batch.tokens.shape
        assert (a, b) == (accumulation, 2) and t in (8, 16, 32)
        assert batch.positions.shape[1] in layout.places[t]
        assert layout.places[t][-1] <= b * t
        assert (np.diff(batch.positions, axis=1) > 0).all()  # distinct and in order
        assert batch.positions.max() < b * t
        assert [x.dtype.name for x in batch[:4]] == ["int32", "int32", "int32", "float32"]
        assert batch.segments is None  # one example a row


def test_places_are_what_the_planned_epochs_need():
    data = dataset()
    for epochs in (1, 3):
        layout = loader(data, batch_size=4, accumulation=2, buckets=2, seed=3, epochs=epochs)
        items = list(iterate(layout, epochs * batches_per_epoch(layout)))
        needed = {rung: 0 for rung in layout.ladder}
        for batch in [item.batch for item in items] + once(layout):
            rung = batch.tokens.shape[2]
            needed[rung] = max(needed[rung], int(batch.weights.sum(1).max()))
        assert {r: (-(-n // 16) * 16,) for r, n in needed.items()} == layout.places
    with pytest.raises(
        ValueError, match="`steps` is 22, but .* for 3 epochs of 7 steps; lay it out"
    ):
        iterate(layout, 22)


def test_evaluation_has_room_for_what_no_epoch_puts_together():
    data = [example(20, i, learned=learned) for i, learned in enumerate((9, 9, 1, 1))]
    for seed in range(8):
        first, second = once(loader(data, batch_size=2, buckets=1, seed=seed))
        assert (first.weights.sum(), second.weights.sum()) == (18, 2)


def test_few_places_where_little_is_learned_and_all_where_it_does_not_pay():
    short = loader([example(60, i, learned=3) for i in range(9)], batch_size=4)
    assert short.places == {64: (16,)}
    exact = loader([example(60, i, learned=4) for i in range(4)], batch_size=4)
    assert exact.places == {64: (16,)} and once(exact)[0].weights.sum() == 16
    full = loader([example(64, i) for i in range(9)], batch_size=4)
    assert full.places == {64: (256,)}
    assert np.array_equal(once(full)[0].positions[0], np.arange(256))


def test_a_second_number_of_places_where_most_batches_need_much_less():
    rare = [example(60, i, learned=50 if i % 100 == 0 else 3) for i in range(400)]
    layout = loader(rare, batch_size=4)
    # 4 * 3 learned tokens in most batches, and 50 + 3 * 3 or a little more in the few others.
    assert layout.places[64][0] == 16 and layout.places[64][1] >= 64
    batches = [item.batch for item in iterate(layout, batches_per_epoch(layout))]
    counts = np.array([int(b.weights.sum()) for b in batches])
    places = np.array([b.positions.shape[1] for b in batches])
    assert counts.sum() == 4 * 50 + 396 * 3
    assert np.array_equal(places, np.where(counts <= 16, 16, layout.places[64][1]))
    few = loader(rare[:100], batch_size=4)  # too few batches to be worth a second program
    assert len(few.places[64]) == 1


@pytest.mark.parametrize(
    "small, large, expected",
    [(64, 16, (48, 64)), (63, 16, (64,)), (64, 64, (64,))],
    ids=["worth it", "too few batches", "too little saved"],
)
def test_edges_of_a_second_number_of_places(small, large, expected):
    assert _places_of([48] * small + [64] * large, 1000) == expected


def test_missing_rows_repeat_one_and_learn_nothing():
    layout = loader([example(7, 1)], batch_size=3, pad_id=77)
    (batch,) = once(layout)
    assert batch.tokens.shape == (1, 3, 8) and (batch.tokens[0, :, 7] == 77).all()
    assert np.array_equal(batch.tokens[0, 1], batch.tokens[0, 0])
    assert batch.weights.sum() == 6
    # They are computed too: 7 of 3 times 8 tokens are real.
    assert padding_share(layout) == pytest.approx(1 - 7 / 24)


def test_iterator_goes_on_from_its_position():
    layout = loader(dataset(), batch_size=4, seed=3, epochs=3)
    size = batches_per_epoch(layout)
    items = list(iterate(layout, 2 * size + 1))
    assert [i.epoch for i in items] == [0] * size + [1] * size + [2]
    assert sum(i.tokens for i in items[:size]) == sum(len(e.tokens) for e in layout.examples)
    reader = iterate(layout, 2 * size + 1)
    for _ in range(size + 2):
        next(reader)
    position = json.loads(json.dumps(reader.get_state()))
    again = iterate(layout, 2 * size + 1)
    again.set_state(position)
    rest = list(again)
    assert len(rest) == size - 1
    for got, expected in zip(rest, items[size + 2 :], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_buckets_save_padding_on_real_lengths():
    # Lengths of sentences are far from uniform; these are drawn like SST-2's.
    rng = np.random.default_rng(0)
    data = [example(int(n), i) for i, n in enumerate(2 + rng.gamma(2.5, 10, 400).astype(int))]
    one = padding_share(loader(data, batch_size=8, buckets=1))
    four = padding_share(loader(data, batch_size=8, buckets=4))
    assert one > 0.7 and four < 0.3


def test_bad_layouts():
    with pytest.raises(ValueError, match="the dataset is empty"):
        loader([], batch_size=2)
    with pytest.raises(ValueError, match="`buckets` end at 8 tokens, but an example has 9"):
        loader([example(9)], batch_size=2, buckets=(8,))
    with pytest.raises(ValueError, match=r"`buckets` must be increasing .*, got \(16, 8\)"):
        loader([example(9)], batch_size=2, buckets=(16, 8))
    with pytest.raises(ValueError, match="`buckets` must be at least 1, got 0"):
        loader([example(9)], batch_size=2, buckets=0)


def test_hash_sees_tokens_mask_and_order():
    data = dataset(5)
    changed = [data[0]._replace(learned=~data[0].learned), *data[1:]]
    hashes = {data_hash(d) for d in (data, data[::-1], data[:4], changed)}
    assert len(hashes) == 4 and data_hash(list(data)) == data_hash(data)


def test_both_parts_of_a_pair_have_room_in_its_rung():
    # The first example fills its rung; the third is in a higher one.
    assert widths_of([(12, 4), (3, 9), (20, 2)], (16, 24)) == {16: (16, 16), 24: (24, 16)}


def test_every_device_has_as_many_tokens_of_a_row():
    assert all(rung % 24 == 0 for rung in ladder_of(None, [5, 30, 40], rows=2, spans=3))


def test_the_grid_of_a_pair_of_texts_counts_both():
    data = [
        Example(np.arange(3, dtype=np.int32), np.arange(3) > 0, "a", read=np.zeros(n, np.int32))
        for n in (9, 2)
    ]
    layout = loader(data, batch_size=2, buckets=1)
    (batch,) = once(layout)
    assert grid_of(batch) == 2 * 8 + 2 * 16
    assert 1 - (3 + 9 + 3 + 2) / grid_of(batch) == pytest.approx(padding_share(layout))
    said = choose([12, 5], (16,), 16, rows=2, width=8, packing=None, widths=layout.widths)
    assert said.text == "buckets of 16 tokens, 64.6% padding, 1 step an epoch"
