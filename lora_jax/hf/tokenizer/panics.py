"""Calls of the library tokenizers, which panics in Rust where an expression takes too long.

Python gets a panic as an error that is no Exception. Before, Rust has written a text of its own to
the process's stderr, which nothing in Python turns off.
"""

import atexit
import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

_STDERR = 2
_OURS = (KeyboardInterrupt, SystemExit)
# The descriptor belongs to the process: one thread at a time sets it.
_setting = threading.Lock()


@contextlib.contextmanager
def without_panics(text: Callable[[str], str]) -> Iterator[None]:
    """Makes a ValueError of what the library raises, or panics with.

    Args:
      text: the error's text, of the library's reason.

    Raises:
      ValueError: in place of any other error.
    """
    try:
        with _held_back():
            yield
    except _OURS:
        raise
    except BaseException as error:
        raise ValueError(text(" ".join(str(error).split())[:200])) from None


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Holds back what is written to stderr meanwhile, and drops it after a panic."""
    if not _setting.acquire(blocking=False):
        yield  # another thread has set it
        return
    try:
        try:
            held, shown = _file(), os.dup(_STDERR)
        except OSError:  # there is no stderr, or no place for a file
            yield
            return
        os.dup2(held.fileno(), _STDERR)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = not isinstance(error, (Exception, *_OURS))
            raise
        finally:
            os.dup2(shown, _STDERR)
            os.close(shown)
            _empty(held.fileno(), show=not panicked)
    finally:
        _setting.release()


def _empty(held: int, *, show: bool) -> None:
    if size := os.fstat(held).st_size:
        text = os.pread(held, size, 0)
        os.ftruncate(held, 0)
        os.lseek(held, 0, os.SEEK_SET)
        if show:
            os.write(_STDERR, text)


@lru_cache(maxsize=1)
def _file() -> Any:
    file = tempfile.TemporaryFile()
    atexit.register(file.close)
    return file
