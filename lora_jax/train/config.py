"""`TrainConfig`: the settings of a training run, validated on construction."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_jax.config.arguments import check_path, set_plain_fields, with_known_fields

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Packing = Literal["auto"] | bool

# Fields that do not change the results: a resumed run may change them.
FREE_FIELDS = frozenset(
    {"output_dir", "resume", "eval_every", "save_every", "keep", "progress", "tensorboard",
     "prefetch", "profile"}
)  # fmt: skip


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, apart from the model, the adapter's config and the data.

    The compute dtype belongs to the model (`lora.models.load(..., dtype="bfloat16")`), and the
    length of examples to the data (`examples(..., max_length=...)`); neither is repeated here.

    Attributes:
      output_dir: folder for checkpoints, metrics and the loss plot. `fit` writes nothing without
        one; the command line needs one.
      resume: continue from the newest checkpoint in `output_dir`, or begin if there is none; a
        finished run goes on with more steps or epochs. False rejects a folder that holds a run.
      epochs: passes over the data, may be fractional; ignored if `steps` is given.
      steps: optimizer steps of the whole run.
      batch_size: rows of one forward pass.
      accumulation: forward passes of one optimizer step; a step sees
        batch_size * accumulation rows, and their loss is averaged over all learned tokens.
      learning_rate: peak learning rate.
      schedule: "cosine", "linear" or "constant" after the warm-up.
      warmup: optimizer steps of linear warm-up, or their share of the run if below 1.
      final_learning_rate: learning rate at the end of the schedule, as a share of the peak.
      weight_decay: decoupled weight decay of AdamW on the trained parameters.
      beta1: decay rate of AdamW's mean of the gradient.
      beta2: decay rate of AdamW's mean of the squared gradient.
      epsilon: added by AdamW to the root of the mean square.
      clip: maximum global norm of the gradient; None does not clip.
      balance_experts: add the load-balancing loss of a mixture of experts to the loss of training,
        times `router_aux_loss_coef` of its config.json, as transformers with
        `output_router_logits`. The evaluation loss stays without it.
      seed: seed of the data order and of dropout.
      buckets: number of lengths that batches are padded to (chosen to pad the data least), or the
        lengths themselves; by default 4 to 16, as many as save an epoch more than they take to
        compile.
      packing: put several examples side by side in a row, none of which attends to another, so
        that little is padding. `batch_size` then counts rows: a step learns more examples, and an
        epoch has fewer steps. "auto" packs where this saves a tenth of the work and an epoch
        keeps 100 steps; the log of a run has the choice.
      packed_length: tokens of a packed row; None takes the longest example. Longer rows leave less
        padding and take more time for attention.
      eval_every: optimizer steps between evaluations; None evaluates before and after only.
      save_every: optimizer steps between checkpoints; by default ten checkpoints a run, and at
        least one in 500 steps. A number as large as `steps` saves at the end only.
      keep: number of newest checkpoints to keep.
      progress: show a progress bar on standard error, or ten lines where that is no terminal.
      tensorboard: write TensorBoard event files too.
      prefetch: batches prepared ahead of the device.
      profile: write a trace of these steps, "10:13" for the four from 10 to 13, to the folder
        `profile` of `output_dir`; TensorBoard's profile plugin and Perfetto read it.
    """

    output_dir: Path | None = None
    resume: bool = False
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = 1.0
    balance_experts: bool = False
    seed: int = 0
    buckets: int | tuple[int, ...] | None = None
    packing: Packing = False
    packed_length: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    progress: bool = True
    tensorboard: bool = True
    prefetch: int = 2
    profile: str | None = None

    def __post_init__(self) -> None:
        set_plain_fields(self)
        if self.output_dir is not None:
            # The only way to set a field of a frozen dataclass.
            object.__setattr__(self, "output_dir", check_path("output_dir", self.output_dir))
        if not isinstance(self.buckets, int | None):
            object.__setattr__(self, "buckets", tuple(self.buckets))
        whole = ("steps", "batch_size", "accumulation", "packed_length", "eval_every",
                 "save_every", "keep")  # fmt: skip
        for name in whole:
            _check(self, name, _whole(getattr(self, name)), "a whole number of at least 1")
        for name in ("epochs", "epsilon"):
            _check(self, name, _finite(getattr(self, name)) > 0, "a number above 0")
        # AdamW changes every number by about the learning rate in a step, and those of `A` are
        # below 1 at the start. A rate above 1 ruins a model, often with a finite loss.
        rate = 0 < _finite(self.learning_rate) <= 1
        _check(self, "learning_rate", rate, "a number above 0 and at most 1")
        for name in ("warmup", "weight_decay"):
            _check(self, name, _finite(getattr(self, name)) >= 0, "a number of at least 0")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= _finite(getattr(self, name)) < 1, "at least 0 and below 1")
        share = _finite(self.final_learning_rate)
        _check(self, "final_learning_rate", 0 <= share <= 1, "a share of the peak, 0 to 1")
        clips = self.clip is None or _finite(self.clip) > 0
        _check(self, "clip", clips, "a number above 0, or `clip=None` for no clipping")
        _check(self, "schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        packs = self.packing == "auto" or isinstance(self.packing, bool)
        _check(self, "packing", packs, '"auto", True or False')
        if self.packed_length is not None and self.packing is False:
            raise ValueError(
                "`packed_length` is for packed rows: add packing=True, or leave it out"
            )
        traced = self.profile is None or profiled_steps(self) is not None
        _check(self, "profile", traced, 'the first and the last step as "10:13"')
        if self.profile is not None and self.output_dir is None:
            raise ValueError("`profile` needs an `output_dir`, where the trace is written")
        if self.steps is not None:
            check_total(self, self.steps)
        seeds = isinstance(self.seed, int) and 0 <= self.seed < 2**32
        _check(self, "seed", seeds, "a whole number from 0 to 2**32 - 1")


def _whole(value: Any) -> bool:
    # True is an int in Python.
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _finite(value: Any) -> float:
    """The number itself, or NaN, for which every comparison is false, if it is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return value


def _check(config: TrainConfig, name: str, fine: bool, expected: str) -> None:
    if not fine:
        raise ValueError(f"`{name}` must be {expected}, got {getattr(config, name)!r}")


def profiled_steps(config: TrainConfig) -> tuple[int, int] | None:
    """The first and the last step of `profile`; None if there is none, or it has another form."""
    found = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", str(config.profile))
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    return (first, last) if first <= last else None


def check_total(config: TrainConfig, total: int) -> None:
    """Checks that the run reaches the end of its warm-up, and the steps to trace.

    Raises:
      ValueError: it ends before.
    """
    if warmup_steps(config, total) > total:
        raise ValueError(
            f"`warmup` is {config.warmup:g} steps, but the run ends after step {total}: choose"
            " fewer, or a share of the run below 1"
        )
    steps = profiled_steps(config)
    if steps is not None and steps[1] > total:
        raise ValueError(
            f"`profile` is {config.profile!r}, but the run ends after step {total}: choose earlier "
            "steps"
        )


def fixed_fields(config: TrainConfig) -> dict:
    """The settings that a resumed run must share with the original, as JSON values."""
    # Of packing, what was chosen counts; the checkpoint has it from the loader.
    free = FREE_FIELDS | {"packing", "packed_length"}
    values = {k: v for k, v in asdict(config).items() if k not in free}
    # Left out where it adds nothing, so that checkpoints from before it match.
    if not config.balance_experts:
        del values["balance_experts"]
    if isinstance(values["buckets"], tuple):
        values["buckets"] = list(values["buckets"])
    return values


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    if config.steps is not None:
        return config.steps
    # Rounding errors of the product must not add a step: 0.07 * 100 is above 7.
    return max(1, math.ceil(config.epochs * steps_per_epoch - 1e-9))


def steps_between_saves(config: TrainConfig, total: int) -> int:
    """Optimizer steps between checkpoints, of a run with so many steps."""
    # Ten of a short run cost little; of a long one no more than 500 steps may be lost.
    return config.save_every or min(-(-total // 10), 500)


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Optimizer steps of the warm-up."""
    return round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
