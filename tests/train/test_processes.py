"""Training in several processes of this machine, joined by `jax.distributed` over gloo."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import hf, models, processes
from lora_jax.cli import main
from lora_jax.models.saving import save_merged
from lora_jax.train import read_metrics

from tests.support.mesh_runs import KINDS, OWN, adapted, make, one_device, run
from tests.support.several import command, ends_of, free_port, losses_of, start
from tests.support.tiny import write_tiny

pytestmark = pytest.mark.once

FILE = "model.safetensors"


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("images", "answers of t5")]


@pytest.mark.parametrize("kind", ["lora", *OTHERS])
def test_sigterm_on_one_process_saves_a_step_that_all_have_finished(tmp_path, kind):
    training = {"output_dir": str(tmp_path), "save_every": 10}
    job = {"mesh": {"fsdp": 2}, "kind": kind, "stopped": 1, "stop_after": 3, "signal": "SIGTERM"}
    ended = start(2, 1, {**job, "training": training})
    steps = {re.search(r"ended by SIGTERM after step (\d) of 10", text)[1] for text, _ in ended}
    assert [status for _, status in ended] == [143, 143]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == list(steps)
    # Resumed in one process on eight devices.
    check_resumed(kind, training, models.make_mesh(data=2, fsdp=4))


def check_resumed(kind, training, mesh):
    """A run goes on in this process, on a mesh, with the losses of one device."""
    options, settings, extra = KINDS[kind]
    again = {**extra, **training, "output_dir": Path(training["output_dir"]), "resume": True}
    losses, _ = run(make(**options), settings, again, mesh)
    np.testing.assert_allclose(losses, one_device(kind)[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_never_comes_is_waited_for_and_said(number):
    run = "from lora_jax import processes as p; p.JOINING, p.REMINDER = 1, 0.5; p.join({!r}, 2, {})"
    address = f"127.0.0.1:{free_port()}"
    ((text, status),) = ends_of([["-c", run.format(address, number)]], 1, [None])
    assert f"process {number} joins the run at {address}; if it aborts here, another" in text
    what = f"process {number} of the run waits for the other 1 at {address}"
    lines = [line for line in text.splitlines() if what in line]
    assert lines[:2] == [f"{what}: 0.5 of 1 s", f"{what}: 1 of 1 s"] and status == 1
    assert lines[2].startswith(f"error: {what}, which have not come: start all of them with")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh", "kind"),
    [
        (2, 2, {"fsdp": 4}, "lora"),
        (2, 4, {"data": 2, "fsdp": 4}, "nf4"),
        (4, 2, {"fsdp": 4, "tensor": 2}, "lora"),
        (4, 1, {"data": 4}, "dora"),
        (2, 2, {"data": 2, "fsdp": 2}, "packed"),
        (2, 2, {"data": 2, "context": 2}, "packed"),
        (2, 4, {"expert": 4, "fsdp": 2}, "experts"),
        (2, 4, {"data": 2, "fsdp": 4}, "images"),
        (4, 2, {"fsdp": 4, "tensor": 2}, "images"),
        (2, 4, {"fsdp": 4, "tensor": 2}, "answers of t5"),
        (4, 2, {"data": 2, "fsdp": 4}, "answers of t5"),
        (2, 2, {"data": 2, "context": 2}, "classes of tokens"),
        (4, 1, {"fsdp": 4}, "questions"),
    ],
)
def test_losses_and_files_are_those_of_one_device(tmp_path, count, devices, mesh, kind):
    job = {
        "mesh": mesh,
        "kind": kind,
        "evaluate": True,
        "training": {"output_dir": str(tmp_path / "run"), "save_every": 5},
        "adapter": str(tmp_path / "peft"),
        "orbax": str(tmp_path / "orbax"),
        # The other kinds hold the same leaves.
        **({"merged": str(tmp_path / "merged")} if kind in ("lora", "nf4") else {}),
    }
    losses = losses_of(start(count, devices, job))
    want, adapters = one_device(kind)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    options, settings, _ = KINDS[kind]
    expected = tmp_path / "expected"
    config, fresh = adapted(model := make(**options), settings)
    tree = lora.combine(adapters, lora.split(fresh)[1])
    hf.save_peft(expected, tree, config, model_type=model.config.model_type)
    found, expected = (
        load_file(p / "adapter_model.safetensors") for p in (tmp_path / "peft", expected)
    )
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        size = np.linalg.norm(x)
        # A bias of the scores of all tokens of a row has no gradient but rounding.
        assert np.linalg.norm(found[name] - x) <= (1e-5 * size if size > 1e-4 else 1e-4), name
    if "merged" in job:
        save_merged(tmp_path / "one", model, tree)
        hf.save_weights(tmp_path / "one-own", lora.merge(tree), OWN)
        for end in ("", "-own"):
            found, one = (load_file(tmp_path / f"{n}{end}" / FILE) for n in ("merged", "one"))
            assert found.keys() == one.keys()
            for name, x in one.items():
                np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)
        assert (tmp_path / "merged.gguf").is_file()
    assert (tmp_path / "peft" / "README.md").is_file()
    assert (tmp_path / "run" / "loss.png").is_file()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 11))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", *OTHERS])
def test_a_process_that_dies_ends_the_others_and_the_run_resumes_on_another_mesh(tmp_path, kind):
    training = {"output_dir": str(tmp_path), "save_every": 2}
    job = {"mesh": {"data": 2, "fsdp": 2}, "stop_after": 5, "stopped": 1, "signal": "SIGKILL"}
    (first, status), (_, killed) = start(2, 2, {**job, "kind": kind, "training": training})
    assert killed == -9 and status not in (0, None)
    assert "another task died" in first
    check_resumed(kind, training, models.make_mesh(tensor=8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"training": {"learning_rate": 1.0}}, "`learning_rate` is 0.01 in process 0 and 1.0 in"),
        ({"skip": 1}, r"`train_data` is \w+ in process 0 and \w+ in process 1"),
        ({"kind": "dora"}, "`lora_params` is"),
    ],
)
def test_processes_that_disagree_stop_with_what_differs(changed, expected):
    job = {"mesh": {"fsdp": 2}}
    for text, status in start(2, 1, job, changed):
        assert status == 1 and re.search(f"ValueError: the processes disagree: {expected}", text)


@pytest.mark.slow
def test_an_output_folder_that_is_not_shared_is_refused(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    job = {"mesh": {"fsdp": 2}, "training": {"output_dir": "run"}}
    for text, status in start(2, 1, job, cwds=folders):
        assert status == 1 and re.search(r"`output_dir` is .*b/run, where the files of", text)


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_refused_by_all(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    job = {"mesh": {"fsdp": 2}, "training": {"output_dir": str(tmp_path)}}
    for text, status in start(2, 1, job):
        assert status == 1 and "holds a run already" in text


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(tmp_path):
    job = {"mesh": {"fsdp": 2}, "stop_after": 3, "stopped": 1, "signal": "raise"}
    (first, status), (second, failed) = start(2, 1, job)
    assert failed == 1 and "RuntimeError: stopped" in second
    # Whichever comes first: the collective's error, or JAX's heartbeat.
    assert status != 0 and re.search("another process of the run|another task died", first)


@pytest.mark.slow
def test_parameters_of_one_process_alone_are_refused():
    for text, status in start(2, 2, {"mesh": {}}):
        assert status == 1 and "spread them over a mesh of all devices" in text


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_out_by_all(tmp_path):
    training = {"output_dir": str(tmp_path), "save_every": 3, "keep": 4}
    job = {"mesh": {"fsdp": 2}, "training": {**training, "resume": True}}
    whole = losses_of(start(2, 1, job))
    for file in (tmp_path / "checkpoints" / "10" / "state" / "ocdbt.process_1").rglob("d/*"):
        file.write_bytes(b"damaged")
    resumed = start(2, 1, job)
    np.testing.assert_array_equal(losses_of(resumed), whole)
    assert "that of step 9 is used instead" in resumed[0][0]
    assert (tmp_path / "checkpoints" / "10.damaged").is_dir()


@pytest.mark.slow
def test_the_command_trains_in_two_processes(tmp_path):
    """Process 0 prints and writes; `generate` and `export` read what it wrote."""
    model, data = write_tiny(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text('{"prompt": "red: ", "completion": "rouge"}\n' * 8)
    run = ["train", "--model", str(model), "--train-data", str(data), "--steps", "2"]
    run += ["--batch-size", "2", "--mesh", "fsdp=2", "--output-dir", str(tmp_path / "run")]
    ended = command(run)
    assert [status for _, status in ended] == [0, 0], ended
    assert "wrote the adapter" in ended[0][0] and "wrote the adapter" not in ended[1][0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    for text, status in command([*run, "--resume"], [], ["--seed", "1"]):
        assert status == 1
        assert "lora-jax train: the processes disagree: `--seed` is 0 in process 0 and 1 in" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "batch", "expected"),
    [
        ("fsdp=3", 6, "`--mesh` is fsdp=3, but the number of devices is 2"),
        ("fdsp=2", 2, "`--mesh` has no axis 'fdsp'; expected data, fsdp, tensor, expert, context"),
        ("fsdp=2", 3, r"`--batch-size` is 3, but its rows are spread over 2 devices \(fsdp=2\)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_by_all(tmp_path, mesh, batch, expected):
    model, data = write_tiny(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text('{"prompt": "red: ", "completion": "rouge"}\n' * 8)
    run = ["train", "--model", str(model), "--train-data", str(data), "--steps", "2"]
    run += ["--batch-size", str(batch), "--mesh", mesh, "--output-dir", str(tmp_path / "run")]
    for text, status in command(run):
        assert status == 2 and re.search(f"lora-jax train: {expected}", text), text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(coordinator="localhost:1"), "`processes` is missing: give `coordinator`"),
        (dict(coordinator="localhost:1", processes=2), "`process_id` is missing"),
        (dict(coordinator="localhost:1", processes=2, process_id=2), "`process_id` is 2, and"),
        (dict(coordinator="localhost:1", processes=0, process_id=0), "and `processes` is 0: the"),
        (dict(coordinator="host0", processes=1, process_id=0), "must be HOST:PORT of process 0"),
    ],
)
def test_half_a_description_of_the_processes_is_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        processes.join(**arguments)


def test_a_coordinator_without_distributed_is_refused(tmp_path, capsys):
    status = main(
        ["train", "--model", "m", "--train-data", "d", "--coordinator", "localhost:1"]
        + ["--output-dir", str(tmp_path)]
    )
    assert status == 2 and "`--coordinator` is for a run of several" in capsys.readouterr().err
