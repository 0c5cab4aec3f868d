"""Causal language-model loss over the learned tokens only.

    loss = - (1/N) sum_i  log softmax(head(h_i))[target_i]        N learned tokens of the step

The sum and N run over all rows and all microbatches of a step, so accumulation changes the memory
but not the loss. The output head, the largest matrix of a small model, is applied only at the
positions that predict a learned token; the others do not contribute to the loss. Where the float32
logits of all these positions would take more than `CHUNK_BYTES`, head and cross entropy run over a
part of the positions at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax import compat

# Logits at one time, float32. The backward pass holds about two more arrays of this size.
CHUNK_BYTES = 128 << 20


def outputs_of(model: Any) -> Callable:
    """The model as a function `(params, tokens, positions) -> logits` at those positions.

    For another loss, or for `plan`. Training uses `losses_of`, which never holds all logits.

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


def losses_of(model: Any, *, chunk_bytes: int = CHUNK_BYTES) -> Callable:
    """The model as a function `(params, tokens, positions, targets) -> losses` at those positions.

    `lorafy` transforms this function for training. Logits exist for as many positions at a time as
    `chunk_bytes` holds in float32, in the backward pass too, which applies the head again.

    Args:
      model: as for `outputs_of`.
      chunk_bytes: the largest array of logits. A head of V outputs takes 4·V bytes a position.

    Returns:
      `losses(params, tokens, positions, targets)`: tokens int32 (B, T), positions and targets
      int32 (P,); -log softmax(logits)[target], float32 (P,).
    """

    def losses(
        params: Any,
        tokens: Int[Array, "b t"],
        positions: Int[Array, " p"],
        targets: Int[Array, " p"],
    ) -> Float[Array, " p"]:
        hidden = pick(model.apply(params, tokens, return_hidden=True), positions)

        def part(hidden: Float[Array, "c d"], targets: Int[Array, " c"]) -> Float[Array, " c"]:
            return token_losses(model.head(params, hidden[None])[0], targets)

        one = jax.ShapeDtypeStruct((1, 1, hidden.shape[-1]), hidden.dtype)
        vocabulary = jax.eval_shape(model.head, params, one).shape[-1]
        count = -(-4 * vocabulary * hidden.shape[0] // chunk_bytes)
        if count <= 1:
            return part(hidden, targets)
        return _in_parts(jax.checkpoint(part), min(count, hidden.shape[0]), hidden, targets)

    return losses


def _in_parts(
    fn: Callable, count: int, hidden: Float[Array, "p d"], targets: Int[Array, " p"]
) -> Float[Array, " p"]:
    """`fn(hidden, targets)`, by `count` parts of the rows one after another."""
    rows = hidden.shape[0]
    size = -(-rows // count)

    def parts(x: Array) -> Array:
        padded = jnp.pad(x, [(0, size * count - rows)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, size, *x.shape[1:])

    found = jax.lax.map(lambda part: fn(*part), (parts(hidden), parts(targets)))
    return found.reshape(-1)[:rows]


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
    return jnp.sum(token_losses(logits, targets) * weights)


def token_losses(logits: Float[Array, "p v"], targets: Int[Array, " p"]) -> Float[Array, " p"]:
    """-log softmax(logits)[target] of each position, in float32."""
    # bfloat16 would round a loss near 10 to multiples of 1/16.
    logits = logits.astype(jnp.float32)
    if any(compat.spec_of(logits) or ()):
        # A look-up along an explicitly sharded dim has no rule in JAX; a sum has.
        chosen = jnp.arange(logits.shape[-1]) == targets[:, None]
        target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    else:
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def summed_loss(losses: Callable) -> Callable:
    """The loss of one microbatch as a sum, from a function that returns the loss of each position.

    Args:
      losses: `(params, tokens, positions, targets, key) -> losses (P,)`, see `losses_of`.

    Returns:
      `loss(params, batch, key) -> float32 ()`; `batch` is one microbatch: tokens (B, T), and
      positions, targets, weights (P,).
    """

    def loss(params: Any, batch: Any, key: Any) -> Float[Array, ""]:
        each = losses(params, batch.tokens, batch.positions, batch.targets, key)
        return jnp.sum(each * batch.weights)

    return loss
