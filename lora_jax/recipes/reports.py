"""What a run prints: its memory, its evaluations, and how it ended."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.compat import require
from lora_jax.train import format_memory


def show_memory(log: Callable[[str], None]) -> Callable:
    """A hook for `fit` that prints the memory of the run above the progress bar."""
    tqdm = require("tqdm").tqdm

    # Printed above the bar: in its line it would be overwritten.
    def show(used: Any) -> None:
        with tqdm.external_write_mode():
            log(f"memory:\n{textwrap.indent(format_memory(used), '  ')}\n")

    return show


def show_evaluations(log: Callable[[str], None]) -> Callable:
    """A hook for `fit` that prints the loss of each evaluation above the progress bar."""
    tqdm = require("tqdm").tqdm

    def show(record: dict) -> None:
        if record["kind"] == "eval" and "eval_loss" in record:
            with tqdm.external_write_mode():
                log(f"eval loss after step {record['step']}: {record['eval_loss']:.4f}")

    return show


def summary(history: Sequence[dict], seconds: float, directory: Path) -> str:
    """The first and last losses of a run, its time, and where its files are.

    Args:
      history: the run's records.
      seconds: what it took.
      directory: its `output_dir`.
    """
    steps = [record for record in history if record["kind"] == "train"]
    evaluated = [r["eval_loss"] for r in history if r["kind"] == "eval" and "eval_loss" in r]
    if not steps:
        return f"no step was left to take; the run is in {directory}"
    first, last = steps[0]["loss"], steps[-1]["loss"]
    count = steps[-1]["step"]
    took = f"{count} step{'s' if count > 1 else ''}, {seconds:,.0f} s"
    lines = [f"{took}; loss {first:.4f} -> {last:.4f}"]
    if evaluated:
        lines[0] += f"; eval loss {evaluated[0]:.4f} -> {evaluated[-1]:.4f}"
    if last > _RISEN * first:
        lines.append("the loss rose: train again with a lower learning rate")
    return "\n".join([*lines, f"plot and metrics: {directory / 'loss.png'}, metrics.jsonl"])


_RISEN = 1.2  # of the first loss; single batches differ by less
