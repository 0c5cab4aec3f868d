"""The folder of the demo: its data as JSON lines, its result, and what it may replace."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_jax.files import LOCK, locked, replacing
from lora_jax.recipes.demo import task

MARK = "demo.json"  # marks a folder written by a demo, which the next demo may replace
_WHAT = {
    "adapter": "the adapter, for PEFT",
    "checkpoints": "the training state, an Orbax checkpoint",
    "loss.png": "the loss curve",
    "metrics.jsonl": "the metrics of every step",
    "tensorboard": "the same for TensorBoard",
    "train.jsonl": "the training data",
    "test.jsonl": "the test data",
    MARK: "the scores",
}


def prepare(directory: Path, train: Sequence[task.Sentence], test: Sequence[task.Sentence]) -> Path:
    """Empties or makes the folder and writes the data into it.

    Args:
      directory: the folder.
      train: the training data.
      test: the test data.

    Returns:
      The path of the training data.

    Raises:
      FileExistsError: the folder holds something, and no demo made it.
      BlockingIOError: a demo is running in it.
    """
    _clear(directory)
    # Marked first, so that the next demo may replace what an interrupted one leaves.
    finish(directory, {"state": "running"})
    for name, examples in (("train.jsonl", train), ("test.jsonl", test)):
        _write_lines(directory / name, ({"messages": task.conversation(e)} for e in examples))
    return directory / "train.jsonl"


def _clear(directory: Path) -> None:
    """Removes the files of an earlier demo, and nothing else."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose a folder as `output_dir`")
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    found -= {LOCK}  # left by a demo that was killed
    if found and (MARK not in found or found - set(_WHAT)):
        other = min(found - set(_WHAT) or found)
        raise FileExistsError(
            f"{directory} holds `{other}`, which no demo wrote; choose another folder as "
            "`output_dir`"
        )
    if not found:
        return
    # A demo that is running in the folder must not lose its files.
    with locked(directory):
        for name in found:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def finish(directory: Path, result: Mapping) -> None:
    """Writes the result, which also marks the folder as written by a demo."""
    _write_lines(directory / MARK, [result])


def _write_lines(path: Path, values: Iterable) -> None:
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def contents(directory: Path) -> str:
    """A line for everything the demo wrote."""
    found = [name for name in _WHAT if (directory / name).exists()]
    return "\n".join(f"  {directory / name}: {_WHAT[name]}" for name in found)
