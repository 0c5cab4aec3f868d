"""The loop: it learns, it can be stopped anywhere and resumed to the bit, it leaves no wreck."""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, train
from lora_jax.train import archive, buckets
from lora_jax.train.preparation import arrange
from lora_jax.train.step import Programs

from tests.support.places import ROOT
from tests.support.train_toys import (
    CONFIG,
    Toy,
    assert_same_bits,
    compiled_once,
    numbers,
    toy_config,
    toy_data,
    toy_fit,
    toy_lora,
    toy_params,
)

pytestmark = pytest.mark.once


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Equal programs of the many runs here are compiled once, those of killed processes too."""
    with compiled_once(tmp_path_factory.mktemp("cache")) as options:
        yield options


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, toy_fit(directory)


def steps_on_disk(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def test_an_encoder_is_refused():
    """Its outputs depend on the tokens that they would have to predict: any loss is low."""
    config = models.BertConfig(
        model_type="bert", vocab_size=16, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16, task="masked-lm",
        pooler=False,
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    with pytest.raises(ValueError, match="`model` is a `bert`, an encoder, whose outputs"):
        train.evaluate(model, model.params, toy_data())
    with pytest.raises(ValueError, match="`model` is a `bert`, an encoder, whose outputs"):
        train.fit(model, model.params, toy_data(), None, train.TrainConfig(steps=1), full=True)


def test_it_learns_and_changes_adapters_only():
    before = toy_lora()
    kept = jax.tree.map(np.array, before)
    result = toy_fit(lora_params=before, steps=30)
    evals = [r["eval_loss"] for r in result.history if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.3
    assert_same_bits(before, kept)  # the caller's tree is whole, not donated
    assert_same_bits(lora.split(result.lora_params)[1], lora.split(kept)[1])
    trained, _ = lora.split(result.lora_params)
    assert all(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(trained))


def test_eval_loss_is_the_loss_of_the_merged_model(whole):
    _, result = whole
    merged = lora.merge(result.lora_params)
    data = toy_data()[:5]
    by_merged = train.evaluate(Toy(), merged, data, batch_size=2)
    assert result.history[-1]["eval_loss"] == pytest.approx(by_merged, abs=1e-5)


def test_history_says_every_step_once(whole):
    directory, result = whole
    steps = [r["step"] for r in result.history if r["kind"] == "train"]
    assert steps == list(range(1, 13))
    assert [r["step"] for r in result.history if r["kind"] == "eval"] == [0, 6, 12]
    assert train.read_metrics(directory / "metrics.jsonl") == result.history
    assert steps_on_disk(directory) == [8, 12]
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_base_is_never_written(whole):
    directory, _ = whole
    embedding = np.asarray(toy_params()["embed"]["embedding"]).tobytes()
    files = [p for p in directory.rglob("*") if p.is_file()]
    assert files and not any(embedding[:64] in p.read_bytes() for p in files)
    (meta,) = directory.glob("checkpoints/12/meta/metadata")
    with lora.checkpoint.manager(directory / "checkpoints") as opened:
        names = set(opened.item_metadata(12).state.keys())
    assert {n.split(".")[0] for n in names} == {"step", "trainable", "opt_state", "key"}
    assert not any("embed" in n for n in names)
    assert "embed.embedding" in json.loads(meta.read_text())["run"]["base"]


def test_one_program_a_bucket_and_none_later(caplog):
    counted = []
    data = toy_data()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):

        def note(record):
            counted.append(sum("Compiling" in m for m in caplog.messages))

        result = toy_fit(data=data, hooks=train.Hooks(record=note), steps=18, buckets=2)
    assert len(set(result.compiled)) == len(result.compiled) == 2
    named = [m for m in caplog.messages if "Compiling jit(step)" in m]
    assert len(named) == 2
    assert counted[-1] == counted[len(counted) // 2] > 0  # nothing is compiled in later epochs


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.support.train_toys import toy_fit
from lora_jax import models, train

where, directory, step = sys.argv[2], sys.argv[3], int(sys.argv[4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def record(r):
    if where == "step" and r["kind"] == "train" and r["step"] == step:
        die()

if where == "save":
    rename = os.rename
    def dying(a, b, *args, **kwargs):
        if os.path.basename(os.fspath(b)) == str(step):
            die()
        return rename(a, b, *args, **kwargs)
    os.rename = os.replace = dying

toy_fit(directory, hooks=train.Hooks(record=record), resume=True)
print("survived")
"""


@pytest.mark.slow
def test_killed_anywhere_and_resumed_gives_the_same_bits(tmp_path, whole, compile_once):
    _, expected = whole
    cache = {name.upper(): str(value) for name, value in compile_once.items()}

    def killed(where, step):
        command = [sys.executable, "-c", KILLED, str(ROOT), where, str(tmp_path), str(step)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=1500, env={**os.environ, **cache}
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]

    killed("step", 2)  # before any checkpoint: begins again
    assert steps_on_disk(tmp_path) == []
    killed("step", 7)  # between checkpoints
    assert steps_on_disk(tmp_path) == [4]
    killed("save", 8)  # all written, not yet moved to its place
    assert steps_on_disk(tmp_path) == [4]
    result = toy_fit(tmp_path, resume=True)
    assert numbers(result.history) == numbers(expected.history)
    assert numbers(train.read_metrics(tmp_path / "metrics.jsonl")) == numbers(expected.history)
    assert_same_bits(result.lora_params, expected.lora_params)


def test_ctrl_c_saves_and_resumes_to_the_bit(tmp_path, whole):
    _, expected = whole

    def press(record):
        if record["kind"] == "train" and record["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 6 of 12: saved in .*res"):
        toy_fit(tmp_path, hooks=train.Hooks(record=press))
    assert signal.getsignal(signal.SIGINT) is before
    assert steps_on_disk(tmp_path) == [4, 6]
    early = (tmp_path / "loss.png").read_bytes()
    result = toy_fit(tmp_path, resume=True)
    assert early != (tmp_path / "loss.png").read_bytes()
    # The interrupted run evaluated at step 6 as the whole one did.
    assert numbers(result.history) == numbers(expected.history)
    assert_same_bits(result.lora_params, expected.lora_params)


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved():
    def press(record):
        if record["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="nothing was saved, because there is no `output_"):
        toy_fit(hooks=train.Hooks(record=press), evals=0)


def test_second_ctrl_c_interrupts_at_once():
    def press(record):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        toy_fit(hooks=train.Hooks(record=press), evals=0)
    assert not caught.value.args


def test_it_runs_in_a_thread_where_there_are_no_signals():
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_fit(steps=2, evals=0)))
    thread.start()
    thread.join()
    assert results[0].step == 2


def test_finished_run_resumes_to_itself(whole, tmp_path):
    directory, expected = whole
    again = toy_fit(directory, resume=True)
    assert again.history == expected.history and again.memory is None
    assert_same_bits(again.lora_params, expected.lora_params)


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    toy_fit(tmp_path, steps=4, evals=0)
    with pytest.raises(ValueError, match="`steps` was 4 and is 3; resume with the same"):
        toy_fit(tmp_path, steps=3, evals=0, resume=True)
    longer = toy_fit(tmp_path, steps=6, evals=0, resume=True)
    assert [r["step"] for r in longer.history if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    # The steps that were left are those of a run of six, which has another schedule before.
    straight = toy_fit(steps=6, evals=0)
    for mine, theirs in zip(longer.history[4:], straight.history[4:], strict=True):
        assert mine["learning_rate"] == theirs["learning_rate"]
        assert mine["tokens"] == theirs["tokens"]
    with pytest.raises(ValueError, match="`learning_rate` was"):
        toy_fit(tmp_path, steps=8, evals=0, resume=True, learning_rate=0.06)


def stop(record):
    if record["step"] == 3:
        raise RuntimeError("stopped")


def test_a_resumed_run_has_the_ladder_of_its_checkpoint(tmp_path, monkeypatch):
    options: Any = {"steps": 1, "buckets": None}
    toy_fit(tmp_path, evals=0, **options)
    fresh = toy_config(**options)
    ladder, *_ = arrange(Toy(), toy_data(), fresh)
    monkeypatch.setattr(buckets, "_LEAST", 1)
    monkeypatch.setattr(buckets, "_MOST", 1)
    kept, *_ = arrange(Toy(), toy_data(), toy_config(tmp_path, resume=True, **options))
    assert kept == ladder != arrange(Toy(), toy_data(), fresh)[0]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_buckets(tmp_path, monkeypatch):
    """Also where the rule that chose them has changed; a checkpoint without them follows it."""
    options: Any = {"steps": 6, "evals": 0, "buckets": None, "save_every": 2}
    whole, describe = toy_fit(**options), archive.describe
    for name in "new", "old":
        with pytest.raises(RuntimeError, match="stopped"):
            toy_fit(tmp_path / name, **options, hooks=train.Hooks(record=stop))

        def without(*args, **named):
            return {k: v for k, v in describe(*args, **named).items() if k != "ladder"}

        monkeypatch.setattr(archive, "describe", without)
    monkeypatch.setattr(archive, "describe", describe)
    monkeypatch.setattr(buckets, "_LEAST", 1)
    monkeypatch.setattr(buckets, "_MOST", 1)
    resumed = toy_fit(tmp_path / "new", **options, resume=True)
    assert numbers(resumed.history) == numbers(whole.history)
    assert_same_bits(resumed.lora_params, whole.lora_params)
    changed = toy_fit(tmp_path / "old", **options, resume=True)
    assert numbers(changed.history)[:2] == numbers(whole.history)[:2]
    assert changed.step == 6 and numbers(changed.history) != numbers(whole.history)
    with pytest.raises(ValueError, match="was trained on other data"):
        toy_fit(tmp_path / "new", **options, resume=True, data=toy_data(30, seed=1))


def test_an_unfinished_run_keeps_its_length(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        toy_fit(tmp_path, steps=6, save_every=2, evals=0, hooks=train.Hooks(record=stop))
    with pytest.raises(ValueError, match="`steps` was 6 and is 8"):
        toy_fit(tmp_path, steps=8, save_every=2, evals=0, resume=True)


@contextlib.contextmanager
def files_at_most(size):
    """Writing past `size` bytes of a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    with files_at_most(16) as fill:

        def before_the_second(record):
            if record["step"] == 8:
                fill()

        hooks = train.Hooks(record=before_the_second)
        with pytest.raises(OSError, match="step 8 cannot .*: File too large; that of step 4") as e:
            toy_fit(tmp_path, hooks=hooks, tensorboard=False)
    assert "\n" not in str(e.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    restored = lora.checkpoint.restore_into(tmp_path, toy_lora())
    assert float(jnp.abs(restored["mix"]["kernel"].b).max()) > 0


def test_metrics_that_cannot_be_written_are_one_line(tmp_path):
    with files_at_most(600) as fill:

        def soon(record):
            if record["step"] == 1:
                fill()

        with pytest.raises(OSError, match="metrics cannot be written: No space left .*; ch") as e:
            toy_fit(tmp_path, hooks=train.Hooks(record=soon), tensorboard=False, evals=0)
    assert "\n" not in str(e.value)


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints cannot be written: Not a directory; choose"):
        toy_fit(tmp_path / "file" / "run")


def test_resuming_another_run_is_refused(whole):
    directory, _ = whole
    with pytest.raises(FileExistsError, match=r"holds a run already: .* \(.*: step 12\); pass"):
        toy_fit(directory)
    with pytest.raises(ValueError, match=r"another config: `learning_rate` was 0.05 and is 0.06;"):
        toy_fit(directory, resume=True, learning_rate=0.06)
    with pytest.raises(ValueError, match="was trained on other data"):
        toy_fit(directory, resume=True, data=toy_data(seed=1))
    with pytest.raises(ValueError, match=r"another base model: `embed.embedding` \(float32\[23,16"):
        toy_fit(directory, resume=True, lora_params=toy_lora(seed=1))
    with pytest.raises(ValueError, match=r"`mix.kernel` is float32\[8,8\], was float32\[16,16\]"):
        toy_fit(directory, resume=True, lora_params=toy_lora(width=8))


def test_nothing_to_train_and_nothing_to_train_on():
    with pytest.raises(ValueError, match="`lora_params` has nothing to train"):
        toy_fit(lora_params=toy_params())
    with pytest.raises(ValueError, match="the dataset is empty"):
        toy_fit(data=[])


def test_token_the_model_does_not_know_is_named():
    (first, *rest) = toy_data()
    for token in (23, -1):
        wrong = first._replace(tokens=np.where(first.learned, token, first.tokens), source="d:7")
        with pytest.raises(
            ValueError, match=f"d:7: .* token {token}, but the vocabulary ends at 22"
        ):
            toy_fit(data=[*rest, wrong])
        with pytest.raises(ValueError, match=f"d:7: .* token {token}, but the vocabulary ends at"):
            train.evaluate(Toy(), toy_lora(), [*rest, wrong])


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    params = toy_lora()
    params["embed"]["embedding"] *= 1e38  # logits overflow
    with pytest.raises(FloatingPointError, match=r"the loss of step 1 is (nan|inf); lower `learn"):
        toy_fit(tmp_path, lora_params=params, evals=0, eval_every=None)
    assert steps_on_disk(tmp_path) == []


def test_hooks_hear_and_add(tmp_path):
    used, seen = [], []
    hooks = train.Hooks(
        record=seen.append, memory=used.append, score=lambda p: {"rank": p["mix"]["kernel"].rank}
    )
    result = toy_fit(hooks=hooks)
    assert seen == result.history
    assert [r["rank"] for r in seen if r["kind"] == "eval"] == [2, 2, 2]
    (one,) = used
    adapters = 2 * (16 * 2) * 4
    assert one.adapters == adapters and one.base == (23 * 16 + 16 * 16) * 4 + 4
    # AdamW's two moments, and the int32 counters of AdamW and of the schedule
    assert one.optimizer == 2 * adapters + 8
    assert one.temporary > 0
    table = train.format_memory(one)
    assert [line.split("  ")[0] for line in table.splitlines()] == [
        "base (frozen)", "adapters", "optimizer state", "temporary (activations, gradients)",
        "total",
    ]  # fmt: skip


def test_progress_bar_shows_loss_rate_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    toy_fit(progress=True, steps=3, evals=0)
    last = capsys.readouterr().err.split("\r")[-1]
    for part in ("100%", "3/3", "loss=", "lr=", "tok/s=", "<"):
        assert part in last


def test_a_log_file_gets_a_line_for_each_tenth_of_a_run(capsys):
    toy_fit(progress=True, steps=20, evals=0)
    err = capsys.readouterr().err
    assert "\r" not in err and "\x1b" not in err
    lines = [line for line in err.splitlines() if line.startswith("train: ")]
    assert [line.split(",")[0] for line in lines] == [f"train: {n}/20" for n in range(2, 21, 2)]
    assert all(re.search(r", loss [\d.]+, lr \S+, tok/s [\d,]+$", line) for line in lines)


def test_bfloat16_base_trains_float32_adapters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy_params())
    plan = lora.plan(CONFIG, Toy().apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    result = toy_fit(lora_params=lora.init(jax.random.key(1), plan, params), steps=30)
    trainable, _ = lora.split(result.lora_params)
    assert {x.dtype.name for x in jax.tree.leaves(trainable)} == {"float32"}
    evals = [r["eval_loss"] for r in result.history if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.3


def test_programs_compile_what_is_asked_for():
    programs = Programs(lambda x, batch: x + batch.tokens.sum())
    missing: Any = None
    batch = train.Batch(np.ones((2, 2)), np.ones((2, 3)), missing, missing)
    assert not programs.has(batch)
    assert programs(np.float32(1), batch) == 5 and programs.has(batch)
