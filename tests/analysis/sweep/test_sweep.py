"""The rank sweep: every adapter of a batch moves as it would alone, and the table says so."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import analysis
from lora_jax.analysis.sweep import train
from lora_jax.analysis.sweep.config import with_rank
from lora_jax.analysis.sweep.plan import Job, plan_sweep
from lora_jax.analysis.sweep.store import Progress
from lora_jax.analysis.sweep.sweep import _groups
from lora_jax.train.step import optimizer

from tests.support.sweep_task import CONFIG, PARAMS, SWEEP, TASK, TRAIN, D, batches, loss, score

pytestmark = pytest.mark.once


def start(rank, seed=0):
    plan = lora.plan(with_rank(CONFIG, rank), loss, PARAMS, next(batches(0)))
    return lora.init(jax.random.key(seed), plan, PARAMS)


@pytest.mark.parametrize("targets", [("layer", "small"), "all-linear"])
def test_ranks_above_a_small_head_are_an_error_whose_remedies_work(targets):
    params = {**PARAMS, "small": jnp.ones((D, 3))}

    def with_head(params, batch):
        return jnp.mean((batch[0] @ params["layer"]["kernel"] @ params["small"]) ** 2)

    task = TASK._replace(params=params, loss=with_head)

    def plan(config, ranks=(1, 4)):
        sweep = dataclasses.replace(SWEEP, ranks=ranks)
        return plan_sweep(task, sweep, config, TRAIN, log=print).plan_of(max(ranks))

    config = dataclasses.replace(CONFIG, target_modules=targets)
    with pytest.raises(
        ValueError, match="`ranks` has 4, above the smallest dimension 3 of `small`"
    ):
        plan(config)
    assert len(plan(config, ranks=(1, 3)).adapted) == 2
    assert len(plan(dataclasses.replace(config, exclude_modules=("small",))).adapted) == 1
    others = "all-linear" if isinstance(targets, str) else ("layer",)
    saved = plan(dataclasses.replace(config, modules_to_save=("small",), target_modules=others))
    assert (len(saved.adapted), len(saved.saved)) == (1, 1)


def test_a_start_that_needs_even_ranks():
    config = dataclasses.replace(CONFIG, init="orthogonal")
    even = dataclasses.replace(SWEEP, ranks=(2, 4))
    assert plan_sweep(TASK, even, config, TRAIN, log=print).plan_of(2).adapted[0].rank == 2
    with pytest.raises(ValueError, match='init="orthogonal" needs an even rank, got rank=1'):
        plan_sweep(TASK, SWEEP, config, TRAIN, log=print)


def test_each_adapter_of_a_batch_moves_as_it_would_alone():
    ranks, rates = (1, 4, 2), (1e-2, 3e-3, 3e-2)
    adapters = [start(r) for r in ranks]
    together = train.train_adapters(
        loss, adapters, rates, batches(0), TRAIN, key=jax.random.key(0), rank=5
    )

    def alone(adapter, rate):
        trainable, frozen = lora.split(adapter)
        tx = optimizer(dataclasses.replace(TRAIN, learning_rate=rate), 60)

        @jax.jit
        def step(trainable, state, batch):
            def of(t):
                return lora.lorafy(loss)(lora.combine(t, frozen), batch)

            value, grads = jax.value_and_grad(of)(trainable)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        state, losses = tx.init(trainable), []
        for batch in batches(0):
            trainable, state, value = step(trainable, state, batch)
            losses.append(float(value))
        return lora.merge(lora.combine(trainable, frozen)), losses

    for adapter, rate, tree, losses, rank in zip(
        adapters, rates, together.trees, together.losses, ranks, strict=True
    ):
        merged, expected = alone(adapter, rate)
        np.testing.assert_allclose(losses, expected, rtol=2e-3)
        np.testing.assert_allclose(
            lora.merge(tree)["layer"]["kernel"], merged["layer"]["kernel"], atol=2e-3
        )
        # What only pads an adapter never moves.
        leaf = tree["layer"]["kernel"]
        assert leaf.rank == 5
        assert not np.any(leaf.a[:, rank:]) and not np.any(leaf.b[rank:])


def test_the_time_of_all_steps_is_reckoned_from_those_that_compiled_nothing():
    at = Progress(10, None, np.zeros(10), seconds=6.0, timed=8, batches="", compiled=50.0)
    assert train._seconds(at) == 7.5
    assert train._seconds(at._replace(seconds=0.0, timed=0)) == 50.0


def test_full_fine_tuning_is_the_optimizer_on_every_weight():
    found = train.train_full(loss, PARAMS, 1e-2, batches(0), TRAIN, key=jax.random.key(0))
    tx = optimizer(dataclasses.replace(TRAIN, learning_rate=1e-2), 60)
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(jax.value_and_grad(loss))
    for batch in batches(0):
        _, grads = step(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4), found.trees[0], params
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    config = dataclasses.replace(TRAIN, output_dir=folder)
    said: list[str] = []
    return folder, analysis.rank_sweep(TASK, SWEEP, CONFIG, config, log=said.append), said


def test_the_rank_of_the_task_is_found(swept):
    _, found, _ = swept
    rows = {row.rank: row for row in found.rows}
    assert list(rows) == ["base", 1, 2, 4, "full"]
    assert rows[1].score > rows[2].score > 10 * rows[4].score
    assert found.smallest == 4
    assert found.smallest_interval == (4, 4)
    assert rows[2].parameters == 2 * 2 * D and rows["full"].parameters == D * D
    # The error that no change of rank 1 or 2 can go below, by Eckart, Young and Mirsky.
    assert rows[1].score > (2.0**2 + 1.5**2) / D * 0.8
    assert rows[1].interval[0] < rows[1].score < rows[1].interval[1]
    assert rows[2].ratio == pytest.approx(rows[2].score / rows["full"].score)
    assert "the smallest rank within 50% of full fine-tuning is 4" in str(found)


def test_each_rank_takes_its_best_learning_rate(swept):
    _, found, _ = swept
    for row in found.rows:
        tried = [r for r in found.runs if r.rank == row.rank and r.tuning is not None]
        if row.rank in (1, 2, 4):
            assert len(tried) == 2
            assert row.learning_rate == min(tried, key=lambda r: r.tuning).learning_rate


def test_the_table_the_json_and_the_figure(swept, tmp_path):
    _, found, _ = swept
    found.save_json(tmp_path / "sweep.json")
    held = json.loads((tmp_path / "sweep.json").read_text())
    assert held["smallest_rank"] == 4 and held["rows"][1]["rank"] == 1
    assert held["rows"][2]["score"] == found.rows[2].score
    found.plot(tmp_path / "sweep.png", title="a task of rank 3")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    *lines, intervals, _ = str(found).splitlines()
    assert len(lines) == 1 + len(found.rows)
    assert intervals.startswith("one seed; 95 % of 1,000 draws of the examples: another order")
    assert held["seeds"] == 1 and held["rows"][2]["seed_scores"] == [held["rows"][2]["score"]]


def never(*_):
    raise AssertionError("this was computed already")


def test_a_sweep_that_is_done_computes_nothing_again(swept):
    folder, found, _ = swept
    config = dataclasses.replace(TRAIN, output_dir=folder, resume=True)
    again = analysis.rank_sweep(
        TASK._replace(batches=never, score=never, tuning=never), SWEEP, CONFIG, config
    )
    assert again.rows == found.rows
    assert not list((folder / "runs").glob("*.npz"))  # scored: no weights are left behind


def test_nothing_is_lost_when_scoring_fails(tmp_path):
    config = dataclasses.replace(TRAIN, output_dir=tmp_path, steps=10)
    sweep = dataclasses.replace(SWEEP, learning_rates=(1e-2,))
    calls = []

    def breaks(params):
        calls.append(1)
        if len(calls) == 3:  # the base, the first rank, and then
            raise OSError("the disk is full")
        return score(params)

    with pytest.raises(OSError, match="the disk is full"):
        analysis.rank_sweep(TASK._replace(score=breaks), sweep, CONFIG, config)
    resumed = analysis.rank_sweep(
        TASK, sweep, CONFIG, dataclasses.replace(config, resume=True), log=calls.append
    )
    assert not any("trained" in line for line in calls if isinstance(line, str))
    whole = analysis.rank_sweep(TASK, sweep, CONFIG, dataclasses.replace(config, output_dir=None))
    assert [r.score for r in resumed.rows] == [r.score for r in whole.rows]


def test_a_short_search_for_the_learning_rate(tmp_path):
    config = dataclasses.replace(TRAIN, steps=20)
    sweep = dataclasses.replace(SWEEP, ranks=(4,), full=False, tune_steps=5)
    found = analysis.rank_sweep(TASK, sweep, CONFIG, config, log=lambda _: None)
    assert all(run.seconds > 0 for run in found.runs if run.rank == 4)
    assert sorted((r.steps, r.values is not None) for r in found.runs if r.rank == 4) == [
        (5, False), (5, False), (20, True),
    ]  # fmt: skip
    assert found.smallest is None and "without full fine-tuning" in found.verdict()


def test_adapters_of_several_seeds_each_see_their_own_batches():
    config = dataclasses.replace(TRAIN, steps=20)
    adapters, rates = [start(2, seed) for seed in (0, 1, 0)], (1e-2, 1e-2, 3e-2)
    both = zip(batches(0), batches(1), strict=True)
    key = jax.random.key(0)
    together = train.train_adapters(loss, adapters, rates, both, config, key=key, sources=(0, 1, 0))
    for seed, places in ((0, (0, 2)), (1, (1,))):
        alone = train.train_adapters(
            loss, [adapters[i] for i in places], [rates[i] for i in places], batches(seed), config,
            key=key,
        )  # fmt: skip
        np.testing.assert_allclose(together.losses[list(places)], alone.losses, rtol=1e-4)
        for i, tree in zip(places, alone.trees, strict=True):
            got, want = lora.merge(together.trees[i]), lora.merge(tree)
            np.testing.assert_allclose(got["layer"]["kernel"], want["layer"]["kernel"], atol=1e-5)


def test_seeds_stand_side_by_side_where_their_batches_have_the_same_shapes():
    def groups(source):
        under_way = plan_sweep(
            TASK._replace(batches=source), dataclasses.replace(SWEEP, together=4), CONFIG, TRAIN,
            log=print,
        )  # fmt: skip
        jobs = [Job(r, 1e-2, s, 60) for r in (1, 2, "full") for s in (0, 1, 2)]
        return [[(j.rank, j.seed) for j in group] for group in _groups(under_way, jobs)]

    alone = [[("full", s)] for s in (0, 1, 2)]
    assert groups(batches) == [
        [(1, 0), (1, 1), (1, 2), (2, 0)], [(2, 1), (2, 2)], *alone
    ]  # fmt: skip
    # The last batch of seed 1 is shorter.
    assert groups(
        lambda seed: (b if seed != 1 or i < 59 else (b[0][:5], b[1][:5])
                      for i, b in enumerate(batches(seed)))
    ) == [[(1, 0), (1, 2), (2, 0), (2, 2)], [(1, 1), (2, 1)], *alone]  # fmt: skip


def test_more_ranks_and_seeds_take_over_the_runs_that_are_there(tmp_path):
    config = dataclasses.replace(TRAIN, steps=10, output_dir=tmp_path, resume=True)
    fewer = dataclasses.replace(SWEEP, ranks=(1,), learning_rates=(1e-2,), together=5)
    more = dataclasses.replace(fewer, ranks=(1, 2), seeds=(0, 1, 2))
    said: list[str] = []
    first = analysis.rank_sweep(TASK, fewer, CONFIG, config, log=said.append)
    del said[:]
    found = analysis.rank_sweep(TASK, more, CONFIG, config, log=said.append)
    trained = [line.partition(":")[0] for line in said if line.startswith("trained")]
    full = "trained full (0.03)"
    assert trained == ["trained " + ", ".join(["1 (0.01)"] * 2 + ["2 (0.01)"] * 3), full, full]
    rows = {row.rank: row for row in found.rows}
    for row in first.rows:
        assert rows[row.rank].seed_scores[0] == row.score
    for rank in (1, 2, "full"):
        scores = [np.mean(np.asarray(r.values)) for r in found.runs if r.rank == rank]
        assert len(scores) == 3 and len(set(scores)) == 3
        assert rows[rank].score == pytest.approx(np.mean(scores))
        assert rows[rank].deviation == pytest.approx(np.std(scores, ddof=1))
    assert "means of 3 seeds, with the standard deviation between them" in str(found)
    assert f"±{rows[2].deviation:.4f}" in str(found)
    found.plot(tmp_path / "sweep.png")


@pytest.mark.parametrize(
    ("task", "sweep", "error", "text"),
    [
        (
            {"score": lambda p: np.zeros(0)},
            {},
            ValueError,
            "the evaluation set must have at least one",
        ),
        ({"score": lambda p: np.full(3, np.nan)}, {}, ValueError, "not finite"),
        ({"tuning": None}, {}, ValueError, "no `tuning` loss"),
        ({"batches": lambda seed: iter(())}, {}, ValueError, "the training set is empty"),
        ({"batches": lambda seed: batches(seed, 3)}, {}, ValueError, "3 batches for 60 steps"),
        ({}, {"learning_rates": (1e30,)}, FloatingPointError, "lower the learning rates"),
    ],
)
def test_what_is_wrong_is_said_at_once(task, sweep, error, text):
    with pytest.raises(error, match=text):
        analysis.rank_sweep(
            TASK._replace(**task), dataclasses.replace(SWEEP, **sweep), CONFIG, TRAIN
        )


def test_another_sweeps_folder_is_refused(swept):
    folder, _, _ = swept
    config = dataclasses.replace(TRAIN, output_dir=folder)
    with pytest.raises(FileExistsError, match="resume=True"):
        analysis.rank_sweep(TASK, SWEEP, CONFIG, config)
    config = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match="has data = 'rank 3', this one has 'other'"):
        analysis.rank_sweep(TASK._replace(data="other"), SWEEP, CONFIG, config)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [("ranks", (), "empty"), ("ranks", (0,), "above 0"), ("together", 0, "at least 1"),
     ("learning_rates", (-1.0,), "above 0"), ("tolerance", 1.5, "in"), ("tune_steps", 0, "least"),
     ("save_every", -1, "at least 0 seconds")],
)  # fmt: skip
def test_a_sweeps_settings_are_checked(field, value, text):
    with pytest.raises(ValueError, match=f"`{field}`.*{text}"):
        dataclasses.replace(SWEEP, full=False, **{field: value})


def test_quantized_weights_cannot_all_be_trained():
    quantized = lora.quantize({"k": jnp.ones((64, 64))}, ["k"])
    with pytest.raises(ValueError, match="is quantized"):
        train.train_full(loss, quantized, 1e-3, batches(0), TRAIN, key=jax.random.key(0))
