"""The optimizer: optax's AdamW behind global-norm clipping, on a warm-up and decay schedule."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from lora_jax.train.config import TrainConfig, warmup_steps


def schedule(config: TrainConfig, total: int) -> Callable:
    """The learning rate of each optimizer step.

        lr(k) = peak * min(1, (k + 1)/w) * (f + (1 - f) * d(t)),     t = (k - w)/(total - w)
        d(t) = (1 + cos(pi t))/2   or   1 - t   or   1

    for warm-up steps w and final share f. Step 0 already moves: its rate is peak/w, not 0.

    Args:
      config: gives the schedule's name, peak, warm-up and final share.
      total: optimizer steps of the run.

    Returns:
      `lr(step)`, step counted from 0, traceable and elementwise.
    """
    warm = warmup_steps(config, total)
    final = config.final_learning_rate
    decay = {
        "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
        "linear": lambda t: 1 - t,
        "constant": jnp.ones_like,
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else final

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warm, 1))
        t = jnp.clip((step - warm) / max(total - warm, 1), 0.0, 1.0)
        return config.learning_rate * rise * (floor + (1 - floor) * decay(t))

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
