"""The rank sweep: trains every rank and the whole model on the same data, steps and seeds."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import multi, processes
from lora_jax.analysis.sweep.config import SweepConfig, Task
from lora_jax.analysis.sweep.plan import Job, SweepPlan, plan_sweep
from lora_jax.analysis.sweep.result import BASE, FULL, Run, Sweep, summarize
from lora_jax.analysis.sweep.store import Keeper, Store
from lora_jax.analysis.sweep.train import Trained, train_adapters, train_full
from lora_jax.config.lora import LoraConfig
from lora_jax.merge import merge
from lora_jax.models.mesh import entered, placement
from lora_jax.multi.stack import stack
from lora_jax.train.config import TrainConfig
from lora_jax.train.mesh import check_processes
from lora_jax.train.progress import bar
from lora_jax.tree import count_parameters, init


def rank_sweep(
    task: Task,
    sweep: SweepConfig,
    lora_config: LoraConfig,
    train_config: TrainConfig,
    *,
    log: Callable[[str], None] = print,
) -> Sweep:
    """Trains adapters of every rank, and the whole model, and finds the smallest sufficient rank.

    All runs see the same batches in the same order, for as many steps. Adapters train side by side
    in one batch. Each rank uses the learning rate with the lowest `task.tuning` loss. The score is
    that of the merged weights.

    Args:
      task: the base, its loss, its data and its score.
      sweep: what is swept.
      lora_config: the adapters, apart from their rank. `alpha` grows with the rank, so that the
        scale `alpha / rank` stays that of the config (with rsLoRA `alpha` stays).
      train_config: `steps`, optimizer and schedule. `output_dir` keeps every run and a checkpoint
        of the training under way: with `resume` an interrupted sweep continues where it stopped,
        and a sweep of more ranks or seeds reuses the runs that are there.
      log: receives a line for every group of runs.

    Returns:
      The table, with the smallest rank within the tolerance of full fine-tuning.

    Raises:
      ValueError: the evaluation set is empty or its scores are not finite, there are several
        learning rates and no `tuning`, no `steps`, full fine-tuning of a quantized base, or
        `output_dir` holds another sweep.
      FileExistsError: `output_dir` holds a sweep and `resume` is false.

    Source: Hu et al. 2021, "LoRA", section 7.1 and tables 6 and 18.
    """
    at = placement(None, task.params)
    check_processes(at)
    with entered(at), processes.reachable():
        log = processes.in_first(log)
        return _run(plan_sweep(task, sweep, lora_config, train_config, log=log))


def _run(plan: SweepPlan) -> Sweep:
    task, sweep, store = plan.task, plan.sweep, plan.store
    # The base is scored before anything is trained: a wrong task or data set shows at once.
    base = _base(plan)
    ranks = [*sweep.ranks, *([FULL] if sweep.full else [])]
    trials = _trials(plan, ranks)
    # All learning rates are chosen before the final runs, so that these train in full groups.
    _train(plan, [j for j in trials if not _is_tuned(store, j)])
    rates = {rank: _best_rate(plan, rank) for rank in ranks}
    jobs = [Job(r, rates[r], seed, plan.steps) for r in ranks for seed in sweep.seeds]
    # Without `tune_steps` the best trial is a final run already; the others' weights can go.
    for job in trials:
        if job not in jobs:
            store.forget(store.runs[job.name])
    _train(plan, [j for j in jobs if not _is_trained(store, j)])
    for job in jobs:
        _score(plan, job)
    chosen = {rank: [store.runs[j.name] for j in jobs if j.rank == rank] for rank in ranks}
    return summarize(
        {BASE: [base], **chosen},
        list(store.runs.values()),
        reduce=task.reduce,
        metric=task.metric,
        lower_is_better=task.lower_is_better,
        tolerance=sweep.tolerance,
    )


def _base(plan: SweepPlan) -> Run:
    """The score of the base before training."""
    run = Run(BASE, 0.0, 0, 0)
    if run.name in plan.store.runs:
        return plan.store.runs[run.name]
    values = _checked(plan.task.score(plan.task.params), "the base")
    run = run._replace(values=values)
    plan.store.scored(run)
    plan.log(f"before training: {plan.task.metric} {plan.task.reduce(values):.4f}")
    return run


# --- learning rates -----------------------------------------------------------------------------


def _rates(sweep: SweepConfig, rank: int | str) -> tuple[float, ...]:
    return sweep.full_learning_rates if rank == FULL else sweep.learning_rates


def _tune_steps(plan: SweepPlan) -> int:
    return plan.sweep.tune_steps or plan.steps


def _trials(plan: SweepPlan, ranks: Sequence[int | str]) -> list[Job]:
    """The runs that choose learning rates; a single candidate needs none."""
    return [
        Job(rank, rate, plan.sweep.seeds[0], _tune_steps(plan))
        for rank in ranks
        for rate in _rates(plan.sweep, rank)
        if len(_rates(plan.sweep, rank)) > 1
    ]


def _best_rate(plan: SweepPlan, rank: int | str) -> float:
    rates = _rates(plan.sweep, rank)
    if len(rates) == 1:
        return rates[0]

    def loss(rate: float) -> float:
        job = Job(rank, rate, plan.sweep.seeds[0], _tune_steps(plan))
        found = plan.store.runs[job.name].tuning
        # A rate at which training diverges loses, and the sweep goes on.
        return found if found is not None and np.isfinite(found) else np.inf

    best = min(rates, key=loss)
    if not np.isfinite(loss(best)):
        raise FloatingPointError(
            f"rank {rank}: the final loss is not finite with any learning rate of {rates}: give "
            "lower ones"
        )
    plan.log(f"rank {rank}: learning rate {best:g} (tuning loss {loss(best):.4f})")
    return best


def _is_tuned(store: Store, job: Job) -> bool:
    return job.name in store.runs and store.runs[job.name].tuning is not None


def _is_trained(store: Store, job: Job) -> bool:
    run = store.runs.get(job.name)
    return run is not None and (run.values is not None or store.holds(run))


# --- training -----------------------------------------------------------------------------------


def _train(plan: SweepPlan, jobs: Sequence[Job]) -> None:
    """Trains interrupted groups first, then the rest: adapters in groups, full runs one by one."""
    begun = list(_begun(plan, jobs))
    left = [j for j in jobs if j not in [member for group in begun for member in group]]
    for group in (*begun, *_groups(plan, left)):
        _train_group(plan, group)


def _begun(plan: SweepPlan, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The groups of these jobs that have a checkpoint."""
    wanted = {job.name: job for job in jobs}
    for found in plan.store.unfinished():
        members = [wanted[name] for name in found.jobs if name in wanted]
        if not members:
            continue
        # A checkpoint holds the whole group, which can only go on as it was.
        if len(members) < len(found.jobs):
            why = "it also trains runs that are not wanted now"
        elif len(members) > plan.sweep.together:
            why = f"it holds {len(members)} adapters, and `together` is {plan.sweep.together}"
        else:
            yield members
            continue
        plan.log(f"{found.folder}: starts again instead of going on after step {found.step}: {why}")


def _groups(plan: SweepPlan, jobs: Sequence[Job]) -> list[list[Job]]:
    """Adapters that train side by side: for as many steps, on batches of the same shapes."""
    several = len({j.seed for j in jobs if j.rank != FULL}) > 1
    alike: dict[tuple, list[Job]] = {}
    for job in jobs:
        if job.rank == FULL:
            kind = job.name  # alone: it has no base in common with others
        else:
            kind = plan.shapes_of(job.seed, job.steps) if several else ""
        alike.setdefault((kind, job.steps), []).append(job)
    size = plan.sweep.together
    return [m[at : at + size] for m in alike.values() for at in range(0, len(m), size)]


def _train_group(plan: SweepPlan, jobs: Sequence[Job]) -> None:
    names = ", ".join(f"{j.rank} ({j.rate:g})" for j in jobs)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(j.seed for j in jobs))
    shown = bar(
        plan.train_config.progress and processes.is_first(),
        total=jobs[0].steps,
        desc=f"rank {names}, seed {seeds}",
        leave=False,
    )

    def advance(loss: float) -> None:
        shown.set_postfix(loss=f"{loss:.4f}", refresh=False)
        shown.update()

    with shown:
        found = _trained(plan, jobs, advance)
    runs = [_run_of(plan, job, found, i, together=len(jobs)) for i, job in enumerate(jobs)]
    # All are stored together: a group with one run missing would have to be trained again.
    for run, tree in zip(runs, found.trees, strict=True):
        plan.store.trained(run, tree)
    plan.store.finished(runs)
    plan.log(f"trained {names}: {found.seconds:.0f} s")


def _trained(plan: SweepPlan, jobs: Sequence[Job], advance: Callable[[float], None]) -> Trained:
    task = plan.task
    config = dataclasses.replace(plan.train_config, steps=jobs[0].steps)
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    batches, key = task.batches(seeds[0]), jax.random.key(seeds[0])
    keeper = _keeper(plan, jobs)
    if jobs[0].rank == FULL:
        return train_full(
            task.loss,
            task.params,
            rate=jobs[0].rate,
            batches=batches,
            config=config,
            key=key,
            advance=advance,
            keeper=keeper,
        )
    sources = None
    if len(seeds) > 1:
        batches = zip(*(task.batches(seed) for seed in seeds), strict=False)
        sources = [seeds.index(job.seed) for job in jobs]
    return train_adapters(
        task.loss,
        [_adapter(plan, job) for job in jobs],
        rates=[j.rate for j in jobs],
        batches=batches,
        config=config,
        key=key,
        sources=sources,
        advance=advance,
        keeper=keeper,
    )


def _keeper(plan: SweepPlan, jobs: Sequence[Job]) -> Keeper | None:
    names = [job.name for job in jobs]
    folder = plan.store.place_of(names)
    if folder is None or plan.sweep.save_every is None:
        return None
    described = {"jobs": names, "base": plan.fingerprint()}
    return Keeper(folder, described, plan.sweep.save_every, params=plan.task.params, log=plan.log)


def _run_of(plan: SweepPlan, job: Job, found: Trained, place: int, *, together: int) -> Run:
    tuning = plan.task.tuning
    return Run(
        *job,
        parameters=_count(plan, job),
        losses=found.losses[place].tolist(),
        tuning=None if tuning is None else float(tuning(merge(found.trees[place]))),
        seconds=found.seconds / together,
        together=together,
        values=None,
    )


def _count(plan: SweepPlan, job: Job) -> int:
    """The trained parameters, without the padding to the largest rank of the group."""
    if job.rank == FULL:
        return count_parameters(plan.task.params).total
    # From shapes, as the trained trees are padded.
    shapes = jax.eval_shape(lambda params: _init(plan, job, params), plan.task.params)
    return count_parameters(shapes).trainable


# --- scores -------------------------------------------------------------------------------------


def _score(plan: SweepPlan, job: Job) -> None:
    task, store = plan.task, plan.store
    run = store.runs[job.name]
    if run.values is not None:
        return
    tree = store.tree(run, _like(plan, job))
    # The merged weights, as they would be used; so ranks and full fine-tuning compile one program.
    values = _checked(task.score(merge(tree)), f"rank {job.rank}")
    base = store.runs[Job(BASE, 0.0, 0, 0).name]
    if base.values is None or len(values) != len(base.values):
        raise ValueError(
            f"`score` gave {len(values)} values for rank {job.rank}, and another number for the "
            "base: it must give a row for each example, and score the same examples each time"
        )
    store.scored(run._replace(values=values))
    plan.log(f"rank {job.rank}: {task.metric} {task.reduce(values):.4f}")


def _like(plan: SweepPlan, job: Job) -> Any:
    """A tree of the structure that training gives."""
    if job.rank == FULL:
        return plan.task.params
    return multi.adapter(stack([_adapter(plan, job)], train=True), 0)


def _adapter(plan: SweepPlan, job: Job) -> Any:
    return _init(plan, job, plan.task.params)


def _init(plan: SweepPlan, job: Job, params: Any) -> Any:
    return init(jax.random.key(job.seed), plan.plan_of(int(job.rank)), params)


def _checked(values: Any, whose: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or not len(values):
        raise ValueError(
            f"`score` of {whose} gave values of shape {values.shape}: it must give a row for each "
            "example, and the evaluation set must have at least one"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"`score` of {whose} gave values that are not finite")
    return values
