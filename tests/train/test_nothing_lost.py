"""A run that a signal ends, whose newest checkpoint is damaged, or that another one joins."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import warnings
from typing import Any

import jax.numpy as jnp
import pytest

from lora_jax import checkpoint, train
from lora_jax.train import archive
from lora_jax.train.config import steps_between_saves

from tests.support import train_toys
from tests.support.places import ROOT
from tests.support.train_toys import (
    Toy,
    assert_same_bits,
    compiled_once,
    numbers,
    toy_config,
    toy_fit,
    toy_params,
)

# Orbax leaves coroutines behind when a read fails.
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")) as options:
        yield options


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with checkpoints of the steps 4 and 8, and what it gives when it is whole."""
    folder = tmp_path_factory.mktemp("runs")

    def stop(record):
        if record["step"] == 9:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        toy_fit(folder / "stopped", hooks=train.Hooks(record=stop), tensorboard=False)
    return folder / "stopped", toy_fit(folder / "whole", tensorboard=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_run_resumes_to_the_bit(tmp_path, stopped, number, request):
    def send(record):
        if record["kind"] == "train" and record["step"] == 6:
            signal.raise_signal(number)

    # The tests may run under `nohup`, where SIGHUP is ignored.
    inherited = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    with pytest.raises(SystemExit, match=rf"ended by {number.name} after step 7 of 12: sav") as end:
        toy_fit(tmp_path, hooks=train.Hooks(record=send), tensorboard=False)
    assert end.value.status == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    result = toy_fit(tmp_path, resume=True, tensorboard=False)
    assert numbers(result.history) == numbers(stopped[1].history)
    assert_same_bits(result.lora_params, stopped[1].lora_params)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP is under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hooks = train.Hooks(record=lambda record: signal.raise_signal(signal.SIGHUP))
        assert toy_fit(hooks=hooks, steps=2, evals=0).step == 2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def data(folder):
    """All files with arrays: which of them Orbax reads depends on how its writes fell together."""
    return [p for p in folder.glob("state/**/d/*") if p.is_file() and p.stat().st_size]


def flipped(content, place):
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


DAMAGES = {
    "a bit near the start": lambda c: (data(c), lambda old: flipped(old, 0.3)),
    "a bit near the end": lambda c: (data(c), lambda old: flipped(old, 0.7)),
    "cut in half": lambda c: (data(c), lambda old: old[: len(old) // 2]),
    "no manifest": lambda c: ([c / "state" / "manifest.ocdbt"], None),
    "no names": lambda c: ([c / "state" / "_METADATA"], lambda old: b""),
    "no meta": lambda c: ([c / "meta" / "metadata"], None),
    "meta of another seed": lambda c: (
        [c / "meta" / "metadata"], lambda old: old.replace(b'"seed":0', b'"seed":1')
    ),
    "meta without checksums": lambda c: (
        [c / "meta" / "metadata"], lambda old: old.replace(b'"checksums"', b'"checksumz"')
    ),
}  # fmt: skip


def damage(folder, name):
    paths, change = DAMAGES[name](folder)
    for path in paths:
        if change is None:
            path.unlink()
            continue
        content = path.read_bytes()
        # As Orbax writes it, with or without a space after a colon.
        changed = change(content.replace(b'": ', b'":') if path.name == "metadata" else content)
        assert changed != content
        path.write_bytes(changed)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, stopped, name):
    run, whole = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]
    damage(run / "checkpoints" / "8", name)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = toy_fit(run, resume=True, tensorboard=False)
    texts = [str(w.message) for w in warned]
    assert any(
        "damaged checkpoint" in t and "checkpoints/8" in t and "step 4 is used" in t for t in texts
    )
    assert numbers(result.history) == numbers(whole.history)
    assert_same_bits(result.lora_params, whole.lora_params)
    assert (run / "checkpoints" / "8.damaged").is_dir()


def test_an_adapter_is_read_from_the_newest_whole_checkpoint(tmp_path, stopped):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    damage(run / "checkpoints" / "8", "a bit near the end")
    with pytest.warns(UserWarning, match="damaged checkpoint: .*checkpoints/8: .*step 4 is used"):
        assert checkpoint.find(run).directory.name == "4"
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        checkpoint.restore(run, Toy().apply, toy_params(), jnp.zeros((1, 4), int))
    newest = checkpoint.find(run, step=8)
    with pytest.raises(ValueError, match="checkpoints/8: "):
        checkpoint.adapters.read_leaves(newest)


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path, stopped):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    for step in "48":
        damage(run / "checkpoints" / step, "no manifest")
    for read in (
        lambda: toy_fit(run, resume=True, tensorboard=False),
        lambda: checkpoint.find(run),
    ):
        with pytest.raises(
            ValueError, match="no checkpoint is whole .*checkpoints/8.*; remove "
        ) as e:
            read()
        assert "\n" not in str(e.value)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "8"]


def test_another_run_is_no_damage(tmp_path, stopped, monkeypatch):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    # What differs in the run and in the adapter, in one sentence.
    other = dataclasses.replace(train_toys.CONFIG, init="gaussian")
    monkeypatch.setattr(train_toys, "CONFIG", other)
    differing = "config: `init` was .* and is .gaussian.; `learning_rate` was .* and is 0.1; resume"
    with pytest.raises(ValueError, match=differing):
        toy_fit(run, resume=True, tensorboard=False, learning_rate=0.1)


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    code = """
import sys
from lora_jax import train
from tests.support import train_toys
from tests.support.train_toys import toy_fit

def stop(record):
    print("writing", flush=True)
    sys.stdin.read()

toy_fit(sys.argv[1], hooks=train.Hooks(record=stop), evals=0, tensorboard=False)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as first:
        assert first.stdout.readline() == "writing\n"
        for resume in (True, False):
            with pytest.raises(
                (BlockingIOError, FileExistsError), match=f"{first.pid}|holds a run"
            ):
                toy_fit(tmp_path, resume=resume, evals=0)
        (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
        first.kill()
    # Killed while it wrote a checkpoint: the next run goes on and clears up.
    assert toy_fit(tmp_path, resume=True, evals=0, tensorboard=False).step == 12
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"8", "12"} and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(("total", "steps"), [(1, 1), (10, 1), (11, 2), (2000, 200), (10**6, 500)])
def test_a_run_saves_by_default(total, steps):
    assert steps_between_saves(toy_config(save_every=None), total) == steps
    assert steps_between_saves(toy_config(save_every=7), total) == 7


def test_the_default_leaves_checkpoints(tmp_path):
    records = []

    def stop(record):
        records.append(record)
        if record["step"] == 8:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        toy_fit(tmp_path, save_every=None, hooks=train.Hooks(record=stop), evals=0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [r["step"] for r in records]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    records = tmp_path / "metrics.jsonl"
    records.write_text('{"step": 1, "loss": 2.0}\n')
    config = toy_config(output_dir=tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a run already: .* \(no checkpoint yet\)"):
        archive.check_new_run(config)
    state: Any = None
    with archive.archive(dataclasses.replace(config, resume=True)) as opened:
        assert archive.start(opened, state, {}, None) == archive.Start(state, 0, None, [])
    assert not records.read_text()
