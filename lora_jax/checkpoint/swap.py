"""A folder that changes as a whole: written beside its place, then put there at one stroke.

Whoever looks, or crashes, at any moment finds the old folder or the new one.
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
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def replace(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder under another name beside its place, and moves it there when it is whole.

    Args:
      directory: its place; what is there is replaced.
      write: makes the folder that it is given.

    Raises:
      OSError: it could not be written; what was there before is intact.
    """
    new = _beside(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        write(new)
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
    mark = f".{directory.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.new"
    return directory.with_name(mark)


def leftovers(directory: Path) -> list[Path]:
    """Folders that a save, here or interrupted, has beside a place."""
    return sorted(directory.parent.glob(f".{directory.name}.*-*-*.new*"))


def _sweep(directory: Path) -> None:
    """Removes what processes of this machine that are gone left half-written."""
    for half in leftovers(directory):
        host, pid, _ = half.name.removeprefix(f".{directory.name}.").rsplit("-", 2)
        if host == _host() and pid.isdigit() and not _alive(int(pid)):
            # An old folder that waits to be put back is the only one there is.
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
        old = new.with_name(new.name + ".old")
        os.rename(directory, old)
        try:
            os.rename(new, directory)
        except OSError:
            os.rename(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step.

    Returns:
      False where the system or the file system has no such step; then nothing was done.

    Raises:
      OSError: it has, and it failed.
    """
    step = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if step is None:
        return False
    if step(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _SWAP) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(b))
