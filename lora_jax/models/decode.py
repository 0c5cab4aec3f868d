"""Running a decoder with one adapter for all rows of a batch, or one for each.

With one for each, the rows are mapped (`jax.vmap`) over a cache that numbers them first, so that
nothing of the cache is moved from token to token; the base weights stay one matmul for all rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lora_jax.array import is_lora, is_stack
from lora_jax.models.attention import Cache
from lora_jax.transform.many.rows import by_row
from lora_jax.transform import lorafy


class Runner(NamedTuple):
    """A decoder's functions with its parameters in them.

    Attributes:
      apply: `(tokens (b, t), mask (b, t) or None, cache) -> (hidden states (b, t, d), cache)`.
      head: `(hidden states (b, 1, d)) -> logits (b, 1, v)`.
      cache: an empty cache.
    """

    apply: Callable
    head: Callable
    cache: Cache


# Where the caches of a batch of rows number them: the rows are written at one place.
ROWS = Cache._make((0, 0, 0, None))


def runner(forward, params, rows: int, slots: int) -> Runner:
    """What decodes a batch.

    Args:
      forward: a decoder's `Forward`.
      params: its parameters, plain or with LoRA leaves, or adapters chosen for the rows
        (`lora.select`).
      rows: of the batch.
      slots: tokens a row of the cache has room for.
    """
    if any(is_stack(x) for x in jax.tree.leaves(params, is_leaf=is_lora)):
        return _by_row(forward, params, rows, slots)
    run, head = lorafy(forward.apply), lorafy(forward.head)

    def apply(tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None, cache):  # noqa: F722
        return run(params, tokens, mask=mask, cache=cache, return_hidden=True)

    return Runner(apply, lambda hidden: head(params, hidden), forward.init_cache(rows, slots))


def _by_row(forward, params, rows: int, slots: int) -> Runner:
    parts = by_row(params)
    if (chosen := parts.arrays[0].shape[parts.axes[0]]) != rows:
        raise ValueError(f"adapters are chosen for {chosen} rows, but there are {rows} prompts")
    run, head = lorafy(forward.apply), lorafy(forward.head)

    def one(own, tokens, mask, cache):
        mask = None if mask is None else mask[None]
        hidden, cache = run(
            parts.join(own, parts.base), tokens[None], mask=mask, cache=cache, return_hidden=True
        )
        return hidden[0], cache

    def apply(tokens, mask, cache):
        axes = (parts.axes, 0, None if mask is None else 0, ROWS)
        return jax.vmap(one, in_axes=axes, out_axes=(0, ROWS))(parts.arrays, tokens, mask, cache)

    def logits(hidden):
        def one_head(own, h):
            return head(parts.join(own, parts.base), h[None])[0]

        return jax.vmap(one_head, in_axes=(parts.axes, 0))(parts.arrays, hidden)

    cache = forward.init_cache(1, slots)
    wide = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)
    return Runner(apply, logits, wide._replace(length=cache.length))
