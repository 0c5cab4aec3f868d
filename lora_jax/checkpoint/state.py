"""The state of a training run on disk, through Orbax's CheckpointManager.

    folder/<step>/state/   Orbax: trainable, opt_state, key, step as one flat dict
    folder/<step>/meta/    JSON: data position, configs, the base's fingerprint, checksums

A step's folder appears by one rename when it is complete: a run that is killed while writing leaves
the previous checkpoint. Saving is synchronous, so that an error is raised in its own step.
"""

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax import processes
from lora_jax.checkpoint.checksums import (
    DamagedError,
    check_arrays,
    split_checksums,
    with_checksums,
)
from lora_jax.checkpoint.flat import differences, flatten, summary, unflatten
from lora_jax.checkpoint.folder import (
    check_space,
    checkpointer,
    folder_of,
    newest_whole,
    one_line,
    quiet,
    read_arrays,
    readable,
    shapes_of,
)
from lora_jax.compat import require


class Checkpoint(NamedTuple):
    """One restored checkpoint.

    Attributes:
      step: number of the step.
      state: the restored tree.
      meta: the JSON values beside it.
    """

    step: int
    state: Any
    meta: dict


@contextlib.contextmanager
def manager(directory: str | os.PathLike, *, keep: int | None = None) -> Iterator[Any]:
    """Orbax's CheckpointManager for a run, as a context.

    Args:
      directory: created if missing.
      keep: number of newest checkpoints to keep; None keeps all.

    Raises:
      OSError: the folder cannot be created or written.
    """
    ocp = require("orbax.checkpoint")
    directory = folder_of(directory)
    processes.together(lambda: _probe(directory))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    # Without explicit handlers a new manager cannot read the items of an existing checkpoint.
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    opened = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    try:
        yield opened
    finally:
        opened.close()


def _probe(directory: Path) -> None:
    """Fails now and with the folder's name, not at the first checkpoint."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A name of its own on every host, where processes may have the same number.
        probe = directory / f".probe.{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise type(error)(
            f"{directory}: checkpoints cannot be written: {one_line(error)}; choose a folder that"
            " can be written"
        ) from None


def save_state(opened: Any, step: int, state: Any, meta: dict) -> None:
    """Writes one checkpoint; returns when it is complete on disk.

    Args:
      opened: from `manager`.
      step: its number.
      state: any tree of arrays; typed random keys are written as their data.
      meta: JSON values.

    Raises:
      OSError: it could not be written; earlier checkpoints are intact, and partial files are
        removed.
    """
    ocp = require("orbax.checkpoint")
    arrays = {name: _plain(leaf) for name, leaf in flatten(state).items()}
    # Every process writes its parts of the arrays, and Orbax lets them wait for each other.
    meta = with_checksums(meta, arrays)
    args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    try:
        check_space(Path(opened.directory), arrays)
        with quiet():
            opened.save(step, args=args, force=True)
    except Exception as error:
        if processes.is_first():
            sweep(Path(opened.directory), f"{step}.")
        # Orbax raises it under another type.
        if (lost := processes.unreachable(error)) is not None:
            raise lost from error
        # Orbax caches the list of steps, which may include the failed one.
        opened.reload()
        last = max((s for s in opened.all_steps() if s != step), default=None)
        kept = "none was there before" if last is None else f"that of step {last} is intact"
        raise OSError(
            f"{opened.directory}: the checkpoint of step {step} cannot be written:"
            f" {one_line(error)}; {kept}; free some space or choose another folder, then resume"
        ) from error


def sweep(directory: Path, start: str = "") -> None:
    """Removes the partial checkpoints of killed runs; no other process may write there.

    Args:
      directory: of the checkpoints.
      start: of the names to remove; all by default.
    """
    for half in directory.glob(f"{start}*orbax-checkpoint-tmp*"):
        shutil.rmtree(half, ignore_errors=True)


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def read_meta_of(opened: Any) -> tuple[int, dict] | None:
    """The step and the JSON of the newest checkpoint, or None if there is no checkpoint.

    Damaged ones are left out with a warning.

    Raises:
      ValueError: all are damaged.
    """
    steps = sorted(opened.all_steps(), reverse=True)
    if not steps:
        return None
    return newest_whole(Path(opened.directory), steps, lambda step: _meta(opened, step)[0])


def _meta(opened: Any, step: int) -> tuple[dict, dict[str, str]]:
    ocp = require("orbax.checkpoint")
    place = Path(opened.directory) / str(step)

    def read() -> tuple[dict, dict[str, str]]:
        # The manager would let the processes wait for each other, also for one that has failed.
        with readable(place, "`meta`"), checkpointer("state") as own:
            meta = own.restore(place, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        return split_checksums(meta, place)

    return processes.together(read, DamagedError)


def restore_state(
    opened: Any, like: Any, *, check: Callable[[dict], None] | None = None
) -> Checkpoint:
    """Reads the newest checkpoint into a tree with the structure of `like`.

    Checkpoints that are damaged are left out with a warning.

    Args:
      opened: from `manager`.
      like: tree of arrays with the expected shapes and dtypes.
      check: called with the JSON before the arrays are read; raises for another run's.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: its arrays differ from those of `like`, or all checkpoints are damaged.
    """
    steps = sorted(opened.all_steps(), reverse=True)
    if not steps:
        raise FileNotFoundError(f"{opened.directory}: there is no checkpoint to restore")
    read = partial(_restore_step, opened, like=like, check=check)
    return newest_whole(Path(opened.directory), steps, read)[1]


def _restore_step(
    opened: Any, step: int, *, like: Any, check: Callable[[dict], None] | None
) -> Checkpoint:
    meta, sums = _meta(opened, step)
    if check is not None:
        check(meta)
    named = flatten(like)
    # Typed keys are stored as integers, see `save_state`.
    wanted = {n: jax.eval_shape(_plain, x) for n, x in named.items()}
    if phrases := differences(wanted, shapes_of(sums)):
        raise ValueError(
            f"{opened.directory}: the checkpoint of step {step} is of another run:"
            f" {summary(phrases)}"
        )
    wanted = {n: _placed(w, named[n]) for n, w in wanted.items()}
    place = Path(opened.directory) / str(step)

    # A process reads its own parts, so that only one of several may find the damage.
    arrays = processes.together(lambda: read_arrays(place, "state", wanted), DamagedError)
    check_arrays(arrays, sums, place)
    typed = {n: _typed(x, named[n]) if _is_key(named[n]) else x for n, x in arrays.items()}
    return Checkpoint(step, unflatten(like, typed), meta)


def _typed(data: Any, like: Any) -> Any:
    """A key of the kind of `like`, where `like` lies."""
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    return processes.put(key, like.sharding)


def set_aside(opened: Any, after: int) -> None:
    """Renames the checkpoints after a step, which are damaged, to make room for new ones."""
    damaged = [step for step in opened.all_steps() if step > after]
    if damaged:
        processes.together(lambda: _rename(Path(opened.directory), damaged))
    opened.reload()


def _rename(directory: Path, damaged: Sequence[int]) -> None:
    if not processes.is_first():
        return
    for step in damaged:
        place = directory / str(step)
        # Kept, as part of it may be rescued by hand; Orbax ignores names that are no numbers.
        aside = place.with_name(f"{step}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(place, aside)
        warnings.warn(f"{place}: renamed to {aside.name}; remove it", stacklevel=4)


def _placed(struct: jax.ShapeDtypeStruct, like: Any) -> jax.ShapeDtypeStruct:
    # Without one Orbax takes the devices of the run that wrote it. A key's sharding fits its data,
    # which has one more dim.
    sharding = getattr(like, "sharding", None)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
