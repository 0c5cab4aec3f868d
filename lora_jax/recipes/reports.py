"""What a run prints: its memory, its evaluations, and how it ended."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax.compat import require
from lora_jax.train import format_memory
from lora_jax.train.speed import PROFILE


def show_memory(log: Callable[[str], None]) -> Callable:
    """A hook for `fit` that prints the memory of the run above the progress bar."""
    tqdm = require("tqdm").tqdm

    # Printed above the bar: in its line it would be overwritten.
    def show(used: Any) -> None:
        with tqdm.external_write_mode():
            log(f"memory:\n{textwrap.indent(format_memory(used), '  ')}\n")

    return show


def idle_devices(mesh: Mapping[str, int] | None) -> str:
    """A hint where a run without a mesh leaves devices idle; empty where there is none."""
    count = jax.device_count()
    # No mesh is made by default: it would decide which batch sizes are valid.
    if mesh is not None or count == 1:
        return ""
    return (
        f"one of {count} devices is used: --mesh data=-1 spreads the rows over all of them, "
        "--mesh fsdp=-1 rows and weights"
    )


def show_evaluations(log: Callable[[str], None]) -> Callable:
    """A hook for `fit` that prints the loss of each evaluation above the progress bar."""
    tqdm = require("tqdm").tqdm

    def show(record: dict) -> None:
        if record["kind"] == "eval" and "eval_loss" in record:
            with tqdm.external_write_mode():
                log(f"eval loss after step {record['step']}: {record['eval_loss']:.4f}")

    return show


def summary(
    history: Sequence[dict],
    seconds: float,
    directory: Path,
    *,
    first_step: float | None = None,
    peak: int | None = None,
) -> str:
    """The first and last losses of a run, its time and speed, and where its files are.

    Args:
      history: the run's records.
      seconds: what it took.
      directory: its `output_dir`.
      first_step: seconds until its first step was done.
      peak: the most bytes that a device held.
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
    lines.append(_speed(steps, first_step, peak))
    lines.append(f"plot and metrics: {directory / 'loss.png'}, metrics.jsonl")
    if (directory / PROFILE).is_dir():
        lines.append(f"trace: {directory / PROFILE}, for TensorBoard's profile plugin or Perfetto")
    return "\n".join(lines)


def _speed(steps: Sequence[dict], first_step: float | None, peak: int | None) -> str:
    # Of the steps alone: without compilation, evaluation and saving.
    took = sum(r["seconds"] for r in steps)
    tokens = sum(r["tokens"] for r in steps)
    parts = [f"{tokens / took:,.0f} tokens/s"]
    # A run that an older release began has records without these.
    if all("flops_per_second" in r for r in steps):
        flops = sum(r["flops_per_second"] * r["seconds"] for r in steps) / took
        parts.append(f"{flops / 1e12:.3g} model TFLOP/s a device")
    if all("mfu" in r for r in steps):
        parts.append(f"MFU {100 * sum(r['mfu'] * r['seconds'] for r in steps) / took:.1f} %")
    if all("padding" in r for r in steps):
        computed = sum(r["tokens"] / (1 - r["padding"]) for r in steps)
        parts.append(f"padding {100 * (1 - tokens / computed):.1f} %")
    if first_step is not None:
        parts.append(f"first step after {first_step:.1f} s")
    if peak is not None:
        parts.append(f"peak memory {peak / 2**30:.2f} GiB")
    return ", ".join(parts)


_RISEN = 1.2  # of the first loss; single batches differ by less
