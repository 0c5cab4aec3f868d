"""The compiled side of generation: one program reads prompts, another writes new tokens.

With one adapter per row (`lora.select`), `runner` maps (`jax.vmap`) over a cache whose first axis
is the row, so that decoding a token does not move the cache; the product with the base stays one
matmul for all rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax.array import is_lora, is_stack
from lora_jax.dims import AnyArray
from lora_jax.models.attention import Cache
from lora_jax.models.encoder_decoder import EncoderDecoderForward
from lora_jax.transform import lorafy
from lora_jax.transform.many.rows import by_row

NO_TOKEN = -1  # in place of a token, where a row has none
NOT_FINITE = -2  # in place of a token, where logits are NaN or infinite


class Chance(NamedTuple):
    """How the next token is drawn.

    Attributes:
      temperature, top_p: as for `models.generate`.
      keys: PRNG keys, one a row; None where the likeliest tokens are taken.
    """

    temperature: Any
    top_p: Any
    keys: Array | None


class State(NamedTuple):
    """What passes from one new token to the next.

    Attributes:
      step: new tokens so far.
      last: the newest token of each row.
      done: rows that have stopped.
      out: the new tokens, `NO_TOKEN` where there is none, or `NOT_FINITE`.
      cache: the model's.
    """

    step: Int[Array, ""]
    last: Int[Array, " b"]
    done: Bool[Array, " b"]
    out: Int[Array, "b room"]
    cache: Cache


@partial(jax.jit, static_argnames=("forward", "room", "sample"))
def read(
    forward: Any,
    params: Any,
    tokens: Int[AnyArray, "b t"],
    mask: Bool[AnyArray, "b t"],
    *,
    room: int,
    sample: bool,
    chance: Chance,
    stops: Int[AnyArray, " stops"],
    first: Int[AnyArray, ""],
    start: Int[AnyArray, ""],
) -> State:
    """Reads a batch of prompts and chooses the first new token of each.

    Args:
      forward, params: the decoder, or an encoder-decoder, whose encoder reads the prompts.
      tokens, mask: the prompts, padded on the left.
      room: the most new tokens; a shape.
      sample: whether tokens are drawn, or are the likeliest.
      chance: how they are drawn.
      stops: tokens that end a row, filled up with `NO_TOKEN`.
      first: how many of a row's new tokens are in its prompt already; counts its draws.
      start: the token that an encoder-decoder's answers start with.
    """
    rows, width = tokens.shape
    if isinstance(forward, EncoderDecoderForward):
        decoder = runner(forward, params, rows, 1 + room)
        cache = decoder.encode(tokens, mask)
        hidden, cache = decoder.apply(jnp.full((rows, 1), start, jnp.int32), None, cache)
    else:
        decoder = runner(forward, params, rows, width + room)
        hidden, cache = decoder.apply(tokens, mask, decoder.cache)
    empty = State(
        step=jnp.int32(0),
        last=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        out=jnp.full((rows, room), NO_TOKEN, jnp.int32),
        cache=cache,
    )
    return _chosen(decoder, empty, hidden, sample=sample, chance=chance, stops=stops, first=first)


# The state is donated: its cache is the largest array there is besides the weights.
@partial(jax.jit, static_argnames=("forward", "sample"), donate_argnames=("state",))
def write(
    forward: Any,
    params: Any,
    state: State,
    *,
    sample: bool,
    chance: Chance,
    stops: Int[AnyArray, " stops"],
    limit: Int[AnyArray, ""],
    first: Int[AnyArray, ""],
) -> State:
    """Continues rows until each has `limit` new tokens or has stopped; other arguments: `read`."""
    # The cache is the state's; the runner's own is not used, so its length does not matter.
    decoder = runner(forward, params, len(state.last), 1)

    def advance(state: State) -> State:
        hidden, cache = decoder.apply(state.last[:, None], None, state.cache)
        state = state._replace(cache=cache)
        return _chosen(
            decoder, state, hidden, sample=sample, chance=chance, stops=stops, first=first
        )

    def is_going(state: State) -> Bool[Array, ""]:
        return (state.step < limit) & ~state.done.all()

    return lax.while_loop(is_going, advance, state)


def not_finite(logits: Float[Array, "*b v"]) -> Bool[Array, "*b"]:
    """Whether logits hold NaN or an infinity; -inf alone may rule a token out."""
    # The maximum is NaN if any of them is.
    return ~jnp.isfinite(jnp.max(logits, axis=-1))


def _chosen(
    decoder: "Runner",
    state: State,
    hidden: Float[Array, "b t d"],
    *,
    sample: bool,
    chance: Chance,
    stops: Int[AnyArray, " stops"],
    first: Int[AnyArray, ""],
) -> State:
    """The state with one more token for each row."""
    logits = decoder.head(hidden[:, -1:])[:, 0]  # (b, v)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sample:
        token = _draw(logits, chance, first + state.step)
    broken = not_finite(logits)
    out = jnp.where(state.done, NO_TOKEN, jnp.where(broken, NOT_FINITE, token))
    # A stop token is written too: `generate` cuts the row there.
    return state._replace(
        step=state.step + 1,
        last=token,
        done=state.done | broken | (token[:, None] == stops).any(axis=1),
        out=lax.dynamic_update_slice(state.out, out[:, None], (0, state.step)),
    )


def _draw(
    logits: Float[Array, "b v"], chance: Chance, number: Int[AnyArray, ""]
) -> Int[Array, " b"]:
    """A token of each row; it is the row's `number`-th."""
    # One key a row and token: neither other rows nor the size of the batch changes a draw.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(chance.keys)
    kept = _nucleus(logits / chance.temperature, chance.top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def _nucleus(logits: Float[Array, "b v"], top_p: Float[Array, ""]) -> Float[Array, "b v"]:
    """Keeps the fewest most likely tokens whose probabilities reach `top_p`, at least one."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    chances = jax.nn.softmax(ordered, axis=-1)
    # The sum over likelier tokens: 0 for the first, which therefore always stays.
    before = jnp.cumsum(chances, axis=-1) - chances
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


class Runner(NamedTuple):
    """The functions of a decoder, bound to its parameters.

    Attributes:
      apply: `(tokens (b, t), mask (b, t) or None, cache) -> (hidden states (b, t, d), cache)`.
      head: `(hidden states (b, 1, d)) -> logits (b, 1, v)`.
      cache: an empty cache; None of an encoder-decoder, whose first one `encode` makes.
      encode: `(tokens (b, s), mask (b, s)) -> cache` of an encoder-decoder.
    """

    apply: Callable
    head: Callable
    cache: Cache | None
    encode: Callable


# The row axis of each field of the caches; all rows share `length`.
ROWS = Cache._make((0, 0, 0, None, 0, 0, 0))


def has_stacks(params: Any) -> bool:
    """Whether the parameters have an adapter for each row."""
    return any(is_stack(x) for x in jax.tree.leaves(params, is_leaf=is_lora))


def runner(forward: Any, params: Any, rows: int, cache_length: int) -> Runner:
    """Binds a decoder to parameters, shared by all rows or chosen for each.

    Args:
      forward: a decoder's `Forward`, or an encoder-decoder's.
      params: its parameters, plain or with LoRA leaves, or with an adapter per row
        (`lora.select`).
      rows: rows of the batch.
      cache_length: maximum number of tokens of a row.
    """
    if has_stacks(params):
        return _by_row(forward, params, rows, cache_length)
    run, head, encode = _functions(forward, cache_length)

    def apply(
        tokens: Int[AnyArray, "b t"], mask: Bool[AnyArray, "b t"] | None, cache: Cache
    ) -> tuple[Float[Array, "b t d"], Cache]:
        return run(params, tokens, mask=mask, cache=cache, return_hidden=True)

    cache = None if encode else forward.init_cache(rows, cache_length)
    return Runner(
        apply,
        lambda hidden: head(params, hidden),
        cache,
        lambda tokens, mask: encode(params, tokens, mask=mask),
    )


def _functions(forward: Any, cache_length: int) -> tuple[Callable, Callable, Any]:
    """What continues texts, its head, and what reads the first text of an encoder-decoder."""
    head = lorafy(forward.head)
    if isinstance(forward, EncoderDecoderForward):
        encode = partial(forward.encode, cache_length=cache_length)
        return lorafy(forward.decode), head, lorafy(encode)
    return lorafy(forward.apply), head, None


def _by_row(forward: Any, params: Any, rows: int, cache_length: int) -> Runner:
    """As `runner`, where `params` has an adapter for each row."""
    parts = by_row(params)
    if not parts.arrays:
        raise ValueError(
            "`params` is a stack of adapters: choose one for each prompt with `adapter_ids`"
        )
    if (chosen := parts.arrays[0].shape[parts.axes[0]]) != rows:
        raise ValueError(f"adapters are chosen for {chosen} rows, but there are {rows} prompts")
    run, head, encode = _functions(forward, cache_length)

    # A row is a batch of one; its cache keeps that axis.
    def one(
        own: list[AnyArray],
        tokens: Int[AnyArray, " t"],
        mask: Bool[AnyArray, " t"] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "t d"], Cache]:
        mask = None if mask is None else mask[None]
        hidden, cache = run(
            parts.join(own, parts.base), tokens[None], mask=mask, cache=cache, return_hidden=True
        )
        return hidden[0], cache

    def apply(
        tokens: Int[AnyArray, "b t"], mask: Bool[AnyArray, "b t"] | None, cache: Cache
    ) -> tuple[Float[Array, "b t d"], Cache]:
        axes = (parts.axes, 0, None if mask is None else 0, ROWS)
        return jax.vmap(one, in_axes=axes, out_axes=(0, ROWS))(parts.arrays, tokens, mask, cache)

    def logits(hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        def one_head(own: list[AnyArray], h: Float[Array, "t d"]) -> Float[Array, "t v"]:
            return head(parts.join(own, parts.base), h[None])[0]

        return jax.vmap(one_head, in_axes=(parts.axes, 0))(parts.arrays, hidden)

    def read(tokens: Int[AnyArray, "b s"], mask: Bool[AnyArray, "b s"]) -> Cache:
        def one_text(own: list[AnyArray], tokens: Any, mask: Any) -> Cache:
            return encode(parts.join(own, parts.base), tokens[None], mask=mask[None])

        each = jax.vmap(one_text, in_axes=(parts.axes, 0, 0), out_axes=ROWS)
        return each(parts.arrays, tokens, mask)

    if encode:
        return Runner(apply, logits, None, read)
    cache = forward.init_cache(1, cache_length)
    # (b, l, 1, s, k, h): rows first, so that the map over them moves nothing.
    wide = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)
    return Runner(apply, logits, wide._replace(length=cache.length), read)
