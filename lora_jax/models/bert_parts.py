"""The parts of encoders: embeddings, and the blocks of BERT and of DistilBERT.

    x <- LayerNorm(x + W_o Attention(x) + b_o)
    x <- LayerNorm(x + W_2 act(W_1 x + b_1) + b_2)

Modules and parameters are Flax NNX's, module names are Hugging Face's, in which alone the blocks
of the two differ. Dropout of the base model is not applied: adapters have their own.

B batch, T tokens, S tokens of a whole row, D width, N heads, F inner size of the MLP.

Sources: Devlin et al. 2018, arXiv:1810.04805; Sanh et al. 2019, arXiv:1910.01108.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.context import over_tokens
from lora_jax.models.layers import ACTIVATIONS, Embedding, LayerNorm, RMSNorm, kept
from lora_jax.models.mixing import mix
from lora_jax.models.rope import Rotation


class Attending(NamedTuple):
    """What a query attends to.

    Attributes:
      mask: true at the keys, of all heads; None for all.
      over: the axis of the mesh that the tokens of a row are spread over, or None.
      rotations: of queries and keys, in blocks that slide and in others; () is none.
      distances: DeBERTa's vectors of all distances, see `lora_jax.models.deberta`.
    """

    mask: Bool[AnyArray, "b s"] | None
    over: str | None
    rotations: tuple[Rotation, ...] = ()
    distances: Float[Array, "c d"] | None = None


class Build(NamedTuple):
    """The options that all modules share: of `BertConfig`, or of T5's."""

    config: Any
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(
            inputs, outputs, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype,
            rngs=self.rngs,
        )  # fmt: skip

    def norm(self, size: int | None = None) -> LayerNorm | RMSNorm:
        width, eps = size or self.config.hidden_size, self.config.layer_norm_eps
        if self.config.norm_bias:
            return LayerNorm(width, eps=eps, param_dtype=self.param_dtype)
        return RMSNorm(width, eps=eps, param_dtype=self.param_dtype, centered=True)

    def table(self, rows: int) -> Embedding:
        width = self.config.embedded_size
        return Embedding(rows, width, dtype=self.dtype, param_dtype=self.param_dtype)


class Embeddings(nnx.Module):
    """The sum of a token's, its type's and its position's vectors, normalized."""

    def __init__(self, build: Build) -> None:
        config = build.config
        self.word_embeddings = build.table(config.vocab_size)
        self.placed, self.typed = config.placed, config.typed
        if self.placed:
            self.position_embeddings = build.table(config.max_position_embeddings)
        if self.typed:
            self.token_type_embeddings = build.table(config.type_vocab_size)
        self.LayerNorm = build.norm(config.embedded_size)

    def __call__(
        self,
        tokens: Int[AnyArray, "b t"],
        token_type_ids: Int[AnyArray, "b t"],
        positions: Int[AnyArray, "#b t"],
    ) -> Float[Array, "b t d"]:
        x = self.word_embeddings(tokens)
        if self.placed:
            x = x + self.position_embeddings(positions)
        if self.typed:
            x = x + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(x)


class SelfAttention(nnx.Module):
    """Every token attends to every real token."""

    def __init__(self, build: Build) -> None:
        width = build.config.hidden_size
        self.heads = build.config.num_attention_heads
        self.query = build.linear(width, width)
        self.key = build.linear(width, width)
        self.value = build.linear(width, width)

    def __call__(self, x: Float[Array, "b t d"], by: Attending) -> Float[Array, "b t d"]:
        return attended(x, (self.query, self.key, self.value), self.heads, by=by)


def attended(
    x: Float[Array, "b t d"],
    projections: tuple[nnx.Linear, nnx.Linear, nnx.Linear],
    heads: int,
    *,
    by: Attending,
) -> Float[Array, "b t d"]:
    """Values weighted by their keys, from the projections of queries, keys and values."""
    # (b, t, n, h) each
    q, k, v = (kept(project(x)).reshape(*x.shape[:2], heads, -1) for project in projections)
    return both_ways(q, k, v, by=by).reshape(x.shape)


def both_ways(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t n h"],
    v: Float[Array, "b t n h"],
    *,
    by: Attending,
    near: Callable[[Int[Array, "t s"]], Bool[Array, "t s"]] | None = None,
) -> Float[Array, "b t n h"]:
    """Values weighted by the keys on both sides.

    Args:
      q, k, v: of all tokens, or of a device's own.
      by: what all queries attend to.
      near: of how many places a key lies before a query, whether it is attended to; None for all.
    """

    def some(q: Array, k: Array, v: Array, first: Any, mask: Any) -> Array:
        seen = None if mask is None else jnp.asarray(mask)[:, None, None, :]  # (b, 1, 1, s)
        if near is not None:
            own = near(first + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1]))
            seen = own[None, None] if seen is None else own & seen  # (b, 1, t, s)
        return mix(q, k, v, seen=seen)

    return over_tokens(some, q, k, v, by.mask, axis=by.over)


class Output(nnx.Module):
    """`LayerNorm(residual + W x + b)`: the last step of attention and of the MLP."""

    def __init__(self, inputs: int, build: Build) -> None:
        self.dense = build.linear(inputs, build.config.hidden_size)
        self.LayerNorm = build.norm()

    def __call__(
        self, x: Float[Array, "b t f"], residual: Float[Array, "b t d"]
    ) -> Float[Array, "b t d"]:
        return self.LayerNorm(residual + kept(self.dense(x)))


class Attention(nnx.Module):
    """Attention and its output layer; `Layer` calls the two."""

    def __init__(self, build: Build, attention: Callable[[Build], Any]) -> None:
        self.self = attention(build)
        self.output = Output(build.config.hidden_size, build)


class Dense(nnx.Module):
    """A dense layer one level deeper, as Hugging Face names it (`intermediate.dense`)."""

    def __init__(self, outputs: int, build: Build) -> None:
        self.dense = build.linear(build.config.hidden_size, outputs)


class Layer(nnx.Module):
    """One block."""

    def __init__(self, build: Build, *, attention: Callable[[Build], Any] = SelfAttention) -> None:
        config = build.config
        self.act = config.hidden_act
        self.attention = Attention(build, attention)
        self.intermediate = Dense(config.intermediate_size, build)
        self.output = Output(config.intermediate_size, build)

    def __call__(
        self, x: Float[Array, "b t d"], by: Attending, slides: bool = False
    ) -> Float[Array, "b t d"]:
        del slides  # no block does
        x = self.attention.output(self.attention.self(x, by), x)
        wide = kept(self.intermediate.dense(x))  # (b, t, f)
        return self.output(ACTIVATIONS[self.act](wide), x)


class DistilAttention(nnx.Module):
    """Attention and its output layer under DistilBERT's names."""

    def __init__(self, build: Build) -> None:
        width = build.config.hidden_size
        self.heads = build.config.num_attention_heads
        self.q_lin = build.linear(width, width)
        self.k_lin = build.linear(width, width)
        self.v_lin = build.linear(width, width)
        self.out_lin = build.linear(width, width)

    def __call__(self, x: Float[Array, "b t d"], by: Attending) -> Float[Array, "b t d"]:
        mixed = attended(x, (self.q_lin, self.k_lin, self.v_lin), self.heads, by=by)
        return kept(self.out_lin(mixed))


class DistilMLP(nnx.Module):
    """`W_2 act(W_1 x + b_1) + b_2` under DistilBERT's names."""

    def __init__(self, build: Build) -> None:
        config = build.config
        self.act = config.hidden_act
        self.lin1 = build.linear(config.hidden_size, config.intermediate_size)
        self.lin2 = build.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return kept(self.lin2(ACTIVATIONS[self.act](kept(self.lin1(x)))))


class DistilLayer(nnx.Module):
    """One block of DistilBERT."""

    def __init__(self, build: Build) -> None:
        self.attention = DistilAttention(build)
        self.sa_layer_norm = build.norm()
        self.ffn = DistilMLP(build)
        self.output_layer_norm = build.norm()

    def __call__(
        self, x: Float[Array, "b t d"], by: Attending, slides: bool = False
    ) -> Float[Array, "b t d"]:
        del slides  # no block does
        x = self.sa_layer_norm(x + self.attention(x, by))
        return self.output_layer_norm(x + self.ffn(x))
