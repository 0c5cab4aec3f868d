"""ModernBERT: an encoder with rotary positions, windows, a gated MLP and norms before both.

    x <- x + W_o Attention(LayerNorm(x))                       the first block has no norm here
    x <- x + W_o (act(W_a n) * W_b n),  n = LayerNorm(x)       W_i is W_a beside W_b

Modules and parameters are Flax NNX's, module names are Hugging Face's.

B batch, T tokens, S tokens of a whole row, D width, N heads, H size of a head, C classes.

Source: Warner et al. 2024, arXiv:2412.13663.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.attention import choose
from lora_jax.models.bert_config import CLASSIFICATION, FEATURES, MASKED_LM
from lora_jax.models.bert_parts import Attending, Build, both_ways
from lora_jax.models.layers import ACTIVATIONS, LayerNorm, RMSNorm, kept, logits_of, stack_of
from lora_jax.models.rope import Rotation, rotate, rotation


def _norm(build: Build) -> LayerNorm | RMSNorm:
    size, eps = build.config.hidden_size, build.config.layer_norm_eps
    if build.config.own.norm_bias:
        return LayerNorm(size, eps=eps, param_dtype=build.param_dtype)
    return RMSNorm(size, eps=eps, param_dtype=build.param_dtype, centered=True)


class Embeddings(nnx.Module):
    """A token's vector, normalized."""

    def __init__(self, build: Build) -> None:
        self.tok_embeddings = build.table(build.config.vocab_size)
        self.norm = _norm(build)


class Attention(nnx.Module):
    """Every token attends to every real token, or to those nearby."""

    def __init__(self, build: Build) -> None:
        width, bias = build.config.hidden_size, build.config.own.attention_bias
        self.heads, self.reach = build.config.num_attention_heads, build.config.own.window // 2
        self.Wqkv = build.linear(width, 3 * width, bias=bias)
        self.Wo = build.linear(width, width, bias=bias)

    def __call__(
        self, x: Float[Array, "b t d"], by: Attending, slides: bool | Bool[Array, ""]
    ) -> Float[Array, "b t d"]:
        apart = kept(self.Wqkv(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (apart[:, :, i] for i in range(3))  # (b, t, n, h) each
        turned = choose(slides, *by.rotations)
        q, k = rotate(q, turned), rotate(k, turned)

        def near(back: Int[Array, "t s"]) -> Bool[Array, "t s"]:
            return (jnp.abs(back) <= self.reach) | ~jnp.asarray(slides)

        return kept(self.Wo(both_ways(q, k, v, by=by, near=near).reshape(x.shape)))


class MLP(nnx.Module):
    """`W_o (act(W_a x) * W_b x)`."""

    def __init__(self, build: Build) -> None:
        config = build.config
        self.act, bias = config.hidden_act, config.own.mlp_bias
        self.Wi = build.linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.Wo = build.linear(config.intermediate_size, config.hidden_size, bias=bias)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        a, b = jnp.split(kept(self.Wi(x)), 2, axis=-1)
        return kept(self.Wo(ACTIVATIONS[self.act](a) * b))


class Layer(nnx.Module):
    """One block; the first one reads normalized embeddings already."""

    def __init__(self, build: Build, *, first: bool) -> None:
        self.first = first
        if not first:
            self.attn_norm = _norm(build)
        self.attn = Attention(build)
        self.mlp_norm = _norm(build)
        self.mlp = MLP(build)

    def __call__(
        self, x: Float[Array, "b t d"], by: Attending, slides: bool | Bool[Array, ""]
    ) -> Float[Array, "b t d"]:
        x = x + self.attn(x if self.first else self.attn_norm(x), by, slides)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, build: Build, *, scan: bool) -> None:
        self.embeddings = Embeddings(build)
        first = tuple(number == 0 for number in range(build.config.num_hidden_layers))
        self.layers = stack_of(first, lambda one: Layer(build, first=one), scan=scan)
        self.final_norm = _norm(build)

    def distances(self, tokens: int) -> None:
        """None: DeBERTa alone has a table of distances."""

    @property
    def stack(self) -> Any:
        """The blocks."""
        return self.layers

    def embed(
        self,
        tokens: Int[AnyArray, "b t"],
        token_type_ids: Int[AnyArray, "b t"],
        positions: Int[AnyArray, "#b t"],
    ) -> Float[Array, "b t d"]:
        """The input of the first block; the blocks rotate by the positions."""
        del token_type_ids, positions
        return self.embeddings.norm(self.embeddings.tok_embeddings(tokens))

    def final(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The hidden states, from the last block's."""
        return self.final_norm(x)


class Head(nnx.Module):
    """`LayerNorm(act(W x))`, before every task's last layer."""

    def __init__(self, build: Build) -> None:
        width, own = build.config.hidden_size, build.config.own
        self.act = own.activation
        self.dense = build.linear(width, width, bias=own.classifier_bias)
        self.norm = _norm(build)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.norm(ACTIVATIONS[self.act](self.dense(x)))


class Decoder(nnx.Module):
    """What the masked-LM head has of its own beside the table."""

    def __init__(self, build: Build) -> None:
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class Headed(nnx.Module):
    """An encoder and the head of a task."""

    def __init__(self, build: Build, *, scan: bool) -> None:
        config = build.config
        self.model = Encoder(build, scan=scan)
        self.head = Head(build)
        if config.task != MASKED_LM:
            self.classifier = build.linear(config.hidden_size, len(config.labels))
        elif config.own.decoder_bias:
            self.decoder = Decoder(build)


def make(build: Build, *, scan: bool) -> nnx.Module:
    """Makes the module for a config's task."""
    return (Encoder if build.config.task == FEATURES else Headed)(build, scan=scan)


def rotations(config: Any, positions: Int[AnyArray, "#b t"]) -> tuple[Rotation, Rotation]:
    """The rotations of blocks that slide, and of the others."""
    size = config.hidden_size // config.num_attention_heads
    local, whole = (
        rotation(
            positions, head_dim=size, theta=theta, scaling=None,
            context=config.max_position_embeddings,
        )
        for theta in config.own.thetas
    )  # fmt: skip
    return local, whole


def logits(
    module: Headed,
    config: Any,
    hidden: Float[Array, "b t d"],
    mask: Bool[AnyArray, "b t"] | None,
) -> Array:
    """The task's float32 logits: (b, c) of a classifier of texts, else (b, t, ·)."""
    if config.task == CLASSIFICATION and config.own.pooling == "mean":
        real = jnp.ones(hidden.shape[:2], bool) if mask is None else jnp.asarray(mask)
        weights = real.astype(jnp.float32)
        summed = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weights)
        hidden = (summed / weights.sum(axis=1)[:, None]).astype(hidden.dtype)
    elif config.task == CLASSIFICATION:
        hidden = hidden[:, 0]
    x = module.head(hidden)
    if config.task != MASKED_LM:
        return module.classifier(x).astype(jnp.float32)
    table = module.model.embeddings.tok_embeddings.embedding.get_value()  # (v, d)
    scores = logits_of(x, table, tied=True, dtype=x.dtype)
    if not config.own.decoder_bias:
        return scores
    return scores + module.decoder.bias.get_value().astype(jnp.float32)
