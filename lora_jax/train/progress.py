"""What a user sees of a run: the progress bar, signals between steps, and the plot of the loss.

The bar shows loss, learning rate, tokens/s and the remaining time on standard error. Where that is
a file or a pipe, there are lines instead.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_jax.compat import require
from lora_jax.files import replacing

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@contextlib.contextmanager
def progress(total: int, *, start: int = 0, show: bool = True) -> Iterator:
    """A tqdm bar over optimizer steps.

    Args:
      total: steps of the run.
      start: steps already taken by a resumed run; they do not count for the remaining time.
      show: whether to draw the bar.
    """
    with bar(
        show, total=total, initial=start, bar_format=_FORMAT, desc="train: ", dynamic_ncols=True
    ) as shown:
        yield shown


def bar(show: bool, *, total: int, initial: int = 0, desc: str = "", **options: Any) -> Any:
    """A tqdm bar, lines where standard error is no terminal, or a stub if `show` is false."""
    if not show:
        return _NoBar()
    if not sys.stderr.isatty():
        return _Lines(total, initial, desc)
    return require("tqdm").tqdm(total=total, initial=initial, desc=desc, **options)


class _NoBar:
    """The methods of a tqdm bar that are used here, doing nothing."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix(self, *args: object, **kwargs: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        pass


class _Lines:
    """The methods of a tqdm bar, for a log file: a line for each tenth of the work.

    A bar would fill the file with carriage returns.
    """

    def __init__(self, total: int, done: int, desc: str) -> None:
        self._total, self._done, self._desc = total, done, desc.removesuffix(": ")
        self._numbers: dict[str, str] = {}

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix(self, parts: Any = None, refresh: bool = True, **more: str) -> None:
        self._numbers = {**(parts or {}), **more}

    def update(self, steps: int = 1) -> None:
        before, self._done = self._done, self._done + steps
        if 10 * before // self._total < 10 * self._done // self._total:
            shown = "".join(f", {name} {value}" for name, value in self._numbers.items())
            line = f"{self._desc}: {self._done}/{self._total}{shown}"
            print(line, file=sys.stderr, flush=True)


def show_record(bar: Any, record: dict) -> None:
    """Advances the bar by a step and shows the numbers of its train record."""
    parts = {
        "loss": f"{record['loss']:.4f}",
        "lr": f"{record['learning_rate']:.2e}",
        "tok/s": f"{record['tokens_per_second']:,.0f}",
    }
    bar.set_postfix(parts, refresh=False)
    bar.update(1)


class TerminatedError(SystemExit):
    """The run was ended by SIGTERM or SIGHUP, after its step was saved.

    Attributes:
      status: the exit status that shells give the signal, 128 + its number.
    """

    status: int = 128 + signal.SIGTERM


# Ctrl-C, the end of a job's time or of a preempted machine, and of a terminal.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], signal.Signals | None]]:
    """Lets the loop finish its step on the first signal; the second one interrupts immediately.

    Python delivers signals to the main thread only; in other threads nothing is changed. A signal
    that is ignored, as SIGHUP under `nohup`, stays ignored.

    Yields:
      A function that returns the signal that has come, or None.
    """
    came: list[signal.Signals] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        # A handler that is not Python's is None, and could not be put back.
        found = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {n: h for n, h in found.items() if h not in (signal.SIG_IGN, None)}

    def note(number: int, frame: Any) -> None:
        came.append(signal.Signals(number))
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruption(came: signal.Signals, text: str) -> BaseException:
    """The exception that ends a run after a signal: KeyboardInterrupt for Ctrl-C."""
    if came == signal.SIGINT:
        return KeyboardInterrupt(text)
    error = TerminatedError(text)
    error.status = 128 + came
    return error


def plot_loss(path: str | os.PathLike, history: Sequence[dict], *, title: str = "") -> None:
    """Draws training loss (as it is, and smoothed), evaluation loss and learning rate by step.

    Args:
      path: path of the PNG; an existing one is replaced when the new one is complete.
      history: records as `fit` returns them.
      title: title of the plot.

    Raises:
      ValueError: no record has a loss.
      OSError: it cannot be written.
    """
    train = [(r["step"], r["loss"], r["learning_rate"]) for r in history if r["kind"] == "train"]
    evals = [(r["step"], r["eval_loss"]) for r in history if r["kind"] == "eval"]
    if not train and not evals:
        raise ValueError("`history` has no record with a loss: there is nothing to plot")
    # A figure without pyplot: no global state, no display.
    figure = require("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        _draw_train(axes, train)
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="tab:red", label="evaluation loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token)", title=title)
    axes.legend(loc="upper right")
    save_figure(figure, path)


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Writes a matplotlib `Figure` as a PNG, replacing an older one when it is complete.

    Raises:
      OSError: it cannot be written.
    """
    agg = require("matplotlib.backends.backend_agg")
    try:
        with replacing(path) as new:
            agg.FigureCanvasAgg(figure).print_png(str(new))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise OSError(f"{path}: the plot cannot be written: {why}") from error


def _draw_train(axes: Any, train: Sequence[tuple]) -> None:
    steps, losses, rates = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3)
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training loss (smoothed)")
    # The rate has its own axis: it is thousands of times smaller than the loss.
    side = axes.twinx()
    side.plot(steps, rates, color="tab:gray", linestyle=":", linewidth=1)
    side.set_ylabel("learning rate (dotted)")
    side.set_ylim(bottom=0)


def smoothed(values: Sequence[float]) -> list[float]:
    """The means of windows around each value, of a twentieth of all and 21 values at most.

    A mean of past values alone would lag behind a falling loss. Toward the ends the windows shrink
    on both sides, so that the first and the last value stay as they are.
    """
    size, reach = len(values), min(10, len(values) // 40)
    sides = [min(reach, i, size - 1 - i) for i in range(size)]
    windows = [values[i - side : i + side + 1] for i, side in enumerate(sides)]
    return [sum(window) / len(window) for window in windows]
