"""Turns an exception into one line of text, and defines the exit statuses."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.cli.flags import in_flags

USAGE = 2  # a wrong command line, as in argparse
FAILURE = 1
INTERRUPTED = 130  # 128 + SIGINT, as in shells
_AGAIN = 0.1  # seconds


class UsageError(Exception):
    """A wrong command line or settings file; the text spells flags and keys as they stand there."""


class EndedError(SystemExit):
    """SIGTERM or SIGHUP came while a command had nothing to save.

    Attributes:
      status: the exit status that shells give the signal, 128 + its number.
    """

    status: int = 128 + signal.SIGTERM


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `EndedError`, as Python turns Ctrl-C into KeyboardInterrupt.

    Training has handlers of its own, which finish and save the step first. A signal that is
    ignored, as SIGHUP under `nohup`, stays ignored; other threads than the main one get none.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        both = (signal.SIGTERM, signal.SIGHUP)
        ours = [each for each in both if signal.getsignal(each) == signal.SIG_DFL]

    def end(number: int, frame: Any) -> NoReturn:
        error = EndedError(f"ended by {signal.Signals(number).name} before it was done")
        error.status = 128 + number
        raise error

    previous = sys.unraisablehook

    def unraisable(found: Any) -> None:
        if not isinstance(found.exc_value, EndedError):
            previous(found)
            return
        # It was raised in a callback or a `__del__`, where Python drops errors: come again soon.
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), found.exc_value.status - 128))
        again.daemon = True
        again.start()

    for each in ours:
        signal.signal(each, end)
    if ours:
        sys.unraisablehook = unraisable
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
        if ours:
            sys.unraisablehook = previous


def quiet_threads() -> None:
    """Keeps off the screen what TensorStore's threads print of a failure that its caller raises."""
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _unraisable(found: Any) -> None:
    # A write that ends after the event loop that waited for it.
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def quiet_logs() -> None:
    """As `quiet_threads`, for what Orbax's threads log after the line about the error."""
    # Not made here: absl wants a class of its own for its logger.
    if "absl.logging" in sys.modules:
        logging.getLogger("absl").setLevel(logging.CRITICAL)


# Errors in the arguments or the files, whose texts are written for users. Any other exception is a
# bug in this program.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError)

# Python's own texts of these errors do not say what to do.
_DISK = {
    errno.ENOSPC: "the disk is full: free some space, or write to another place",
    errno.EDQUOT: "your disk quota is used up: free some space, or write to another place",
    errno.EACCES: "permission denied: write to a folder that is yours",
    errno.EPERM: "permission denied: write to a folder that is yours",
    errno.EROFS: "the file system is read-only: write to another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder: give another path",
    errno.EISDIR: "it is a folder, and a file was expected: give the path of a file",
    errno.EEXIST: "there is a file of that name already: give another path",
    errno.ELOOP: "it is a symbolic link, or links lead in a circle: remove it",
    errno.ENOENT: "there is no such file or folder: check the path",
}


def explain(error: BaseException, flags: Collection[str] = ()) -> str:
    """One line about an error: what went wrong and what to do.

    Args:
      error: the exception.
      flags: those of the command, `--max-length`: settings in the text are spelled as these.

    Returns:
      A text without line breaks.
    """
    if isinstance(error, UsageError):
        return _line(str(error))
    if isinstance(error, OSError) and error.errno in _DISK and error.filename is not None:
        return _line(f"{error.filename}: {_DISK[error.errno]}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _DISK[errno.ENOSPC]
    # XLA's error for a full device is a RuntimeError of many lines.
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return (
            "out of memory: take a smaller --batch-size (with more --accumulation), shorter "
            "examples, or --remat full; --device-memory chooses what fits"
        )
    if _expected(error):
        return in_flags(_line(str(error) or type(error).__name__), flags)
    return _line(
        f"internal error: {type(error).__name__}: {error} ({_place(error)}); "
        "please report it with what --debug prints"
    )


def status_of(error: BaseException, flags: Collection[str] = ()) -> int:
    """The exit status: that of argparse for a wrong command line.

    An error about a setting begins with the setting: "`--mesh` has no axis ...". One about a file
    or the data begins with a path.
    """
    # Known where a setting's error was raised; jax need not be loaded for it.
    arguments = sys.modules.get("lora_jax.config.arguments")
    if arguments is not None and isinstance(error, arguments.SettingsError):
        return USAGE
    about_setting = isinstance(error, ValueError | TypeError | OSError) and re.match(
        "`?--", in_flags(_line(str(error)), flags)
    )
    return USAGE if about_setting or isinstance(error, UsageError) else FAILURE


def _expected(error: BaseException) -> bool:
    # UnicodeError is a ValueError too, but its text is about bytes, not about what to do.
    return isinstance(error, _EXPECTED) and not isinstance(error, UnicodeError)


def _place(error: BaseException) -> str:
    # The last frame: where it was raised.
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


def _line(text: str) -> str:
    # Scripts read one line an error.
    return "; ".join(part for line in text.splitlines() if (part := line.strip()))
