"""Causal attention of a decoder, with and without a cache, full or with a sliding window.

One function, `Attend`, does what happens between a block's projections and its output: it rotates
queries and keys, stores keys and values, and mixes the values. Blocks with a sliding window (a
token attends to a fixed number before it) need another one than the rest: `AttendOf` has both.

B batch, T new tokens, S length of the cache, N query heads, K key/value heads, H size of a head
(HQ with what `with_sinks` adds to a query), L blocks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models import kernels
from lora_jax.models.context import check_tokens, over_tokens
from lora_jax.models.rope import Rotation, rotate

# Bytes of float32 scores that training holds at once on a device.
MOST_SCORES = 2**28


class Cache(NamedTuple):
    """Keys and values of the tokens so far, filled from the left.

    A call writes its T tokens at positions `length .. length + T`; the caller makes the cache long
    enough. Positions that hold padding are never attended to.
    """

    keys: Float[Array, "l b s k h"]
    values: Float[Array, "l b s k h"]
    valid: Bool[Array, "b s"]
    length: Int[Array, ""]


class Mixing(NamedTuple):
    """Options of a decoder's attention.

    Attributes:
      slides: for each block, whether it has a sliding window.
      window: tokens that a token attends to in such blocks, itself included.
      scale: factor of the products; None is `1 / sqrt(H)`.
      softcap: limits the scores to `(-softcap, softcap)`; None leaves them.
      sinks: each head has a score of its own in the softmax, of no key.
    """

    slides: tuple[bool, ...]
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False


# Keys and values of all blocks, `(l, b, s, k, h)` each; None without a cache.
Stored = tuple[Array, Array] | None

# (queries, keys, values, stored=, block=) -> (mixed values, stored); `block` is the block's number.
# Where heads have sinks, `with_sinks(queries, sinks)` is what stands for the queries.
Attend = Callable[..., tuple[Array, Stored]]

# By whether the block slides: a bool, or an array in a scan over blocks that differ.
AttendOf = Callable[[bool | Array], Attend]

# Whether a block slides -> how its queries and keys are rotated, or None.
Rotations = Callable[[bool | Array], Rotation | None]


def choose(slides: bool | Array, sliding: Any, full: Any) -> Any:
    """One of two trees of arrays."""
    if isinstance(slides, bool):
        return sliding if slides else full
    return jax.tree.map(lambda a, b: jnp.where(slides, a, b), sliding, full)


def attention(
    tokens: AnyArray,
    mask: Bool[AnyArray, "b t"] | None,
    cache: Cache | None,
    *,
    segments: Int[AnyArray, "b t"] | None = None,
    mixing: Mixing,
    rotations: Rotations,
    wanted: kernels.AttentionName = "auto",
    over: str | None = None,
) -> tuple[AttendOf, Stored, Cache | None]:
    """How the blocks of one call attend.

    Args:
      tokens: (b, t) new tokens; only their shape is read.
      mask: true at real tokens of whole rows; None where all are.
      cache: the tokens before these, or None.
      segments: the text of each token where rows hold several, without a cache; no token attends
        to another text's.
      mixing: how queries weigh keys.
      rotations: the rotation of a block's queries and keys.
      wanted: the implementation without a cache, see `lora_jax.models.kernels`.
      over: the axis of the mesh that the tokens of a row are spread over without a cache, or None.

    Returns:
      How a block attends; the stored keys and values that blocks take and return; and the cache
      with the new tokens counted in `valid` and `length`.
    """
    if cache is None:
        check_tokens(tokens.shape[1], over)
        attend_of = _without_cache(
            mask, segments, mixing=mixing, rotations=rotations, wanted=wanted, over=over
        )
        return attend_of, None, None
    count = tokens.shape[1]
    new = jnp.ones(tokens.shape, bool) if mask is None else mask  # (b, t)
    valid = lax.dynamic_update_slice(cache.valid, new, (0, cache.length))  # (b, s)
    attend_of = _with_cache(valid, cache.length, count, mixing=mixing, rotations=rotations)
    counted = cache._replace(valid=valid, length=cache.length + count)
    return attend_of, (cache.keys, cache.values), counted


def positions_of(valid: Bool[AnyArray, "b t"]) -> Int[Array, "b t"]:
    """The position of each token: only real ones count, so padding on the left shifts none."""
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def starts_of(segments: Int[AnyArray, "b t"]) -> Int[Array, "b t"]:
    """Where each token's text begins in its row of texts side by side."""
    at = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    # A running maximum: the last beginning at or before each token.
    return lax.cummax(jnp.where(first, at, 0), axis=1)


def _seen_by(
    mask: Bool[AnyArray, "b t"] | None,
    segments: Int[AnyArray, "b t"] | None,
    at: Int[Array, " q"] | None = None,
) -> Any:
    """Which keys the queries see but for causality and windows, (b, 1, #q, t); None for all.

    `at` are the places of the queries, None for every place of the row.
    """
    if segments is not None:
        # Padding, segment 0, attends to padding: a softmax over nothing would be one over all.
        own = segments if at is None else jnp.take(segments, at, axis=1, mode="clip")  # (b, q)
        return own[:, None, :, None] == segments[:, None, None, :]
    return None if mask is None else mask[:, None, None, :]


def _without_cache(
    mask: Bool[AnyArray, "b t"] | None,
    segments: Int[AnyArray, "b t"] | None,
    *,
    mixing: Mixing,
    rotations: Rotations,
    wanted: kernels.AttentionName,
    over: str | None,
) -> AttendOf:
    # Padding on the right needs no mask: under causal attention only padding attends to it.
    unmasked = mask is None and segments is None

    def attend_of(slides: bool | Array) -> Attend:
        by = rotations(slides)
        window = mixing.window
        near = (window - 1, 0) if slides is True and window is not None else None

        def attend(
            q: Float[Array, "b t n hq"],
            k: Float[Array, "b t k h"],
            v: Float[Array, "b t k h"],
            *,
            stored: Stored,
            block: Int[Array, ""],
        ) -> tuple[Float[Array, "b t n h"], Stored]:
            q, k = _rotated(q, by, mixing), rotate(k, by)
            kernel = kernels.kernel_for(
                wanted, q, mask, segments, slides=slides, window=mixing.window,
                scale=mixing.scale, softcap=mixing.softcap, sinks=mixing.sinks, over=over,
            )  # fmt: skip
            if kernel is not None:
                return kernel(q, k, v), stored

            # The mask is made where it is used, and fused with the causal one into the softmax:
            # outside it would be an array of all pairs of tokens.
            def mix(mask: Any, segments: Any, q: Array, k: Array, v: Array, first: Any) -> Array:
                whole = q.shape[1] == k.shape[1]
                # The window of JAX's attention is a static number.
                if whole and isinstance(slides, bool) and _is_plain(mixing):
                    return jax.nn.dot_product_attention(
                        q, k, v, mask=_seen_by(mask, segments), scale=mixing.scale,
                        is_causal=True, local_window_size=near,
                    )  # fmt: skip
                at = first + jnp.arange(q.shape[1])
                back = at[:, None] - jnp.arange(k.shape[1])
                seen = _near(back, mixing, slides)[None, None]  # (1, 1, t, s)
                seen = seen if unmasked else seen & _seen_by(mask, segments, at)  # (b, 1, t, s)
                return _mix(q, k, v, seen=seen, mixing=mixing)

            def in_parts(q: Array, k: Array, v: Array, first: Any, *others: Any) -> Array:
                return _in_parts(partial(mix, *others), q, k, v, first)

            return over_tokens(in_parts, q, k, v, mask, segments, axis=over), stored

        return attend

    return attend_of


def _with_cache(
    valid: Bool[Array, "b s"],
    start: Int[Array, ""],
    count: int,
    *,
    mixing: Mixing,
    rotations: Rotations,
) -> AttendOf:
    # How many slots each key lies before each query, (t, s); negative ones come after it.
    back = start + jnp.arange(count)[:, None] - jnp.arange(valid.shape[1])

    def attend_of(slides: bool | Array) -> Attend:
        by = rotations(slides)
        seen = valid[:, None, None, :] & _near(back, mixing, slides)  # (b, 1, t, s)

        # The cache is the scan's carry, which is written in place: as input and output of the scan
        # the whole of it would be copied for every token.
        def attend(
            q: Float[Array, "b t n hq"],
            k: Float[Array, "b t k h"],
            v: Float[Array, "b t k h"],
            *,
            stored: tuple[Float[Array, "l b s k h"], Float[Array, "l b s k h"]],
            block: Int[Array, ""],
        ) -> tuple[Float[Array, "b t n h"], Stored]:
            q, k = _rotated(q, by, mixing), rotate(k, by)
            at = (block, 0, start, 0, 0)
            keys, values = (
                lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
                for old, new in zip(stored, (k, v), strict=True)
            )
            # This block's, (b, s, k, h).
            own_keys, own_values = (
                lax.dynamic_index_in_dim(kept, block, keepdims=False).astype(q.dtype)
                for kept in (keys, values)
            )
            return _mix(q, own_keys, own_values, seen=seen, mixing=mixing), (keys, values)

        return attend

    return attend_of


def _in_parts(
    mix: Callable,
    q: Float[Array, "b t n hq"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    first: int | Array,
) -> Float[Array, "b t n h"]:
    """`mix(q, k, v, first)`; where its scores are large, a part at a time and again when backward.

    A part has some of the heads, or of one key head some of the queries: so memory grows with the
    length of a row, not with its square. The float32 scores of all heads at once would be the
    largest arrays of a training step over a quantized base.
    """
    b, t, n, _ = q.shape
    heads, h = v.shape[2:]
    rows, tensor = _spread_over(b, heads)
    scores = 4 * b * n * t * k.shape[1] // (rows * tensor)  # bytes on a device
    # Key heads are never split: the fewest equal parts of a device's own whose scores fit.
    own = heads // tensor
    fits = [p for p in range(1, own + 1) if own % p == 0 and scores <= p * MOST_SCORES]
    parts = fits[0] if fits else own
    pieces = min(t, -(-scores // (parts * MOST_SCORES)))
    if parts == pieces == 1:
        return mix(q, k, v, first)
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
        return jax.checkpoint(partial(mix, first=first))(q, k, v)
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
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(b, size * pieces, m, -1)[:, :t]
    return kernels.in_place(mixed, q)


def _spread_over(rows: int, heads: int) -> tuple[int, int]:
    """The devices that rows, and key heads, are spread over in the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    of_rows, of_heads = kernels.spread(mesh, rows, heads)
    devices = math.prod(mesh.shape[axis] for axis in of_rows or ())
    return devices, 1 if of_heads is None else mesh.shape[of_heads]


def _near(
    back: Int[Array, "t s"],
    mixing: Mixing,
    slides: bool | Array,
) -> Bool[Array, "t s"]:
    """Which keys a query attends to, from how many slots they lie before it."""
    if slides is False or mixing.window is None:
        return back >= 0
    if slides is True:
        return (back >= 0) & (back < mixing.window)
    # In a scan over blocks that differ, `slides` is data.
    return (back >= 0) & ((back < mixing.window) | ~slides)


def _mix(
    q: Float[Array, "b t n hq"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    seen: Bool[Array, "#b 1 t s"],
    mixing: Mixing,
) -> Float[Array, "b t n h"]:
    """Values weighted by their keys: `softmax(cap(scale · q kᵀ)) v`."""
    if _is_plain(mixing):
        return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=mixing.scale)
    q, sinks = (q[..., :-1], q[..., -1]) if mixing.sinks else (q, None)  # sinks: (b, t, n)
    b, t, n, h = q.shape
    groups = q.reshape((b, t, k.shape[2], -1, h))  # g query heads for each key head
    logits = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=jnp.float32)
    # The scale before the cap, as in Gemma 2.
    logits = logits * (h**-0.5 if mixing.scale is None else mixing.scale)
    if mixing.softcap is not None:
        logits = jnp.tanh(logits / mixing.softcap) * mixing.softcap
    # Not -inf: a row of padding attends to nothing, and its gradient would be NaN. The factor is
    # that of `jax.nn.dot_product_attention`.
    logits = jnp.where(seen[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max)
    # A sink takes its share of the softmax, and has no value to add.
    if sinks is not None:
        sinks = jnp.moveaxis(sinks, 1, 2).reshape(*logits.shape[:3], t, 1)
        logits = jnp.concatenate((logits, sinks.astype(logits.dtype)), axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def with_sinks(q: Float[Array, "b t n h"], sinks: Float[Array, " n"]) -> Float[Array, "b t n h+1"]:
    """Queries that carry the sink of their head as a last number, wherever they are split."""
    last = jnp.broadcast_to(sinks.astype(q.dtype)[:, None], (*q.shape[:3], 1))
    return jnp.concatenate((q, last), axis=-1)


def _rotated(q: Array, by: Rotation | None, mixing: Mixing) -> Array:
    """The rotated queries; what is behind them is no part of a head."""
    if not mixing.sinks:
        return rotate(q, by)
    return jnp.concatenate((rotate(q[..., :-1], by), q[..., -1:]), axis=-1)


def _is_plain(mixing: Mixing) -> bool:
    """Whether JAX's own attention computes it: it has no soft caps and no sinks."""
    return mixing.softcap is None and not mixing.sinks
