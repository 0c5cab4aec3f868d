"""Attention without a kernel: the scores of some heads and queries at a time, in plain JAX.

B batch, T queries, S keys, N query heads, K key/value heads, H size of a head (HQ with what
`lora_jax.models.attention.with_sinks` adds to a query).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from lora_jax.dims import AnyArray
from lora_jax.models.delta_rule import DeltaSizes
from lora_jax.models.kernels import in_place, spread

# Bytes of float32 scores that training holds at once on a device.
MOST_SCORES = 2**28
# A row's queries are cut into at most so many runs of at least so many tokens, each with the keys
# up to its end: four runs take 5/8 of the products of all pairs.
MOST_RUNS, SHORTEST_RUN = 4, 64
# The sums over keys, which are kept where only the scores are computed again.
_SUMS = "sums over keys"
_KEPT = jax.checkpoint_policies.save_only_these_names(_SUMS)


class Mixing(NamedTuple):
    """Options of a decoder's attention.

    Attributes:
      slides: for each block, whether it has a sliding window; None where it has a delta net.
      window: tokens that a token attends to in such blocks, itself included.
      chunked: the window is a piece of the text, see `lora_jax.models.config`.
      apart: keys of blocks that slide and of others have different sizes.
      shared: last blocks, which have no keys: they attend to those of the last block before them
        that slides as they do. Only with `apart`.
      scale: factor of the products; None is `1 / sqrt(H)`.
      softcap: limits the scores to `(-softcap, softcap)`; None leaves them.
      sinks: each head has a score of its own in the softmax, of no key.
      delta: the sizes of delta nets, where blocks have them.
      again: the backward pass computes blocks again, and holds the scores of one run of queries.
    """

    slides: tuple[bool | None, ...]
    window: int | None = None
    chunked: bool = False
    apart: bool = False
    shared: int = 0
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    delta: DeltaSizes | None = None
    again: bool = False


PLAIN = Mixing(slides=())


def in_runs(
    mix: Callable,
    window: int | None,
    again: bool,
    q: Float[Array, "b t n hq"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    first: int | Array,
    *others: AnyArray | None,
) -> Float[Array, "b t n h"]:
    """Causal `mix(q, k, v, first, *others)`, without most of the pairs that the mask leaves out.

    Args:
      mix: attention of queries of which the first stands at `first` among the keys.
      window: tokens that every token attends to, itself included; None for all before it.
      again: see `Mixing`.
      q, k, v, first: of a whole row, or queries from `first` on.
      others: masks and the like of the keys, (b, s), or None.
    """
    mixed, runs = [], _runs(q.shape[1], k.shape[1], window)
    pairs = sum((run.stop - run.start) * (keys.stop - keys.start) for run, keys in runs)
    # A block that is computed again would hold the scores of all runs until its MLP is passed back.
    # Computed once more they cost a product of queries and keys, under 1 % of an 8B step.
    again = again and _score_bytes(q, k, pairs) > MOST_SCORES
    for run, keys in runs:
        own = [None if x is None else x[:, keys] for x in others]

        def some(q: Array, k: Array, v: Array, first: Any, own: Any = own) -> Array:
            return mix(q, k, v, first, *own)

        at = first + run.start - keys.start
        mixed.append(_in_parts(some, q[:, run], k[:, keys], v[:, keys], at, again=again))
    return in_place(jnp.concatenate(mixed, axis=1), q)


def _runs(queries: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    """Runs of a row's queries, and the keys that those of a run attend to.

    Source: the blocks above the diagonal that FlashAttention-2 skips, Dao 2023, arXiv:2307.08691,
    section 3.1.
    """
    # Of a row that is spread over devices, a device does not know the place of its queries.
    if queries != keys:
        return [(slice(0, queries), slice(0, keys))]
    size = -(-queries // max(1, min(MOST_RUNS, queries // SHORTEST_RUN)))
    first = [
        0 if window is None else max(0, begin - window + 1) for begin in range(0, queries, size)
    ]
    ends = [min(begin + size, queries) for begin in range(0, queries, size)]
    return [(slice(i * size, end), slice(first[i], end)) for i, end in enumerate(ends)]


def _in_parts(
    mix: Callable,
    q: Float[Array, "b t n hq"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    first: int | Array,
    *,
    again: bool,
) -> Float[Array, "b t n h"]:
    """`mix(q, k, v, first)`; where its scores are large, a part at a time and again when backward.

    A part has some of the heads, or of one key head some of the queries: so memory grows with the
    length of a row, not with its square. The float32 scores of all heads at once would be the
    largest arrays of a training step over a quantized base.
    """
    b, t, n, _ = q.shape
    heads, h = v.shape[2:]
    scores = _score_bytes(q, k, t * k.shape[1])
    # Key heads are never split: the fewest equal parts of a device's own whose scores fit.
    own = heads // _spread_over(b, heads)[1]
    fits = [p for p in range(1, own + 1) if own % p == 0 and scores <= p * MOST_SCORES]
    parts = fits[0] if fits else own
    pieces = min(t, -(-scores // (parts * MOST_SCORES)))
    if parts == pieces == 1:
        return (jax.checkpoint(mix, policy=_KEPT) if again else mix)(q, k, v, first)
    some = partial(_by_queries, mix, pieces, first)
    if parts == 1:
        return some(q, k, v)

    group = n // heads  # query heads of a key head

    def split(
        x: Float[Array, "b t n h"] | Float[Array, "b s k h"], each: int
    ) -> Float[Array, "parts b t m h"]:
        # A part takes every `parts`-th key head, so that each device of a mesh has equally many of
        # its own heads in every part, and none is sent.
        size = x.shape[-1]
        x = x.reshape((*x.shape[:2], heads // parts, parts, each, size))
        return jnp.moveaxis(x, 3, 0).reshape(parts, *x.shape[:2], -1, size)

    operands = (split(q, group), split(k, 1), split(v, 1))
    mixed = lax.map(lambda each: some(*each), operands)  # (parts, b, t, m, h)
    mixed = mixed.reshape((parts, b, t, heads // parts, group, h))
    return jnp.moveaxis(mixed, 0, 3).reshape(b, t, n, h)


def _by_queries(
    mix: Callable,
    pieces: int,
    first: int | Array,
    q: Float[Array, "b t m hq"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
) -> Float[Array, "b t m h"]:
    """`mix`, by so many pieces of the queries one after another."""
    if pieces == 1:
        return jax.checkpoint(mix)(q, k, v, first)
    b, t, m, wide = q.shape
    size = -(-t // pieces)
    pieces = -(-t // size)
    padded = jnp.pad(q, ((0, 0), (0, size * pieces - t), (0, 0), (0, 0)))
    apart = padded.reshape((b, pieces, size, m, wide))
    apart = jnp.moveaxis(apart, 1, 0)  # (pieces, b, size, m, h)
    one = jax.checkpoint(lambda q, at: mix(q, k, v, at))
    # Bound to the queries: a scan over heads or blocks would compute the masks of all pieces, which
    # it finds the same in every turn, beforehand.
    apart, firsts = lax.optimization_barrier((apart, first + jnp.arange(pieces) * size))
    mixed = lax.map(lambda each: one(*each), (apart, firsts))
    return jnp.moveaxis(mixed, 0, 1).reshape(b, size * pieces, m, -1)[:, :t]


def _score_bytes(q: Float[Array, "b t n hq"], k: Float[Array, "b s k h"], pairs: int) -> int:
    """Bytes on a device of the float32 scores of so many pairs of a query and a key in each row."""
    (b, _, n, _), heads = q.shape, k.shape[2]
    return 4 * b * n * pairs // math.prod(_spread_over(b, heads))


def _spread_over(rows: int, heads: int) -> tuple[int, int]:
    """The devices that rows, and key heads, are spread over in the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    of_rows, of_heads = spread(mesh, rows, heads)
    devices = math.prod(mesh.shape[axis] for axis in of_rows or ())
    return devices, 1 if of_heads is None else mesh.shape[of_heads]


@jax.custom_jvp
def _only(seen: Bool[Array, "#b 1 1 #t s"], logits: Float[Array, "b k g t s"]) -> Array:
    """The scores of the keys that each query attends to, and one of no weight for the others.

    Not -inf: a row of padding attends to nothing, and its gradient would be NaN. The factor is that
    of `jax.nn.dot_product_attention`.
    """
    return jnp.where(seen, logits, -0.7 * jnp.finfo(jnp.float32).max)


@_only.defjvp
def _only_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # What has no weight has no gradient either: a choice would keep the mask of every head for it.
    # Where a query attends to nothing, all keys have the same weight.
    some = jnp.any(primals[0], axis=-1, keepdims=True)
    return _only(*primals), tangents[1] * some.astype(tangents[1].dtype)


def mix(
    q: Float[Array, "b t n hq"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    seen: Bool[Array, "#b 1 #t s"] | None,
    by: Mixing = PLAIN,
    bias: Float[Array, "#b n t s"] | None = None,
) -> Float[Array, "b t n h"]:
    """Values weighted by their keys: `softmax(cap(scale · q kᵀ) + bias) v`.

    The M = T·N/K queries of a key head are one matrix, and all arrays of scores have this order of
    axes: on a CPU, the transposes of scores take longer than the products. The softmax divides the
    sums of values, which are fewer than the weights.

    Args:
      q: queries, with the sinks of `with_sinks` where heads have them.
      k, v: keys and values.
      seen: the keys that each query attends to; None for all.
      by: scale, soft cap and sinks.
      bias: added to the scores; None adds nothing.
    """
    q, sinks = (q[..., :-1], q[..., -1]) if by.sinks else (q, None)  # sinks: (b, t, n)
    (b, t, n, h), (s, heads) = q.shape, k.shape[1:3]

    def by_key_heads(x: Float[Array, "b t n *h"]) -> Float[Array, "b k m *h"]:
        x = jnp.moveaxis(x.reshape(b, t, heads, n // heads, *x.shape[3:]), 1, 3)
        return x.reshape(b, heads, -1, *x.shape[4:])

    # The scale before the cap, as in Gemma 2.
    scale = h**-0.5 if by.scale is None else by.scale
    logits = jnp.einsum("bkmh,bskh->bkms", by_key_heads(q), k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if by.softcap is not None:
        logits = jnp.tanh(logits / by.softcap) * by.softcap
    if bias is not None:
        logits = logits + bias.reshape(-1, heads, logits.shape[2], s)
    if seen is not None:
        logits = _only(seen[:, :, None], logits.reshape(b, heads, -1, t, s))
        logits = logits.reshape(b, heads, -1, s)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = by_key_heads(sinks)[..., None].astype(top.dtype)
        top = jnp.maximum(top, sinks)
    # Any number is right for `top`: it cancels.
    top = lax.stop_gradient(top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # A sink takes its share of the softmax, and has no value to add.
    total = total if sinks is None else total + jnp.exp(sinks - top)
    mixed = jnp.einsum(
        "bkms,bskh->bkmh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    mixed, total = checkpoint_name((mixed, total), _SUMS)
    mixed = (mixed / total).astype(v.dtype).reshape(b, heads, n // heads, t, -1)
    return in_place(jnp.moveaxis(mixed, 3, 1).reshape(b, t, n, -1), q)
