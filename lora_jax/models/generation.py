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
    _check(model, prompts, max_new_tokens, temperature, top_p, key)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    if adapter_ids is not None:
        params = select(params, jnp.asarray(adapter_ids))
    stops = np.full(bucket(len(stop_tokens), _SMALLEST_STOPS), _NO_TOKEN, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    chance = np.float32(temperature), np.float32(top_p), key
    run = partial(_run, model.forward, params, stops=stops, chance=chance)
    first = _before_turning(model, prompts, max_new_tokens)
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


def _run(forward, params, prompts, count: int, *, stops, chance, done: int) -> np.ndarray:
    """`count` more tokens of each prompt, after the `done` first."""
    tokens, mask = left_padded(prompts)
    temperature, top_p, key = chance
    out = _generate(
        forward,
        bucket(count, _SMALLEST_NEW),
        bool(temperature > 0),
        params,
        tokens,
        mask,
        np.int32(count),
        temperature,
        top_p,
        stops,
        jax.random.key(0) if key is None else key,
        np.int32(done),
    )
    return np.asarray(out)[:, :count]


def _before_turning(model, prompts, count: int) -> int:
    """How many of `count` tokens fit before LongRoPE changes the rotation of all tokens.

    As in transformers, the longest text of the batch decides for all rows.
    """
    point, longest = model.config.turning_point, max(map(len, prompts))
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
        raise ValueError(f"{name} must be a sequence of integers, the token ids: {error}") from None
    if not tokens:
        raise ValueError(f"{name} is empty: give at least one token")
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{name} has token {outside[0]}, which is outside the vocabulary 0 to {vocab_size - 1}"
        )
    return tokens


def _check(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: Array | None,
) -> None:
    check_decoder(model)
    if max_new_tokens < 0:
        raise ValueError(f"`max_new_tokens` must be at least 0, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"`temperature` must be at least 0 and `top_p` in (0, 1], got {temperature}, {top_p}"
        )
    if temperature > 0 and key is None:
        raise ValueError("`key` is needed to sample: pass jax.random.key(seed), or temperature=0")
    for number, prompt in enumerate(prompts):
        checked_prompt(f"prompt {number}", prompt, model.config.vocab_size)
        if len(prompt) + max_new_tokens > model.config.context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                f"more than the model's context of {model.config.context}"
            )


def left_padded(prompts) -> tuple[np.ndarray, np.ndarray]:
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
    return max(smallest, 1 << (count - 1).bit_length()) if count else smallest


def _until(row: list[int], stop_tokens: Sequence[int]) -> list[int]:
    ends = {*stop_tokens, _NO_TOKEN}
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


class _State(NamedTuple):
    step: Array  # new tokens so far
    last: Array  # (b,) the newest token
    done: Array  # (b,) rows that have stopped
    out: Array  # (b, new) tokens, _NO_TOKEN where none
    cache: Cache


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    forward: Forward,
    room: int,
    sample: bool,
    params,
    tokens,
    mask,
    limit,
    temperature,
    top_p,
    stops,
    key,
    first,
):
    rows, width = tokens.shape
    decoder = runner(forward, params, rows, width + room)

    def choose(hidden, step):
        logits = decoder.head(hidden[:, -1:])[:, 0]
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), first + step))(
            jnp.arange(rows)
        )
        kept = _nucleus(logits / temperature, top_p)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def note(state: _State, hidden) -> _State:
        token = choose(hidden, state.step)
        out = jnp.where(state.done, _NO_TOKEN, token)
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
        jnp.int32(0),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
        jnp.full((rows, room), _NO_TOKEN, jnp.int32),
        cache,
    )
    going = lambda state: (state.step < limit) & ~state.done.all()  # noqa: E731
    return lax.while_loop(going, advance, note(empty, hidden)).out


def _nucleus(logits: Float[Array, "b v"], top_p) -> Float[Array, "b v"]:  # noqa: F722
    """Keeps the fewest most likely tokens whose probabilities reach `top_p`, at least one."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    chances = jax.nn.softmax(ordered, axis=-1)
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


def runner(forward, params, rows: int, cache_length: int) -> Runner:
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

    def apply(tokens: Int[AnyArray, "b t"], mask: Bool[AnyArray, "b t"] | None, cache):  # noqa: F722
        return run(params, tokens, mask=mask, cache=cache, return_hidden=True)

    return Runner(
        apply, lambda hidden: head(params, hidden), forward.init_cache(rows, cache_length)
    )


def _by_row(forward, params, rows: int, cache_length: int) -> Runner:
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

    cache = forward.init_cache(1, cache_length)
    wide = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)
    return Runner(apply, logits, wide._replace(length=cache.length))
