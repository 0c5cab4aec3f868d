"""Packed rows: every example once an epoch, little padding, and the numbers of single rows."""

import dataclasses
import json
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax import models, train
from lora_jax.train import Example, TrainConfig, batches_per_epoch, iterate, loader, once, packing
from lora_jax.train.batches import padding_share
from lora_jax.train.loss import Rows
from lora_jax.train.packing import choose, pack_epoch, rows_by_rank
from lora_jax.train.preparation import arrange, layout

from tests.support import mesh_runs
from tests.support.mesh_runs import KINDS, adapted, make, run
from tests.support.train_toys import Toy, numbers, toy_fit

pytestmark = pytest.mark.once

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)
PACKED = dict(packing=True, packed_length=48, batch_size=8)


def loads_of(lengths, by_rank):
    ranked = sorted(lengths, reverse=True)
    return np.bincount(by_rank, weights=ranked).astype(int)


def best_fit(lengths, length):
    """Room left in each row, by looking at every row for every example."""
    rooms = []
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else length) - size)
    return sorted(rooms)


@given(LENGTHS, st.integers(30, 64))
@settings(max_examples=60, deadline=None)
def test_rows_are_filled_by_best_fit(lengths, length):
    loads = loads_of(lengths, rows_by_rank(lengths, length))
    assert sorted((length - loads).tolist()) == best_fit(lengths, length)


@given(LENGTHS, st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_example_once(lengths, rows, epoch):
    by_rank = rows_by_rank(lengths, 32)
    plan = pack_epoch(lengths, by_rank, 32, rows=rows, seed=5, epoch=epoch)
    assert sorted(i for b in plan for i in b.examples) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for b in plan for row in b.rows)
    # All epochs have equally many batches, and only the last has fewer rows.
    assert len(plan) == -(-(by_rank.max() + 1) // rows)
    assert all(len(b.rows) == rows for b in plan[:-1])


def test_an_epoch_is_drawn_by_seed_and_number():
    lengths = np.random.default_rng(0).integers(3, 9, 200).tolist()
    by_rank = rows_by_rank(lengths, 32)

    def rows(seed, epoch):
        plan = pack_epoch(lengths, by_rank, 32, rows=4, seed=seed, epoch=epoch)
        return [tuple(sorted(row.tolist())) for b in plan for row in b.rows]

    assert rows(1, 2) == rows(1, 2)
    for other in (rows(1, 3), rows(2, 2)):
        # Neither the rows' examples nor their order are those of another epoch.
        assert len(set(other) & set(rows(1, 2))) < 5


def example(length, seed, learned=None):
    tokens = np.random.default_rng([seed, length]).permutation(500)[:length] + 1
    return Example(tokens.astype(np.int32), np.arange(length) >= (learned or 1), f"e{seed}")


def pairs(batch):
    """(token, next token) of every learned place, and the segments of both."""
    found = []
    for tokens, segments, at, targets, weights in zip(
        batch.tokens, batch.segments, batch.positions, batch.targets, batch.weights, strict=True
    ):
        flat, own = tokens.reshape(-1), segments.reshape(-1)
        kept = at[weights > 0]
        assert (own[kept] == own[kept + 1]).all() and (own[kept] > 0).all()
        found += zip(flat[kept].tolist(), targets[weights > 0].tolist(), strict=True)
    return found


@pytest.mark.parametrize("accumulation, parts", [(1, 1), (2, 1), (2, 2)])
def test_batches_ask_for_exactly_what_is_learned(accumulation, parts):
    data = [example(int(n), i) for i, n in enumerate([5, 9, 17, 30, 8, 3, 3, 1, 2, 12, 25, 4])]
    # Of a mark at an example's first token nothing is learned: nothing predicts it.
    data[0] = data[0]._replace(learned=np.ones(5, bool))
    plan = loader(data, batch_size=2, accumulation=accumulation, packed=32, rows=Rows(parts=parts))
    batches = once(plan)
    want = sorted(
        (int(e.tokens[t - 1]), int(e.tokens[t])) for e in data for t in range(1, len(e.tokens))
    )
    assert sorted(p for b in batches for p in pairs(b)) == want
    for batch in batches:
        assert batch.tokens.shape == batch.segments.shape == (accumulation, 2, 32)
        assert ((batch.tokens == 0) == (batch.segments == 0)).all()
        assert batch.positions.shape[1] // parts in plan.places[32]
        assert [x.dtype.name for x in batch[:5]] == ["int32"] * 3 + ["float32", "int32"]
        assert batch.reads is None
        assert (batch.segments[..., 0] == 1).all()  # rows that only fill a batch are real ones
    real = sum(len(e.tokens) for e in data)
    cells = len(batches) * batches[0].tokens.size
    assert padding_share(plan) == pytest.approx(1 - real / cells)


def test_the_iterator_goes_on_in_the_middle_of_an_epoch():
    data = [example(int(n), i) for i, n in enumerate(np.random.default_rng(1).integers(2, 30, 60))]
    plan = loader(data, batch_size=3, packed=32, seed=3, epochs=3)
    steps = 3 * batches_per_epoch(plan)
    items = list(iterate(plan, steps))
    size = steps // 3
    assert [sum(i.tokens for i in items[e * size : (e + 1) * size]) for e in range(3)] == [
        sum(len(e.tokens) for e in data)
    ] * 3
    reader = iterate(plan, steps)
    for _ in range(size + 1):
        next(reader)
    again = iterate(plan, steps)
    again.set_state(json.loads(json.dumps(reader.get_state())))
    for got, want in zip(again, items[size + 1 :], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)


# --- numbers ------------------------------------------------------------------------------------

LOSSES = {
    "lora": ({}, {}),
    "dora": ({}, dict(use_dora=True)),
    "nf4": (dict(quantize=True), {}),
    "gpt2": (dict(gpt2=True), dict(target_modules=("c_attn", "c_proj"))),
    "tied head": (dict(tied=True), dict(target_modules=("q_proj", "embed_tokens"))),
    "layers apart": (dict(scan=False), {}),
}


def totals(model, params, batches):
    """The summed loss of an epoch and its gradient; each shape of batch compiles once."""
    trainable, frozen = lora.split(params)
    step = jax.jit(jax.value_and_grad(train.lora_loss(model)))
    found = [
        step(trainable, frozen, jax.tree.map(lambda x: x[0], batch), None) for batch in batches
    ]
    return jax.tree.map(lambda *x: sum(x), *found)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("lora", "nf4") else pytest.mark.slow)
        for kind in LOSSES
    ],
)
def test_losses_and_gradients_are_those_of_buckets_and_of_single_rows(kind):
    options, fields = LOSSES[kind]
    model = make(**options)
    _, params = adapted(model, {"init": "random", **fields})
    data = mesh_runs.data()[:12]
    packed = once(loader(data, batch_size=2, packed=48))
    buckets = once(loader(data, batch_size=4, buckets=1))
    single = once(loader(data, batch_size=1, buckets=1))
    assert packed[0].segments.max() >= 3
    want, *others = (totals(model, params, batches) for batches in (single, buckets, packed))
    for got in others:
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_under_dropout_a_changed_example_changes_no_loss_of_its_neighbours():
    model = make()
    _, params = adapted(model, {"init": "random", "dropout": 0.5})
    (batch,) = once(loader(mesh_runs.data()[:8], batch_size=3, packed=48))
    tokens, segments, at = batch.tokens[0], batch.segments[0], batch.positions[0]
    changed = np.where(segments == 2, (tokens + 1) % 128, tokens)
    losses = jax.jit(lora.lorafy(train.losses_of(model)))

    def run(tokens):
        return np.asarray(
            losses(
                params, tokens, at, batch.targets[0], segments=jnp.asarray(segments),
                lora_key=jax.random.key(3),
            )
        )  # fmt: skip

    before, after = run(tokens), run(changed)
    touched = segments.reshape(-1)[at] == 2
    assert (before[touched] != after[touched]).all()
    np.testing.assert_array_equal(before[~touched], after[~touched])


@pytest.mark.filterwarnings("ignore:every device holds all of")
@pytest.mark.parametrize(
    "kind",
    [
        "accumulation",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("lora", "nf4", "dropout")),
    ],
)
def test_on_a_mesh_the_losses_are_those_of_one_device(kind):
    options, fields, training = KINDS[kind]
    model, training = make(**options), {**PACKED, **training, "batch_size": 8, "steps": 4}
    want, expected = run(model, fields, training)
    got, adapters = run(model, fields, training, models.make_mesh(data=2, fsdp=4))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


# --- runs ---------------------------------------------------------------------------------------


def fit(output_dir=None, *, record=None, data=None, **options):
    model = make()
    config, params = adapted(model, {"dropout": 0.2})
    usual = dict(batch_size=2, steps=9, save_every=4, progress=False, tensorboard=False)
    train_config = TrainConfig(output_dir=output_dir, **{**usual, **options})
    lines: list[str] = []
    hooks = train.Hooks(record=record, layout=lines.append)
    data = mesh_runs.data() if data is None else data
    result = train.fit(model, params, data, data[:4], train_config, lora_config=config, hooks=hooks)
    return result, lines


ROWS = dict(packing=True, packed_length=48)


def test_a_packed_run_resumes_to_the_bit_in_the_middle_of_an_epoch(tmp_path):
    whole, lines = fit(**ROWS)
    (line,) = lines
    assert line.startswith("packed rows of 48 tokens, ") and line.endswith(" 5 steps an epoch")
    assert len(whole.compiled) == 1 and whole.compiled[0][:3] == (1, 2, 48)
    first = [r for r in whole.history if r["kind"] == "train"][:5]
    assert [r["epoch"] for r in first] == [0] * 5
    assert sum(r["tokens"] for r in first) == sum(len(e.tokens) for e in mesh_runs.data())

    def stop(record):
        if record["step"] == 6 and record["kind"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, record=stop, **ROWS)
    with pytest.raises(ValueError, match="`packed_length` was 48 and is None"):
        fit(tmp_path, resume=True)
    resumed, _ = fit(tmp_path, resume=True, **ROWS)
    assert numbers(resumed.history) == numbers(whole.history)
    jax.tree.map(np.testing.assert_array_equal, resumed.lora_params, whole.lora_params)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_a_resumed_run_keeps_what_was_chosen(tmp_path, packed, monkeypatch):
    def stop(record):
        if record["step"] == 3:
            raise RuntimeError("stopped")

    auto = {**ROWS, "packing": "auto", "packed_length": None, "save_every": 2}
    monkeypatch.setattr(packing, "LEAST_STEPS", 1)
    monkeypatch.setattr(packing, "WORTH", 9.0 if packed else 0.0)
    whole, (line,) = fit(**auto)
    assert line.startswith("packed rows" if packed else "buckets")
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, record=stop, **auto)
    monkeypatch.setattr(packing, "WORTH", 0.0 if packed else 9.0)
    resumed, lines = fit(tmp_path, resume=True, **auto)
    assert lines == [line] and numbers(resumed.history) == numbers(whole.history)


def test_evaluation_has_the_loss_of_single_rows():
    packed, _ = fit(steps=1, **ROWS)
    buckets, _ = fit(steps=1)
    first = [
        next(r["eval_loss"] for r in x.history if r["kind"] == "eval") for x in (packed, buckets)
    ]
    assert first[0] == first[1]


def test_by_default_rows_hold_the_longest_example():
    longest = max(len(e.tokens) for e in mesh_runs.data())
    result, (line,) = fit(steps=1, packing=True)
    assert result.compiled[0][2] == 16 >= longest
    assert line.startswith("packed rows of 16 tokens, ")


def test_a_model_without_segments_is_not_packed():
    with pytest.raises(ValueError, match="`packing` is True, but the model's `apply` has no argum"):
        toy_fit(packing=True)
    data = [example(4 if i % 8 else 30, i)._replace(learned=np.arange(4 if i % 8 else 30) > 0)
            for i in range(800)]  # fmt: skip
    config = TrainConfig(packing="auto", batch_size=1, buckets=1)
    assert layout(Toy(), data, config).loader.by_rank is None
    assert layout(make(), data, config).loader.by_rank is not None


def test_a_head_for_answers_is_not_packed():
    asks = make(task="question-answering")
    with pytest.raises(ValueError, match="`packing` is True, but .*, or its head finds answers"):
        arrange(asks, mesh_runs.data(), TrainConfig(packing=True))


# (lengths, whether the log names `packing`): 69 % of padding, none packed; 44 %, and 25 % packed;
# 11 %, none packed.
ADVICE = {"much": ([4] * 12 + [16], True), "a third": ([10, 10, 10, 6], False),
          "little": ([16] * 6 + [8, 8], False)}  # fmt: skip


@pytest.mark.parametrize("lengths, advised", ADVICE.values(), ids=ADVICE)
def test_packing_is_named_where_it_halves_much_padding(lengths, advised):
    data = [example(n, i)._replace(learned=np.arange(n) > 0) for i, n in enumerate(lengths)]
    config = TrainConfig(batch_size=1, buckets=(16,))
    assert arrange(make(), data, config)[1].text.endswith("; consider packing") == advised


def test_a_quantized_model_takes_packed_rows():
    config = TrainConfig(packing=True, packed_length=48)
    assert layout(make(quantize=True), mesh_runs.data(), config).loader.ladder == (48,)


CASES: dict[str, dict[str, Any]] = {
    "saves": dict(lengths=[10] * 900 + [90] * 100, ladder=(96,), length=96, chosen=True),
    "few steps": dict(lengths=[10] * 90 + [90] * 10, ladder=(96,), length=96, chosen=False),
    "little padding": dict(lengths=[90] * 1000, ladder=(96,), length=96, chosen=False),
    # A fifth is padding, but attention over 4,096 tokens costs more.
    "long rows": dict(lengths=[80] * 50_000, ladder=(96,), length=4096, chosen=False),
}


@pytest.mark.parametrize("case", CASES)
def test_auto_packs_where_it_saves_work(case):
    given = dict(CASES[case])
    chosen = given.pop("chosen")
    found = choose(**given, rows=2, width=64, packing="auto")
    assert found.length == (given["length"] if chosen else None)
    kind = "packed rows of" if chosen else "buckets of"
    assert found.text.startswith(kind) and f"{found.steps:,} steps an epoch" in found.text


def test_the_row_of_the_longest_example_is_not_always_the_first():
    lengths = list(range(1, 17))
    by_rank = rows_by_rank(lengths, 16)

    def place(epoch):
        plan = pack_epoch(lengths, by_rank, 16, rows=1, seed=0, epoch=epoch)
        return [15 in bucket.examples for bucket in plan].index(True)

    assert len({place(epoch) for epoch in range(6)}) > 2


def test_rows_that_fill_up_a_batch_count_as_padding():
    assert choose([8, 8, 8], (8,), 8, rows=1, width=64, packing=True).steps == 3
    found = choose([7, 1, 5], (8,), 8, rows=3, width=64, packing=True)
    assert found.text.startswith(
        "packed rows of 8 tokens, 45.8% padding (45.8% in buckets), 1 step "
    )


def test_a_row_too_short_for_an_example_is_refused_where_rows_are_packed():
    with pytest.raises(ValueError, match="`packed_length` is 8 tokens, but an example has 15"):
        fit(packing=True, packed_length=8)
    with pytest.raises(ValueError, match="`packed_length` is for packed rows: add packing=True"):
        TrainConfig(packed_length=8)


@pytest.mark.parametrize("packing", ["on", 1, None])
def test_wrong_settings(packing):
    with pytest.raises(ValueError, match='`packing` must be "auto", True or False, got'):
        TrainConfig(packing=packing)
    with pytest.raises(ValueError, match="`packed_length` must be a whole number of at least 1"):
        dataclasses.replace(TrainConfig(), packed_length=0)
