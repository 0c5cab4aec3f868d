"""The runs of a sweep on disk: finished runs (`Store`) and checkpoints of current ones (`Keeper`).

output_dir/sweep.json             the settings of all runs; a resumed sweep must have the same
           runs/NAME.json         the numbers of a run, written when it is trained and when scored
           runs/NAME.npz          its trained weights, until it is scored or rejected
           unfinished/NAME/       Orbax checkpoint of a training in progress

A group of adapters that train together has one checkpoint: the trained leaves, the optimizer's
state, the losses so far, and a digest of the batches seen. Restoring checks the digest, the jobs of
the group and the base's fingerprint, so that a resumed training ends with the bits of an
uninterrupted one.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from lora_jax import processes
from lora_jax.analysis.sweep.result import Run
from lora_jax.checkpoint import check_base, manager, read_meta_of, restore_state, save_state
from lora_jax.files import kept, replacing, write_text
from lora_jax.models.mesh import on_mesh, placement
from lora_jax.train.archive import check_shared
from lora_jax.train.batches import Batch, by_place
from lora_jax.tree import combine, trained_and_frozen

COMMON = "sweep.json"
_UNFINISHED = "unfinished"
FORMAT = "lora_jax unfinished training 1"
_KEPT = ("seconds", "timed", "batches", "compiled")
_SHARE = 20  # at most 1/20 of the time is spent on writing checkpoints


class Progress(NamedTuple):
    """The progress of a training.

    Attributes:
      step: steps taken.
      state: the trained leaves and the optimizer's state.
      losses: float32 (steps, members), or (steps,); NaN for the steps to come.
      seconds: time of the steps that compiled nothing.
      timed: number of these steps.
      batches: digest of the batches seen so far, in order.
      compiled: time of the steps that also compiled.
    """

    step: int
    state: Any
    losses: np.ndarray
    seconds: float
    timed: int
    batches: str
    compiled: float = 0.0


class Keeper:
    """Writes and restores the checkpoints of one training.

    Args:
      folder: the folder of this training.
      described: identifies the training, as JSON values; `base` is a fingerprint.
      every: seconds between checkpoints; 0 for one after each step.
      params: the base, whose fingerprint must be that of a restored checkpoint.
      log: called with a line of text when a training continues.

    Attributes:
      folder: the folder of this training.
      begun: whether it has a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        described: dict,
        every: float,
        *,
        params: Any,
        log: Callable[[str], None],
    ) -> None:
        self.folder, self._params, self._log = folder, params, log
        self._described, self._every = {"format": FORMAT, **described}, every
        self._last, self._took, self.begun = time.monotonic(), 0.0, False

    def restore(self, fresh: Progress) -> Progress:
        """The newest checkpoint, or `fresh` if there is none.

        Raises:
          ValueError: the checkpoint is of another training or base, or has other shapes.
        """
        if not self.folder.is_dir():
            return fresh
        with manager(self.folder, keep=1) as opened:
            if opened.latest_step() is None:
                return fresh
            meta = _meta(opened, self.folder)
            self._check(meta["training"])
            check_base(meta["training"]["base"], self._params, where=str(self.folder))
            like = self._arrays(fresh)
            found = restore_state(opened, like)
        self.begun = True
        self._log(f"going on after step {found.step} of {len(fresh.losses)}: {self.folder}")
        losses = np.array(found.state["losses"])
        return Progress(found.step, found.state["state"], losses, **meta["progress"])

    def _arrays(self, progress: Progress) -> dict[str, Any]:
        losses, at = jax.numpy.asarray(progress.losses), placement(None, self._params)
        # Processes write arrays that all of them know the place of.
        return {
            "state": progress.state,
            "losses": losses if at is None else on_mesh(losses, at.mesh),
        }

    def _check(self, had: Mapping) -> None:
        now = self._described
        # The base is left to `check_base`, which names the leaves that differ.
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
        """Writes a checkpoint, and removes the previous one when it is complete.

        Raises:
          OSError: it cannot be written; the previous checkpoint is intact.
        """
        began = time.monotonic()
        values = {k: getattr(progress, k) for k in _KEPT}
        meta = {"training": self._described, "progress": values}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with manager(self.folder, keep=1) as opened:
            if opened.latest_step() != progress.step:
                save_state(opened, progress.step, self._arrays(progress), meta)
        self.begun, self._last = True, time.monotonic()
        self._took = self._last - began


class Unfinished(NamedTuple):
    """A checkpoint of an interrupted training.

    Attributes:
      folder: its folder.
      step: steps taken.
      jobs: names of the runs that train together in it.
    """

    folder: Path
    step: int
    jobs: tuple[str, ...]


def unfinished(folder: Path) -> Iterator[Unfinished]:
    """The interrupted trainings in a folder that have a checkpoint.

    Raises:
      ValueError: one cannot be read.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with manager(path, keep=1) as opened:
            step = opened.latest_step()
            if step is not None:
                yield Unfinished(path, step, tuple(_meta(opened, path)["training"]["jobs"]))


def folder_of(folder: Path, jobs: Sequence[str]) -> Path:
    """The folder of a group: a readable name, unique to these runs."""
    # The names of a whole group can exceed the length that file systems allow.
    digest = hashlib.sha256("\n".join(jobs).encode()).hexdigest()[:8]
    return folder / f"{jobs[0]}-of-{len(jobs)}-{digest}"


def remove(folder: Path) -> None:
    """Removes a checkpoint, and the parent folder if it was the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def digest(before: str, batch: Any) -> str:
    """The digest of a sequence of batches, extended by one.

    Args:
      before: the digest without it; empty for the first.
      batch: a tree of arrays; of a `train.Batch` the order of its places does not count, which
        depends on the mesh.
    """
    batch = by_place(batch) if isinstance(batch, Batch) else batch
    found = hashlib.sha256(before.encode())
    # With dtype and shape: the same bytes in another shape are another batch.
    for leaf in jax.tree.leaves(batch):
        array = np.asarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _meta(opened: Any, folder: Path) -> dict:
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


class Store:
    """The finished runs; without a folder they are kept in memory only.

    Attributes:
      runs: the runs by name.
    """

    def __init__(self, folder: Path | None, common: Mapping[str, Any]) -> None:
        self.runs: dict[str, Run] = {}
        self._trees: dict[str, Any] = {}
        self._folder = folder
        if folder is None:
            return
        processes.by_first(lambda: (folder / "runs").mkdir(parents=True, exist_ok=True))
        check_shared(folder)
        # Through JSON, as the stored values are: a tuple would differ from the list read back.
        same = json.loads(json.dumps(common))
        processes.by_first(lambda: _check_common(folder / COMMON, same))
        for path in sorted((folder / "runs").glob("*.json")):
            run = _read(path)
            self.runs[run.name] = run

    def trained(self, run: Run, tree: Any) -> None:
        """Stores a trained run that is not scored yet, with its weights."""
        if self._folder is not None:
            arrays = [np.asarray(processes.whole(x)) for x in jax.tree.leaves(_moved(tree))]
            processes.by_first(lambda: _write_arrays(self._path(run, ".npz"), arrays))
        else:
            self._trees[run.name] = tree
        self._write(run)

    def tree(self, run: Run, like: Any) -> Any:
        """The weights of a trained run that is not scored yet.

        Args:
          run: the run.
          like: a tree of the same structure; untrained leaves are taken from it.
        """
        if run.name in self._trees:
            return self._trees[run.name]
        moved, still = trained_and_frozen(like)
        # A tree of full fine-tuning has no adapters: all its leaves are in the file.
        whole = not jax.tree.leaves(moved)
        leaves, tree = jax.tree.flatten(like if whole else moved)
        with np.load(self._path(run, ".npz")) as held:
            arrays = [held[f"arr_{i}"] for i in range(len(leaves))]
        # bfloat16 comes back as its bits, see `_plain`.
        arrays = [
            _like(x.view(leaf.dtype) if x.dtype != leaf.dtype else x, leaf)
            for x, leaf in zip(arrays, leaves, strict=True)
        ]
        tree = jax.tree.unflatten(tree, arrays)
        return tree if whole else combine(tree, still)

    def holds(self, run: Run) -> bool:
        """Whether the weights of a run are still stored."""
        if self._folder is None:
            return run.name in self._trees
        return self._path(run, ".npz").is_file()

    def scored(self, run: Run) -> None:
        """Stores the scores of a run and removes its weights."""
        # In this order: a run killed in between keeps its score, and only a file is left over.
        self._write(run)
        self.forget(run)

    def forget(self, run: Run) -> None:
        """Removes the weights of a run."""
        self._trees.pop(run.name, None)
        if self._folder is not None:
            processes.by_first(lambda: self._path(run, ".npz").unlink(missing_ok=True))

    def place_of(self, jobs: Sequence[str]) -> Path | None:
        """The checkpoint folder of a group; None without a folder."""
        if self._folder is None:
            return None
        return folder_of(self._folder / _UNFINISHED, jobs)

    def unfinished(self) -> Iterator[Unfinished]:
        """The trainings that were in progress when the sweep was interrupted."""
        if self._folder is not None:
            yield from unfinished(self._folder / _UNFINISHED)

    def finished(self, runs: Sequence[Run]) -> None:
        """Removes the checkpoints of groups with any of these runs, which are now trained."""
        # A run may also have trained in a group of another size before the interruption.
        names = [run.name for run in runs]
        left = [u.folder for u in self.unfinished() if set(names) & set(u.jobs)]
        if (own := self.place_of(names)) is not None:
            left.append(own)
        processes.by_first(lambda: [remove(folder) for folder in left])

    def _write(self, run: Run) -> None:
        self.runs[run.name] = run
        if self._folder is None:
            return
        # Arrays as lists, for JSON.
        values = run._asdict() | {
            "losses": [float(x) for x in run.losses],
            "values": None if run.values is None else np.asarray(run.values).tolist(),
        }
        text = json.dumps(values)
        processes.by_first(lambda: write_text(self._path(run, ".json"), text))

    def _path(self, run: Run, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / "runs" / (run.name + suffix)


def _moved(tree: Any) -> Any:
    """The trained leaves: the trainable half, or the whole tree of full fine-tuning."""
    moved, _ = trained_and_frozen(tree)
    return moved if jax.tree.leaves(moved) else tree


def _write_arrays(path: Path, arrays: Sequence[np.ndarray]) -> None:
    with replacing(path) as new, open(new, "wb") as file:
        np.savez(file, *[_plain(x) for x in arrays])


def _like(x: np.ndarray, leaf: Any) -> jax.Array:
    """An array from the disk where the leaf lies."""
    where = getattr(leaf, "sharding", None)
    return processes.put(x, where) if isinstance(where, NamedSharding) else jax.numpy.asarray(x)


def _plain(x: np.ndarray) -> np.ndarray:
    """The array as .npz can store it: bfloat16 is stored as its bits."""
    return x if x.dtype.kind in "fiub" else x.view(np.uint16 if x.itemsize == 2 else np.uint8)


def _read(path: Path) -> Run:
    try:
        held = json.loads(path.read_text("utf-8"))
        values = held.pop("values")
        return Run(**held, values=None if values is None else np.asarray(values))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a run of this sweep ({error}); remove the file, and resume"
        ) from None


def _check_common(path: Path, common: dict) -> None:
    had = kept(path, lambda: common, indent=1)
    if differs := [k for k in common.keys() | had.keys() if common.get(k) != had.get(k)]:
        name = sorted(differs)[0]
        raise ValueError(
            f"{path}: the sweep there has {name} = {had.get(name)!r}, this one has "
            f"{common.get(name)!r}: their runs cannot share a table; choose another "
            "`output_dir`"
        )
