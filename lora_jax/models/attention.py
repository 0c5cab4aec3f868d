"""Causal attention of a decoder, with and without a cache, full or with a sliding window.

One function, `Attend`, does what happens between a block's projections and its output: it rotates
queries and keys, stores keys and values, and mixes the values. Blocks with a sliding window (a
token attends to a fixed number before it) need another one than the rest: `AttendOf` has both.

B batch, T new tokens, S length of the cache, N query heads, K key/value heads, H size of a head
(HQ with what `with_sinks` adds to a query), L blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models import kernels
from lora_jax.models.context import check_tokens, of_whole_rows, over_tokens
from lora_jax.models.delta_net import among, recurrence
from lora_jax.models.mixing import Mixing, in_runs, mix


class Kept(NamedTuple):
    """What blocks keep of the tokens so far, those of one kind in one array.

    Attributes:
      keys, values: of the L blocks with attention.
      convs, states: of the blocks with a delta net, see `lora_jax.models.delta_net`; None without.
    """

    keys: Any
    values: Any
    convs: Float[Array, "m b w c"] | None = None
    states: Float[Array, "m b n k v"] | None = None


class Read(NamedTuple):
    """What a decoder attends to of the text that its encoder has read.

    Attributes:
      keys, values: of the L blocks.
      mask: true at the text's tokens.
    """

    keys: Float[Array, "l b s n h"]
    values: Float[Array, "l b s n h"]
    mask: Bool[Array, "b s"]


class Cache(NamedTuple):
    """What is kept of the tokens so far: keys and values, filled from the left, and delta nets'.

    A call writes its T tokens at positions `length .. length + T`; the caller makes the cache long
    enough. Positions that hold padding are never attended to. Where blocks that slide have keys of
    other sizes (`Mixing.apart`), keys and values are those of each kind, by whether they slide.
    `read` is what an encoder-decoder has read, which stays as it is.
    """

    keys: Float[Array, "l b s k h"] | dict[bool, Array]
    values: Float[Array, "l b s k h"] | dict[bool, Array]
    valid: Bool[Array, "b s"]
    length: Int[Array, ""]
    convs: Float[Array, "m b w c"] | None = None
    states: Float[Array, "m b n k v"] | None = None
    read: Read | None = None


# None without a cache; where blocks share keys, those of the last block that has its own, by
# whether it slides.
Stored = Kept | None

# (queries, keys, values, stored=, block=) -> (mixed values, stored); `block` is the block's number.
# Keys and values are None in a block that shares those of another.
# Where heads have sinks, `with_sinks(queries, sinks)` is what stands for the queries.
Attend = Callable[..., tuple[Array, Stored]]

# By whether the block slides: a bool, or an array in a scan over blocks that differ. Of None, a
# delta net's, it is a `lora_jax.models.delta_net.Recur`.
AttendOf = Callable[[Any], Attend]

# (queries, keys) -> both as their products take them: rotated, by their places.
Turn = Callable[[Array, Array], tuple[Array, Array]]

# By whether a block slides; None leaves queries and keys as they are.
Turns = Callable[[bool | Array], Turn | None]


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
    turns: Turns,
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
      turns: what a block does to queries and keys by their places in their texts.
      wanted: the implementation without a cache, see `lora_jax.models.kernels`.
      over: the axis of the mesh that the tokens of a row are spread over without a cache, or None.

    Returns:
      How a block attends; the stored keys and values that blocks take and return; and the cache
      with the new tokens counted in `valid` and `length`.
    """
    if cache is None:
        check_tokens(tokens.shape[1], over)
        cut = None
        if mixing.chunked:
            shape = of_whole_rows(tokens, over).shape
            cut = pieces_of(mask, segments, shape, mixing.window)
        attend_of = _without_cache(
            mask, segments, cut, mixing=mixing, turns=turns, wanted=wanted, over=over
        )
        return _or_recur(attend_of, mask, segments, mixing, over), None, None
    count = tokens.shape[1]
    new = jnp.ones(tokens.shape, bool) if mask is None else mask  # (b, t)
    valid = lax.dynamic_update_slice(cache.valid, new, (0, cache.length))  # (b, s)
    attend_of = _with_cache(valid, cache.length, count, mixing=mixing, turns=turns)
    counted = cache._replace(valid=valid, length=cache.length + count)
    kept = Kept(cache.keys, cache.values, cache.convs, cache.states)
    return _or_recur(attend_of, mask, None, mixing, None), kept, counted


def _or_recur(
    attend_of: AttendOf,
    mask: Bool[AnyArray, "b t"] | None,
    segments: Int[AnyArray, "b t"] | None,
    mixing: Mixing,
    over: str | None,
) -> AttendOf:
    """How every block mixes tokens, those with a delta net too."""
    if mixing.delta is None:
        return attend_of
    recur = recurrence(
        mask,
        None if segments is None else starts_of(segments),
        sizes=mixing.delta,
        place=among([slides is None for slides in mixing.slides]),
        over=over,
    )
    return lambda slides: recur if slides is None else attend_of(slides)


def positions_of(valid: Bool[AnyArray, "b t"]) -> Int[Array, "b t"]:
    """The position of each token: only real ones count, so padding on the left shifts none."""
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def starts_of(segments: Int[AnyArray, "b t"]) -> Int[Array, "b t"]:
    """Where each token's text begins in its row of texts side by side."""
    at = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    # A running maximum: the last beginning at or before each token.
    return lax.cummax(jnp.where(first, at, 0), axis=1)


def pieces_of(
    mask: Bool[AnyArray, "b t"] | None,
    segments: Int[AnyArray, "b t"] | None,
    shape: tuple[int, ...],
    size: int | None,
) -> Int[Array, "b t"]:
    """Segments of at most so many tokens that the texts of a row are cut into.

    A text begins with its first real token, after which padding counts.

    Args:
      mask, segments: of whole rows, as for `attention`.
      shape: (b, t).
      size: tokens of a piece; None leaves the texts whole.
    """
    if segments is None:
        real = jnp.ones(shape, bool) if mask is None else mask
        texts = jnp.cumsum(real, axis=1) > 0
    else:
        real, texts = segments > 0, segments
    if size is None:
        return jnp.where(real, texts, 0)
    begins = (jnp.arange(shape[1]) - starts_of(texts)) % size == 0
    return jnp.where(real, jnp.cumsum(begins, axis=1), 0)


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
    cut: Int[Array, "b t"] | None,
    *,
    mixing: Mixing,
    turns: Turns,
    wanted: kernels.AttentionName,
    over: str | None,
) -> AttendOf:
    """`cut` are the pieces of the texts, which stand for the texts in blocks that slide."""

    def attend_of(slides: bool | Array) -> Attend:
        turn, kind = turns(slides), cast(Any, slides)
        real, texts = mask, segments
        if cut is not None and slides is not False:
            whole = pieces_of(mask, segments, cut.shape, None)
            real, texts = None, choose(slides, cut, whole)
        # Padding on the right needs no mask: under causal attention only padding attends to it.
        unmasked = real is None and texts is None
        # In a scan over blocks that differ, `slides` is data.
        window = mixing.window if slides is True else None

        def attend(
            q: Float[Array, "b t n hq"],
            k: Float[Array, "b t k h"] | None,
            v: Float[Array, "b t k h"] | None,
            *,
            stored: Stored,
            block: Int[Array, ""],
        ) -> tuple[Float[Array, "b t n h"], Stored]:
            q, k = _turned(q, k, turn, mixing)
            if stored is not None and k is not None:
                stored = Kept({**stored.keys, kind: k}, {**stored.values, kind: v})
            elif stored is not None:
                k, v = stored.keys[kind], stored.values[kind]
            assert k is not None and v is not None
            kernel = kernels.kernel_for(
                wanted, q, real, texts, slides=slides, window=mixing.window,
                scale=mixing.scale, softcap=mixing.softcap, sinks=mixing.sinks, over=over,
            )  # fmt: skip
            if kernel is not None:
                return kernel(q, k, v), stored

            # The mask is made where it is used, and fused with the causal one into the softmax:
            # outside it would be an array of all pairs of tokens.
            def some(q: Array, k: Array, v: Array, first: Any, mask: Any, segments: Any) -> Array:
                at = first + jnp.arange(q.shape[1])
                back = at[:, None] - jnp.arange(k.shape[1])
                seen = _near(back, mixing, slides)[None, None]  # (1, 1, t, s)
                seen = seen if unmasked else seen & _seen_by(mask, segments, at)  # (b, 1, t, s)
                return mix(q, k, v, seen=seen, by=mixing)

            by_runs = partial(in_runs, some, window, mixing.again)
            return over_tokens(by_runs, q, k, v, real, texts, axis=over), stored

        return attend

    return attend_of


def _with_cache(
    valid: Bool[Array, "b s"],
    start: Int[Array, ""],
    count: int,
    *,
    mixing: Mixing,
    turns: Turns,
) -> AttendOf:
    # How many slots each key lies before each query, (t, s); negative ones come after it.
    back = start + jnp.arange(count)[:, None] - jnp.arange(valid.shape[1])
    place = among([slides is not None for slides in mixing.slides])
    place = _place_among_own(mixing) if mixing.apart else place
    together = None
    if mixing.chunked:
        pieces = pieces_of(valid, None, valid.shape, mixing.window)
        own = lax.dynamic_slice_in_dim(pieces, start, count, axis=1)  # (b, t)
        together = own[:, None, :, None] == pieces[:, None, None, :]  # (b, 1, t, s)

    def attend_of(slides: bool | Array) -> Attend:
        turn, kind = turns(slides), cast(Any, slides)
        seen = valid[:, None, None, :] & _near(back, mixing, slides)  # (b, 1, t, s)
        if together is not None:
            seen = seen & (together | ~jnp.asarray(slides))

        # The cache is the scan's carry, which is written in place: as input and output of the scan
        # the whole of it would be copied for every token.
        def attend(
            q: Float[Array, "b t n hq"],
            k: Float[Array, "b t k h"] | None,
            v: Float[Array, "b t k h"] | None,
            *,
            stored: Kept,
            block: Int[Array, ""],
        ) -> tuple[Float[Array, "b t n h"], Stored]:
            q, k = _turned(q, k, turn, mixing)
            before: tuple[Any, Any] = (stored.keys, stored.values)
            kept = tuple(old[kind] for old in before) if mixing.apart else before
            number = place(block)
            if k is not None and v is not None:
                at = (number, 0, start, 0, 0)
                kept = tuple(
                    lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
                    for old, new in zip(kept, (k, v), strict=True)
                )
            # This block's, (b, s, k, h).
            own_keys, own_values = (
                lax.dynamic_index_in_dim(x, number, keepdims=False).astype(q.dtype) for x in kept
            )
            mixed = mix(q, own_keys, own_values, seen=seen, by=mixing)
            if mixing.apart:
                kept = tuple({**old, kind: x} for old, x in zip(before, kept, strict=True))
            return mixed, stored._replace(keys=kept[0], values=kept[1])

        return attend

    return attend_of


def _place_among_own(mixing: Mixing) -> Callable[[Array], Array]:
    """The place of each block's keys among those of blocks that slide as it does."""
    counts, places = dict.fromkeys(mixing.slides, 0), []
    for block, slides in enumerate(mixing.slides):
        if block < len(mixing.slides) - mixing.shared:
            counts[slides] += 1
        places.append(counts[slides] - 1)
    return jnp.asarray(places, jnp.int32).__getitem__


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


def with_sinks(q: Float[Array, "b t n h"], sinks: Float[Array, " n"]) -> Float[Array, "b t n h+1"]:
    """Queries that carry the sink of their head as a last number, wherever they are split."""
    last = jnp.broadcast_to(sinks.astype(q.dtype)[:, None], (*q.shape[:3], 1))
    return jnp.concatenate((q, last), axis=-1)


def _turned(
    q: Array, k: Array | None, turn: Turn | None, mixing: Mixing
) -> tuple[Array, Array | None]:
    """Queries and keys by their places; what is behind a query is no part of a head."""
    if turn is None:
        return q, k
    if k is None:
        return turn(q, q)[0], None
    if not mixing.sinks:
        return turn(q, k)
    turned, k = turn(q[..., :-1], k)
    return jnp.concatenate((turned, q[..., -1:]), axis=-1), k
