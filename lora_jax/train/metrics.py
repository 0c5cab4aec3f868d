"""Metrics of a run as records: JSON lines, and TensorBoard event files beside them.

A record is a flat dict: `{"kind": "train", "step": 12, "loss": 1.23, ...}` after each optimizer
step, `{"kind": "eval", "step": 12, "eval_loss": 1.31}` after each evaluation. Steps count from 1:
the record of step k has the loss before the k-th update.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_jax import processes
from lora_jax.files import write_text
from lora_jax.train.events import open_events, write_scalars

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
# Fields that are no scalars: they are in the tag and the step of an event.
_LABELS = {"kind", "step"}


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records of a metrics file; an incomplete last line (a killed run) is ignored.

    Raises:
      ValueError: any other line is not JSON.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    # What follows the last newline is empty, or the half-written record of a killed run.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a JSON record of metrics") from None
    return records


def rewind(path: Path, step: int) -> list[dict]:
    """Removes the records after `step` from a metrics file, if it exists.

    A resumed run trains these steps again, so that the file has each step once.

    Returns:
      The remaining records.
    """
    if not path.exists():
        return []
    kept = [r for r in read_metrics(path) if r["step"] <= step]
    if processes.is_first():
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


@contextlib.contextmanager
def writer(
    directory: Path | None, *, step: int = 0, tensorboard: bool = True
) -> Iterator[Callable[[dict], None]]:
    """A function that writes a record to all files.

    Args:
      directory: folder of the run; None writes nothing, and so do all processes but the first.
      step: the step that a run is resumed from; TensorBoard hides older events after it.
      tensorboard: write event files too.

    Raises:
      OSError: a record cannot be written (from the function as well).
    """
    if directory is None or not processes.is_first():
        yield lambda record: None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explained(directory))
        directory.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that a record is in the file even if the process is killed right after.
        file = stack.enter_context(open(directory / METRICS, "ab", buffering=0))
        events = None
        if tensorboard:
            opened = open_events(directory / EVENTS, purge=step + 1 if step else 0)
            events = stack.enter_context(opened)

        def write(record: dict) -> None:
            line = json.dumps(record).encode() + b"\n"
            # On a full disk an unbuffered write may write a part, without an error.
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if events is not None:
                kind = record["kind"]
                scalars = {f"{kind}/{k}": v for k, v in record.items() if k not in _LABELS}
                write_scalars(events, record["step"], scalars)

        yield write


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised with a full sentence, not by the system
            raise
        raise type(error)(
            f"{directory}: metrics cannot be written: {os.strerror(error.errno)}; checkpoints are"
            " intact; free some space or choose another folder, then resume"
        ) from error
