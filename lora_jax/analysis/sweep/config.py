"""The task and the settings of a rank sweep."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_jax.config.arguments import set_plain_fields, with_known_fields
from lora_jax.config.lora import LoraConfig


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


class Task(NamedTuple):
    """What is trained and how it is scored; `params` is the base's tree in every function.

    Attributes:
      params: the base.
      loss: `(params, batch) -> float32 ()`, the mean loss of a batch; a pure function, which
        `plan` traces and `lorafy` transforms.
      batches: `seed -> batches`, at least as many as there are steps, and the same ones on every
        call with a seed; every new shape is compiled. If the batches of several seeds have the
        same shapes step by step, adapters of these seeds train side by side.
      score: `params -> (n, ...)`: the value of each of n evaluation examples, or the numbers that
        `reduce` needs.
      tuning: `params -> float`, lower is better: the loss that chooses the learning rates, best
        on examples that are neither trained on nor scored. None with single learning rates.
      reduce: turns `(n, ...)` values into the score; the mean by default.
      metric: name of the score.
      lower_is_better: whether a lower score is better.
      data: identifies the data and the model, so that resuming with others is an error.
    """

    params: Any
    loss: Callable[[Any, Any], Any]
    batches: Callable[[int], Iterable]
    score: Callable[[Any], np.ndarray]
    tuning: Callable[[Any], float] | None = None
    reduce: Callable[[np.ndarray], float] = _mean
    metric: str = "score"
    lower_is_better: bool = False
    data: str = ""


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The settings of a sweep.

    Attributes:
      ranks: ranks of the adapters.
      full: whether to run full fine-tuning too, the reference for the ranks.
      learning_rates: candidates for every rank; the tuning loss chooses one for each rank.
      full_learning_rates: candidates for full fine-tuning.
      seeds: seeds of the data order, the adapters' init and dropout; all share one base, a new
        head included. The first seed is used to choose the learning rates.
      tune_steps: steps of the runs that choose; none trains them to the end and keeps the best.
      together: adapters that train in one batch, limited by memory.
      tolerance: relative distance from full fine-tuning that is still good enough.
      save_every: seconds between checkpoints within a run; None writes none, 0 writes one after
        every step. The interval grows if writing takes more than a twentieth of it.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    full: bool = True
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)
    full_learning_rates: tuple[float, ...] = (2e-5, 1e-4)
    seeds: tuple[int, ...] = (0,)
    tune_steps: int | None = None
    together: int = 4
    tolerance: float = 0.01
    save_every: float | None = 60.0

    def __post_init__(self) -> None:
        set_plain_fields(self)
        for name in ("ranks", "learning_rates", "full_learning_rates", "seeds"):
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, Sequence) else (value,)
            # A rank or a seed that is given twice is run once.
            object.__setattr__(self, name, tuple(dict.fromkeys(value)))
            if not value and not (name == "ranks" and self.full):
                raise ValueError(f"`{name}` is empty: give at least one")
        for name in ("ranks", "learning_rates", "full_learning_rates"):
            kind = int if name == "ranks" else int | float
            if bad := [x for x in getattr(self, name) if not (isinstance(x, kind) and x > 0)]:
                whole = "whole " * (name == "ranks")
                raise ValueError(f"`{name}` must be {whole}numbers above 0, got {bad[0]!r}")
        if self.tune_steps is not None and self.tune_steps < 1:
            raise ValueError(f"`tune_steps` must be at least 1, got {self.tune_steps}")
        if self.together < 1:
            raise ValueError(f"`together` must be at least 1, got {self.together}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` must be in [0, 1), got {self.tolerance}")
        if self.save_every is not None and not self.save_every >= 0:
            raise ValueError(f"`save_every` must be at least 0 seconds, got {self.save_every}")


def with_rank(config: LoraConfig, rank: int) -> LoraConfig:
    """The config with another rank and the same scale (with rsLoRA the same `alpha`).

    Raises:
      ValueError: it has a `rank_pattern` or an `alpha_pattern`.
    """
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("a sweep chooses the ranks: leave out `rank_pattern` and `alpha_pattern`")
    # `replace` would keep the alpha of the old rank, and so change the scale.
    if config.use_rslora:
        return dataclasses.replace(config, rank=rank, alpha=config.alpha)
    return dataclasses.replace(config, rank=rank, alpha=config.alpha * rank / config.rank)
