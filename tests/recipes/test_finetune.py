"""What a fine-tuning prints when it ends."""

from pathlib import Path

import pytest

from lora_jax.recipes.finetune import summary

pytestmark = pytest.mark.once


def record(step: int, loss: float) -> dict:
    return {"kind": "train", "step": step, "loss": loss}


def test_the_summary_has_the_first_and_the_last_losses():
    text = summary([record(1, 2.5), record(2, 1.25)], 1234.5, Path("run"))
    assert text == (
        "2 steps, 1,234 s; loss 2.5000 -> 1.2500\nplot and metrics: run/loss.png, metrics.jsonl"
    )
    evaluated = [{"kind": "eval", "step": 0, "eval_loss": 3.0}, record(1, 2.5)]
    assert "; eval loss 3.0000 -> 3.0000\n" in summary(evaluated, 1, Path("run"))
    assert summary([], 1, Path("run")) == "no step was left to take; the run is in run"


@pytest.mark.parametrize(("last", "rose"), [(2.9, False), (3.1, True), (1e9, True)])
def test_a_loss_that_rose_is_in_the_summary(last, rose):
    text = summary([record(1, 2.5), record(3, last)], 1, Path("run"))
    assert ("the loss rose: train again with a lower learning rate" in text) is rose
