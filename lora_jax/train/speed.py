"""How fast a run is: the record of a step, and traces for a profiler."""

import contextlib
import math
import time
from pathlib import Path

import jax

from lora_jax import processes
from lora_jax.train.batches import Item, grid_of
from lora_jax.train.config import TrainConfig, profiled_steps
from lora_jax.train.flops import peak_flops
from lora_jax.train.step import Metrics

PROFILE = "profile"  # the folder of the traces in a run's output_dir


class Clock:
    """Tokens per second over the last steps, without compilation, evaluation and saving.

    Attributes:
      first_step: seconds from the clock's start to the end of the first step, compilation
        included; None before.
    """

    def __init__(self, memory: float = 0.9) -> None:
        self.first_step: float | None = None
        self._memory = memory
        self._tokens = 0.0
        self._seconds = 0.0
        self._start = self._last = time.perf_counter()

    def restart(self) -> None:
        """Excludes the time since the last step, spent on compiling, evaluating or saving."""
        self._last = time.perf_counter()

    def step(self, tokens: int) -> tuple[float, float]:
        """Counts a step with this many tokens; returns its seconds and the recent tokens/s."""
        now = time.perf_counter()
        if self.first_step is None:
            self.first_step = now - self._start
        seconds, self._last = now - self._last, now
        self._tokens = self._memory * self._tokens + tokens
        self._seconds = self._memory * self._seconds + seconds
        return seconds, self._tokens / max(self._seconds, 1e-9)


def train_record(
    step: int, item: Item, out: Metrics, *, rate: float, clock: Clock, flops: float | None
) -> dict:
    """Waits for a step and returns its record.

    Args:
      step: its number, from 1.
      item: its batch.
      out: its metrics, on the device.
      rate: its learning rate.
      clock: counts the step.
      flops: model FLOPs of the step on each device, see `training_flops`.

    Raises:
      FloatingPointError: its loss is not finite.
    """
    loss, grad_norm, learned = (float(x) for x in out)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of step {step} is {loss}; lower `learning_rate`, lengthen `warmup` or clip"
            " harder, and start again from the last checkpoint or the beginning"
        )
    seconds, speed = clock.step(item.tokens)
    record = {
        "kind": "train",
        "step": step,
        "epoch": item.epoch,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "learned_tokens": int(learned),
        "tokens": item.tokens,
        "padding": 1 - item.tokens / grid_of(item.batch),
        "seconds": seconds,
        "tokens_per_second": speed,
    }
    if flops is not None:
        record["flops_per_second"] = flops / seconds
        peak = peak_flops(jax.local_devices()[0])
        if peak is not None:
            record["mfu"] = flops / seconds / peak
    return record


class Trace:
    """Writes a trace of the steps of `config.profile` to its folder; called between steps."""

    def __init__(self, config: TrainConfig, *, start: int, total: int) -> None:
        """`start` steps of `total` are taken."""
        # `profile` comes with an `output_dir`.
        self._directory = config.output_dir or Path()
        self._running = contextlib.ExitStack()
        first, last = profiled_steps(config) or (total + 1, total + 1)
        # A resumed run may be among these steps, or beyond them.
        self._begin, self._end = max(first - 1, start), min(last, total)

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends after this step."""
        return step in (self._begin, self._end)

    def __call__(self, step: int) -> None:
        """Begins or ends the trace if it is due after this step, which is done."""
        if step == self._begin < self._end and processes.is_first():
            trace = jax.profiler.trace(str(self._directory / PROFILE))
            self._running.enter_context(trace)
        if step == self._end:
            self.close()

    def close(self) -> None:
        """Ends the trace, if one is running."""
        self._running.close()
