"""Metrics of a run as records: JSON lines, and TensorBoard event files beside them.

A record is a flat dict: `{"kind": "train", "step": 12, "loss": 1.23, ...}` after each optimizer
step, `{"kind": "eval", "step": 12, "eval_loss": 1.31}` after each evaluation. Steps count from 1:
the record of step k has the loss before the k-th update.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
_LABELS = {"kind", "step"}
_FLUSH_SECONDS = 5.0


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records of a metrics file; an unfinished last line (a killed run) is left out.

    Raises:
      ValueError: another line is not JSON.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or half
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a JSON record of metrics") from None
    return records


def rewind(path: Path, step: int) -> list[dict]:
    """Takes the records after `step` out of a metrics file, if there is one.

    A resumed run trains those steps again; the file then has each step once.

    Returns:
      The records that stay.
    """
    if not path.exists():
        return []
    kept = [r for r in read_metrics(path) if r["step"] <= step]
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return kept


@contextlib.contextmanager
def writer(
    directory: Path | None, *, step: int = 0, tensorboard: bool = True
) -> Iterator[Callable[[dict], None]]:
    """A function that writes a record wherever records go.

    Args:
      directory: of the run; None writes nothing.
      step: the step the run goes on from; TensorBoard hides older events after it.
      tensorboard: write event files too.

    Raises:
      OSError: a record cannot be written (from the function as well).
    """
    if directory is None:
        yield lambda record: None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explained(directory))
        directory.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a record is in the file when it was written, whatever happens next.
        file = stack.enter_context(open(directory / METRICS, "ab", buffering=0))
        events = _events(directory / EVENTS, step, stack) if tensorboard else None

        def write(record: dict) -> None:
            line = json.dumps(record).encode() + b"\n"
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if events is not None:
                events(record)

        yield write


@contextlib.contextmanager
def _explained(directory: Path):
    try:
        yield
    except OSError as error:
        if error.errno is None:  # already a sentence
            raise
        raise type(error)(
            f"{directory}: metrics cannot be written: {os.strerror(error.errno)}; checkpoints are"
            " intact; free some space or choose another folder, then resume"
        ) from error


def _events(directory: Path, step: int, stack: contextlib.ExitStack) -> Callable[[dict], None]:
    """Appends records to a new TensorBoard event file.

    Through tensorboardX's file format but not its `SummaryWriter`, which writes in a thread: on a
    full disk that thread dies, and the training loop then waits for it forever.
    """
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{step}"
    file = RecordWriter(str(directory / name))
    stack.callback(file.close)

    def add(step: int, **content) -> None:
        file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    add(0, file_version="brain.Event:2")
    # TensorBoard drops what earlier files say of this step and later ones.
    add(step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    flushed = time.monotonic()

    def write(record: dict) -> None:
        nonlocal flushed
        values = [
            Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in _LABELS
        ]
        add(record["step"], summary=Summary(value=values))
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            file.flush()
            flushed = time.monotonic()

    return write
