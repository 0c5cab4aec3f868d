"""Serving with continuous batching: requests share one running batch, each with its own adapter.

Every row has its own cache and length. A new request is read in one pass into a free row and
continues with the others in the next step, so it does not wait for them to end. A row's adapter is
gathered once, when its request is admitted; decoding steps gather nothing.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.models.attention import Cache
from lora_jax.models.generation import bucket, left_padded
from lora_jax.models.model import Model
from lora_jax.multi.pool import AdapterPool
from lora_jax.transform import lorafy
from lora_jax.transform.many.rows import by_row, select


class _State(NamedTuple):
    """The arrays on the device, with a row axis: `axes` for the adapters, axis 0 for the rest."""

    adapters: list
    cache: Cache
    last: jax.Array


@dataclass
class Request:
    """A prompt to continue.

    Attributes:
      prompt: token ids.
      adapter: name in the pool; None for the plain base.
      max_new_tokens: maximum number of new tokens.
      tokens: the new tokens so far, without the stop token.
      done: whether the request is finished.
    """

    prompt: Sequence[int]
    adapter: str | None
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class Server:
    """Decodes requests greedily in a continuously running batch.

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
    ):
        """Makes the rows' caches.

        Args:
          model: a decoder; the pool's base are its parameters.
          pool: the adapters.
          rows: requests that run at once; their adapters must fit the pool's budget together.
          room: tokens, prompt and new ones, that a row has room for.
          stop_tokens: a request ends before the first of these.

        Raises:
          ValueError: `rows` or `room` below 1, or more room than the model's context.
        """
        if rows < 1 or room < 1:
            raise ValueError(f"`rows` and `room` must be at least 1, got {rows} and {room}")
        if room > model.config.context:
            raise ValueError(f"`room` is {room}, but the model's context is {model.config.context}")
        self.rows, self.room, self.steps = rows, room, 0
        self._model, self._pool, self._stops = model, pool, frozenset(stop_tokens)
        self._waiting: deque[Request] = deque()
        self._running: list[Request | None] = [None] * rows
        chosen = select(pool.stacked, np.full(rows, -1))
        parts = by_row(chosen)
        cache = model.forward.init_cache(1, room)
        wide = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)
        self._state = _State(parts.arrays, wide, jnp.zeros(rows, jnp.int32))
        # The base is an argument: closed over, it would be compiled into the programs as constants.
        self._base = parts.base
        apply = functools.partial(_next_token, model.forward, parts.join)
        self._step = jax.jit(functools.partial(_advance, apply, parts.axes), donate_argnums=(1,))
        self._admit = jax.jit(
            functools.partial(_admit, apply, model.forward, parts.axes, room), donate_argnums=(1,)
        )

    def submit(self, prompt: Sequence[int], *, adapter: str | None, max_new_tokens: int) -> Request:
        """Queues a request and starts to load its adapter in the background.

        Raises:
          ValueError: an empty prompt, a token outside the vocabulary, or more than a row holds.
        """
        vocabulary = self._model.config.vocab_size
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"`prompt` must be tokens in 0..{vocabulary - 1}, at least one")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
        if (wanted := bucket(len(prompt)) + max_new_tokens) > self.room:
            raise ValueError(
                f"the prompt (in a bucket of {bucket(len(prompt))} tokens) and {max_new_tokens} "
                f"new tokens need {wanted} places, but a row has `room` for {self.room}"
            )
        request = Request(list(prompt), adapter, max_new_tokens)
        self._waiting.append(request)
        self._pool.prefetch([adapter])
        return request

    def run(self) -> None:
        """Steps until all requests are finished."""
        while self.step():
            pass

    def step(self) -> bool:
        """Admits waiting requests, and decodes one token of every running one.

        Returns:
          Whether any request is unfinished.
        """
        for row, running in enumerate(self._running):
            if running is None and self._waiting:
                self._let_in(row, self._waiting[0])
                self._waiting.popleft()
        if not any(self._running):
            return bool(self._waiting)
        self._state, tokens = self._step(self._base, self._state)
        self.steps += 1
        for row, token in enumerate(np.asarray(tokens).tolist()):
            self._note(row, token)
        return any(self._running) or bool(self._waiting)

    def _let_in(self, row: int, request: Request) -> None:
        running = [r.adapter for r in self._running if r is not None and r.adapter is not None]
        adapter_index = self._pool.ids([request.adapter], keep=running)
        tokens, mask = left_padded([request.prompt])
        own = by_row(select(self._pool.stacked, adapter_index)).arrays
        self._state, token = self._admit(self._base, self._state, own, tokens, mask, np.int32(row))
        self._running[row] = request
        self._note(row, int(token))

    def _note(self, row: int, token: int) -> None:
        request = self._running[row]
        if request is None:
            return
        if token in self._stops:
            request.done = True
        else:
            request.tokens.append(token)
            request.done = len(request.tokens) == request.max_new_tokens
        if request.done:
            self._running[row] = None


def _next_token(forward, join, base: list, own: list, tokens, mask, cache) -> tuple[Any, Cache]:
    """The most likely next token of one row, and its cache with the given tokens added."""
    params = join(own, base)
    hidden, cache = lorafy(forward.apply)(
        params, tokens, mask=mask, cache=cache, return_hidden=True
    )
    logits = lorafy(forward.head)(params, hidden[:, -1:])
    return jnp.argmax(logits[0, 0]).astype(jnp.int32), cache


def _advance(apply, at, base: list, state: _State) -> tuple[_State, Any]:
    # Free rows are computed too and write to their caches; the result is ignored.
    def one(own, token, cache):
        return apply(base, own, token[None, None], None, cache)

    tokens, cache = jax.vmap(one, in_axes=(at, 0, 0))(state.adapters, state.last, state.cache)
    return _State(state.adapters, cache, tokens), tokens


def _admit(apply, forward, at, room: int, base: list, state: _State, own, tokens, mask, row):
    """Reads a prompt into a row."""
    single = [lax.squeeze(x, [axis]) for x, axis in zip(own, at, strict=True)]
    token, cache = apply(base, single, tokens, mask, forward.init_cache(1, room))

    def put(whole, part, axis=0):
        return lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), row, axis)

    adapters = [put(x, y, axis) for x, y, axis in zip(state.adapters, single, at, strict=True)]
    caches = jax.tree.map(put, state.cache, cache)
    return _State(adapters, caches, put(state.last, token)), token
