"""`lora-jax sweep` and `lora-jax generate` in two processes, against one."""

import json
import re
import signal

import numpy as np
import pytest

from lora_jax.cli import main

from tests.support.several import command, signalled
from tests.support.tiny import write_tiny

pytestmark = [pytest.mark.once, pytest.mark.slow]

LINES = [
    {"prompt": "area : riverside", "completion": " by the river there is a pub ."},
    {"prompt": "food : French", "completion": " a French place ."},
]


def runs_of(folder):
    return {p.name: json.loads(p.read_text()) for p in (folder / "runs").glob("*.json")}


@pytest.mark.parametrize("metric", ["loss", "bleu"])
def test_a_sweep_in_two_processes_finds_what_one_finds(tmp_path, metric):
    data, alone, together = (tmp_path / name for name in ("data.jsonl", "alone", "together"))
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES * 6))
    sweep = ["sweep", "--model", str(write_tiny(tmp_path / "model")), "--train-data", str(data)]
    sweep += ["--eval-data", str(data), "--metric", metric, "--ranks", "1", "4", "--steps", "3"]
    sweep += ["--learning-rates", "1e-2", "3e-2", "--full-learning-rates", "1e-2", "--together"]
    sweep += ["4", "--batch-size", "4", "--buckets", "1", "--epsilon", "1e-3", "--no-progress"]
    sweep += ["--max-new-tokens", "4", "--save-every", "0", "--target-modules", "q_proj", "v_proj"]
    assert main([*sweep, "--output-dir", str(alone)]) == 0
    sweep += ["--mesh", "fsdp=2", "--output-dir", str(together)]
    first, second = command(sweep)
    assert (first[1], second[1]) == (0, 0), (first, second)
    assert "wrote result.json" in first[0] and "rank 4" not in second[0]
    found, want = runs_of(together), runs_of(alone)
    assert found.keys() == want.keys() and len(want) == 6
    for name, run in want.items():
        np.testing.assert_allclose(found[name]["losses"], run["losses"], rtol=1e-5)
        np.testing.assert_allclose(found[name]["values"] or 0, run["values"] or 0, rtol=1e-5)
    assert not list(together.glob("unfinished/*")) and (together / "sweep.png").is_file()
    # Once more: everything is read from the folder, by both.
    before = (together / "result.json").read_text()
    ended = command([*sweep, "--resume"], [], [])
    assert [status for _, status in ended] == [0, 0] and "trained 1" not in ended[0][0]
    assert (together / "result.json").read_text() == before
    for text, status in command(sweep):
        assert status == 1 and "there is a sweep already" in text
    for text, status in command([*sweep, "--resume"], [], ["--ranks", "2"]):
        assert status == 1 and "the processes disagree: `--ranks` is (1, 4) in process 0" in text
    # JAX itself joins the two that process 0 was told of.
    for text, status in command([*sweep, "--resume"], [], ["--processes", "3"]):
        assert (
            status == 1 and "disagree: `--processes` is 2 in process 0 and 3 in process 1" in text
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_in_one_process_goes_on_in_another_number(tmp_path, number):
    data, alone, together = (tmp_path / name for name in ("data.jsonl", "alone", "together"))
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES * 6))
    sweep = ["sweep", "--model", str(write_tiny(tmp_path / "model")), "--train-data", str(data)]
    sweep += ["--eval-data", str(data), "--ranks", "2", "--steps", "60", "--learning-rates"]
    sweep += ["1e-2", "--batch-size", "4", "--buckets", "1", "--epsilon", "1e-3", "--no-full"]
    sweep += ["--no-progress", "--target-modules", "q_proj", "v_proj"]
    assert main([*sweep, "--output-dir", str(alone)]) == 0
    sweep += ["--output-dir", str(together), "--save-every", "0"]
    stop = signalled(number, together, "unfinished/*/[!.]*")
    (first, status), (second, other) = command([*sweep, "--mesh", "fsdp=2"], meanwhile=stop)
    if number == signal.SIGTERM:
        assert (status, other) == (143, 143), (first, second)
        assert "after step" in first and "saved in" in first
    else:
        assert other == -9 and status not in (0, None)
        assert re.search("another process of the run|another task died", first)
    assert list(together.glob("unfinished/*"))
    assert main([*sweep, "--resume"]) == 0
    (run,), (want,) = (
        [r for name, r in runs_of(folder).items() if "base" not in name]
        for folder in (together, alone)
    )
    np.testing.assert_allclose(run["losses"], want["losses"], rtol=1e-4)
    np.testing.assert_allclose(run["values"], want["values"], rtol=1e-4)


def test_two_processes_write_the_texts_of_one(tmp_path, capsys):
    generate = ["generate", str(write_tiny(tmp_path / "model")), "area :", "a French place", "food"]
    generate += ["--raw", "--temperature", "1", "--max-new-tokens", "6", "--quantize", "nf4"]
    generate += ["--quantize-block", "16"]
    assert main(generate) == 0
    want = capsys.readouterr().out
    (first, status), (second, other) = command([*generate, "--mesh", "data=2"])
    assert (status, other) == (0, 0), (first, second)
    assert want in first and "food" not in second
    for text, status in command([*generate[:2], "-"]):
        assert status == 2 and "every process needs the prompts" in text
    for text, status in command(generate, ["--mesh", "data=2"], ["--mesh", "fsdp=2"]):
        assert status == 1 and "disagree: `--mesh` is {'data': 2} in process 0 and {'fsdp'" in text
