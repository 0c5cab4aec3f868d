"""The runs of a sweep on disk: one file a run, so that nothing computed is lost.

output_dir/sweep.json             what the runs have in common; a resumed sweep must agree
           runs/NAME.json         a run's numbers, written when it is trained, again when scored
           runs/NAME.npz          its trained numbers, until it is scored or passed over
           unfinished/NAME/       a training under way, see `sweep_resume`
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.analysis.sweep import resume
from lora_jax.analysis.sweep.result import Run
from lora_jax.files import kept, replacing, write_text

COMMON = "sweep.json"
_UNFINISHED = "unfinished"


class Store:
    """The runs that are done. Without a folder they are kept in memory only.

    Attributes:
      runs: by name.
    """

    def __init__(self, folder: Path | None, common: Mapping[str, Any]):
        self.runs: dict[str, Run] = {}
        self._trees: dict[str, Any] = {}
        self._folder = folder
        if folder is None:
            return
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        _check_common(folder / COMMON, json.loads(json.dumps(common)))
        for path in sorted((folder / "runs").glob("*.json")):
            run = _read(path)
            self.runs[run.name] = run

    def trained(self, run: Run, tree) -> None:
        """Keeps a run that is trained and not scored yet, with its weights."""
        if self._folder is not None:
            arrays = [np.asarray(x) for x in jax.tree.leaves(_moved(tree))]
            with replacing(self._path(run, ".npz")) as new, open(new, "wb") as file:
                np.savez(file, *[_plain(x) for x in arrays])
        else:
            self._trees[run.name] = tree
        self._write(run)

    def tree(self, run: Run, like):
        """The weights of a run that is not scored yet.

        Args:
          run: the run.
          like: a tree of the same structure; what did not train is taken from it.
        """
        if run.name in self._trees:
            return self._trees[run.name]
        moved, still = lora.split(like)
        whole = not jax.tree.leaves(moved)
        leaves, tree = jax.tree.flatten(like if whole else moved)
        with np.load(self._path(run, ".npz")) as held:
            arrays = [held[f"arr_{i}"] for i in range(len(leaves))]
        arrays = [
            jax.numpy.asarray(x.view(leaf.dtype) if x.dtype != leaf.dtype else x)
            for x, leaf in zip(arrays, leaves, strict=True)
        ]
        tree = jax.tree.unflatten(tree, arrays)
        return tree if whole else lora.combine(tree, still)

    def holds(self, run: Run) -> bool:
        """Whether the weights of a run are still there."""
        if self._folder is None:
            return run.name in self._trees
        return self._path(run, ".npz").is_file()

    def scored(self, run: Run) -> None:
        """Keeps a run with its values; its weights are not needed any more."""
        self._write(run)
        self.forget(run)

    def forget(self, run: Run) -> None:
        """Lets go of a run's weights."""
        self._trees.pop(run.name, None)
        if self._folder is not None:
            self._path(run, ".npz").unlink(missing_ok=True)

    def place_of(self, jobs: Sequence[str]) -> Path | None:
        """Where runs that train together are kept on the way; None without a folder."""
        if self._folder is None:
            return None
        return resume.folder_of(self._folder / _UNFINISHED, jobs)

    def unfinished(self) -> Iterator[resume.Unfinished]:
        """Trainings that were under way when the sweep was stopped."""
        if self._folder is not None:
            yield from resume.unfinished(self._folder / _UNFINISHED)

    def finished(self, runs: Sequence[Run]) -> None:
        """Takes away the checkpoints that hold any of these runs, which are trained now."""
        names = [run.name for run in runs]
        if (own := self.place_of(names)) is not None:
            resume.remove(own)
        for found in list(self.unfinished()):
            if set(names) & set(found.jobs):
                resume.remove(found.folder)

    def _write(self, run: Run) -> None:
        self.runs[run.name] = run
        if self._folder is None:
            return
        values = run._asdict() | {
            "losses": [float(x) for x in run.losses],
            "values": None if run.values is None else np.asarray(run.values).tolist(),
        }
        write_text(self._path(run, ".json"), json.dumps(values))

    def _path(self, run: Run, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / "runs" / (run.name + suffix)


def _moved(tree):
    """What a run trained: the trainable half, or the whole tree of full fine-tuning."""
    moved, _ = lora.split(tree)
    return moved if jax.tree.leaves(moved) else tree


def _plain(x: np.ndarray) -> np.ndarray:
    """NumPy's files know no bfloat16: its bits are kept."""
    return x if x.dtype.kind in "fiub" else x.view(np.uint16 if x.itemsize == 2 else np.uint8)


def _read(path: Path) -> Run:
    try:
        held = json.loads(path.read_text("utf-8"))
        values = held.pop("values")
        return Run(**held, values=None if values is None else np.asarray(values))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a run of this sweep ({error}); remove the file and resume"
        ) from None


def _check_common(path: Path, common: dict) -> None:
    had = kept(path, lambda: common, indent=1)
    if differs := [k for k in common.keys() | had.keys() if common.get(k) != had.get(k)]:
        name = sorted(differs)[0]
        raise ValueError(
            f"{path}: the sweep there has {name} = {had.get(name)!r}, this one has "
            f"{common.get(name)!r}: its runs cannot stand in one table; give another output_dir"
        )
