"""The command `lora-jax`: arguments to dataclasses to library calls, and nothing else.

`main` is the only place that turns an error into a line on stderr and an exit status.
"""

import os
import signal
import sys
import warnings
from collections.abc import Sequence

from lora_jax.cli import errors
from lora_jax.cli.parser import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; None takes the process's own.

    Returns:
      The exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C.
    """
    arguments = parse(argv)
    if not arguments.debug:
        warnings.formatwarning = _warning_line
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        return _fail(arguments, str(interrupt) or "interrupted", errors.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return _fail(arguments, errors.explain(error), errors.FAILURE)


def _fail(arguments, line: str, status: int) -> int:
    if arguments.debug:
        import traceback

        traceback.print_exc()
    print(f"lora-jax {arguments.command}: {line}", file=sys.stderr)
    return status


def _warning_line(message, category, filename, lineno, line=None) -> str:
    return f"lora-jax: warning: {' '.join(str(message).split())}\n"
