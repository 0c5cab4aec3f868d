"""Causal language-model loss over the learned tokens only.

    loss = - (1/N) sum_i  log softmax(head(h_i))[target_i]        N learned tokens of the step

The sum and N run over all rows and all microbatches of a step, so accumulation changes the memory
but not the loss. The output head, the largest matrix of a small model, is applied only at the
positions that predict a learned token; the others do not contribute to the loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax import compat


def outputs_of(model: Any) -> Callable:
    """The model as a function `(params, tokens, positions) -> logits` at those positions.

    `lorafy` transforms this function for training; `plan` accepts it too.

    Args:
      model: `apply(params, tokens, return_hidden=True)` gives hidden states (B, T, D) and
        `head(params, hidden)` gives logits (B, T', V).

    Returns:
      `logits(params, tokens, positions)`: tokens int32 (B, T), positions int32 (P,) of the
      flattened (B, T) grid; logits float32 (P, V).
    """

    def logits(
        params: Any, tokens: Int[Array, "b t"], positions: Int[Array, " p"]
    ) -> Float[Array, "p v"]:
        hidden = model.apply(params, tokens, return_hidden=True)
        picked = pick(hidden, positions)
        return model.head(params, picked[None])[0].astype(jnp.float32)

    return logits


def pick(hidden: Float[Array, "b t d"], positions: Int[Array, " p"]) -> Float[Array, "p d"]:
    """The hidden states at `positions` of the flattened grid, (P, D); all of them if P == B*T."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if positions.shape[0] == flat.shape[0]:
        return flat
    # The positions are distinct and sorted; with these flags the scatter of the gradient needs no
    # atomic additions. Where mesh axes are explicit, JAX needs the place of the picked rows.
    spread = any(compat.spec_of(flat) or ())
    return flat.at[positions].get(
        indices_are_sorted=True,
        unique_indices=True,
        mode="promise_in_bounds",
        out_sharding=PartitionSpec() if spread else None,
    )


def cross_entropy(
    logits: Float[Array, "p v"],
    targets: Int[Array, " p"],
    weights: Float[Array, " p"],
) -> Float[Array, ""]:
    """The weighted sum of -log softmax(logits)[target], in float32 (not yet divided by N)."""
    return jnp.sum(token_losses(logits, targets, weights))


def token_losses(
    logits: Float[Array, "p v"],
    targets: Int[Array, " p"],
    weights: Float[Array, " p"],
) -> Float[Array, " p"]:
    """The weighted -log softmax(logits)[target] of each position, in float32."""
    # bfloat16 would round a loss near 10 to multiples of 1/16.
    logits = logits.astype(jnp.float32)
    if any(compat.spec_of(logits) or ()):
        # A look-up along an explicitly sharded dim has no rule in JAX; a sum has.
        chosen = jnp.arange(logits.shape[-1]) == targets[:, None]
        target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    else:
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - target) * weights


def summed_loss(outputs: Callable) -> Callable:
    """The loss of one microbatch as a sum, from a function that returns logits.

    Args:
      outputs: `(params, tokens, positions, key) -> logits (P, V)`.

    Returns:
      `loss(params, batch, key) -> float32 ()`; `batch` is one microbatch: tokens (B, T), and
      positions, targets, weights (P,).
    """

    def loss(params: Any, batch: Any, key: Any) -> Float[Array, ""]:
        logits = outputs(params, batch.tokens, batch.positions, key)
        return cross_entropy(logits, batch.targets, batch.weights)

    return loss
