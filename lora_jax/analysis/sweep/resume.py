"""A training of a sweep on disk while it is under way, so that a killed one goes on from there.

    output_dir/unfinished/NAME/<step>/    see `lora_jax.checkpoint.state`

Only what trains is written: the adapters, or every weight of full fine-tuning, and the optimizer's
state. The order of the data follows from the seed; a digest of every batch that was seen says so
for sure. A resumed training takes the same steps as one that was never stopped.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

FORMAT = "lora_jax unfinished training 1"
_KEPT = ("seconds", "timed", "batches", "compiled")
_SHARE = 20  # of the time between checkpoints, at most one part writes


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
      step: steps taken.
      state: what trains, and the optimizer's state.
      losses: float32 (steps, members), or (steps,); NaN where it has not been.
      seconds: of the timed steps, those that compiled nothing.
      timed: how many those are.
      batches: digest of the batches seen so far, in their order.
      compiled: seconds of the steps that compiled as well.
    """

    step: int
    state: Any
    losses: np.ndarray
    seconds: float
    timed: int
    batches: str
    compiled: float = 0.0


class Keeper:
    """Keeps one training under way.

    Args:
      folder: its own.
      described: what makes the training the one it is, JSON values; `base` is a fingerprint.
      every: seconds between checkpoints; 0 for one after each step.
      params: the base, compared with the one that a checkpoint was made over.
      say: is told when a training goes on.

    Attributes:
      folder: of the checkpoint.
      begun: whether there is one.
    """

    def __init__(
        self, folder: Path, described: dict, every: float, *, params, say: Callable[[str], None]
    ):
        self.folder, self._params, self._say = folder, params, say
        self._described, self._every = {"format": FORMAT, **described}, every
        self._last, self._took, self.begun = time.monotonic(), 0.0, False

    def restore(self, fresh: Progress) -> Progress:
        """The newest checkpoint, or `fresh` where there is none.

        Raises:
          ValueError: it is of another training, another base, or its arrays have other shapes.
        """
        from lora_jax.checkpoint import check_base, manager, restore_state

        if not self.folder.is_dir():
            return fresh
        with manager(self.folder, keep=1) as opened:
            if opened.latest_step() is None:
                return fresh
            meta = _meta(opened, self.folder)
            self._check(meta["training"])
            check_base(meta["training"]["base"], self._params, where=str(self.folder))
            like = {"state": fresh.state, "losses": jax.numpy.asarray(fresh.losses)}
            found = restore_state(opened, like)
        self.begun = True
        self._say(f"going on after step {found.step} of {len(fresh.losses)}: {self.folder}")
        losses = np.array(found.state["losses"])
        return Progress(found.step, found.state["state"], losses, **meta["progress"])

    def _check(self, had: Mapping) -> None:
        now = self._described
        for name in sorted((had.keys() | now.keys()) - {"base"}):
            if had.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder}: the unfinished training there has {name} = "
                    f"{had.get(name)!r}, this one has {now.get(name)!r}; remove the folder to "
                    "start it again"
                )

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        wait = max(self._every, _SHARE * self._took) if self._every else 0.0
        return time.monotonic() - self._last >= wait

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint; the one before goes when the new one is whole.

        Raises:
          OSError: it cannot be written; the one before is intact.
        """
        from lora_jax.checkpoint import manager, save_state

        began = time.monotonic()
        state = {"state": progress.state, "losses": jax.numpy.asarray(progress.losses)}
        values = {k: getattr(progress, k) for k in _KEPT}
        meta = {"training": self._described, "progress": values}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with manager(self.folder, keep=1) as opened:
            if opened.latest_step() != progress.step:
                save_state(opened, progress.step, state, meta)
        self.begun, self._last = True, time.monotonic()
        self._took = self._last - began


class Unfinished(NamedTuple):
    """A checkpoint that lies there.

    Attributes:
      folder: its own.
      step: steps taken.
      jobs: names of the runs that train together in it.
    """

    folder: Path
    step: int
    jobs: tuple[str, ...]


def unfinished(folder: Path) -> Iterator[Unfinished]:
    """All checkpoints below a folder; what was stopped before its first one is left out.

    Raises:
      ValueError: one cannot be read.
    """
    from lora_jax.checkpoint import manager

    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with manager(path, keep=1) as opened:
            step = opened.latest_step()
            if step is not None:
                yield Unfinished(path, step, tuple(_meta(opened, path)["training"]["jobs"]))


def folder_of(folder: Path, jobs: Sequence[str]) -> Path:
    """Where runs that train together are kept: readable, and different for other runs."""
    digest = hashlib.sha256("\n".join(jobs).encode()).hexdigest()[:8]
    return folder / f"{jobs[0]}-of-{len(jobs)}-{digest}"


def remove(folder: Path) -> None:
    """Takes a checkpoint away, and the folder of all when it was the last."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def digest(before: str, batch) -> str:
    """The digest of the batches so far, with one more.

    Args:
      before: of those before it; empty for none.
      batch: a tree of arrays.
    """
    found = hashlib.sha256(before.encode())
    for leaf in jax.tree.leaves(batch):
        array = np.asarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _meta(opened, folder: Path) -> dict:
    from lora_jax.checkpoint import read_meta_of

    try:
        found = read_meta_of(opened)
        assert found is not None
        meta = found[1]
        if {"training", "progress"} <= meta.keys() and "jobs" in meta["training"]:
            return meta
        reason = "its `meta` lacks parts"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
    raise ValueError(
        f"{folder}: not the checkpoint of an unfinished training ({reason}); remove the folder to "
        "start it again"
    )
