"""Orbax folders with arrays under one name and JSON under `meta`, and errors of the disk."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.compat import require


def checkpointer(item: str) -> Any:
    """Orbax's checkpointer of a folder with arrays under `item` and JSON under `meta`."""
    ocp = require("orbax.checkpoint")
    handlers = {item: ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def is_folder(directory: Path, item: str) -> bool:
    """Whether the path is a folder with `item` and `meta`."""
    return (directory / item).is_dir() and (directory / "meta").is_dir()


def place_for(directory: str | os.PathLike, item: str, what: str) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
      FileExistsError: it holds anything other than `item`.
    """
    directory = Path(os.path.abspath(directory))
    if directory.is_dir():
        taken = any(directory.iterdir()) and not is_folder(directory, item)
    else:
        taken = directory.exists()
    if taken:
        raise FileExistsError(
            f"{directory} exists and is not {what} written by lora_jax; choose another folder"
        )
    return directory


def read_meta(
    directory: Path, expected: str, *, part: str | None = None, needs: tuple[str, ...] = ()
) -> dict:
    """The JSON of a folder, or one part of it.

    Args:
      directory: the folder.
      expected: the required value of `format`.
      part: read only this value.
      needs: required keys, each an object.

    Raises:
      ValueError: the folder is damaged or of another format.
    """
    ocp = require("orbax.checkpoint")
    try:
        with checkpointer("adapter") as opened:
            meta = opened.restore(directory, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        meta = meta if part is None else meta[part]
        found = meta.get("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory}: its `meta` cannot be read: {type(error).__name__}: {error}"
        ) from None
    if found != expected:
        raise ValueError(f"{directory}: expected format {expected!r}, got {found!r}")
    # A run without a LoRA config has null there.
    if lost := [n for n in needs if not isinstance(meta.get(n, "absent"), dict | None)]:
        raise ValueError(f"{directory}: its `meta` has no `{lost[0]}`; it is damaged")
    return meta


def read_shapes(opened: Any, directory: Path, item: str) -> Any:
    """Shapes and dtypes of a folder's arrays, as a tree.

    Raises:
      ValueError: they cannot be read, in one line.
    """
    with _readable(directory):
        return opened.metadata(directory).item_metadata[item].tree


def read_arrays(opened: Any, directory: Path, item: str, wanted: Any) -> Any:
    """The arrays of a folder.

    Args:
      opened: from `checkpointer`.
      directory: the folder.
      item: the part of it with the arrays.
      wanted: tree of `jax.ShapeDtypeStruct`s with the shardings.

    Raises:
      ValueError: they cannot be read, in one line.
    """
    ocp = require("orbax.checkpoint")
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
    with _readable(directory):
        return opened.restore(directory, args)[item]


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:
        raise ValueError(
            f"{directory}: its arrays cannot be read: {one_line(error)}; take an earlier one"
        ) from error


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
