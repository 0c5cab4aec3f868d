"""Training for a sweep: several adapters of different rank in one batch, or every weight.

The adapters are padded to one rank and stacked (`lora.stack(..., train=True)`). All see the same
batch, so the product with the base weight is one matmul for all of them. Each adapter has its own
optimizer state, gradient clipping and learning rate, and so trains exactly as it would alone. The
padding stays zero: the gradient of A there is a product with the zeros of B, and vice versa.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import compat, multi, processes
from lora_jax.analysis.sweep.store import Keeper, Progress, digest
from lora_jax.array import is_lora, is_stack
from lora_jax.models.mesh import Placement, on_mesh, params_on, placement
from lora_jax.multi.stack import stack
from lora_jax.train.config import TrainConfig
from lora_jax.train.mesh import results
from lora_jax.train.progress import interruptible, interruption
from lora_jax.train.step import optimizer, split_full
from lora_jax.transform.lorafy import lorafy
from lora_jax.tree import combine, split


class Trained(NamedTuple):
    """The result of training a group.

    Attributes:
      trees: a parameter tree for each member.
      losses: float32 (members, steps), before each step's update.
      seconds: time of the whole group, without compilation unless every step compiled.
    """

    trees: list
    losses: np.ndarray
    seconds: float


def train_adapters(
    loss: Callable,
    adapters: Sequence,
    rates: Sequence[float],
    batches: Iterable,
    config: TrainConfig,
    *,
    key: jax.Array,
    rank: int | None = None,
    sources: Sequence[int] | None = None,
    advance: Callable[[float], None] = lambda loss: None,
    keeper: Keeper | None = None,
) -> Trained:
    """Trains adapters of one base side by side, on the same batches or each on its own.

    Args:
      loss: `(params, batch) -> ()`, the mean loss of a batch.
      adapters: trees from `lora.init`, of any ranks.
      rates: the peak learning rate of each.
      batches: at least `config.steps` batches.
      config: the optimizer and its schedule; its learning rate is ignored.
      key: key of the adapters' dropout.
      rank: the rank that all are padded to; the largest by default.
      sources: for each adapter, the index of its batch in the items of `batches`, which are then
        tuples of batches of the same shapes. None: an item is one batch, shared by all.
      advance: called with the mean loss after each step.
      keeper: writes and restores checkpoints; None keeps nothing.

    Returns:
      The trained trees in the same order, padded to `rank`.

    Raises:
      FloatingPointError: the loss of every adapter is NaN or infinite. A single one may diverge:
        the sweep then rejects its learning rate.
    """
    at = placement(None, adapters)
    stacked = params_on(stack(adapters, train=True, rank=rank), at)
    trainable, frozen = split(stacked)
    leaves, tree = jax.tree.flatten(trainable)
    each = _each(loss, len(adapters), sources)

    def losses(leaves: list, frozen: Any, batch: Any, key: Any) -> tuple:
        found = each(combine(jax.tree.unflatten(tree, leaves), frozen), batch, key)
        return jnp.sum(found), found

    run = _Run(config, losses, jnp.asarray(rates, jnp.float32), axes=_axes(stacked), at=at)
    done = run(leaves, frozen, batches, key=key, advance=advance, keeper=keeper)
    stacked = combine(jax.tree.unflatten(tree, done.state[0]), frozen)
    trees = [multi.adapter(stacked, i) for i in range(len(adapters))]
    return Trained(trees, done.losses.T, _seconds(done))


def train_full(
    loss: Callable,
    params: Any,
    rate: float,
    batches: Iterable,
    config: TrainConfig,
    *,
    key: jax.Array,
    advance: Callable[[float], None] = lambda loss: None,
    keeper: Keeper | None = None,
) -> Trained:
    """Trains every weight of a model, as `train_adapters` trains adapters.

    Raises:
      ValueError: a leaf is quantized, or holds no floats.
    """
    at = placement(None, params)
    leaves, tree = jax.tree.flatten(split_full(params_on(params, at))[0])

    def losses(leaves: list, frozen: Any, batch: Any, key: Any) -> tuple:
        del frozen, key
        found = loss(jax.tree.unflatten(tree, leaves), batch)
        return found, found

    run = _Run(config, losses, jnp.asarray(rate, jnp.float32), at=at)
    done = run(leaves, None, batches, key=key, advance=advance, keeper=keeper)
    return Trained([jax.tree.unflatten(tree, done.state[0])], done.losses[None], _seconds(done))


def _each(loss: Callable, count: int, sources: Sequence[int] | None) -> Callable:
    """`(stacked, batch, key) -> (count,)`, every adapter's loss. One row is one adapter.

    "gathered", as each adapter has one row: there is nothing to group.
    """
    ids = jnp.arange(count)
    if sources is None:
        shared = lorafy(loss, reverse_only=True, row_axes=None, adapter_strategy="gathered")
        return lambda params, batch, key: shared(params, batch, adapter_ids=ids, lora_key=key)

    def one(params: Any, batch: Any) -> Any:  # whose arrays hold one row
        return loss(params, jax.tree.map(lambda x: x[0], batch))

    own = lorafy(one, reverse_only=True, adapter_strategy="gathered")
    which = jnp.asarray(sources)

    def each(params: Any, batches: tuple, key: jax.Array) -> Any:
        rows = jax.tree.map(lambda *x: jnp.stack(x)[which], *batches)
        return own(params, rows, adapter_ids=ids, lora_key=key)

    return each


def _axes(stacked: Any) -> list[int]:
    """The adapter axis of each trained leaf."""
    trainable, _ = split(stacked)
    found = jax.tree.map(
        lambda x: jax.tree.map(lambda _: x.axis, x) if is_stack(x) else x,
        trainable,
        is_leaf=is_lora,
    )
    return jax.tree.leaves(found)


class _Run:
    """The training of one group, whose step is compiled once.

    Args:
      config: the optimizer and its schedule.
      losses: `(leaves, frozen, batch, key) -> (sum, each)`, the losses of the members.
      rates: the peak learning rate of each member, or of the whole model.
      axes: the adapter axis of each leaf; None for the whole model.
      at: where the leaves lie; None on one device.
    """

    def __init__(
        self,
        config: TrainConfig,
        losses: Callable,
        rates: jax.Array,
        *,
        axes: list[int] | None = None,
        at: Placement | None = None,
    ) -> None:
        # AdamW's update is linear in the learning rate: the schedule gives its share of the peak.
        self.tx = optimizer(dataclasses.replace(config, learning_rate=1.0), _steps(config))
        self.steps, self.losses, self.rates, self.axes = _steps(config), losses, rates, axes
        self.at = at

    def __call__(
        self,
        leaves: list,
        frozen: Any,
        batches: Iterable,
        *,
        key: jax.Array,
        advance: Callable[[float], None],
        keeper: Keeper | None,
    ) -> Progress:
        # Copied, because the step donates its state and the caller keeps its leaves.
        state = ([jnp.copy(x) for x in leaves], self._moments(leaves))
        step = self._compiled(state)
        losses = np.full((self.steps, *np.shape(self.rates)), np.nan, np.float32)
        at = Progress(step=0, state=state, losses=losses, seconds=0.0, timed=0, batches="")
        at = at if keeper is None else keeper.restore(at)
        source, first, seen = iter(batches), at.step, set[tuple]()
        _skip(source, at, advance)
        with interruptible() as interrupted:
            for number, batch in zip(range(first, self.steps), source, strict=False):
                # By the step's number, so that a resumed run draws the same dropout.
                step_key = jax.random.fold_in(key, number)
                # Each process has the whole of a batch, and the loss takes its rows.
                placed = batch if self.at is None else on_mesh(batch, self.at.mesh)
                at = self._taken(at, frozen, placed, step=step, key=step_key, seen=seen)
                advance(float(np.mean(at.losses[number])))
                if keeper is not None:
                    at = at._replace(batches=digest(at.batches, batch))
                came, due = _agreed(interrupted(), keeper is not None and keeper.due())
                if keeper is not None and (came or due):
                    keeper.save(at)
                if came:
                    raise interruption(came, _interrupted(at.step, self.steps, keeper))
        if at.step < self.steps:
            raise ValueError(f"`batches` gave {at.step} batches for {self.steps} steps")
        if keeper is not None and keeper.begun:
            # Scoring, which follows, may take long too.
            keeper.save(at)
        return at

    def _moments(self, leaves: list) -> Any:
        """The optimizer's state, its moments sharded like their leaves."""
        fresh = self._mapped(self.tx.init, 1)(leaves)
        if self.at is None:
            return fresh
        axes = self.axes or [0] * len(leaves)
        where = [_first_axis(x.sharding, axis) for x, axis in zip(leaves, axes, strict=True)]
        fresh = optax.tree.map_params(self.tx, processes.put, fresh, where)
        return on_mesh(fresh, self.at.mesh)

    def _compiled(self, state: tuple) -> Callable:
        """The step; on a mesh its results lie as its arguments do, which the next step takes."""
        return jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=results(state, self.at),
            compiler_options=compat.compiler_options(),
        )

    def _taken(
        self,
        at: Progress,
        frozen: Any,
        batch: Any,
        *,
        step: Callable,
        key: jax.Array,
        seen: set[tuple],
    ) -> Progress:
        """One step; `at.losses` is written in place."""
        shapes = tuple(np.shape(x) for x in jax.tree.leaves(batch))
        began = time.perf_counter()
        state, out = step(at.state, frozen, batch, key)
        at.losses[at.step] = loss = np.asarray(out)
        seconds = time.perf_counter() - began
        if not np.isfinite(loss).any():
            raise FloatingPointError(
                f"the loss of step {at.step + 1} is {loss}: lower the learning rates"
            )
        at = at._replace(step=at.step + 1, state=state)
        if shapes in seen:
            return at._replace(seconds=at.seconds + seconds, timed=at.timed + 1)
        # The first step of a shape also compiles.
        seen.add(shapes)
        return at._replace(compiled=at.compiled + seconds)

    def _mapped(self, fn: Callable, trees: int) -> Callable:
        """`fn` for each adapter; the first `trees` arguments are lists of leaves with own axes."""
        if self.axes is None:
            return fn
        return lambda *args: jax.vmap(
            fn, in_axes=(*[self.axes] * trees, *[0] * (len(args) - trees))
        )(*args)

    def _step(self, state: tuple, frozen: Any, batch: Any, key: jax.Array) -> tuple:
        leaves, opt_state = state
        grads, out = jax.grad(self.losses, has_aux=True)(leaves, frozen, batch, key)

        def move(grads: Any, leaves: Any, opt_state: Any, rate: jax.Array) -> tuple:
            updates, opt_state = self.tx.update(grads, opt_state, leaves)
            return [rate.astype(u.dtype) * u for u in jax.tree.leaves(updates)], opt_state

        updates, opt_state = self._mapped(move, 2)(grads, leaves, opt_state, self.rates)
        # `vmap` puts the adapter axis first.
        if self.axes is not None:
            updates = [jnp.moveaxis(u, 0, at) for u, at in zip(updates, self.axes, strict=True)]
        moved = [x + u for x, u in zip(leaves, updates, strict=True)]
        return (moved, opt_state), out


def _first_axis(where: Any, axis: int) -> NamedSharding:
    """The sharding of a leaf whose axis `axis` is moved to the front."""
    spec = [*where.spec, *[None] * (axis + 1 - len(where.spec))]
    return NamedSharding(where.mesh, PartitionSpec(spec.pop(axis), *spec))


def _agreed(came: signal.Signals | None, due: bool) -> tuple[signal.Signals | None, bool]:
    """The signal that any process has received, and whether any is due for a checkpoint."""
    found = processes.exchange([came or 0, due])
    number = max(one for one, _ in found)
    return signal.Signals(number) if number else None, any(due for _, due in found)


def _skip(source: Iterator, at: Progress, advance: Callable) -> None:
    """Skips the batches of the steps that were taken before the interruption.

    Raises:
      ValueError: they differ from the batches that were trained on.
    """
    seen = ""
    for loss, batch in zip(at.losses[: at.step], source, strict=False):
        seen = digest(seen, batch)
        advance(float(np.mean(loss)))
    if seen != at.batches:
        raise ValueError(
            f"the first {at.step} batches differ from those of the unfinished training: "
            "`batches` must give the same ones on every call with a seed; with other data, choose "
            "another `output_dir`"
        )


def _interrupted(step: int, steps: int, keeper: Keeper | None) -> str:
    saved = "nothing is saved" if keeper is None else f"saved in {keeper.folder}"
    return f"interrupted after step {step} of {steps}: {saved}"


def _seconds(at: Progress) -> float:
    """Time of all steps at the speed of those that compiled nothing, if there were any."""
    return at.seconds * at.step / at.timed if at.timed else at.compiled


def _steps(config: TrainConfig) -> int:
    if config.steps is None:
        raise ValueError("`steps` is missing: a sweep takes as many with every rank")
    return config.steps
