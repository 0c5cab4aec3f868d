"""Which rank is enough: every rank and full fine-tuning on the same data, budget and seeds."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lora
from lora_jax import multi
from lora_jax.analysis.sweep_result import BASE, FULL, Run, Sweep, summarize
from lora_jax.analysis.sweep_store import COMMON, Store
from lora_jax.analysis.sweep_train import Trained, train_adapters, train_full
from lora_jax.config import LoraConfig
from lora_jax.train.config import TrainConfig, fixed_fields


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


class Task(NamedTuple):
    """What is learned, and how it is judged. Parameters are the base's own tree in all of them.

    Attributes:
      params: the base.
      loss: `(params, batch) -> float32 ()`, the mean loss of a batch; it is what `plan` traces
        and `lorafy` transforms, a pure function.
      batches: `seed -> batches`, at least as many as there are steps; a new shape compiles anew.
      score: `params -> (n, ...)`: for each of n evaluation examples its value, or several
        numbers that `reduce` needs.
      tuning: `params -> float`, lower is better, chooses among learning rates; best on examples
        that are neither trained on nor scored. None where there is nothing to choose.
      reduce: from `(n, ...)` values to the score; the mean by default.
      metric: the score's name.
      lower_is_better: of the score.
      data: names the data and the model, so that a resumed sweep notices other ones.
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


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is swept.

    Attributes:
      ranks: of the adapters.
      full: whether full fine-tuning is run too; the ranks are measured against it.
      learning_rates: candidates for every rank; each rank takes its best by the tuning loss.
      full_learning_rates: candidates for full fine-tuning.
      seeds: of the order of the data and the start; the first also chooses the learning rates.
      tune_steps: steps of the runs that choose; none runs them to the end and keeps the best.
      together: adapters that train in one batch, as many as memory holds.
      tolerance: how far from full fine-tuning, relatively, is still good enough.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    full: bool = True
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)
    full_learning_rates: tuple[float, ...] = (2e-5, 1e-4)
    seeds: tuple[int, ...] = (0,)
    tune_steps: int | None = None
    together: int = 4
    tolerance: float = 0.01

    def __post_init__(self):
        for name in ("ranks", "learning_rates", "full_learning_rates", "seeds"):
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, Sequence) else (value,)
            object.__setattr__(self, name, tuple(dict.fromkeys(value)))
            if not value and not (name == "ranks" and self.full):
                raise ValueError(f"`{name}` is empty: give at least one")
        for name in ("ranks", "learning_rates", "full_learning_rates"):
            if bad := [x for x in getattr(self, name) if not x > 0]:
                raise ValueError(f"`{name}` must be above 0, got {bad[0]}")
        if self.tune_steps is not None and self.tune_steps < 1:
            raise ValueError(f"`tune_steps` must be at least 1, got {self.tune_steps}")
        if self.together < 1:
            raise ValueError(f"`together` must be at least 1, got {self.together}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` must be in [0, 1), got {self.tolerance}")


def rank_sweep(
    task: Task,
    sweep: SweepConfig,
    lora_config: LoraConfig,
    train_config: TrainConfig,
    *,
    say: Callable[[str], None] = print,
) -> Sweep:
    """Trains every rank, and every weight, alike, and finds the smallest rank that is enough.

    All see the same batches in the same order, for as many steps. Adapters train side by side in
    one batch. Each rank has the learning rate that is best for it by `task.tuning`. The score is
    that of the merged weights.

    Args:
      task: the base, its loss, its data and its score.
      sweep: what is swept.
      lora_config: the adapters but for their rank; `alpha` goes with the rank, so that the scale
        `alpha / rank` is the config's (with rsLoRA `alpha` stays).
      train_config: `steps`, optimizer and schedule. `output_dir` keeps every run: a sweep that
        was stopped goes on where it was with `resume`, and one with more ranks takes over those
        that are there.
      say: gets a line for every group of runs.

    Returns:
      The table, with the smallest rank within the tolerance of full fine-tuning.

    Raises:
      ValueError: the evaluation set is empty or its scores are not finite, there are several
        learning rates and no `tuning`, no `steps`, full fine-tuning of a quantized base, or
        `output_dir` holds another sweep.
      FileExistsError: `output_dir` holds a sweep and `resume` is false.

    Source: Hu et al. 2021, "LoRA", section 7.1 and tables 6 and 18.
    """
    return _Sweep(task, sweep, lora_config, train_config, say).run()


class _Job(NamedTuple):
    rank: int | str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return Run(self.rank, self.rate, self.seed, self.steps, 0, (), None, 0.0, 1, None).name


class _Sweep:
    """A sweep under way."""

    def __init__(self, task: Task, sweep, lora_config, train_config, say: Callable):
        if train_config.steps is None:
            raise ValueError("`steps` is missing: every rank is trained for as many steps")
        if task.tuning is None and (
            len(sweep.learning_rates) > 1 or (sweep.full and len(sweep.full_learning_rates) > 1)
        ):
            raise ValueError(
                "there are several learning rates and no `tuning` loss in the task to choose by: "
                "give one, or a single learning rate"
            )
        self.task, self.sweep, self.say = task, sweep, say
        self.lora_config, self.train_config = lora_config, train_config
        self._plans: dict = {}
        self._parameters: dict = {}
        self.store = _open(task, sweep, lora_config, train_config)

    def run(self) -> Sweep:
        base = self._base()
        wanted = [*self.sweep.ranks, *([FULL] if self.sweep.full else [])]
        steps, first = self.train_config.steps, self.sweep.seeds[0]
        # A single candidate needs no trial.
        trial = self.sweep.tune_steps or steps
        trials = [_Job(r, rate, first, trial) for r in wanted for rate in self._rates(r)
                  if len(self._rates(r)) > 1]  # fmt: skip
        self._train([j for j in trials if not self._tuned(j)])
        rates = {rank: self._best(rank, first, trial) for rank in wanted}
        jobs = [_Job(r, rates[r], seed, steps) for r in wanted for seed in self.sweep.seeds]
        for job in trials:
            if job not in jobs:
                self.store.forget(self.store.runs[job.name])
        self._train([j for j in jobs if not self._trained_already(j)])
        for job in jobs:
            self._score(job)
        chosen = {rank: [self.store.runs[j.name] for j in jobs if j.rank == rank]
                  for rank in wanted}  # fmt: skip
        return summarize(
            {BASE: [base], **chosen},
            list(self.store.runs.values()),
            reduce=self.task.reduce,
            metric=self.task.metric,
            lower_is_better=self.task.lower_is_better,
            tolerance=self.sweep.tolerance,
        )

    def _rates(self, rank: int | str) -> tuple[float, ...]:
        return self.sweep.full_learning_rates if rank == FULL else self.sweep.learning_rates

    def _best(self, rank: int | str, seed: int, steps: int) -> float:
        rates = self._rates(rank)
        if len(rates) == 1:
            return rates[0]

        def loss(rate: float) -> float:
            found = self.store.runs[_Job(rank, rate, seed, steps).name].tuning
            return found if found is not None and np.isfinite(found) else np.inf

        best = min(rates, key=loss)
        if not np.isfinite(loss(best)):
            raise FloatingPointError(
                f"rank {rank}: with every learning rate of {rates} the loss is not finite in the "
                "end: give lower ones"
            )
        self.say(f"rank {rank}: learning rate {best:g} (tuning loss {loss(best):.4f})")
        return best

    def _base(self) -> Run:
        """The score as it came; before anything is trained, as it shows what is wrong with it."""
        run = Run(BASE, 0.0, 0, 0, 0, (), None, 0.0, 1, None)
        if run.name in self.store.runs:
            return self.store.runs[run.name]
        values = _checked(self.task.score(self.task.params), "the base")
        run = run._replace(values=values)
        self.store.scored(run)
        self.say(f"as it came: {self.task.metric} {self.task.reduce(values):.4f}")
        return run

    def _train(self, jobs: Sequence[_Job]) -> None:
        """Trains adapters in groups of the same seed and length, and whole models one by one."""
        groups: dict[tuple, list[_Job]] = {}
        for job in jobs:
            alone = job.name if job.rank == FULL else ""
            groups.setdefault((alone, job.seed, job.steps), []).append(job)
        for members in groups.values():
            size = self.sweep.together
            for start in range(0, len(members), size):
                self._train_group(members[start : start + size])

    def _tuned(self, job: _Job) -> bool:
        return job.name in self.store.runs and self.store.runs[job.name].tuning is not None

    def _trained_already(self, job: _Job) -> bool:
        run = self.store.runs.get(job.name)
        return run is not None and (run.values is not None or self.store.holds(run))

    def _train_group(self, jobs: Sequence[_Job]) -> None:
        from tqdm import tqdm

        seed, steps = jobs[0].seed, jobs[0].steps
        names = ", ".join(f"{j.rank} ({j.rate:g})" for j in jobs)
        bar = tqdm(total=steps, desc=f"rank {names}, seed {seed}", leave=False,
                   disable=not self.train_config.progress)  # fmt: skip

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        with bar:
            found = self._trained(
                jobs, dataclasses.replace(self.train_config, steps=steps), advance
            )
        tuning = self.task.tuning
        for job, tree, losses in zip(jobs, found.trees, found.losses, strict=True):
            run = Run(
                *job,
                parameters=self._count(job),
                losses=losses.tolist(),
                tuning=None if tuning is None else float(tuning(lora.merge(tree))),
                seconds=found.seconds / len(jobs),
                together=len(jobs),
                values=None,
            )
            self.store.trained(run, tree)
        self.say(f"trained {names}: {found.seconds:.0f} s")

    def _trained(self, jobs: Sequence[_Job], config: TrainConfig, advance: Callable) -> Trained:
        batches = self.task.batches(jobs[0].seed)
        key = jax.random.key(jobs[0].seed)
        if jobs[0].rank == FULL:
            return train_full(
                self.task.loss, self.task.params, jobs[0].rate, batches, config,
                key=key, advance=advance,
            )  # fmt: skip
        return train_adapters(
            self.task.loss, [self._adapter(job) for job in jobs], [j.rate for j in jobs], batches,
            config, key=key, advance=advance,
        )  # fmt: skip

    def _count(self, job: _Job) -> int:
        """The trained parameters, padding left out."""
        if job.rank not in self._parameters:
            tree = self.task.params if job.rank == FULL else self._adapter(job)
            counted = lora.count_parameters(tree)
            self._parameters[job.rank] = counted.total if job.rank == FULL else counted.trainable
        return self._parameters[job.rank]

    def _score(self, job: _Job) -> None:
        run = self.store.runs[job.name]
        if run.values is not None:
            return
        tree = self.store.tree(run, self._like(job))
        values = _checked(self.task.score(lora.merge(tree)), f"rank {job.rank}")
        base = self.store.runs[_Job(BASE, 0.0, 0, 0).name]
        if base.values is None or len(values) != len(base.values):
            raise ValueError(
                f"`score` gave {len(values)} values for rank {job.rank}, and others for the base: "
                "it must give a row for each example, the same examples each time"
            )
        self.store.scored(run._replace(values=values))
        self.say(f"rank {job.rank}: {self.task.metric} {self.task.reduce(values):.4f}")

    def _adapter(self, job: _Job):
        plan = self._plan(job.rank)
        return lora.init(jax.random.key(job.seed), plan, self.task.params)

    def _plan(self, rank: int | str):
        if rank not in self._plans:
            config = with_rank(self.lora_config, int(rank))
            self._plans[rank] = lora.plan(config, self.task.loss, self.task.params, self._batch)
        return self._plans[rank]

    def _like(self, job: _Job):
        """A tree of the structure that training gives."""
        if job.rank == FULL:
            return self.task.params
        return multi.adapter(lora.stack([self._adapter(job)], train=True), 0)

    @functools.cached_property
    def _batch(self):
        batch = next(iter(self.task.batches(self.sweep.seeds[0])), None)
        if batch is None:
            raise ValueError("`batches` gave no batch: the training set is empty")
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), batch)


def with_rank(config: LoraConfig, rank: int) -> LoraConfig:
    """The config with another rank and the same scale (with rsLoRA the same `alpha`).

    Raises:
      ValueError: it has a `rank_pattern` or an `alpha_pattern`, which says ranks of its own.
    """
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("a sweep chooses the ranks: leave out `rank_pattern` and `alpha_pattern`")
    if config.use_rslora:
        return dataclasses.replace(config, rank=rank, alpha=config.alpha)
    return dataclasses.replace(config, rank=rank, alpha=config.alpha * rank / config.rank)


def _checked(values, whose: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or not len(values):
        raise ValueError(
            f"`score` of {whose} gave {values.shape} values: the evaluation set is empty; it must "
            "give a row for each of at least one example"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"`score` of {whose} gave values that are not finite")
    return values


def _open(task: Task, sweep: SweepConfig, lora_config: LoraConfig, config: TrainConfig) -> Store:
    folder = config.output_dir
    if folder is not None and (folder / COMMON).exists() and not config.resume:
        raise FileExistsError(
            f"{folder}: there is a sweep already; go on with resume=True (--resume), or give "
            "another output_dir"
        )
    # Only what differs from the defaults: a field that a later release adds changes no run.
    usual = dataclasses.asdict(LoraConfig())
    adapters = {k: v for k, v in dataclasses.asdict(lora_config).items()
                if v != usual[k] and k not in ("rank", "alpha")}  # fmt: skip
    one = with_rank(lora_config, 1)
    free = ("learning_rate", "steps", "epochs", "seed")
    training = {k: v for k, v in fixed_fields(config).items() if k not in free}
    common = {
        "data": task.data,
        "metric": task.metric,
        "lora": json.loads(json.dumps({**adapters, "alpha at rank 1": one.alpha}, default=str)),
        "training": training,
    }
    return Store(folder, common)
