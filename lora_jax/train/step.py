"""One optimizer step as a pure function of the train state, the frozen base and a batch.

Also the optimizer (AdamW behind global-norm clipping, on a warm-up and decay schedule), and full
fine-tuning, the baseline of an adapter, in the same loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lora_jax import compat, paths
from lora_jax.array import is_leaf, is_lora
from lora_jax.config.arguments import check_argument, check_count, check_key
from lora_jax.optim import check_optimizer, check_trainable
from lora_jax.quant.array import is_quant
from lora_jax.train.config import TrainConfig, warmup_steps
from lora_jax.tree import trained_and_frozen


class TrainState(NamedTuple):
    """The values that a step changes and a checkpoint stores, without the frozen base.

    Attributes:
      step: int32 (), optimizer steps taken.
      trainable: the trainable tree of `lora.split`, with None for the leaves of the base.
      opt_state: optax's state over `trainable`.
      key: the run's dropout key; step k uses `fold_in(key, k)`, so it never changes.
    """

    step: Int[Array, ""]
    trainable: Any
    opt_state: Any
    key: Array


class Metrics(NamedTuple):
    """The metrics of a step, as device scalars.

    Attributes:
      loss: mean cross entropy of the step's learned tokens, nats, before the update.
      grad_norm: global norm of its gradient before clipping.
      learned: the number of learned tokens.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learned: Float[Array, ""]


def init_state(key: Array, trainable: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    `trainable` is copied, because a step donates the state's buffers: the caller's stay valid.

    Raises:
      TypeError: no PRNG key, or no optimizer.
      ValueError: `trainable` is empty, holds the base too, or integers such as the codes of a
        quantized base.
    """
    check_key("key", key)
    check_optimizer(tx)
    trains, rest = trained_and_frozen(trainable)
    if jax.tree.leaves(trains) and jax.tree.leaves(rest):
        raise ValueError(
            "`trainable` holds the base too, which would get moments: pass the first tree of "
            "`lora.split(lora_params)`"
        )
    check_trainable(trainable)
    trainable = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key)


class Programs:
    """A function of `(..., batch)` compiled once for each shape of its batch.

    Compilation is explicit, not left to the first call, so that it can be counted and timed, and
    the compiled program inspected for its memory.

    Attributes:
      compiled: the compiled programs by the batch's (A, B, T, P).
    """

    def __init__(self, fn: Callable, *, donate: tuple[int, ...] = (), results: Any = None) -> None:
        """`results` are the shardings of what `fn` returns; None leaves them to the compiler."""
        self.compiled: dict[tuple[int, ...], Any] = {}
        self._jitted = jax.jit(fn, donate_argnums=donate, out_shardings=results)

    def has(self, batch: Any) -> bool:
        """Whether the program for this batch's shape is already compiled."""
        return shape_of(batch) in self.compiled

    def compile(self, *args: Any) -> Any:
        """Compiles the program for the shape of the last argument if needed, without running it."""
        shape = shape_of(args[-1])
        if shape not in self.compiled:
            lowered = self._jitted.lower(*args)
            self.compiled[shape] = lowered.compile(compiler_options=compat.compiler_options())
        return self.compiled[shape]

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(*args)


def shape_of(batch: Any) -> tuple[int, ...]:
    """(A, B, T, P): microbatches, rows, tokens of a row, and places of a loss in a microbatch.

    Of an encoder-decoder (A, B, T, P, S), with the tokens that its encoder reads.
    """
    reads = () if batch.reads is None else batch.reads.shape[-1:]
    return (*batch.tokens.shape, batch.positions.shape[-1], *reads)


def make_step(loss: Callable, tx: optax.GradientTransformation) -> Callable:
    """The function of one optimizer step.

    Microbatches are scanned; their gradients are summed in float32 and divided once by the number
    of learned tokens in all of them:  g = sum_i grad(loss_i) / sum_i N_i.

    Args:
      loss: `(trainable, frozen, microbatch, key) -> float32 ()`, a sum over learned tokens.
      tx: the optimizer.

    Returns:
      `step(state, frozen, batch) -> (state, Metrics)`; `batch` is a `Batch` with a leading axis
      of microbatches. Jit it with the state donated; `frozen` is an argument so that the base
      is not compiled into the program as constants.
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        # A function of the step alone, so that a resumed run draws the same dropout masks.
        key = jax.random.fold_in(state.key, state.step)
        learned = jnp.sum(batch.weights)
        total, grads = _gradients(loss, state.trainable, frozen, batch=batch, key=key)
        # Every batch of a `Loader` has a learned token; the maximum keeps other batches finite.
        count = jnp.maximum(learned, 1.0)
        grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, state.trainable)
        # Weight decay reads the parameters, hence the third argument.
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(total / count, optax.tree.norm(grads), learned)
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return step


def _gradients(
    loss: Callable, trainable: Any, frozen: Any, *, batch: Any, key: Array
) -> tuple[Float[Array, ""], Any]:
    """Sum of the microbatches' losses and gradients, in float32."""
    grad = jax.value_and_grad(loss)
    count = batch.tokens.shape[0]
    # Without accumulation no float32 copy of the gradients is needed.
    if count == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        return grad(trainable, frozen, only, jax.random.fold_in(key, 0))

    # The sums are float32 also for bfloat16 parameters, where small terms would be lost.
    def add(carry: tuple[Any, Any], item: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
        number, part = item
        value, grads = grad(trainable, frozen, part, jax.random.fold_in(key, number))
        total, sums = carry
        sums = jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, grads)
        return (total + value, sums), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), trainable)
    start = (jnp.zeros((), jnp.float32), zeros)
    (total, grads), _ = jax.lax.scan(add, start, (jnp.arange(count), batch))
    return total, grads


def split_full(params: Any) -> tuple[Any, Any]:
    """The counterpart of `lora.split` for full fine-tuning.

    Args:
      params: plain parameters, every leaf an array of floats.

    Returns:
      `(trainable, frozen)`: `params` itself, and a tree of the same structure with None leaves.

    Raises:
      ValueError: a leaf has an adapter, is quantized or holds no floats, and so has no gradient.
    """
    for key_path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        found = _untrainable(x)
        if found is not None:
            raise ValueError(
                f"full fine-tuning trains every leaf, but `{paths.spell(key_path)}` {found}"
            )
    if not jax.tree.leaves(params):
        raise ValueError("full fine-tuning has nothing to train: `lora_params` has no leaves")
    return params, jax.tree.map(lambda x: None, params)


def _untrainable(x: Any) -> str | None:
    if is_lora(x):
        return "has an adapter; merge it first (lora.merge), or train the adapter alone"
    if is_quant(x):
        return f"is quantized ({x.format}); load the model without `quantize`, or train an adapter"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"holds {x.dtype}, which has no gradient; keep it out of the parameters"
    return None


def schedule(config: TrainConfig, total: int) -> Callable:
    """The learning rate of each optimizer step.

        lr(k) = peak * min(1, (k + 1)/w) * (f + (1 - f) * d(t)),     t = (k - w)/(total - w)
        d(t) = (1 + cos(pi t))/2   or   1 - t   or   1

    for w warm-up steps and final share f. The rate of step 0 is peak/w, not 0.

    Args:
      config: gives the schedule's name, peak, warm-up and final share.
      total: optimizer steps of the run.

    Returns:
      `lr(step)`, step counted from 0, traceable and elementwise.
    """
    check_argument("train.schedule(config, total)", "config", config, TrainConfig)
    check_count("total", total)
    warm = warmup_steps(config, total)
    final = config.final_learning_rate
    decay = {
        "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
        "linear": lambda t: 1 - t,
        "constant": jnp.ones_like,  # no decay, whatever the final share
    }[config.schedule]

    def rate(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warm, 1))
        t = jnp.clip((step - warm) / max(total - warm, 1), 0.0, 1.0)
        return config.learning_rate * rise * (final + (1 - final) * decay(t))

    return rate


def optimizer(config: TrainConfig, total: int) -> optax.GradientTransformation:
    """Clipping, then AdamW: p <- p - lr * (m/(sqrt(v) + eps) + decay * p), as torch.optim.AdamW."""
    adamw = optax.adamw(
        schedule(config, total),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    if config.clip is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)
