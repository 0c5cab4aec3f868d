"""Recorded answers of torch: they come back as they were, and another answer is noticed."""

import numpy as np
import pytest

from tests.support import oracle

pytestmark = pytest.mark.once
ANSWER = {"logits": np.arange(6.0, dtype=np.float32).reshape(2, 3), "tokens": [[1, 2], [3]]}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "FOLDER", tmp_path)
    oracle.write(tmp_path / "room" / "a_case.logits.safetensors", ANSWER)
    return "room/a case.logits"


def never():
    raise AssertionError("asked")


def test_an_answer_comes_back_and_nobody_is_asked(recorded, monkeypatch):
    monkeypatch.setattr(oracle, "MODE", "recorded")
    found = oracle.oracle(recorded, never)
    assert list(found) == list(ANSWER) and found["tokens"] == ANSWER["tokens"]
    np.testing.assert_array_equal(found["logits"], ANSWER["logits"])


@pytest.mark.parametrize("change", [{"logits": ANSWER["logits"] + 0.01}, {"tokens": [[1, 2], [4]]}])
def test_another_answer_is_an_error_where_torch_is_asked_again(recorded, monkeypatch, change):
    monkeypatch.setattr(oracle, "MODE", "live")
    oracle.oracle(recorded, lambda: ANSWER)
    with pytest.raises(AssertionError, match="a case"):
        oracle.oracle(recorded, lambda: {**ANSWER, **change})


def test_another_version_of_torch_is_asked(recorded, monkeypatch):
    monkeypatch.setattr(oracle, "MODE", "recorded")
    monkeypatch.setattr(oracle, "installed", lambda: {"torch": "0.1"})
    with pytest.raises(AssertionError, match="asked"):
        oracle.oracle(recorded, never)


def test_what_is_not_recorded_is_said(recorded):
    with pytest.raises(FileNotFoundError, match="make oracles"):
        oracle.oracle("room/other", never)
