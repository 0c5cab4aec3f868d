"""`fit`: the training loop.

The loop has no hidden state. The next step depends only on `TrainState` and the position of the
data iterator; both are in every checkpoint. So a run that is killed and resumed computes the same
numbers as an uninterrupted one.
"""

import contextlib
import math
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.config.lora import LoraConfig
from lora_jax.models.mesh import (
    Placement,
    check_rows,
    entered,
    model_on,
    on_mesh,
    params_on,
    placement,
)
from lora_jax.train import archive as archives
from lora_jax.train import mesh as meshes
from lora_jax.train import metrics, preparation
from lora_jax.train.batches import Batch, Item, iterate
from lora_jax.train.config import TrainConfig, steps_between_saves
from lora_jax.train.evaluate import check_tokens, evaluator, lora_loss, mean_loss
from lora_jax.train.examples import Example
from lora_jax.train.flops import StepFlops
from lora_jax.train.loss import Rows
from lora_jax.train.memory import Memory, memory
from lora_jax.train.preparation import Hooks
from lora_jax.train.progress import interruptible, interruption, plot_loss, progress, show_record
from lora_jax.train.speed import Clock, Trace, train_record
from lora_jax.train.step import (
    Metrics,
    Programs,
    TrainState,
    init_state,
    make_step,
    optimizer,
    schedule,
)
from lora_jax.tree import combine

PLOT = "loss.png"


class Result(NamedTuple):
    """The result of a run.

    Attributes:
      lora_params: the trained tree; plain parameters after full fine-tuning.
      history: all records of the run, including those before a resume; see `metrics`.
      step: optimizer steps taken.
      memory: the memory of the run; None if no step ran in this process.
      compiled: (A, B, T, P) of every compiled batch shape.
      first_step: seconds until the first step of this process was done, compilation included.
    """

    lora_params: Any
    history: list[dict]
    step: int
    memory: Memory | None
    compiled: tuple[tuple[int, ...], ...]
    first_step: float | None = None


class _Job(NamedTuple):
    """The values that the steps of a run read but do not change."""

    config: TrainConfig
    total: int
    frozen: Any
    programs: Programs
    rates: np.ndarray
    at: Placement | None
    evaluate: Callable[[TrainState], dict[str, float]] | None
    save: Callable[[TrainState, int], None] | None
    save_every: int
    emit: Callable[[dict], None]
    hooks: Hooks
    flops: StepFlops
    clock: Clock


# A step that runs: its number, its data, its metrics and its model FLOPs.
_Pending = tuple[int, Item, Metrics, float | None]


def fit(
    model: Any,
    lora_params: Any,
    train_data: Sequence[Example],
    eval_data: Sequence[Example] | None,
    config: TrainConfig,
    *,
    full: bool = False,
    lora_config: LoraConfig | None = None,
    hooks: Hooks | None = None,
) -> Result:
    """Trains the adapters of `lora.init`; the base is neither changed nor written.

    With `full` it trains every leaf of plain parameters instead, as a baseline for adapters with
    the same data order, schedule, evaluation and checkpoints (each of which holds a whole model).

    Args:
      model: `apply(params, tokens, return_hidden=True)`, `head(params, hidden)`, and `tokenizer`
        with a `pad_id`, or None.
      lora_params: from `lora.init`, or plain parameters if `full`; not modified.
      train_data: tokenized examples, at least one.
      eval_data: examples to evaluate on before, during and after; None or empty for no evaluation.
      config: the settings of the run.
      full: train every parameter, without an adapter.
      lora_config: the adapter's config, stored in the checkpoints.
      hooks: callbacks.

    Returns:
      The trained tree and the history.

    Raises:
      ValueError: bad data, nothing to train, or a checkpoint of another base, config or dataset.
      FileExistsError: `output_dir` holds a run and `config.resume` is false.
      BlockingIOError: another process writes in `output_dir`.
      FloatingPointError: the loss is not a finite number.
      OSError: something cannot be written; the last checkpoint is intact.
      TypeError: an argument of another kind, or in another's place.
      ModuleNotFoundError: the extra `llm` is not installed.
      KeyboardInterrupt: Ctrl-C; the current step is finished and saved first.
      SystemExit: SIGTERM or SIGHUP; the same.
    """
    hooks = hooks or Hooks()
    preparation.check_call(model, lora_params, train_data, eval_data, config, lora_config, hooks)
    at = placement(model, lora_params)
    processes.together(lambda: meshes.check_processes(at), ValueError, "train.fit")
    preparation.check_same(config, train_data, eval_data, lora_params)
    check_rows(at, config.batch_size)
    with entered(at), processes.reachable():
        placed = params_on(lora_params, at)
        model = model_on(model, placed, at)
        result = _fit(
            model, placed, at, train_data, eval_data, config,
            full=full, lora_config=lora_config, hooks=hooks,
        )  # fmt: skip
    if at is None:
        return result
    return result._replace(lora_params=on_mesh(result.lora_params, at.given))


def _fit(
    model: Any,
    lora_params: Any,
    at: Placement | None,
    train_data: Sequence[Example],
    eval_data: Sequence[Example] | None,
    config: TrainConfig,
    *,
    full: bool,
    lora_config: LoraConfig | None,
    hooks: Hooks,
) -> Result:
    """`fit` of parameters that lie on the mesh, where it is the context's."""
    clock = Clock()
    trainable, frozen = preparation.halves(lora_params, full, lora_config)
    rows = meshes.rows_of(at, lora_params)
    data, total, text = preparation.layout(model, train_data, config, rows)
    if hooks.layout is not None:
        hooks.layout(text)
    every = [*train_data, *(eval_data or ())]
    check_tokens(model, lora_params, every, length=data.ladder[0])
    tx = optimizer(config, total)
    fresh = meshes.state_on(init_state(jax.random.key(config.seed), trainable, tx), tx, at)
    loss = lora_loss(model, rows, balance=preparation.balance_of(model, config))
    programs = Programs(make_step(loss, tx), donate=(0,), results=meshes.results(fresh, at))
    # Computed once: the base does not change, and reading it takes seconds where it is large.
    described = archives.describe(
        config, total, data, lora_config=lora_config, lora_params=lora_params
    )
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(archives.archive(config))
        begin = archives.start(opened, fresh, described, lora_params)
        items = iterate(data, total, prefetch=config.prefetch)
        # Registered after the folder's: the thread that prepares batches ends first.
        stack.callback(items.close)
        if begin.position is not None:
            items.set_state(begin.position)
        history, emit = _recorder(config, begin, hooks, stack)
        job = _Job(
            config,
            total,
            frozen,
            programs,
            # For the records; the optimizer computes its own inside of the step.
            rates=np.asarray(schedule(config, total)(np.arange(total))),
            at=at,
            evaluate=_evaluation(
                model, eval_data, config, frozen=frozen, hooks=hooks, at=at, rows=rows
            ),
            save=opened
            and (
                lambda state, step: archives.save(
                    opened, step, state, described=described, position=items.get_state()
                )
            ),
            save_every=steps_between_saves(config, total),
            emit=emit,
            hooks=hooks,
            flops=StepFlops(loss, 1 if at is None else at.mesh.size),
            clock=clock,
        )
        try:
            state = _run(job, begin.state, begin.step, items)
        except (KeyboardInterrupt, SystemExit):
            with contextlib.suppress(OSError):
                _plot(config, history, total)
            raise
    _plot(config, history, total)
    return Result(
        lora_params=combine(state.trainable, frozen),
        history=history,
        step=total,
        memory=_memory(job, state) if programs.compiled else None,
        compiled=tuple(programs.compiled),
        first_step=clock.first_step,
    )


def _plot(config: TrainConfig, history: Sequence[dict], total: int) -> None:
    """Writes the plot of the loss, of a run that was interrupted too."""
    wanted = processes.is_first() and any(record["kind"] == "train" for record in history)
    if wanted and config.output_dir is not None:
        plot_loss(config.output_dir / PLOT, history, title=f"{total} optimizer steps")


def _recorder(
    config: TrainConfig, begin: archives.Start, hooks: Hooks, stack: contextlib.ExitStack
) -> tuple[list[dict], Callable[[dict], None]]:
    """The history so far, and a function that appends a record and writes it everywhere."""
    history = list(begin.history)
    write = stack.enter_context(
        metrics.writer(config.output_dir, step=begin.step, tensorboard=config.tensorboard)
    )

    def emit(record: dict) -> None:
        history.append(record)
        write(record)
        if hooks.record is not None:
            hooks.record(record)

    return history, emit


def _evaluation(
    model: Any,
    data: Sequence[Example] | None,
    config: TrainConfig,
    *,
    frozen: Any,
    hooks: Hooks,
    at: Placement | None,
    rows: Rows,
) -> Callable[[TrainState], dict[str, float]] | None:
    """A function from a state to the numbers of an eval record, or None without evaluation."""
    if not data and hooks.score is None:
        return None
    # As many buckets as in training but other lengths: evaluation data may be longer.
    given = config.buckets
    count = len(given) if isinstance(given, tuple) else given
    options = {"batch_size": config.batch_size, "buckets": count, "at": at, "rows": rows}
    prepared = evaluator(model, data, **options) if data else None

    def evaluate(state: TrainState) -> dict[str, float]:
        numbers = {}
        if prepared is not None:
            numbers["eval_loss"] = mean_loss(prepared, state.trainable, frozen)
        if hooks.score is not None:
            numbers.update(hooks.score(combine(state.trainable, frozen)))
        return numbers

    return evaluate


def _run(job: _Job, state: TrainState, start: int, items: Any) -> TrainState:
    """Runs the steps after `start`, with the evaluations and checkpoints that are due."""
    clock, pending, agreed = job.clock, None, meshes.agreement(job.at)
    shown = job.config.progress and processes.is_first()
    with (
        progress(job.total, start=start, show=shown) as bar,
        interruptible() as interrupted,
        contextlib.closing(Trace(job.config, start=start, total=job.total)) as trace,
    ):
        # A resumed run has the loss before training in its history.
        if start == 0:
            _evaluate(job, state, 0)
        trace(start)
        for step in range(start + 1, job.total + 1):
            item = next(items)
            batch = meshes.batch_on(item.batch, job.at)
            if not job.programs.has(batch):
                # A compilation may take minutes: the record of the step before is not kept back.
                pending = _settle(job, pending, bar)
                _compile(job, state, batch)
                clock.restart()
            flops = job.flops(state.trainable, job.frozen, batch)
            # The old state's buffers are donated: nothing may read them from here on.
            state, out = job.programs(state, job.frozen, batch)
            # The previous step is read while this one runs, so the device never waits for Python.
            _settle(job, pending, bar)
            pending = (step, item, out, flops)
            stop = agreed(interrupted())
            if stop or _due(job, step) or trace.due(step):
                pending = _settle(job, pending, bar)
                _between(job, state, step, stop)
                trace(step)
                clock.restart()
    return state


def _compile(job: _Job, state: TrainState, batch: Batch) -> None:
    job.programs.compile(state, job.frozen, batch)
    # Counted here, as it traces the loss once more: no step's time has it.
    job.flops(state.trainable, job.frozen, batch)
    if len(job.programs.compiled) == 1 and job.hooks.memory is not None:
        job.hooks.memory(_memory(job, state))


def _memory(job: _Job, state: TrainState) -> Memory:
    compiled = job.programs.compiled.values()
    return memory(state.trainable, job.frozen, state.opt_state, compiled)


def _settle(job: _Job, pending: _Pending | None, bar: Any) -> None:
    """Waits for a step and records it.

    Raises:
      FloatingPointError: its loss is not finite; no later state is saved.
    """
    if pending is None:
        return
    step, item, out, flops = pending
    rate = float(job.rates[step - 1])
    record = train_record(step, item, out, rate=rate, clock=job.clock, flops=flops)
    job.emit(record)
    show_record(bar, record)


def _due(job: _Job, step: int) -> bool:
    every = (job.config.eval_every, job.save_every)
    return step == job.total or any(_is_time(n, step) for n in every)


def _between(job: _Job, state: TrainState, step: int, came: signal.Signals | None) -> None:
    """Evaluates and saves if due, and ends the run after a signal.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
      SystemExit: after SIGTERM or SIGHUP.
    """
    last = step == job.total
    # Evaluate before saving: then the checkpoint of a step is written after its eval record, and a
    # resumed run neither lacks nor repeats the record. A job that is about to be killed may have
    # no time for it: it saves first.
    if last or (_is_time(job.config.eval_every, step) and came in (None, signal.SIGINT)):
        _evaluate(job, state, step)
    if job.save is not None and (last or came or _is_time(job.save_every, step)):
        job.save(state, step)
    if came and not last:
        saved = (
            "nothing was saved, because there is no `output_dir`"
            if job.save is None
            else f"saved in {job.config.output_dir}; pass resume=True to continue from there"
        )
        how = "interrupted" if came == signal.SIGINT else f"ended by {came.name}"
        raise interruption(came, f"{how} after step {step} of {job.total}: {saved}")


def _is_time(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _evaluate(job: _Job, state: TrainState, step: int) -> None:
    if job.evaluate is None:
        return
    numbers = job.evaluate(state)
    if not math.isfinite(numbers.get("eval_loss", 0.0)):
        raise FloatingPointError(
            f"the evaluation loss after step {step} is {numbers['eval_loss']}; lower"
            " `learning_rate`, or check the base model's weights if this is step 0"
        )
    job.emit({"kind": "eval", "step": step, **numbers})
