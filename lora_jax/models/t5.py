"""T5: an encoder that reads a text, and a decoder that attends to it and writes another.

    x <- x + Attention(RMSNorm(x))                     scores q·k + b(distance), without a scale
    x <- x + Attention(RMSNorm(x), the encoder's)      the decoder's blocks
    x <- x + W_o act(W_i RMSNorm(x))                   or W_o (act(W_i0 n) * W_i1 n)

The b are of a table that the first block of a stack has for all of them; in UMT5 each has its own.
Modules and parameters are Flax NNX's, module names are Hugging Face's.

B batch, T tokens, S tokens that are attended to, D width, N heads, H size of a head.

Sources: Raffel et al. 2020, arXiv:1910.10683; Chung et al. 2023 (UMT5), arXiv:2304.09151.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models.bert_parts import Build
from lora_jax.models.layers import ACTIVATIONS, Embedding, RMSNorm, kept, logits_of
from lora_jax.models.mixing import Mixing, mix
from lora_jax.models.t5_config import T5Config
from lora_jax.paths import slice_of

_UNSCALED = Mixing(slides=(), scale=1.0)

Pairs = tuple[Float[Array, "b s n h"], Float[Array, "b s n h"]]


def distances_of(build: Build) -> Embedding:
    """A table of distances: a number for each bucket and head."""
    config = build.config
    return Embedding(
        config.buckets, config.num_attention_heads, dtype=build.dtype, param_dtype=build.param_dtype
    )


class Attention(nnx.Module):
    """Projections of queries, keys and values, and of what is mixed of them."""

    def __init__(self, build: Build, *, measured: bool = False) -> None:
        config = build.config
        self.heads, inner = config.num_attention_heads, config.num_attention_heads * config.head_dim
        self.q, self.k, self.v = (
            build.linear(config.hidden_size, inner, bias=False) for _ in range(3)
        )
        self.o = build.linear(inner, config.hidden_size, bias=False)
        if measured:
            self.relative_attention_bias = distances_of(build)

    def pairs(self, x: Float[Array, "b s d"]) -> Pairs:
        """Keys and values."""
        return self._by_head(self.k(x)), self._by_head(self.v(x))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        pairs: Pairs,
        *,
        seen: Bool[Array, "#b 1 #t s"] | None,
        bias: Float[Array, "1 n t s"] | None = None,
    ) -> Float[Array, "b t d"]:
        q = self._by_head(self.q(x))
        mixed = mix(q, *pairs, seen=seen, by=_UNSCALED, bias=bias)
        return kept(self.o(mixed.reshape(*x.shape[:2], -1)))

    def _by_head(self, x: Float[Array, "b t d"]) -> Float[Array, "b t n h"]:
        return kept(x).reshape(*x.shape[:2], self.heads, -1)


class MLP(nnx.Module):
    """`W_o act(W_i x)`, with a gate or without."""

    def __init__(self, build: Build) -> None:
        config = build.config
        sizes = config.hidden_size, config.intermediate_size
        self.act, self.names = config.activation, ("wi_0", "wi_1") if config.gated else ("wi",)
        for name in self.names:
            setattr(self, name, build.linear(*sizes, bias=False))
        self.wo = build.linear(*sizes[::-1], bias=False)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        act, (first, *gate) = ACTIVATIONS[self.act], (getattr(self, name) for name in self.names)
        inner = act(kept(first(x)))
        for other in gate:
            inner = inner * kept(other(x))
        return kept(self.wo(inner))


class Layer(nnx.Module):
    """A part of a block, under its name, and the norm before it."""

    def __init__(self, build: Build, name: str, part: nnx.Module) -> None:
        config = build.config
        setattr(self, name, part)
        self.layer_norm = RMSNorm(
            config.hidden_size, eps=config.layer_norm_epsilon, param_dtype=build.param_dtype
        )


class Attending(NamedTuple):
    """How the blocks of a stack attend.

    Attributes:
      own: (keys and values of the new tokens, what is stored, number of the block) -> those of all
        tokens, and what is stored.
      seen: which of them each token attends to; None for all.
      bias: of the attention of a block: what is added to the scores.
      read: (attention of a decoder's block, its number) -> keys and values of the encoder's text.
      text: true at that text's tokens; None for all.
    """

    own: Callable[[Pairs, Any, Int[Array, ""]], tuple[Pairs, Any]]
    seen: Bool[Array, "#b 1 #t s"] | None
    bias: Callable[[Attention], Float[Array, "1 n t s"]]
    read: Callable[[Attention, Int[Array, ""]], Pairs] | None = None
    text: Bool[Array, "b 1 1 s"] | None = None


class Block(nnx.Module):
    """Attention among the tokens, in a decoder to the encoder's too, and the MLP."""

    def __init__(self, build: Build, *, decoder: bool, measured: bool) -> None:
        parts: list[tuple[str, nnx.Module]] = [
            ("SelfAttention", Attention(build, measured=measured)),
            *([("EncDecAttention", Attention(build))] if decoder else []),
            ("DenseReluDense", MLP(build)),
        ]
        self.layer = nnx.Dict({str(i): Layer(build, *part) for i, part in enumerate(parts)})

    def __call__(
        self, x: Float[Array, "b t d"], by: Attending, stored: Any, number: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Any]:
        layers: Any = self.layer
        first, *crossed, last = (layers[str(i)] for i in range(len(layers)))
        normed, attention = first.layer_norm(x), first.SelfAttention
        pairs, stored = by.own(attention.pairs(normed), stored, number)
        x = x + attention(normed, pairs, seen=by.seen, bias=by.bias(attention))
        for each in crossed:
            assert by.read is not None
            attention = each.EncDecAttention
            pairs = by.read(attention, number)
            x = x + attention(each.layer_norm(x), pairs, seen=by.text)
        return x + last.DenseReluDense(last.layer_norm(x)), stored


class Distances(nnx.Module):
    """The first block's table of distances, where the blocks are stacked without it."""

    def __init__(self, build: Build) -> None:
        attention = nnx.Dict({"relative_attention_bias": distances_of(build)})
        self.layer = nnx.Dict({"0": nnx.Dict({"SelfAttention": attention})})


class Stack(nnx.Module):
    """The encoder, or the decoder: its blocks and the norm after them.

    `block` has all blocks as one, named by their numbers (`0:12`), whose parameters have a leading
    axis, and the first one's table of distances (`0:1`); or it has each block for itself.
    """

    def __init__(self, build: Build, *, decoder: bool, scan: bool) -> None:
        config = build.config
        self.count = config.num_decoder_layers if decoder else config.num_hidden_layers
        self.every, self.scan = config.kind.every, scan
        blocks: dict[str, nnx.Module] = {}
        if scan:
            if not self.every:
                blocks["0:1"] = Distances(build)
            # The only block has its table itself.
            measured = self.every or self.count == 1
            blocks[self.all] = Block(build, decoder=decoder, measured=measured)
        else:
            for i in range(self.count):
                blocks[str(i)] = Block(build, decoder=decoder, measured=self.every or i == 0)
        self.block = nnx.Dict(blocks)
        self.final_layer_norm = RMSNorm(
            config.hidden_size, eps=config.layer_norm_epsilon, param_dtype=build.param_dtype
        )

    @property
    def all(self) -> str:
        """The name of all blocks as one."""
        return slice_of(range(self.count))

    @property
    def blocks(self) -> Any:
        """What `lora_jax.models.layers.run_blocks` takes."""
        return self.block[self.all] if self.scan else self.block

    def bias(
        self, back: Int[Array, "t s"], config: T5Config, *, decoder: bool
    ) -> Callable[[Attention], Float[Array, "1 n t s"]]:
        """`Attending.bias` of keys so many places before each query."""
        added = partial(_added, back=back, config=config, decoder=decoder)
        if self.every:
            return lambda attention: added(attention.relative_attention_bias.embedding.get_value())
        first: Any = self.block["0:1" if self.scan else "0"]
        attention = first.layer["0"].SelfAttention
        table = attention.relative_attention_bias.embedding.get_value()
        bias = added(table[0] if self.scan else table)  # once, for all blocks
        return lambda attention: bias


class T5(nnx.Module):
    """The encoder, the decoder, their table, and the head unless it is the table."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        scan: bool,
        rngs: nnx.Rngs,
    ) -> None:
        build = Build(config, dtype, param_dtype, rngs)
        self.dtype = dtype
        self.factor = config.hidden_size**-0.5 if config.scaled else 1.0
        self.tied = config.tie_word_embeddings
        self.shared = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype
        )
        self.encoder = Stack(build, decoder=False, scan=scan)
        self.decoder = Stack(build, decoder=True, scan=scan)
        if not self.tied:
            self.lm_head = build.linear(config.hidden_size, config.vocab_size, bias=False)

    def head(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits in float32."""
        weight = self.shared.embedding if self.tied else self.lm_head.kernel
        hidden = hidden if self.factor == 1 else hidden * self.factor
        return logits_of(hidden, weight.get_value(), tied=self.tied, dtype=self.dtype)


def _added(
    table: Float[Array, "r n"], *, back: Int[Array, "t s"], config: T5Config, decoder: bool
) -> Float[Array, "1 n t s"]:
    """What is added to the scores, in float32."""
    far = config.distances
    rows = jnp.asarray(bucket_of(np.arange(-far, far + 1), config, decoder=decoder))
    numbers = jnp.take(table, rows[jnp.clip(back, -far, far) + far], axis=0)  # (t, s, n)
    return jnp.moveaxis(numbers.astype(jnp.float32), -1, 0)[None]


def bucket_of(
    back: Int[np.ndarray, "..."], config: T5Config, *, decoder: bool
) -> Int[np.ndarray, "..."]:
    """The row of the table for keys so many places before a query.

    Small distances have rows of their own. Those beyond share the others by their logarithm, up to
    the farthest. The encoder has half of the rows for keys after the query; in the decoder, which
    does not see them, they have the row of distance 0.
    """
    count = config.buckets if decoder else config.buckets // 2
    distance = np.maximum(back, 0) if decoder else np.abs(back)
    own = count // 2
    # float32 as transformers has it: the edges of buckets depend on the rounding.
    share = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(own))
    share = share / np.float32(math.log(config.distances / own)) * np.float32(count - own)
    beyond = np.minimum(own + share.astype(int), count - 1)
    found = np.where(distance < own, distance, beyond)
    return found if decoder else found + np.where(back < 0, count, 0)
