"""The decoder: blocks of grouped-query attention and a gated MLP on a residual stream.

    x <- x + Attention(RMSNorm(x))
    x <- x + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(x)

Modules and parameters are Flax NNX's, module names are Hugging Face's. The blocks run as one
`jax.lax.scan` over their stacked parameters, or one after the other where they are not stacked.

B batch, T new tokens, S key slots, D width, N query heads, K key/value heads, H size of a head,
L blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models.config import LlamaConfig
from lora_jax.models.rope import Rotation, rotate, rotation


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots that are filled from the left.

    A call writes its T tokens into the slots `length .. length + T`; who calls sees to it that
    they are there. Slots that hold padding are never attended to.
    """

    keys: Float[Array, "l b s k h"]  # noqa: F722
    values: Float[Array, "l b s k h"]  # noqa: F722
    valid: Bool[Array, "b s"]  # noqa: F722
    length: Int[Array, ""]  # noqa: F722


# (queries, keys, values, stored keys and values or None, block number) -> (mixed values, stored)
Attend = Callable[..., tuple[Array, tuple[Array, Array] | None]]


# Name of the projections' results under rematerialization policies.
PROJECTION = "projection"


def _kept(x: Array) -> Array:
    return checkpoint_name(x, PROJECTION)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, the mean in float32."""

    def __init__(self, size: int, *, eps: float, param_dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:  # noqa: F722
        wide = x.astype(jnp.float32)
        normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale.get_value().astype(x.dtype) * normal.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, one a token."""

    def __init__(self, tokens: int, size: int, *, dtype, param_dtype):
        self.dtype = dtype
        self.embedding = nnx.Param(jnp.zeros((tokens, size), param_dtype))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:  # noqa: F722
        return jnp.take(self.embedding.get_value(), tokens, axis=0).astype(self.dtype)


class Attention(nnx.Module):
    """Attention with rotary positions; one key/value head serves N/K query heads."""

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        width, size = config.hidden_size, config.head_dim
        queries, pairs = config.num_attention_heads * size, config.num_key_value_heads * size

        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.head_dim = size
        self.q_proj = linear(width, queries, config.qkv_bias)
        self.k_proj = linear(width, pairs, config.qkv_bias)
        self.v_proj = linear(width, pairs, config.qkv_bias)
        self.o_proj = linear(queries, width, config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(size, eps=config.rms_norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(size, eps=config.rms_norm_eps, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "b t d"], turn: Rotation, attend: Attend, stored, block):  # noqa: F722
        q, k, v = (
            _kept(project(x)).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed, stored = attend(rotate(q, turn), rotate(k, turn), v, stored, block)
        return _kept(self.o_proj(mixed.reshape(*x.shape[:2], -1))), stored


class MLP(nnx.Module):
    """`W_down (silu(W_gate x) * W_up x)`."""

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:  # noqa: F722
        gate, up = _kept(self.gate_proj(x)), _kept(self.up_proj(x))
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(size, eps=eps, param_dtype=param_dtype)
        self.post_attention_layernorm = RMSNorm(size, eps=eps, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "b t d"], turn: Rotation, attend: Attend, stored, block):  # noqa: F722
        mixed, stored = self.self_attn(self.input_layernorm(x), turn, attend, stored, block)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), stored


class Decoder(nnx.Module):
    """Embedding, blocks, final norm.

    `layers` is one block whose parameters carry a leading axis L (`scan`), or a dictionary of L
    blocks named by their number.
    """

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, scan: bool, rngs: nnx.Rngs):
        def block() -> Block:
            return Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype
        )
        numbers = range(config.num_hidden_layers)
        self.layers = block() if scan else nnx.Dict({str(i): block() for i in numbers})
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)


class CausalLM(nnx.Module):
    """The decoder and, unless it is tied to the embedding, its head."""

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, scan: bool, rngs: nnx.Rngs):
        self.dtype = dtype
        self.model = Decoder(config, dtype=dtype, param_dtype=param_dtype, scan=scan, rngs=rngs)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def head(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:  # noqa: F722
        """Logits in float32; products in the compute dtype, sums in float32."""
        tied = self.tied
        weight = self.model.embed_tokens.embedding if tied else self.lm_head.kernel
        contract = (((hidden.ndim - 1,), (1 if tied else 0,)), ((), ()))
        return lax.dot_general(
            hidden.astype(self.dtype),
            weight.get_value().astype(self.dtype),
            contract,
            preferred_element_type=jnp.float32,
        )


def hidden_states(
    lm: CausalLM,
    config: LlamaConfig,
    tokens: Int[Array, "b t"],  # noqa: F722
    *,
    positions: Int[Array, "b t"] | None,  # noqa: F722
    mask: Bool[Array, "b t"] | None,  # noqa: F722
    cache: Cache | None,
    wrap: Callable[[Callable], Callable],
) -> tuple[Float[Array, "b t d"], Cache | None]:  # noqa: F722
    """Runs the decoder up to its final norm.

    Args:
      lm: the module, holding its parameters.
      config: its configuration.
      tokens: new tokens.
      positions: each token's place in its text; by default counted over the real tokens.
      mask: true at real tokens, false at padding on either side; None if there is no padding.
      cache: what was seen before, or None.
      wrap: applied to the function that runs one block (rematerialization).

    Returns:
      Hidden states, and the cache with the new tokens in it.
    """
    if positions is None:
        positions = _positions(tokens, mask, cache)
    turn = rotation(
        positions,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        context=config.max_position_embeddings,
    )
    attend, stored, cache = _attention(tokens, mask, cache, config.sliding_window)
    x = lm.model.embed_tokens(tokens)
    x, stored = _blocks(lm.model.layers, x, turn, attend, stored, wrap)
    if cache is not None:
        cache = cache._replace(keys=stored[0], values=stored[1])
    return lm.model.norm(x), cache


def _positions(tokens, mask, cache) -> Int[Array, "b t"]:  # noqa: F722
    """Real tokens are counted, so padding on the left shifts nothing."""
    if mask is None:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    else:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    if cache is None:
        return positions
    return positions + cache.valid.sum(axis=1, dtype=jnp.int32)[:, None]


def _attention(tokens, mask, cache: Cache | None, window: int | None):
    """The way of attending, what is stored for it, and the cache with its slots counted."""
    if cache is None:
        return _attend_new(mask, window), None, None
    new = jnp.ones(tokens.shape, bool) if mask is None else mask
    valid = lax.dynamic_update_slice(cache.valid, new, (0, cache.length))
    slots = jnp.arange(valid.shape[1])
    last = cache.length + jnp.arange(tokens.shape[1])[:, None]
    near = slots <= last if window is None else (slots <= last) & (slots > last - window)
    attend = _attend_stored(valid[:, None, None, :] & near, cache.length)
    counted = cache._replace(valid=valid, length=cache.length + tokens.shape[1])
    return attend, (cache.keys, cache.values), counted


def _attend_new(mask, window: int | None) -> Attend:
    # Under causal attention padding on the right is seen by padding only: without a mask it
    # costs nothing. The mask stays (b, 1, 1, s); XLA fuses it and the causal one into the softmax.
    keys_seen = None if mask is None else mask[:, None, None, :]
    near = None if window is None else (window - 1, 0)

    def attend(q, k, v, stored, block):
        mixed = jax.nn.dot_product_attention(
            q, k, v, mask=keys_seen, is_causal=True, local_window_size=near
        )
        return mixed, stored

    return attend


def _attend_stored(seen: Bool[Array, "b 1 t s"], start) -> Attend:  # noqa: F722
    # The cache is the scan's carry and written in place: as its input and output it would be
    # copied whole for every token.
    def attend(q, k, v, stored, block):
        at = (block, 0, start, 0, 0)
        keys, values = (
            lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
            for old, new in zip(stored, (k, v), strict=True)
        )
        this_keys, this_values = (
            lax.dynamic_index_in_dim(kept, block, keepdims=False) for kept in (keys, values)
        )
        mixed = jax.nn.dot_product_attention(
            q, this_keys.astype(q.dtype), this_values.astype(q.dtype), mask=seen
        )
        return mixed, (keys, values)

    return attend


def _blocks(layers, x, turn: Rotation, attend: Attend, stored, wrap):
    if isinstance(layers, nnx.Dict):
        for number in range(len(layers)):
            graph, state = nnx.split(layers[str(number)])
            run = wrap(
                lambda s, x, kept, i, graph=graph: nnx.merge(graph, s)(x, turn, attend, kept, i)
            )
            x, stored = run(state, x, stored, jnp.int32(number))
        return x, stored
    graph, states = nnx.split(layers)
    run = wrap(lambda state, x, kept, i: nnx.merge(graph, state)(x, turn, attend, kept, i))

    def step(carry, each):
        state, block = each
        return run(state, *carry, block), None

    count = jax.tree.leaves(states)[0].shape[0]
    return lax.scan(step, (x, stored), (states, jnp.arange(count, dtype=jnp.int32)))[0]
