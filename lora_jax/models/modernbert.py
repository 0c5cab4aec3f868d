"""ModernBERT: an encoder with rotary positions, windows, a gated MLP and norms before both.

    x <- x + W_o Attention(LayerNorm(x))                       the first block has no norm here
    x <- x + W_o (act(W_a n) * W_b n),  n = LayerNorm(x)       W_i is W_a beside W_b

Modules and parameters are Flax NNX's, module names are Hugging Face's.

B batch, T tokens, S tokens of a whole row, D width, N heads, H size of a head.

Source: Warner et al. 2024, arXiv:2412.13663.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.attention import choose
from lora_jax.models.bert_parts import Attending, Build, both_ways
from lora_jax.models.layers import ACTIVATIONS, kept, stack_of
from lora_jax.models.rope import Rotation, rotate, rotation


class Embeddings(nnx.Module):
    """A token's vector, normalized."""

    def __init__(self, build: Build) -> None:
        self.tok_embeddings = build.table(build.config.vocab_size)
        self.norm = build.norm()


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
            self.attn_norm = build.norm()
        self.attn = Attention(build)
        self.mlp_norm = build.norm()
        self.mlp = MLP(build)

    def __call__(
        self, x: Float[Array, "b t d"], by: Attending, slides: bool | Bool[Array, ""]
    ) -> Float[Array, "b t d"]:
        x = x + self.attn(x if self.first else self.attn_norm(x), by, slides)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, build: Build, *, scan: bool | tuple[int, ...]) -> None:
        self.embeddings = Embeddings(build)
        first = tuple(number == 0 for number in range(build.config.num_hidden_layers))
        self.layers = stack_of(first, lambda one: Layer(build, first=one), scan=scan)
        self.final_norm = build.norm()

    def distances(self, tokens: int) -> None:
        """None: DeBERTa alone has a table of distances."""

    @property
    def stack(self) -> Any:
        """The blocks."""
        return self.layers

    @property
    def table(self) -> Any:
        """The embedding of the words."""
        return self.embeddings.tok_embeddings

    def embed(
        self,
        tokens: Int[AnyArray, "b t"],
        token_type_ids: Int[AnyArray, "b t"],
        positions: Int[AnyArray, "#b t"],
    ) -> Float[Array, "b t d"]:
        """The input of the first block; the blocks rotate by the positions."""
        del token_type_ids, positions
        return self.embeddings.norm(self.embeddings.tok_embeddings(tokens))

    def after(self, x: Float[Array, "b t d"], mask: Any) -> Any:
        """A block's result as it is: DeBERTa alone changes one."""
        return lambda y, number: y

    def final(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The hidden states, from the last block's."""
        return self.final_norm(x)


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
