"""Orbax folders with arrays under one name and JSON under `meta`, and errors of the disk.

`meta` holds a checksum of every array and of itself, see `checksums`.
"""

import contextlib
import errno
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from lora_jax import processes
from lora_jax.checkpoint.checksums import CHECKSUMS, DamagedError, split_checksums
from lora_jax.checkpoint.flat import parse
from lora_jax.compat import require
from lora_jax.config.arguments import check_path
from lora_jax.files import replacing

T = TypeVar("T")

_AT_A_TIME = 1 << 25  # bytes of arrays that are read at a time, or those of the largest read


def checkpointer(item: str, *, largest: int = 0, together: bool = False) -> Any:
    """Orbax's checkpointer of a folder with arrays under `item` and JSON under `meta`.

    A process of several reads and writes by itself, and waits for none of the others.

    Args:
      item: name of the arrays.
      largest: bytes of the largest read of an array.
      together: all processes write their parts of the arrays into one folder.
    """
    ocp = require("orbax.checkpoint")
    me = jax.process_index()
    who = ocp.options.MultiprocessingOptions()
    if processes.several() and not together:
        who = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
        )
    # Orbax reads all arrays at once, and needs twice their memory.
    arrays = ocp.StandardCheckpointHandler(
        multiprocessing_options=who, restore_concurrent_gb=max(largest + 1, _AT_A_TIME) / 1e9
    )
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=who)
    both = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=who),
        **{item: arrays, "meta": meta},
    )
    return ocp.Checkpointer(both, multiprocessing_options=who)


def is_folder(directory: Path, item: str) -> bool:
    """Whether the path is a folder with `item` and `meta`."""
    return (directory / item).is_dir() and (directory / "meta").is_dir()


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints of a run, the newest first; none where there is no folder."""
    # Other names are Orbax's partial checkpoints, and damaged ones that were renamed.
    names = (path.name for path in checkpoints.glob("*"))
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def folder_of(directory: Any) -> Path:
    """A folder's whole path.

    Raises:
      TypeError: it is no path.
    """
    return Path(os.path.abspath(check_path("directory", directory)))


def place_for(directory: str | os.PathLike, item: str, what: str) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
      FileExistsError: it holds anything other than `item`.
    """
    directory = folder_of(directory)
    if directory.is_dir():
        taken = any(directory.iterdir()) and not is_folder(directory, item)
    else:
        taken = directory.exists()
    if taken:
        raise FileExistsError(
            f"{directory} exists and is not {what} written by lora_jax; choose another folder"
        )
    return directory


def replace(directory: Path, write: Callable[[Path], None], *, together: bool = False) -> None:
    """Writes a folder and moves it into place when it is complete.

    Args:
      directory: the final path; existing content is replaced.
      write: creates the folder at the path it is called with.
      together: all processes call this and write their parts; the first one moves the folder.

    Raises:
      OSError: it could not be written; existing content is intact.
    """
    try:
        if together and not processes.is_first():
            write(Path(processes.exchange(None)[0]))
        else:
            with replacing(directory) as new:
                if together:
                    processes.exchange(str(new))
                write(new)
        if together:
            processes.exchange("moved")
    except Exception as error:
        raise OSError(
            f"cannot write {directory}: {one_line(error)}; what was there before is intact"
        ) from error


def read_meta(
    directory: Path, expected: str, *, part: str | None = None, needs: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """The JSON of a folder, or one part of it, and the checksums of its arrays.

    Args:
      directory: the folder.
      expected: the required value of `format`.
      part: read only this value.
      needs: required keys, each an object.

    Raises:
      ValueError: the folder is damaged or of another format.
    """
    ocp = require("orbax.checkpoint")
    with readable(directory, "`meta`"), checkpointer("adapter") as opened:
        meta = opened.restore(directory, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    run = meta if part is None or not isinstance(meta, dict) else meta.get(part)
    found = run.get("format") if isinstance(run, dict) else None
    # Older formats have no checksums: the format is named before they are missed.
    if found != expected and (not isinstance(meta, dict) or CHECKSUMS not in meta):
        raise ValueError(f"{directory}: expected format {expected!r}, got {found!r}")
    plain, sums = split_checksums(meta, directory)
    run = plain if part is None else plain[part]
    if found != expected:
        raise ValueError(f"{directory}: expected format {expected!r}, got {found!r}")
    # A run without a LoRA config has null there.
    if lost := [n for n in needs if not isinstance(run.get(n, "absent"), dict | None)]:
        raise ValueError(f"{directory}: its `meta` has no `{lost[0]}`; it is damaged")
    return run, sums


def shapes_of(sums: Mapping[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array, from its checksum."""
    parsed = {name: parse(text) for name, text in sums.items()}
    return {n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in parsed.items()}


def newest_whole(directory: Path, steps: Sequence[int], read: Callable[[int], T]) -> tuple[int, T]:
    """The newest of several checkpoints that is whole, with a warning for each newer one.

    Args:
      directory: the folder that holds them, each named by its step.
      steps: the steps, newest first.
      read: reads a checkpoint, given its step; raises `DamagedError` if it is not whole.

    Raises:
      ValueError: none is whole.
    """
    reasons = []
    for step in steps:
        try:
            found = read(step)
        except DamagedError as error:
            if (directory / str(step)).exists():  # else a run has just replaced it by a newer one
                reasons.append(str(error))
            continue
        # Only now is it known which one is used.
        for reason in reasons:
            warnings.warn(
                f"damaged checkpoint: {reason}; that of step {step} is used instead", stacklevel=3
            )
        return step, found
    if steps and not reasons:
        raise DamagedError(
            f"{directory}: a run replaces its checkpoints meanwhile; read them again"
        )
    raise DamagedError(
        f"{directory}: no checkpoint is whole ({'; '.join(reasons)}); remove {directory} to start "
        "from the beginning"
    )


def read_arrays(directory: Path, item: str, wanted: Any) -> Any:
    """The arrays of a folder.

    Args:
      directory: the folder.
      item: the part of it with the arrays.
      wanted: tree of `jax.ShapeDtypeStruct`s with the shardings.

    Raises:
      DamagedError: they cannot be read, in one line.
    """
    ocp = require("orbax.checkpoint")
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
    with readable(directory, "arrays"):
        with checkpointer(item) as opened:
            stored = opened.metadata(directory).item_metadata[item].tree
        reads = jax.tree.leaves(jax.tree.map(_read_bytes, wanted, stored))
        with checkpointer(item, largest=max(reads, default=0)) as opened:
            return opened.restore(directory, args)[item]


def _read_bytes(wanted: jax.ShapeDtypeStruct, stored: Any) -> int:
    """Bytes of the largest read of an array: that of a shard, in whole chunks of the file."""
    shape, where = wanted.shape, wanted.sharding
    size = wanted.dtype.itemsize
    shard = shape if where is None else where.shard_shape(shape)
    for whole, n, chunk in zip(shape, shard, stored.storage.chunk_shape, strict=True):
        # A shard that does not begin with a chunk may reach into one more.
        apart = bool(n % chunk and chunk % n)
        size *= min(-(-n // chunk) + apart, -(-whole // chunk)) * chunk
    return size


@contextlib.contextmanager
def readable(directory: Path, what: str) -> Iterator[None]:
    """Turns whatever Orbax raises for a damaged folder into one line.

    Raises:
      DamagedError: the block raised.
      PermissionError: the files may not be read.
    """
    try:
        with quiet():
            yield
    except MemoryError:
        raise
    except Exception as error:
        # Neither missing rights nor a full device memory damage a file.
        text = one_line(error)
        if text == "Permission denied":
            raise PermissionError(f"{directory}: {text}: its {what} cannot be read") from None
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        # Other classes, such as KeyError, come from Orbax's parsing of a damaged file.
        text = text if isinstance(error, ValueError | OSError) else "the file is damaged"
        raise DamagedError(f"{directory}: its {what} cannot be read: {text}") from error


# Bytes that Orbax writes beside the data to describe the tree and each array.
_OVERHEAD, _PER_ARRAY = 16_384, 1024
# Causes that TensorStore reports within long messages about its own files.
_KNOWN = (
    "No space left on device",
    "Disk quota exceeded",
    "Permission denied",
    "Read-only file system",
    "File too large",
    "Not a directory",
)


def check_space(directory: Path, arrays: Mapping) -> None:
    """Checks that the disk has room before anything is written.

    Writing would fail too, but only after Orbax's threads have filled the disk.

    Args:
      directory: a folder on the disk.
      arrays: the arrays to write, by name.

    Raises:
      OSError: not enough space is free.
    """
    # A lower bound: file systems round up to blocks.
    needed = _OVERHEAD + sum(x.nbytes + _PER_ARRAY for x in arrays.values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        what = f"{needed / 2**20:,.2f} MiB are needed and {free / 2**20:,.2f} MiB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({what})")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax's log of tracebacks for errors that it also raises."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def one_line(error: BaseException) -> str:
    """One line from an error of Orbax or TensorStore, without its internals."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    for known in _KNOWN:
        if known.lower() in text.lower():
            return known
    return text if len(text) <= 200 else text[:200] + "..."
