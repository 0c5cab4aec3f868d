"""Atomic replacement of a folder: write it under a temporary name, then swap it in.

A reader, or a crash, at any moment finds either the old folder or the new one.
"""

import ctypes
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

from lora_jax.checkpoint.folder import one_line

_AT_CWD, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
# Errors of renameat2 where the kernel or the file system lacks the exchange.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def replace(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder under a temporary name and moves it into place when it is complete.

    Args:
      directory: the final path; existing content is replaced.
      write: creates the folder at the path it is called with.

    Raises:
      OSError: it could not be written; existing content is intact.
    """
    new = _beside(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        write(new)
        # The data must be on the disk before the name is: after a crash of the machine the new
        # name would otherwise point to empty files.
        _sync(new)
        _put(new, directory)
    except Exception as error:
        raise OSError(
            f"cannot write {directory}: {one_line(error)}; what was there before is intact"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def _beside(directory: Path) -> Path:
    # Beside the target, so that the rename stays on one file system. Host and process in the name
    # tell an interrupted save from one that is still running, also on a shared disk.
    mark = f".{directory.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.new"
    return directory.with_name(mark)


def leftovers(directory: Path) -> list[Path]:
    """Temporary folders of current or interrupted saves beside a path."""
    return sorted(directory.parent.glob(f".{directory.name}.*-*-*.new*"))


def _sweep(directory: Path) -> None:
    """Removes the partial folders of dead processes of this machine."""
    for half in leftovers(directory):
        host, pid, _ = half.name.removeprefix(f".{directory.name}.").rsplit("-", 2)
        if host == _host() and pid.isdigit() and not _alive(int(pid)):
            # If the path is missing, the leftover is the only copy and must stay.
            if directory.exists():
                shutil.rmtree(half, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(new: Path, directory: Path) -> None:
    if not directory.exists():
        os.rename(new, directory)
    elif not exchange(new, directory):
        # Two renames leave a moment without the folder; `leftovers` finds the old one after a
        # crash in it.
        old = new.with_name(new.name + ".old")
        os.rename(directory, old)
        try:
            os.rename(new, directory)
        except OSError:
            os.rename(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders atomically.

    Returns:
      False if the system or the file system does not support it; nothing is changed then.

    Raises:
      OSError: the exchange failed.
    """
    step = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if step is None:
        return False
    if step(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _SWAP) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(b))
