"""A rank sweep before it runs: its settings are checked, and its runs on disk are opened."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import paths, processes
from lora_jax.analysis.sweep.config import SweepConfig, Task, with_rank
from lora_jax.analysis.sweep.result import Run
from lora_jax.analysis.sweep.store import COMMON, Store
from lora_jax.checkpoint import fingerprint
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import sizes
from lora_jax.plan.decide import plan as make_plan
from lora_jax.plan.leaf import Plan
from lora_jax.train.config import TrainConfig, fixed_fields
from lora_jax.train.preparation import settings_of, shapes_hash


class Job(NamedTuple):
    """A run to be trained; `rank` is a number, "full" or "base"."""

    rank: int | str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return Run(self.rank, self.rate, self.seed, self.steps).name


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep that is checked and ready to run.

    Attributes:
      task, sweep, lora_config, train_config: the arguments of `rank_sweep`.
      steps: optimizer steps of every run.
      store: the finished runs.
      log: receives the lines for the user.
      plan_of: the adapter plan of a rank.
      shapes_of: `(seed, steps) -> digest` of the shapes of the batches that such a run sees.
      fingerprint: of the base.

    The last three are computed on first use and cached, since a resumed sweep may need none.
    """

    task: Task
    sweep: SweepConfig
    lora_config: LoraConfig
    train_config: TrainConfig
    steps: int
    store: Store
    log: Callable[[str], None]
    plan_of: Callable[[int], Plan]
    shapes_of: Callable[[int, int], str]
    fingerprint: Callable[[], dict[str, str]]


def plan_sweep(
    task: Task,
    sweep: SweepConfig,
    lora_config: LoraConfig,
    train_config: TrainConfig,
    *,
    log: Callable[[str], None],
) -> SweepPlan:
    """Checks a sweep and opens its folder; arguments and errors are those of `rank_sweep`."""
    _check(task, sweep, train_config)
    _check_same(task, sweep, lora_config, train_config)
    for rank in sweep.ranks:
        with_rank(lora_config, rank)

    batch_of = functools.cache(functools.partial(_first_batch, task))

    def planned(config: LoraConfig) -> Plan:
        return make_plan(config, task.loss, task.params, batch_of(sweep.seeds[0]))

    @functools.cache
    def check_ranks() -> None:
        # At rank 1 every matrix can be adapted; no start but the default is made for every rank.
        smallest = with_rank(dataclasses.replace(lora_config, init="default", loftq_config={}), 1)
        _check_ranks(sweep.ranks, planned(smallest))

    def plan_of(rank: int) -> Plan:
        check_ranks()
        return planned(with_rank(lora_config, rank))

    assert train_config.steps is not None
    return SweepPlan(
        task=task,
        sweep=sweep,
        lora_config=lora_config,
        train_config=train_config,
        steps=train_config.steps,
        store=_open(task, sweep, lora_config, train_config),
        log=log,
        plan_of=functools.cache(plan_of),
        shapes_of=functools.cache(functools.partial(_shapes, task)),
        fingerprint=functools.cache(functools.partial(fingerprint, task.params)),
    )


def _check(task: Task, sweep: SweepConfig, train_config: TrainConfig) -> None:
    if train_config.steps is None:
        raise ValueError("`steps` is missing: every rank is trained for as many steps")
    # Before anything is trained: without a tuning loss the choice would fail after the trials.
    if task.tuning is None and (
        len(sweep.learning_rates) > 1 or (sweep.full and len(sweep.full_learning_rates) > 1)
    ):
        raise ValueError(
            "there are several learning rates and no `tuning` loss in the task to choose by: "
            "give one, or a single learning rate"
        )


def _check_same(
    task: Task, sweep: SweepConfig, lora_config: LoraConfig, train_config: TrainConfig
) -> None:
    """Checks that all processes run the same sweep."""
    settings = settings_of(sweep, lora_config, train_config)
    where = {"task.data": task.data, "task.params": shapes_hash(task.params)}
    processes.check_same({**settings, **where})


def _check_ranks(ranks: Sequence[int], plan: Plan) -> None:
    """Checks that every rank adapts the same weights."""
    for leaf in plan.adapted:
        limit = min(sizes(leaf.shape, leaf.roles)[1:])
        if max(ranks) > limit:
            name = paths.module_of(leaf.path).rpartition(".")[2]
            raise ValueError(
                f"`ranks` has {max(ranks)}, above the smallest dimension {limit} of `{leaf.path}`, "
                "where full rank is reached: lower `ranks`, leave the module out with "
                f"exclude_modules=({name!r},), or train it whole with modules_to_save=({name!r},) "
                "and without an entry of its own in `target_modules`"
            )


def _first_batch(task: Task, seed: int) -> Any:
    batch = next(iter(task.batches(seed)), None)
    if batch is None:
        raise ValueError("`batches` gave no batch: the training set is empty")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), batch)


def _shapes(task: Task, seed: int, steps: int) -> str:
    # A digest, as the shapes of thousands of batches are only compared.
    found = hashlib.sha256()
    for batch in itertools.islice(task.batches(seed), steps):
        kinds = jax.tree.map(lambda x: f"{np.asarray(x).dtype}{np.shape(x)}", batch)
        found.update(str(kinds).encode())
    return found.hexdigest()


def _open(task: Task, sweep: SweepConfig, lora_config: LoraConfig, config: TrainConfig) -> Store:
    folder = config.output_dir

    def check_new() -> None:
        if folder is not None and (folder / COMMON).exists() and not config.resume:
            raise FileExistsError(
                f"{folder}: there is a sweep already; pass resume=True to go on with it, or give "
                "another `output_dir`"
            )

    processes.together(check_new)
    # Only what differs from the defaults: a field that a later release adds changes no run.
    usual = dataclasses.asdict(LoraConfig())
    adapters = {k: v for k, v in dataclasses.asdict(lora_config).items()
                if v != usual[k] and k not in ("rank", "alpha")}  # fmt: skip
    # As `with_rank` has it, which would refuse an odd rank where a start needs an even one.
    one = lora_config.alpha / (1 if lora_config.use_rslora else lora_config.rank)
    free = ("learning_rate", "steps", "epochs", "seed")
    training = {k: v for k, v in fixed_fields(config).items() if k not in free}
    common = {
        "data": task.data,
        "metric": task.metric,
        "lora": json.loads(json.dumps({**adapters, "alpha at rank 1": one}, default=str)),
        "training": training,
    }
    return Store(folder, common)
