"""The progress bar: loss, learning rate, tokens/s and time left, on standard error."""

import contextlib
import time
from collections.abc import Iterator

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@contextlib.contextmanager
def progress(total: int, *, start: int = 0, show: bool = True) -> Iterator:
    """A tqdm bar over optimizer steps.

    Args:
      total: steps of the run.
      start: steps already taken (a resumed run); they do not count for the time left.
      show: draw it at all.
    """
    from tqdm import tqdm

    bar = tqdm(
        total=total, initial=start, disable=not show, bar_format=_FORMAT, desc="train: ",
        dynamic_ncols=True,
    )  # fmt: skip
    try:
        yield bar
    finally:
        bar.close()


def show_record(bar, record: dict) -> None:
    """Moves the bar on by a step and shows what its train record says."""
    parts = {
        "loss": f"{record['loss']:.4f}",
        "lr": f"{record['learning_rate']:.2e}",
        "tok/s": f"{record['tokens_per_second']:,.0f}",
    }
    bar.set_postfix(parts, refresh=False)
    bar.update(1)


class Clock:
    """Tokens per second over the last steps, without the time spent on other things."""

    def __init__(self, memory: float = 0.9):
        self._memory = memory
        self._tokens = 0.0
        self._seconds = 0.0
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Forgets the time since the last step: it went into compiling, evaluating or saving."""
        self._last = time.perf_counter()

    def step(self, tokens: int) -> tuple[float, float]:
        """Counts a step of that many tokens; gives its seconds and the recent tokens/s."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._tokens = self._memory * self._tokens + tokens
        self._seconds = self._memory * self._seconds + seconds
        return seconds, self._tokens / max(self._seconds, 1e-9)
