"""Which rank is enough: every rank and full fine-tuning on the same data, budget and seeds."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lora_jax import multi
from lora_jax.analysis.sweep.config import SweepConfig, Task, with_rank
from lora_jax.analysis.sweep.result import BASE, FULL, Run, Sweep, summarize
from lora_jax.analysis.sweep.store import COMMON, Keeper, Store
from lora_jax.analysis.sweep.train import Trained, train_adapters, train_full
from lora_jax.checkpoint import fingerprint
from lora_jax.config.lora import LoraConfig
from lora_jax.merge import merge
from lora_jax.multi.stack import stack
from lora_jax.plan.decide import plan as make_plan
from lora_jax.train.config import TrainConfig, fixed_fields
from lora_jax.train.progress import bar
from lora_jax.tree import count_parameters, init


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
      train_config: `steps`, optimizer and schedule. `output_dir` keeps every run, and of the
        training under way a checkpoint: a sweep that was stopped goes on where it was with
        `resume`, and one with more ranks or seeds takes over the runs that are there.
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
        self._shapes_of: dict[tuple[int, int], str] = {}
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
        """Trains what was under way, then the rest: adapters in groups, whole models one by one."""
        begun = list(self._begun(jobs))
        left = [j for j in jobs if j not in [member for group in begun for member in group]]
        for group in (*begun, *self._groups(left)):
            self._train_group(group)

    def _begun(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """The groups of these jobs that have a checkpoint."""
        wanted = {job.name: job for job in jobs}
        for found in self.store.unfinished():
            members = [wanted[name] for name in found.jobs if name in wanted]
            if not members:
                continue
            if len(members) < len(found.jobs):
                why = "other runs train with them in it, which are not wanted now"
            elif len(members) > self.sweep.together:
                why = f"it holds {len(members)} adapters, and `together` is {self.sweep.together}"
            else:
                yield members
                continue
            self.say(f"{found.folder}: started again, not gone on with after step {found.step}: "
                     f"{why}")  # fmt: skip

    def _groups(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        """Adapters that train side by side: for as many steps, on batches of the same shapes."""
        several = len({j.seed for j in jobs if j.rank != FULL}) > 1
        alike: dict[tuple, list[_Job]] = {}
        for job in jobs:
            kind = job.name if job.rank == FULL else self._shapes(job) if several else ""
            alike.setdefault((kind, job.steps), []).append(job)
        size = self.sweep.together
        parts = [range(0, len(members), size) for members in alike.values()]
        return [m[at : at + size] for m, part in zip(alike.values(), parts, strict=True)
                for at in part]  # fmt: skip

    def _shapes(self, job: _Job) -> str:
        """A digest of the shapes of the batches that a job sees."""
        if (key := (job.seed, job.steps)) not in self._shapes_of:
            found = hashlib.sha256()
            for batch in itertools.islice(self.task.batches(job.seed), job.steps):
                kinds = jax.tree.map(lambda x: f"{np.asarray(x).dtype}{np.shape(x)}", batch)
                found.update(str(kinds).encode())
            self._shapes_of[key] = found.hexdigest()
        return self._shapes_of[key]

    def _tuned(self, job: _Job) -> bool:
        return job.name in self.store.runs and self.store.runs[job.name].tuning is not None

    def _trained_already(self, job: _Job) -> bool:
        run = self.store.runs.get(job.name)
        return run is not None and (run.values is not None or self.store.holds(run))

    def _train_group(self, jobs: Sequence[_Job]) -> None:
        names = ", ".join(f"{j.rank} ({j.rate:g})" for j in jobs)
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(j.seed for j in jobs))
        shown = bar(
            self.train_config.progress,
            total=jobs[0].steps,
            desc=f"rank {names}, seed {seeds}",
            leave=False,
        )

        def advance(loss: float) -> None:
            shown.set_postfix(loss=f"{loss:.4f}", refresh=False)
            shown.update()

        with shown:
            found = self._trained(jobs, advance)
        runs = [self._run_of(job, found, i, len(jobs)) for i, job in enumerate(jobs)]
        # All at once: a group of which one is missing would have to be trained again.
        for run, tree in zip(runs, found.trees, strict=True):
            self.store.trained(run, tree)
        self.store.finished(runs)
        self.say(f"trained {names}: {found.seconds:.0f} s")

    def _run_of(self, job: _Job, found: Trained, place: int, together: int) -> Run:
        tuning = self.task.tuning
        return Run(
            *job,
            parameters=self._count(job),
            losses=found.losses[place].tolist(),
            tuning=None if tuning is None else float(tuning(merge(found.trees[place]))),
            seconds=found.seconds / together,
            together=together,
            values=None,
        )

    def _trained(self, jobs: Sequence[_Job], advance: Callable) -> Trained:
        config = dataclasses.replace(self.train_config, steps=jobs[0].steps)
        seeds = list(dict.fromkeys(job.seed for job in jobs))
        batches, key = self.task.batches(seeds[0]), jax.random.key(seeds[0])
        keeper = self._keeper(jobs)
        if jobs[0].rank == FULL:
            return train_full(
                self.task.loss, self.task.params, jobs[0].rate, batches, config,
                key=key, advance=advance, keeper=keeper,
            )  # fmt: skip
        sources = None
        if len(seeds) > 1:
            batches = zip(*(self.task.batches(seed) for seed in seeds), strict=False)
            sources = [seeds.index(job.seed) for job in jobs]
        return train_adapters(
            self.task.loss, [self._adapter(job) for job in jobs], [j.rate for j in jobs], batches,
            config, key=key, sources=sources, advance=advance, keeper=keeper,
        )  # fmt: skip

    def _keeper(self, jobs: Sequence[_Job]) -> Keeper | None:
        folder = self.store.place_of([job.name for job in jobs])
        if folder is None or self.sweep.save_every is None:
            return None
        described = {"jobs": [job.name for job in jobs], "base": self._fingerprint}
        return Keeper(
            folder, described, self.sweep.save_every, params=self.task.params, say=self.say
        )

    def _count(self, job: _Job) -> int:
        """The trained parameters, padding left out."""
        if job.rank not in self._parameters:
            tree = self.task.params if job.rank == FULL else self._adapter(job)
            counted = count_parameters(tree)
            self._parameters[job.rank] = counted.total if job.rank == FULL else counted.trainable
        return self._parameters[job.rank]

    def _score(self, job: _Job) -> None:
        run = self.store.runs[job.name]
        if run.values is not None:
            return
        tree = self.store.tree(run, self._like(job))
        values = _checked(self.task.score(merge(tree)), f"rank {job.rank}")
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
        return init(jax.random.key(job.seed), plan, self.task.params)

    def _plan(self, rank: int | str):
        if rank not in self._plans:
            config = with_rank(self.lora_config, int(rank))
            self._plans[rank] = make_plan(config, self.task.loss, self.task.params, self._batch)
        return self._plans[rank]

    def _like(self, job: _Job):
        """A tree of the structure that training gives."""
        if job.rank == FULL:
            return self.task.params
        return multi.adapter(stack([self._adapter(job)], train=True), 0)

    @functools.cached_property
    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self.task.params)

    @functools.cached_property
    def _batch(self):
        batch = next(iter(self.task.batches(self.sweep.seeds[0])), None)
        if batch is None:
            raise ValueError("`batches` gave no batch: the training set is empty")
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), batch)


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
