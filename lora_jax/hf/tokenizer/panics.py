"""Calls of the library tokenizers: what it takes, and its panics, as where a regex takes too long.

Python gets a panic in Rust as an error that is no Exception. Before, Rust has written a text of its
own to the process's stderr, which nothing in Python turns off.
"""

import atexit
import contextlib
import operator
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from lora_jax.config.arguments import kind_of

_STDERR = 2
_OURS = (KeyboardInterrupt, SystemExit)
# The descriptor belongs to the process: one thread at a time sets it.
_setting = threading.Lock()


def check_texts(texts: Iterable[Any]) -> None:
    """Refuses what the library takes for no text, or for several.

    Raises:
      TypeError: one text, or no texts.
      ValueError: a text with half of a character, which no file in UTF-8 has.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"the tokenizer reads a list of texts here, got {kind_of(texts)}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"the tokenizer reads one text at a time, got {kind_of(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has `\\u{ord(text[error.start]):04x}` at character {error.start}, which "
                "is half of a character (a lone surrogate): take it out"
            ) from None


def checked_ids(ids: Any) -> list[int]:
    """The ids of tokens as Python's numbers.

    Raises:
      TypeError: something else than a list of whole numbers, such as a text or rows of them.
      ValueError: a number that no token has.
    """
    try:
        found = [operator.index(each) for each in ids]
    except TypeError:
        found = None
    if found is None or isinstance(ids, str | bytes):
        raise TypeError(f"`ids` must be the token ids of one text, got {kind_of(ids)}")
    if wrong := [each for each in found if not 0 <= each < 2**32]:
        raise ValueError(f"`ids` must be token ids, got {wrong[0]}")
    return found


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
