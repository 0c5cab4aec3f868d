"""Training for a sweep: several adapters of different rank in one batch, or every weight.

The adapters stand padded to one rank in a stack (`lora.stack(..., train=True)`), and all of them
see the same batch: the base's product is one matmul over the batches of all. Each has its own
optimizer state, gradient clipping and learning rate, so it moves as it would alone. Entries that
only pad an adapter stay zero: A's gradient is a product with B's zeros there, and the reverse.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import compat, multi
from lora_jax.array import is_lora, is_stack
from lora_jax.train.config import TrainConfig
from lora_jax.train.full import split_full
from lora_jax.train.optimizer import optimizer


class Trained(NamedTuple):
    """What training a group ends with.

    Attributes:
      trees: a parameter tree for each member.
      losses: float32 (members, steps), before each step's update.
      seconds: of the whole group, compilation left out.
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
    key,
    rank: int | None = None,
    advance: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """Trains adapters of one base side by side on the same batches.

    Args:
      loss: `(params, batch) -> ()`, the mean loss of a batch.
      adapters: trees from `lora.init`, of any ranks.
      rates: a learning rate for each, at its peak.
      batches: as many as `config.steps`.
      config: the optimizer and its schedule; its own learning rate is not looked at.
      key: of the adapters' dropout.
      rank: what all are padded to; the largest by default.
      advance: is given the mean loss after each step.

    Returns:
      The trained trees in the same order, padded to `rank`.

    Raises:
      FloatingPointError: every adapter's loss has become NaN or infinite. One alone is left to
        its fate: it is the sweep that finds a learning rate too high.
    """
    stacked = lora.stack(adapters, train=True, rank=rank)
    trainable, frozen = lora.split(stacked)
    leaves, tree = jax.tree.flatten(trainable)
    ids = jnp.arange(len(adapters))
    # One row is one adapter; the batch is the same for all.
    each = lora.lorafy(loss, reverse_only=True, row_axes=None, adapter_way="gathered")

    def losses(leaves, frozen, batch, key):
        params = lora.combine(jax.tree.unflatten(tree, leaves), frozen)
        found = each(params, batch, adapter_ids=ids, lora_key=key)
        return jnp.sum(found), found

    run = _Run(config, losses, jnp.asarray(rates, jnp.float32), axes=_axes(stacked))
    leaves, found, seconds = run(leaves, frozen, batches, key, advance)
    stacked = lora.combine(jax.tree.unflatten(tree, leaves), frozen)
    trees = [multi.adapter(stacked, slot) for slot in range(len(adapters))]
    return Trained(trees, np.stack(found, axis=1), seconds)


def train_full(
    loss: Callable,
    params,
    rate: float,
    batches: Iterable,
    config: TrainConfig,
    *,
    key,
    advance: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """Trains every weight of a model, as `train_adapters` trains adapters.

    Raises:
      ValueError: a leaf is quantized, or holds no floats.
    """
    leaves, tree = jax.tree.flatten(split_full(params)[0])

    def losses(leaves, frozen, batch, key):
        del frozen, key
        found = loss(jax.tree.unflatten(tree, leaves), batch)
        return found, found

    run = _Run(config, losses, jnp.asarray(rate, jnp.float32))
    leaves, found, seconds = run(leaves, None, batches, key, advance)
    return Trained([jax.tree.unflatten(tree, leaves)], np.stack(found)[None], seconds)


def _axes(stacked) -> list[int]:
    """The axis of each trained leaf that numbers the slots."""
    trainable, _ = lora.split(stacked)
    found = jax.tree.map(
        lambda x: jax.tree.map(lambda _: x.axis, x) if is_stack(x) else x,
        trainable,
        is_leaf=is_lora,
    )
    return jax.tree.leaves(found)


class _Run:
    """The steps of one group."""

    def __init__(self, config: TrainConfig, losses: Callable, rates, *, axes=None):
        # AdamW's update is linear in the learning rate: the schedule gives its share of the peak.
        self.tx = optimizer(dataclasses.replace(config, learning_rate=1.0), _steps(config))
        self.steps, self.losses, self.rates, self.axes = _steps(config), losses, rates, axes
        self.step = jax.jit(
            self._step, donate_argnums=0, compiler_options=compat.compiler_options()
        )

    def __call__(self, leaves: list, frozen, batches: Iterable, key, advance: Callable):
        state = ([jnp.copy(x) for x in leaves], self._mapped(self.tx.init, 1)(leaves))
        found, seconds, seen = [], 0.0, set()
        for number, batch in zip(range(self.steps), batches, strict=False):
            shapes = tuple(np.shape(x) for x in jax.tree.leaves(batch))
            began = time.perf_counter()
            state, out = self.step(state, frozen, batch, jax.random.fold_in(key, number))
            found.append(np.asarray(out))
            # The first step of a shape also compiles.
            seconds += time.perf_counter() - began if shapes in seen else 0.0
            seen.add(shapes)
            if not np.isfinite(found[-1]).any():
                raise FloatingPointError(
                    f"the loss of step {number + 1} is {found[-1]}: lower the learning rates"
                )
            advance(float(np.mean(found[-1])))
        if len(found) < self.steps:
            raise ValueError(f"`batches` gave {len(found)} batches for {self.steps} steps")
        counted = self.steps - len(seen)
        return state[0], found, seconds * self.steps / counted if counted else float("nan")

    def _mapped(self, fn: Callable, trees: int):
        """`fn` for every slot by itself: of `trees` trees of leaves first, then of the rest."""
        if self.axes is None:
            return fn
        return lambda *args: jax.vmap(
            fn, in_axes=(*[self.axes] * trees, *[0] * (len(args) - trees))
        )(*args)

    def _step(self, state, frozen, batch, key):
        leaves, opt_state = state
        grads, out = jax.grad(self.losses, has_aux=True)(leaves, frozen, batch, key)

        def move(grads, leaves, opt_state, rate):
            updates, opt_state = self.tx.update(grads, opt_state, leaves)
            return [rate.astype(u.dtype) * u for u in jax.tree.leaves(updates)], opt_state

        updates, opt_state = self._mapped(move, 2)(grads, leaves, opt_state, self.rates)
        if self.axes is not None:
            updates = [jnp.moveaxis(u, 0, at) for u, at in zip(updates, self.axes, strict=True)]
        moved = [x + u for x, u in zip(leaves, updates, strict=True)]
        return (moved, opt_state), out


def _steps(config: TrainConfig) -> int:
    if config.steps is None:
        raise ValueError("`steps` is missing in the TrainConfig: a sweep gives every rank as many")
    return config.steps
