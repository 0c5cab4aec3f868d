"""Generation: continues prompts of different lengths in one batch, token by token.

Prompts are padded on the left to a common bucket, read in one pass, and continued in a compiled
loop that ends when every row has stopped. Shapes are bucketed and everything else (temperature,
stop tokens, number of tokens) is data, so that a second call seldom compiles.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from lora_jax import processes
from lora_jax.config.arguments import check_count, check_key, check_tree, integer, kind_of
from lora_jax.models.decoding import NO_TOKEN, NOT_FINITE, Chance, has_stacks, read, write
from lora_jax.models.encoder_decoder import EncoderDecoderForward
from lora_jax.models.mesh import Placement, entered, model_on, params_on, placement
from lora_jax.models.model import Forward, Model
from lora_jax.transform.many.rows import select

# The smallest buckets of prompts, new tokens and stop tokens; larger ones are powers of two.
_SMALLEST_PROMPT, _SMALLEST_NEW, _SMALLEST_STOPS = 16, 16, 4
# New tokens between two calls of `stream`: few enough to read along, many to keep a device busy.
_STREAMED = 4
# Logits divided by less than this may overflow in float32.
_LOWEST_TEMPERATURE = 1e-30


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
    stream: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      model: the model; its own `params` are not used.
      params: its parameters, with or without LoRA leaves.
      prompts: token ids; lengths may differ. An encoder-decoder reads them and writes answers.
      max_new_tokens: maximum number of new tokens for each prompt.
      temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
      top_p: samples from the fewest most likely tokens whose probabilities reach this sum.
      stop_tokens: a row ends before the first of these.
      key: PRNG key, required with a temperature. A row's tokens depend on the key and the row's
        index, not on the other rows. Or an array of keys, one for each prompt.
      adapter_ids: the adapter index of each prompt if `params` is a stack (`lora.stack`); -1 is
        the plain base.
      stream: called every few tokens with those of each prompt since the last call.

    Returns:
      The new tokens of each prompt, without the stop token.

    Raises:
      ValueError: an empty prompt, a prompt that leaves no room in the context, or options out of
        range.
      FloatingPointError: the logits after a prompt hold NaN or an infinity.
    """
    max_new_tokens = check_count("max_new_tokens", max_new_tokens, least=0)
    _check_sampling(temperature, top_p, key)
    stop_tokens = checked_stops(stop_tokens)
    prompts = _checked_prompts(model, prompts, max_new_tokens)
    check_tree("params", params)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    at = placement(model, params)
    params = params_on(params, at)
    if adapter_ids is not None:
        with entered(at):
            params = select(params, adapter_ids)
    stops = np.full(bucket(len(stop_tokens), _SMALLEST_STOPS), NO_TOKEN, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    keys = _row_keys(key, len(prompts)) if temperature > 0 else None
    chance = Chance(np.float32(temperature), np.float32(top_p), keys)
    # Rows with an adapter each are computed one by one, which leaves no batch to spread.
    own = adapter_ids is not None or has_stacks(params)
    # As in transformers, the one of generation_config.json comes first.
    start = model.generation.get("decoder_start_token_id")
    start = getattr(model.config, "decoder_start_token_id", 0) if start is None else start
    chunks = partial(
        _chunks,
        model.forward if own else model_on(model, params, at).forward,
        params,
        at=at and (at._replace(rows=()) if own else at),
        chunk=max_new_tokens if stream is None else _STREAMED,
        stops=stops,
        chance=chance,
        starts=start,
    )
    with entered(at), processes.reachable():
        return _answers(
            model, prompts, max_new_tokens, chunks, stop_tokens=stop_tokens, stream=stream
        )


def _answers(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    chunks: Callable,
    *,
    stop_tokens: Sequence[int],
    stream: Callable[[list[list[int]]], None] | None,
) -> list[list[int]]:
    """The new tokens of each prompt, of which `chunks` makes some at a time."""
    answers: list[list[int]] = [[] for _ in prompts]
    change = _before_longrope(model, prompts, max_new_tokens)
    # LongRoPE rotates every position differently in long texts, so the cache is invalid there and
    # all tokens are read again.
    for start, end in ((0, change), (change, max_new_tokens)):
        if start == end or all(len(answer) < start for answer in answers):
            break
        # Rows that have stopped continue with token 0, which is cut off below.
        filled = [[*answer, *[0] * (start - len(answer))] for answer in answers]
        texts = [[*old, *new] for old, new in zip(prompts, filled, strict=True)]
        done = start
        for new in chunks(texts, end - start, done=start):
            if len(rows := (new == NOT_FINITE).any(axis=1).nonzero()[0]):
                raise FloatingPointError(
                    f"prompt {rows[0]}: the logits are not finite; the numbers of the base or of "
                    "the adapter are too large for the model's dtype, or hold NaN"
                )
            # A row that has stopped has fewer tokens than there were.
            fresh = [
                _until(row, stop_tokens) if len(answer) == done else []
                for answer, row in zip(answers, new.tolist(), strict=True)
            ]
            done += new.shape[1]
            for answer, tokens in zip(answers, fresh, strict=True):
                answer += tokens
            if stream is not None:
                stream(fresh)
    return answers


def _row_keys(key: Any, rows: int) -> Array:
    """A key for each row, of one key or of as many."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim == (0 if typed else 1):
        return _folded(key, np.arange(rows))
    if len(key) != rows:
        raise ValueError(f"`key` holds {len(key)} keys, but there are {rows} prompts")
    return key


# The keys of some rows or prompts, by their numbers.
_folded = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def _chunks(
    forward: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    at: Placement | None,
    chunk: int,
    stops: Int[np.ndarray, " stops"],
    chance: Chance,
    starts: int,
    done: int,
) -> Iterator[Int[np.ndarray, "b chunk"]]:
    """`count` more tokens of each prompt, after the `done` first, some at a time.

    An encoder-decoder's answer `starts` with a token.
    """
    tokens, mask = left_padded(prompts)
    if at is not None:
        (tokens, mask, keys) = (_on_rows(x, at) for x in (tokens, mask, chance.keys))
        chance = chance._replace(keys=keys)
    options = {
        "sample": bool(chance.temperature > 0),
        "chance": chance,
        "stops": stops,
        "first": np.int32(done),
    }
    room = bucket(count, _SMALLEST_NEW)
    state = read(forward, params, tokens, mask, room=room, start=np.int32(starts), **options)
    for start in range(0, count, chunk):
        end = min(start + chunk, count)
        # The first token is there already.
        if end > 1:
            state = write(forward, params, state, limit=np.int32(end), **options)
        yield np.asarray(processes.whole(state.out))[: len(prompts), start:end]
        if bool(state.done.all()):
            return


def _on_rows(x: Any, at: Placement) -> Any:
    """An array of the rows, spread over the mesh; copies of the first row make them divide."""
    if x is None:
        return None
    more = -len(x) % at.parts
    whole = x[np.r_[: len(x), [0] * more]] if more else x
    return processes.put(whole, NamedSharding(at.mesh, PartitionSpec(at.rows)))


def _before_longrope(model: Model, prompts: Sequence[Sequence[int]], count: int) -> int:
    """How many of `count` tokens fit before LongRoPE changes the rotation of all tokens.

    As in transformers, the longest text of the batch decides for all rows.
    """
    point, longest = model.config.longrope_limit, max(map(len, prompts))
    # The last new token is never read, hence one more.
    return count if point is None or longest > point else min(count, point - longest + 1)


def check_decoder(model: Model) -> Forward | EncoderDecoderForward:
    """The model's functions, if it writes texts."""
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` must be a `Model`, as `models.load` returns it, got {kind_of(model)}"
        )
    if not isinstance(model.forward, Forward | EncoderDecoderForward):
        raise ValueError(
            f"`model` is a `{model.config.model_type}`, an encoder, which writes nothing: pass a "
            "decoder"
        )
    if model.config.labels:
        raise ValueError(
            f"`model` has a head for {model.config.task}, and writes nothing: pass a language "
            "model (...ForCausalLM)"
        )
    return model.forward


def checked_stops(tokens: Sequence[int]) -> tuple[int, ...]:
    """Stop tokens as Python integers, without those that no vocabulary has.

    Raises:
      ValueError: something else than integers.
    """
    try:
        # Files have -1 for "none".
        return tuple(x for x in map(integer, _in_order(tokens, unordered=())) if 0 <= x < 2**31)
    except TypeError as error:
        raise ValueError(
            f"`stop_tokens` must be a sequence of integers, the token ids: {error}"
        ) from None


def checked_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> list[int]:
    """A prompt's tokens as Python integers.

    Raises:
      ValueError: it is empty, or has what is no token of the vocabulary.
    """
    try:
        # Floats would be cut off to integers without a word, and a mask be taken for tokens.
        tokens = list(map(integer, _in_order(prompt)))
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


def _in_order(tokens: Any, unordered: tuple[type, ...] = (Set, Mapping)) -> Any:
    # The items of `bytes` are integers too, but no tokens.
    if isinstance(tokens, (str, bytes, *unordered)):
        raise TypeError(f"got {kind_of(tokens)}")
    return tokens


def _check_sampling(temperature: float, top_p: float, key: Array | None) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, str | bool) or not _is_number(value):
            raise ValueError(f"`{name}` must be a number, got {value!r}")
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"`temperature` must be at least 0 and `top_p` in (0, 1], got {temperature}, {top_p}"
        )
    if 0 < temperature < _LOWEST_TEMPERATURE:
        raise ValueError(
            f"`temperature` = {temperature} is too small to divide by: 0 takes the most likely "
            "token"
        )
    if temperature > 0 and key is None:
        raise ValueError("`key` is needed to sample: pass jax.random.key(seed), or temperature=0")
    if temperature > 0:
        check_key("key", key, rows=True)


def _is_number(value: Any) -> bool:
    try:
        return not math.isnan(float(value))
    except (TypeError, ValueError):
        return False


def _checked_prompts(model: Model, prompts: Any, max_new_tokens: int) -> list[list[int]]:
    check_decoder(model)
    if prompts is None or isinstance(prompts, str | bytes | Set | Mapping):
        raise ValueError(
            f"`prompts` must be a list of prompts, each a list of token ids, got {kind_of(prompts)}"
        )
    checked = []
    for number, prompt in enumerate(prompts):
        checked.append(checked_prompt(f"prompt {number}", prompt, model.config.vocab_size))
        # An encoder-decoder has no table of positions, and its answer is a text of its own.
        limited = isinstance(model.forward, Forward)
        if limited and len(checked[-1]) + max_new_tokens > model.config.context:
            raise ValueError(
                f"prompt {number} has {len(checked[-1])} tokens; with {max_new_tokens} new ones "
                f"that is more than the model's context of {model.config.context}"
            )
    return checked


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
    ends = {*stop_tokens, NO_TOKEN}
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
