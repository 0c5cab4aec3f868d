"""A sweep that was killed inside a training goes on there, and ends with the very same numbers."""

import dataclasses
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis
from lora_jax.analysis.sweep import store, train
from lora_jax.analysis.sweep.plan import Job, plan_sweep
from lora_jax.analysis.sweep.sweep import _begun
from lora_jax.checkpoint import fingerprint

from tests.support.sweep_task import CONFIG, PARAMS, SWEEP, TASK, TRAIN, batches, score

pytestmark = pytest.mark.once

STEPS = 8
SMALL = dataclasses.replace(SWEEP, ranks=(1, 2), learning_rates=(1e-2,), together=2, save_every=0)
ADAPTERS = dataclasses.replace(CONFIG, dropout=0.2)


class Power(Exception):
    """The power goes."""


def cut(number, how):
    """Batches, the last of which comes when something happens."""

    def make(seed):
        for i, batch in enumerate(batches(seed)):
            if i == number:
                how()
            yield batch

    return make


def fail():
    raise Power


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def sweep(folder, source=batches, **options):
    """A sweep with the weights that it scored, and what it said."""
    said: list[str] = []
    weights: list = []

    def seen(params):
        weights.append(params)
        return score(params)

    config = dataclasses.replace(TRAIN, steps=STEPS, output_dir=folder, resume=True)
    task = TASK._replace(batches=source, score=seen)
    settings = dataclasses.replace(SMALL, **options)
    return analysis.rank_sweep(task, settings, ADAPTERS, config, log=said.append), weights, said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder in which the adapters were stopped at step 5 of 8."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Power):
        sweep(folder, cut(5, fail))
    return folder


def test_adapters_and_full_fine_tuning_end_bit_for_bit_as_if_never_stopped(stopped, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(stopped, folder)
    (held,) = store.unfinished(folder / "unfinished")
    assert held.step == 5 and len(held.jobs) == 2
    files = [p for p in held.folder.rglob("*") if p.is_file()]
    # Two adapters of rank 2, their gradients' two means, and what Orbax writes besides.
    assert sum(p.stat().st_size for p in files) < 40_000
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 8: saved in .*unfinished"):
        # The adapters go on, and Ctrl-C comes while full fine-tuning takes step 4.
        calls = iter((batches, batches, cut(3, ctrl_c)))
        sweep(folder, lambda seed: next(calls)(seed))
    found, weights, said = sweep(folder)
    assert any(re.match(r"going on after step 4 of 8: .*full_lr0.03", line) for line in said)
    assert not (folder / "unfinished").exists()
    whole, expected, _ = sweep(None)
    for run, other in zip(found.runs, whole.runs, strict=True):
        assert run.name == other.name and list(run.losses) == list(other.losses)
    # The base was scored when the sweep began.
    for got, want in zip(weights, expected[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert [r.score for r in found.rows] == [r.score for r in whole.rows]


def test_only_what_fits_is_gone_on_with(stopped):
    said: list[str] = []
    (held,) = store.unfinished(stopped / "unfinished")
    config = dataclasses.replace(TRAIN, steps=STEPS, output_dir=stopped, resume=True)

    def begun(ranks, together=2):
        settings = dataclasses.replace(SMALL, together=together)
        under_way = plan_sweep(TASK, settings, ADAPTERS, config, log=said.append)
        jobs = [Job(rank, 1e-2, 0, STEPS) for rank in ranks]
        return [[job.rank for job in group] for group in _begun(under_way, jobs)]

    assert begun((4, 2, 1)) == [[1, 2]] and begun((4, 8)) == [] and not said
    assert begun((1, 2), together=1) == []
    assert begun((2, 4)) == []
    started = f"{held.folder}: starts again instead of going on after step 5: "
    assert said == [
        started + "it holds 2 adapters, and `together` is 1",
        started + "it also trains runs that are not wanted now",
    ]


def keeper(folder, params=PARAMS, jobs=("a", "b")):
    described = {"jobs": list(jobs), "base": fingerprint(params)}
    return store.Keeper(folder, described, 0, params=params, log=lambda _: None)


def progress(width=4, step=0):
    state = ([jnp.arange(width * 1.0)], {"mu": jnp.ones(width, jnp.bfloat16)})
    losses = np.full((3, 2), np.nan, np.float32)
    losses[:step] = [1.5, np.inf]
    return store.Progress(step, state, losses, 2.5, step, "abc" if step else "")


def test_a_checkpoint_is_read_as_it_was_written_or_not_at_all(tmp_path):
    folder = tmp_path / "one"
    fresh = progress()
    assert keeper(folder).restore(fresh) is fresh
    keeper(folder).save(progress(step=1))
    keeper(folder).save(progress(step=2))
    found = keeper(folder).restore(fresh)
    jax.tree.map(np.testing.assert_array_equal, found, progress(step=2))
    assert found.state[1]["mu"].dtype == jnp.bfloat16
    assert [p.name for p in folder.iterdir() if p.name.isdigit()] == ["2"]
    with pytest.raises(ValueError, match=r"one: .* has jobs = \['a', 'b'\], this one has \['a'\]"):
        keeper(folder, jobs=("a",)).restore(fresh)
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    with pytest.raises(ValueError, match="one was made over another base model: `layer.kernel`"):
        keeper(folder, params=other).restore(fresh)
    with pytest.raises(ValueError, match=r"of another run: .*float32\[4\], expected float32\[5\]"):
        keeper(folder).restore(progress(width=5))
    shutil.rmtree(folder / "2" / "meta")
    with pytest.raises(ValueError, match="one: not the checkpoint of an unfinished training"):
        keeper(folder).restore(fresh)


def test_other_batches_than_those_trained_on_are_refused():
    seen = store.digest(store.digest("", np.ones(3)), np.zeros(3))
    at = progress(step=2)._replace(batches=seen)
    shown: list[float] = []
    train._skip(iter([np.ones(3), np.zeros(3)]), at, shown.append)
    assert len(shown) == 2
    for other in ([np.zeros(3), np.ones(3)], [np.ones(3)], [np.ones(3), np.zeros(3, np.float32)]):
        with pytest.raises(ValueError, match="differ from those of the unfinished training"):
            train._skip(iter(other), at, shown.append)


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    kept = store.Keeper(tmp_path, {}, 60, params=PARAMS, log=print)
    assert not kept.due()
    now[0] = 60.0
    assert kept.due()
    kept._last, kept._took = 60.0, 10.0
    now[0] = 259.0
    assert not kept.due()
    now[0] = 260.0
    assert kept.due()
