"""What can go wrong with a disk, said in one line."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

# Orbax writes descriptions of arrays and of the tree beside them: a few kB, more for many leaves.
_OVERHEAD, _PER_ARRAY = 16_384, 1024

_KNOWN = (
    "No space left on device",
    "Disk quota exceeded",
    "Permission denied",
    "Read-only file system",
    "File too large",
    "Not a directory",
)


def check_space(directory: Path, arrays: Mapping) -> None:
    """Refuses to begin what the disk has no room for.

    Writing would fail as well, but only after Orbax's threads have filled the disk.

    Args:
      directory: on the disk to be written to.
      arrays: what is to be written, by name.

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
    """Keeps Orbax from logging the tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def one_line(error: BaseException) -> str:
    """The text of an error of Orbax or TensorStore, cut to what a person can use."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    for known in _KNOWN:
        if known.lower() in text.lower():
            return known
    return text if len(text) <= 200 else text[:200] + "..."
