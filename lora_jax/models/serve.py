"""Serving with continuous batching: requests share one running batch, each with its own adapter.

Every row has its own cache and length. A new request is read in one pass into a free row and
continues with the others in the next step, so it does not wait for them to end. A row's adapter is
gathered once, when its request is admitted; decoding steps gather nothing.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from lora_jax.config.arguments import check_count, kind_of
from lora_jax.dims import AnyArray
from lora_jax.models.attention import Cache
from lora_jax.models.decoding import NOT_FINITE, not_finite
from lora_jax.models.generation import (
    bucket,
    check_decoder,
    checked_prompt,
    checked_stops,
    left_padded,
)
from lora_jax.models.model import Forward, Model
from lora_jax.multi.pool import AdapterPool
from lora_jax.multi.single import stack_of_one
from lora_jax.transform import lorafy
from lora_jax.transform.many.rows import by_row, select

# Seconds that a step waits for an adapter when no row is running.
_LONGEST_WAIT = 0.05


class _State(NamedTuple):
    """The arrays on the device.

    Attributes:
      adapters: arrays of the rows' adapters; `_Decoder.axes` are their row axes.
      cache: (rows, l, 1, s, k, h).
      last: the newest token of each row.
    """

    adapters: list
    cache: Cache
    last: Int[Array, " rows"]


@dataclass
class Request:
    """A prompt to continue.

    Attributes:
      prompt: token ids.
      adapter: name in the pool; None for the plain base.
      max_new_tokens: maximum number of new tokens.
      tokens: the new tokens so far, without the stop token.
      done: whether the request is finished, one way or the other.
      error: why it failed, if it did; `tokens` are then those from before.
    """

    prompt: Sequence[int]
    adapter: str | None
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    error: BaseException | None = None


class _Waiting(NamedTuple):
    request: Request
    loading: futures.Future | None  # of its adapter; None if that is on the device


class Server:
    """Decodes requests greedily in a continuously running batch.

    Threads may share a server: `submit` and `cancel` may be called at any time, and steps run one
    at a time. A request that cannot be served (its adapter is missing, does not fit the pool,
    holds NaN, or gives logits that are not finite) ends with `error` set, and `step` and `run` go
    on with the others, whose tokens are what they are without it. Requests whose adapters are
    still loading are passed by. If the device fails in a step, the running requests end with that
    error, the step raises it, and the waiting ones are served by the next.

    Example:
      server = Server(model, pool, rows=16, room=512, stop_tokens=(eos,))
      requests = [server.submit(prompt, adapter=name, max_new_tokens=64) for ...]
      server.run()
      requests[0].tokens

    Attributes:
      rows: number of requests that run at once.
      steps: decoding steps so far.
    """

    def __init__(
        self,
        model: Model,
        pool: AdapterPool,
        *,
        rows: int,
        room: int,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Makes the rows' caches.

        Args:
          model: a decoder; the pool's base are its parameters.
          pool: the adapters.
          rows: requests that run at once, of as many adapters as there are.
          room: tokens, prompt and new ones, that a row has room for.
          stop_tokens: a request ends before the first of these.

        Raises:
          ValueError: an encoder, `rows` or `room` below 1, more room than the model's context,
            stop tokens that are no integers, or a pool over another base.
        """
        forward = check_decoder(model)
        if not isinstance(forward, Forward):
            raise ValueError(
                f"`model` is a `{model.config.model_type}`, an encoder-decoder, of which requests "
                "cannot be served together: answer a batch at a time with `models.generate`"
            )
        if not isinstance(pool, AdapterPool):
            raise TypeError(f"`pool` must be an `AdapterPool`, got {kind_of(pool)}")
        rows, room = check_count("rows", rows), check_count("room", room)
        if room > model.config.context:
            raise ValueError(f"`room` is {room}, but the model's context is {model.config.context}")
        self.rows, self.room, self.steps = rows, room, 0
        self._model, self._pool, self._stops = model, pool, frozenset(checked_stops(stop_tokens))
        self._waiting: deque[_Waiting] = deque()
        self._running: list[Request | None] = [None] * rows
        self._queue, self._turn = threading.Lock(), threading.Lock()  # `_waiting`; one step
        stacked, plain = pool.lookup([None] * rows)
        try:
            stack_of_one(stacked, model.params)
        except ValueError as error:
            raise ValueError(
                "`pool` and `model` must have one base: make the pool's template from "
                f"`model.params` ({error})"
            ) from None
        parts = by_row(select(stacked, plain))

        def fresh() -> _State:
            # A cache of its own for each row, whose texts differ in length.
            cache = forward.init_cache(1, room)
            wide = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)
            # Copies: the state is donated to every step.
            return _State([jnp.copy(x) for x in parts.arrays], wide, jnp.zeros(rows, jnp.int32))

        self._fresh = fresh
        self._state = fresh()
        # The base is an argument: closed over, it would be compiled into the programs as constants.
        self._base = parts.base
        decoder = _Decoder(forward, parts.join, parts.axes, room)
        self._step = jax.jit(functools.partial(_advance, decoder), donate_argnums=(1,))
        self._admit = jax.jit(functools.partial(_admit, decoder), donate_argnums=(1,))

    def submit(self, prompt: Sequence[int], *, adapter: str | None, max_new_tokens: int) -> Request:
        """Queues a request and starts to load its adapter in the background.

        Raises:
          ValueError: an empty prompt, a token outside the vocabulary, more than a row holds, or an
            adapter that is no name.
        """
        config = self._model.config
        tokens = checked_prompt("`prompt`", prompt, config.vocab_size)
        limit = check_count("max_new_tokens", max_new_tokens)
        if (wanted := bucket(len(tokens)) + limit) > self.room:
            raise ValueError(
                f"the prompt (in a bucket of {bucket(len(tokens))} tokens) and {limit} "
                f"new tokens need {wanted} places, but a row has `room` for {self.room}"
            )
        point = config.longrope_limit
        if point is not None and len(tokens) <= point < len(tokens) + limit - 1:
            raise ValueError(
                f"`prompt` has {len(tokens)} tokens and {limit} new ones pass {point}, where "
                "LongRoPE rotates all positions anew: use `generate`, which reads the text again "
                "there, or fewer new tokens"
            )
        if not isinstance(adapter, str | None):
            raise ValueError(f"`adapter` must be a name in the pool or None, got {adapter!r}")
        request = Request(tokens, adapter, limit)
        loading = self._pool.prefetch([adapter])
        with self._queue:
            self._waiting.append(_Waiting(request, loading.get(adapter) if adapter else None))
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request with the tokens it has; its row is free from the next step on."""
        request.done = True

    def run(self) -> None:
        """Steps until all requests are finished."""
        while self.step():
            pass

    def step(self) -> bool:
        """Admits waiting requests, and decodes one token of every running one.

        Returns:
          Whether any request is unfinished.
        """
        with self._turn:
            for row, running in enumerate(self._running):
                if running is not None and running.done:  # cancelled
                    self._running[row] = None
                if self._running[row] is None:
                    self._fill(row)
            if any(self._running):
                self._decode()
            else:
                self._await_adapters()
            return any(self._running) or bool(self._waiting)

    def _fill(self, row: int) -> None:
        """Admits the first waiting request that can run; those that cannot end here."""
        while self._running[row] is None and (waiting := self._next()):
            request, loading = waiting
            try:
                if loading is not None:
                    loading.result()  # raises what went wrong, and does not load again
                self._start(row, request)
            except BaseException as error:
                _fail(request, error)
                self._running[row] = None
                self._recover(error)
                if not isinstance(error, Exception):  # an interrupt is for the caller
                    raise

    def _next(self) -> _Waiting | None:
        """The first waiting request whose adapter is there, taken out of the queue."""
        with self._queue:
            self._waiting = deque(x for x in self._waiting if not x.request.done)  # cancelled
            for waiting in self._waiting:
                if waiting.loading is None or waiting.loading.done():
                    self._waiting.remove(waiting)
                    return waiting
        return None

    def _start(self, row: int, request: Request) -> None:
        """Reads a request's prompt into a free row, which gives its first token."""
        tokens, mask = left_padded([request.prompt])
        own = self._adapter_of(request)
        self._state, token = self._admit(
            self._base, self._state, own, tokens, mask=mask, row=np.int32(row)
        )
        self._running[row] = request
        self._record(row, int(token))

    def _adapter_of(self, request: Request) -> list:
        # A function of its own: an error keeps its frames, and must not keep the pool's stack.
        stacked, index = self._pool.lookup([request.adapter])
        return by_row(select(stacked, index)).arrays

    def _decode(self) -> None:
        try:
            self._state, tokens = self._step(self._base, self._state)
            found = np.asarray(tokens).tolist()
        except BaseException as error:
            self._recover(error)
            raise
        self.steps += 1
        for row, token in enumerate(found):
            self._record(row, token)

    def _recover(self, error: BaseException) -> None:
        """Starts with empty rows if a program failed that had been given the state's memory."""
        if not any(x.is_deleted() for x in jax.tree.leaves(self._state)):
            return
        for request in self._running:
            if request is not None:
                _fail(request, error)
        self._running = [None] * self.rows
        self._state = self._fresh()

    def _await_adapters(self) -> None:
        with self._queue:
            loading = [x.loading for x in self._waiting if x.loading is not None]
        if loading:
            futures.wait(loading, _LONGEST_WAIT, futures.FIRST_COMPLETED)

    def _record(self, row: int, token: int) -> None:
        """Adds a token to a row's request, and frees the row if that ends it."""
        request = self._running[row]
        if request is None:
            return
        if token == NOT_FINITE:
            _fail(
                request,
                FloatingPointError(
                    f"adapter `{request.adapter}`: the logits are not finite; its numbers are too "
                    "large for the model's dtype"
                ),
            )
        elif token in self._stops:
            request.done = True
        elif not request.done:
            request.tokens.append(token)
            request.done = len(request.tokens) == request.max_new_tokens
        if request.done:
            self._running[row] = None


def _fail(request: Request, error: BaseException) -> None:
    # `done` last: another thread that sees it sees the error too.
    request.error = error
    request.done = True


class _Decoder(NamedTuple):
    """What the two programs share.

    Attributes:
      forward: the model's functions.
      join: a row's arrays and the base's -> parameters.
      axes: the row axis of each array of the adapters.
      room: tokens of a row's cache.
    """

    forward: Forward
    join: Callable
    axes: list[int]
    room: int


def _next_token(
    decoder: _Decoder,
    params: Any,
    tokens: Int[AnyArray, "1 t"],
    *,
    mask: Bool[AnyArray, "1 t"] | None,
    cache: Cache,
) -> tuple[Int[Array, ""], Cache]:
    """The most likely next token of one row, and its cache with the given tokens added."""
    hidden, cache = lorafy(decoder.forward.apply)(
        params, tokens, mask=mask, cache=cache, return_hidden=True
    )
    logits = lorafy(decoder.forward.head)(params, hidden[:, -1:])[0, 0]  # (v,)
    token = jnp.where(not_finite(logits), NOT_FINITE, jnp.argmax(logits))
    return token.astype(jnp.int32), cache


def _advance(decoder: _Decoder, base: list, state: _State) -> tuple[_State, Int[Array, " rows"]]:
    """One more token of every row."""

    # Free rows are computed too and write to their caches; the result is ignored.
    def one(own: list, token: Int[Array, ""], cache: Cache) -> tuple[Int[Array, ""], Cache]:
        params = decoder.join(own, base)
        return _next_token(decoder, params, token[None, None], mask=None, cache=cache)

    in_axes = (decoder.axes, 0, 0)
    tokens, cache = jax.vmap(one, in_axes=in_axes)(state.adapters, state.last, state.cache)
    return _State(state.adapters, cache, tokens), tokens


def _admit(
    decoder: _Decoder,
    base: list,
    state: _State,
    own: list,
    tokens: Int[AnyArray, "1 t"],
    *,
    mask: Bool[AnyArray, "1 t"],
    row: Int[AnyArray, ""],
) -> tuple[_State, Int[Array, ""]]:
    """Reads a prompt into a row."""
    # The adapter's arrays come with a row axis of size 1.
    single = [lax.squeeze(x, [axis]) for x, axis in zip(own, decoder.axes, strict=True)]
    empty = decoder.forward.init_cache(1, decoder.room)
    params = decoder.join(single, base)
    token, cache = _next_token(decoder, params, tokens, mask=mask, cache=empty)

    def put(whole: Array, part: Array, axis: int = 0) -> Array:
        return lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), row, axis)

    adapters = [
        put(x, y, axis) for x, y, axis in zip(state.adapters, single, decoder.axes, strict=True)
    ]
    caches = jax.tree.map(put, state.cache, cache)
    return _State(adapters, caches, put(state.last, token)), token
