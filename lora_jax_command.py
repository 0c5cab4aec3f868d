"""The program `lora-jax`: what a signal does while the package is still being imported.

It stands outside the package: an import of `lora_jax.cli` runs `lora_jax/__init__.py` first, which
imports jax and takes a second or more.
"""

import os
import signal
from typing import Any, NoReturn


def start() -> NoReturn:
    """Imports the package, and runs the command of the process.

    SIGTERM, SIGHUP and Ctrl-C end the imports in a sentence. One that is ignored, as SIGHUP under
    `nohup`, stays ignored.
    """
    all_ = ((s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    ours = {number: before for number, before in all_ if before != signal.SIG_IGN}
    for number in ours:
        signal.signal(number, _end)
    from lora_jax import cli  # noqa: PLC0415 - after the signals are caught

    # `cli` has handlers of its own.
    for number, before in ours.items():
        signal.signal(number, before)
    cli.start()


def _end(number: int, frame: Any) -> NoReturn:
    # An error would be raised inside an import, where some libraries catch all of them.
    name = signal.Signals(number).name
    text = "interrupted" if number == signal.SIGINT else f"ended by {name} before it was done"
    os.write(2, f"lora-jax: {text}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    start()
