"""Generation: continues prompts of different lengths in one batch, token by token.

Prompts are padded on the left to a common bucket, read in one pass, and continued in a compiled
loop that ends when every row has stopped. Shapes are bucketed and everything else (temperature,
stop tokens, number of tokens) is data, so that a second call seldom compiles.

With one adapter per row (`lora.select`), `runner` maps (`jax.vmap`) over a cache whose first axis
is the row, so that decoding a token does not move the cache; the product with the base stays one
matmul for all rows.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax.array import is_lora, is_stack
from lora_jax.dims import AnyArray
from lora_jax.models.attention import Cache
from lora_jax.models.model import Forward, Model
from lora_jax.transform import lorafy
from lora_jax.transform.many.rows import by_row, select

# The smallest buckets of prompts, new tokens and stop tokens; larger ones are powers of two.
_SMALLEST_PROMPT, _SMALLEST_NEW, _SMALLEST_STOPS = 16, 16, 4
_NO_TOKEN = -1


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    adapter_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      model: the model; its own `params` are not used.
      params: its parameters, with or without LoRA leaves.
      prompts: token ids; lengths may differ.
      max_new_tokens: maximum number of new tokens for each prompt.
      temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
      top_p: samples from the fewest most likely tokens whose probabilities reach this sum.
      stop_tokens: a row ends before the first of these.
      key: PRNG key, required with a temperature. A row's tokens depend on the key and the row's
        index, not on the other rows.
      adapter_ids: the adapter index of each prompt if `params` is a stack (`lora.stack`); -1 is
        the plain base.

    Returns:
      The new tokens of each prompt, without the stop token.

    Raises:
      ValueError: an empty prompt, a prompt that leaves no room in the context, or options out of
        range.
    """
    _check_sampling(max_new_tokens, temperature, top_p, key)
    _check_prompts(model, prompts, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    if adapter_ids is not None:
        params = select(params, jnp.asarray(adapter_ids))
    stops = np.full(bucket(len(stop_tokens), _SMALLEST_STOPS), _NO_TOKEN, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    # Without a key nothing is drawn, but the program is the one with a key.
    drawn = jax.random.key(0) if key is None else key
    chance = _Chance(np.float32(temperature), np.float32(top_p), drawn)
    run = partial(_run, model.forward, params, stops=stops, chance=chance)
    first = _before_longrope(model, prompts, max_new_tokens)
    new = run(prompts, first, done=0)
    if first < max_new_tokens and any(
        len(_until(row, stop_tokens)) == first for row in new.tolist()
    ):
        # LongRoPE rotates every position differently in long texts, so the cache is invalid and
        # all tokens are read again. Rows that have stopped continue with token 0, cut off below.
        read = np.where(new == _NO_TOKEN, 0, new).tolist()
        texts = [[*old, *row] for old, row in zip(prompts, read, strict=True)]
        new = np.concatenate((new, run(texts, max_new_tokens - first, done=first)), axis=1)
    return [_until(row, stop_tokens) for row in new.tolist()]


class _Chance(NamedTuple):
    """How the next token is drawn."""

    temperature: Any
    top_p: Any
    key: Array


def _run(
    forward: Forward,
    params: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    stops: Int[np.ndarray, " stops"],
    chance: _Chance,
    done: int,
) -> Int[np.ndarray, "b count"]:
    """`count` more tokens of each prompt, after the `done` first."""
    tokens, mask = left_padded(prompts)
    out = _generate(
        forward,
        params,
        tokens,
        mask,
        room=bucket(count, _SMALLEST_NEW),
        sample=bool(chance.temperature > 0),
        chance=chance,
        stops=stops,
        limit=np.int32(count),
        first=np.int32(done),
    )
    return np.asarray(out)[:, :count]


def _before_longrope(model: Model, prompts: Sequence[Sequence[int]], count: int) -> int:
    """How many of `count` tokens fit before LongRoPE changes the rotation of all tokens.

    As in transformers, the longest text of the batch decides for all rows.
    """
    point, longest = model.config.longrope_limit, max(map(len, prompts))
    # The last new token is never read, hence one more.
    return count if point is None or longest > point else min(count, point - longest + 1)


def check_decoder(model: Model) -> Forward:
    """The model's functions, if it is a decoder."""
    if not isinstance(model.forward, Forward):
        raise ValueError(
            f"`model` is a `{model.config.model_type}`, an encoder, which writes nothing: pass a "
            "decoder"
        )
    return model.forward


def checked_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> list[int]:
    """A prompt's tokens as Python integers.

    Raises:
      ValueError: it is empty, or has what is no token of the vocabulary.
    """
    try:
        # Floats would be cut off to integers without a word.
        tokens = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(
            f"{name} must be a sequence of integers, the token ids: {error}; a text is encoded by "
            "`model.tokenizer.encode`, or given to `recipes.generate.generate_texts`"
        ) from None
    if not tokens:
        raise ValueError(f"{name} is empty: give at least one token")
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{name} has token {outside[0]}, which is outside the vocabulary 0 to {vocab_size - 1}"
        )
    return tokens


def _check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, key: Array | None
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"`max_new_tokens` must be at least 0, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"`temperature` must be at least 0 and `top_p` in (0, 1], got {temperature}, {top_p}"
        )
    if temperature > 0 and key is None:
        raise ValueError("`key` is needed to sample: pass jax.random.key(seed), or temperature=0")


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    check_decoder(model)
    for number, prompt in enumerate(prompts):
        checked_prompt(f"prompt {number}", prompt, model.config.vocab_size)
        if len(prompt) + max_new_tokens > model.config.context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                f"more than the model's context of {model.config.context}"
            )


def left_padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Prompts padded on the left to a common bucket, and the mask of their real tokens."""
    width = bucket(max(len(p) for p in prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


def bucket(count: int, smallest: int = _SMALLEST_PROMPT) -> int:
    """The padded length for `count` tokens: a power of two, at least `smallest`."""
    # The least power of two that is not below `count`.
    return max(smallest, 1 << (count - 1).bit_length()) if count else smallest


def _until(row: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """A row up to its first stop token, or to its end."""
    ends = {*stop_tokens, _NO_TOKEN}
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


class _State(NamedTuple):
    """What the loop over new tokens carries.

    Attributes:
      step: new tokens so far.
      last: the newest token of each row.
      done: rows that have stopped.
      out: the new tokens, `_NO_TOKEN` where there is none.
      cache: the model's.
    """

    step: Int[Array, ""]
    last: Int[Array, " b"]
    done: Bool[Array, " b"]
    out: Int[Array, "b new"]
    cache: Cache


@partial(jax.jit, static_argnames=("forward", "room", "sample"))
def _generate(
    forward: Forward,
    params: Any,
    tokens: Int[AnyArray, "b t"],
    mask: Bool[AnyArray, "b t"],
    *,
    room: int,
    sample: bool,
    chance: _Chance,
    stops: Int[AnyArray, " stops"],
    limit: Int[AnyArray, ""],
    first: Int[AnyArray, ""],
) -> Int[Array, "b room"]:
    """New tokens of a batch of prompts.

    Args:
      forward, params: the decoder.
      tokens, mask: the prompts, padded on the left.
      room: the most new tokens; a shape.
      sample: whether tokens are drawn, or are the likeliest.
      chance: how they are drawn.
      stops: tokens that end a row, filled up with `_NO_TOKEN`.
      limit: how many new tokens, at most `room`.
      first: how many of a row's new tokens are in its prompt already; counts its draws.
    """
    rows, width = tokens.shape
    decoder = runner(forward, params, rows, width + room)

    def note(state: _State, hidden: Float[Array, "b t d"]) -> _State:
        logits = decoder.head(hidden[:, -1:])[:, 0]  # (b, v)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if sample:
            token = _draw(logits, chance, first + state.step)
        out = jnp.where(state.done, _NO_TOKEN, token)
        # A stop token is written too: `generate` cuts the row there.
        done = state.done | (token[:, None] == stops).any(axis=1)
        return state._replace(
            step=state.step + 1,
            last=token,
            done=done,
            out=lax.dynamic_update_slice(state.out, out[:, None], (0, state.step)),
        )

    def advance(state: _State) -> _State:
        hidden, cache = decoder.apply(state.last[:, None], None, state.cache)
        return note(state._replace(cache=cache), hidden)

    hidden, cache = decoder.apply(tokens, mask, decoder.cache)
    empty = _State(
        step=jnp.int32(0),
        last=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        out=jnp.full((rows, room), _NO_TOKEN, jnp.int32),
        cache=cache,
    )

    def is_going(state: _State) -> Bool[Array, ""]:
        return (state.step < limit) & ~state.done.all()

    return lax.while_loop(is_going, advance, note(empty, hidden)).out


def _draw(
    logits: Float[Array, "b v"], chance: _Chance, number: Int[AnyArray, ""]
) -> Int[Array, " b"]:
    """A token of each row; it is the row's `number`-th."""
    # One key a row and token: neither other rows nor the size of the batch changes a draw.
    fold = jax.random.fold_in
    keys = jax.vmap(lambda row: fold(fold(chance.key, row), number))(jnp.arange(len(logits)))
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
      cache: an empty cache.
    """

    apply: Callable
    head: Callable
    cache: Cache


# The row axis of each field of the caches; all rows share `length`.
ROWS = Cache._make((0, 0, 0, None))


def runner(forward: Forward, params: Any, rows: int, cache_length: int) -> Runner:
    """Binds a decoder to parameters, shared by all rows or chosen for each.

    Args:
      forward: a decoder's `Forward`.
      params: its parameters, plain or with LoRA leaves, or with an adapter per row
        (`lora.select`).
      rows: rows of the batch.
      cache_length: maximum number of tokens of a row.
    """
    if any(is_stack(x) for x in jax.tree.leaves(params, is_leaf=is_lora)):
        return _by_row(forward, params, rows, cache_length)
    run, head = lorafy(forward.apply), lorafy(forward.head)

    def apply(
        tokens: Int[AnyArray, "b t"], mask: Bool[AnyArray, "b t"] | None, cache: Cache
    ) -> tuple[Float[Array, "b t d"], Cache]:
        return run(params, tokens, mask=mask, cache=cache, return_hidden=True)

    cache = forward.init_cache(rows, cache_length)
    return Runner(apply, lambda hidden: head(params, hidden), cache)


def _by_row(forward: Forward, params: Any, rows: int, cache_length: int) -> Runner:
    """As `runner`, where `params` has an adapter for each row."""
    parts = by_row(params)
    if (chosen := parts.arrays[0].shape[parts.axes[0]]) != rows:
        raise ValueError(f"adapters are chosen for {chosen} rows, but there are {rows} prompts")
    run, head = lorafy(forward.apply), lorafy(forward.head)

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

    cache = forward.init_cache(1, cache_length)
    # (b, l, 1, s, k, h): rows first, so that the map over them moves nothing.
    wide = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)
    return Runner(apply, logits, wide._replace(length=cache.length))
