"""The command `lora-jax`: arguments become dataclasses, which are passed to recipes.

Only `main` turns an error into a line on stderr and an exit status.
"""

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lora_jax.cli import errors
from lora_jax.cli.flags import flags_of, in_flags
from lora_jax.cli.parser import parse

__all__ = ["main"]


def __dir__() -> list[str]:
    return __all__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; those of the process by default.

    Returns:
      The exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C, 143 after
      SIGTERM, 129 after SIGHUP.
    """
    errors.quiet_threads()
    with errors.ending_by_signals():
        try:
            # Takes a second or two, as it imports what the command's flags are made of.
            arguments = parse(argv)
        except (KeyboardInterrupt, errors.EndedError) as end:
            print(f"lora-jax: {str(end) or 'interrupted'}", file=sys.stderr)
            return getattr(end, "status", errors.INTERRUPTED)
        return _run(arguments)


def start() -> NoReturn:
    """Runs the command of the process, and ends the process."""
    status = main()
    if status in (errors.INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
        # A thread of XLA may still compile, and would crash in Python's own exit (SIGSEGV).
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command, and prints a line where it ends early."""
    # With --debug, Python's own format, which names the line of code.
    if not arguments.debug:
        warnings.formatwarning = _warning_lines(arguments)
    try:
        arguments.run(arguments)
        # Here, where a closed pipe is caught, and not at exit.
        sys.stdout.flush()
        return 0
    except (KeyboardInterrupt, SystemExit) as end:  # Ctrl-C, or another signal
        usual = errors.INTERRUPTED if isinstance(end, KeyboardInterrupt) else errors.FAILURE
        line = in_flags(str(end) or "interrupted", flags_of(arguments.parser))
        return _fail(arguments, line, getattr(end, "status", usual))
    except BrokenPipeError:
        # The reader of our output has exited (`| head`). Python would fail again when it flushes
        # stdout at exit, so stdout is redirected.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        flags = flags_of(arguments.parser)
        return _fail(arguments, errors.explain(error, flags), errors.status_of(error, flags))


def _fail(arguments: argparse.Namespace, line: str, status: int) -> int:
    if arguments.debug:
        import traceback

        traceback.print_exc()
    else:
        errors.quiet_logs()
    print(f"lora-jax {arguments.command}: {line}", file=sys.stderr)
    # Not imported here: an error must not wait for jax to load.
    if joined := sys.modules.get("lora_jax.processes"):
        joined.leave(status)
    return status


def _warning_lines(arguments: argparse.Namespace) -> Callable[..., str]:
    """Python's `warnings.formatwarning`, for warnings in one line that name flags."""
    flags = flags_of(arguments.parser)

    def format_warning(message: Warning | str, *args: Any, **kwargs: Any) -> str:
        return f"lora-jax: warning: {in_flags(' '.join(str(message).split()), flags)}\n"

    return format_warning
