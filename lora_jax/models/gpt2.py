"""GPT-2: learned positions, LayerNorm, one fused projection for queries, keys and values.

    x <- x + Attention(LayerNorm(x))
    x <- x + W_proj gelu(W_fc LayerNorm(x) + b_fc) + b_proj

Modules and parameters are Flax NNX's, module names are Hugging Face's.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019. Dropout of the
base model is not applied; its rates are only read from and written to config.json.

B batch, T new tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.attention import Attend, Stored
from lora_jax.models.classifier import read_classes, write_classes
from lora_jax.models.dialect import (
    refuse_unsupported,
    scalar_if_one,
    tuple_of,
)
from lora_jax.models.heads import LANGUAGE
from lora_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    kept,
    logits_of,
    stack_of,
)
from lora_jax.models.mixing import Mixing
from lora_jax.models.ranges import check_fields, check_object, check_raw

# Fields of config.json -> ours.
_NAMES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "activation_function": "activation_function",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
}
_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Accepted and ignored: `n_ctx` repeats `n_positions`, softmax is always computed in float32, and
# the `summary_*` fields belong to a head that a language model lacks.
_WITHOUT_EFFECT = (
    "n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_MAYBE_NONE = ("bos_token_id", "pad_token_id", "eos_token_id")


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """GPT-2's configuration, with the field names of the other decoders.

    Attributes:
      model_type: "gpt2".
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP; None is four times `hidden_size`.
      num_hidden_layers: number of blocks.
      num_attention_heads: number of heads.
      max_position_embeddings: rows of the position table: the context, in tokens.
      layer_norm_epsilon: added to the variance before the root.
      activation_function: a key of `lora_jax.models.layers.ACTIVATIONS`.
      scale_attn_weights: divide attention scores by the root of the head size.
      scale_attn_by_inverse_layer_idx: divide the attention scores of block i by i + 1.
      tie_word_embeddings: the output head is the embedding table.
      dropout: rates after residuals, embeddings and attention weights; not applied.
      bos_token_id, pad_token_id: or None.
      eos_token_ids: the tokens that end a text.
      initializer_range: standard deviation of fresh weights.
      task, labels, problem_type: of a classifier, as in `LlamaConfig`.
    """

    model_type: str = "gpt2"
    vocab_size: int
    hidden_size: int
    intermediate_size: int | None = None
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    dropout: tuple[float, ...] = (0.1, 0.1, 0.1)
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02
    task: str = LANGUAGE
    labels: tuple[str, ...] = ()
    problem_type: str | None = None

    fresh_scale: ClassVar[float] = 1.0
    longrope_limit: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_fields(self, {ours: theirs for theirs, ours in _NAMES.items()})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: `n_embd` ({self.hidden_size}) is not a multiple of `n_head` "
                f"({self.num_attention_heads})"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"config: `activation_function` `{self.activation_function}` is not one of "
                f"{', '.join(ACTIVATIONS)}"
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """The number of query heads."""
        return self.num_attention_heads

    @property
    def context(self) -> int:
        """Maximum number of tokens in a text."""
        return self.max_position_embeddings

    @property
    def mixing(self) -> Mixing:
        """How queries weigh keys; no block has a sliding window."""
        # None is `1 / sqrt(H)`.
        scale = None if self.scale_attn_weights else 1.0
        return Mixing(slides=(False,) * self.num_hidden_layers, scale=scale)

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "GPT2Config":
        """Reads the object in config.json.

        Raises:
          ValueError: an invalid size, or a field whose value changes results and is not supported.
        """
        check_object(raw)
        refuse_unsupported(raw, (*_NAMES, *_DROPOUT, *_WITHOUT_EFFECT, "eos_token_id"))
        check_raw(raw)
        if raw.get("n_ctx", (stated := raw.get("n_positions", 1024))) != stated:
            raise ValueError(f"config: `n_ctx` is {raw['n_ctx']}, but `n_positions` {stated}")
        set_ = {k: v for k, v in raw.items() if v is not None or k in _MAYBE_NONE}
        given = {**_DEFAULTS, **set_}
        fields = {ours: given[theirs] for theirs, ours in _NAMES.items() if theirs in given}
        rates = tuple(float(given.get(name, 0.1)) for name in _DROPOUT)
        ends = tuple_of(given["eos_token_id"])
        fields |= {"dropout": rates, "eos_token_ids": ends, **read_classes(raw)}
        return GPT2Config(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json; `from_hf` reads it back unchanged."""
        return {
            "model_type": "gpt2",
            **write_classes(self, "GPT2LMHeadModel"),
            **{theirs: getattr(self, ours) for theirs, ours in _NAMES.items()},
            **dict(zip(_DROPOUT, self.dropout, strict=True)),
            "eos_token_id": scalar_if_one(self.eos_token_ids),
        }


class Attention(nnx.Module):
    """Attention with one fused projection for queries, keys and values."""

    def __init__(self, config: GPT2Config, *, linear: Callable[[int, int], nnx.Linear]) -> None:
        self.head_dim = config.head_dim
        self.by_number = config.scale_attn_by_inverse_layer_idx
        self.c_attn = linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = linear(config.hidden_size, config.hidden_size)

    def __call__(
        self, x: Float[Array, "b t d"], attend: Attend, stored: Stored, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Stored]:
        # (b, t, n, h) each
        q, k, v = (
            part.reshape(*x.shape[:2], -1, self.head_dim)
            for part in jnp.split(kept(self.c_attn(x)), 3, axis=-1)
        )
        # Dividing the queries divides their products with the keys.
        if self.by_number:
            q = q / (block + 1).astype(q.dtype)
        mixed, stored = attend(q, k, v, stored=stored, block=block)
        return kept(self.c_proj(mixed.reshape(x.shape))), stored


class MLP(nnx.Module):
    """`W_proj gelu(W_fc x + b_fc) + b_proj`."""

    def __init__(self, config: GPT2Config, *, linear: Callable[[int, int], nnx.Linear]) -> None:
        inner = config.intermediate_size or 4 * config.hidden_size
        self.activation = config.activation_function
        self.c_fc = linear(config.hidden_size, inner)
        self.c_proj = linear(inner, config.hidden_size)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.c_proj(ACTIVATIONS[self.activation](kept(self.c_fc(x))))


class Block(nnx.Module):
    """Attention and MLP, each on normalized input and added to the residual stream."""

    def __init__(
        self,
        config: GPT2Config,
        *,
        norm: Callable[[], LayerNorm],
        linear: Callable[[int, int], nnx.Linear],
    ) -> None:
        self.ln_1 = norm()
        self.attn = Attention(config, linear=linear)
        self.ln_2 = norm()
        self.mlp = MLP(config, linear=linear)

    def __call__(
        self, x: Float[Array, "b t d"], attend: Attend, stored: Stored, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Stored]:
        mixed, stored = self.attn(self.ln_1(x), attend, stored, block)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), stored


class Decoder(nnx.Module):
    """Embeddings, blocks, final norm; `h` is stacked or a dictionary, like Llama's `layers`."""

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        scan: bool | tuple[int, ...],
        rngs: nnx.Rngs,
    ) -> None:
        size = config.hidden_size

        def norm() -> LayerNorm:
            return LayerNorm(size, eps=config.layer_norm_epsilon, param_dtype=param_dtype)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def table(rows: int) -> Embedding:
            return Embedding(rows, size, dtype=dtype, param_dtype=param_dtype)

        def block(_: None) -> Block:
            return Block(config, norm=norm, linear=linear)

        self.wte = table(config.vocab_size)
        self.wpe = table(config.max_position_embeddings)
        self.h = stack_of([None] * config.num_hidden_layers, block, scan=scan)
        self.ln_f = norm()


class GPT2LM(nnx.Module):
    """The decoder and, unless it is tied to the embedding, its head."""

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        scan: bool | tuple[int, ...],
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.transformer = Decoder(
            config, dtype=dtype, param_dtype=param_dtype, scan=scan, rngs=rngs
        )
        self.tied = config.tie_word_embeddings
        self.name = "score" if config.labels else "lm_head"
        if not self.tied:
            head = nnx.Linear(
                config.hidden_size,
                len(config.labels) or config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            setattr(self, self.name, head)

    def embed(
        self, tokens: Int[AnyArray, "b t"], positions: Int[AnyArray, "#b t"]
    ) -> Float[Array, "b t d"]:
        """The input of the first block: each token's vector plus its position's."""
        return self.transformer.wte(tokens) + self.transformer.wpe(positions)

    def of_blocks(self, tokens: Int[AnyArray, "b t"], embedded: Float[Array, "b t d"]) -> None:
        """Blocks have no inputs of their own."""

    def final(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of the head."""
        return self.transformer.ln_f(x)

    def head(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits in float32."""
        # (v, d), or (d, v)
        weight = self.transformer.wte.embedding if self.tied else getattr(self, self.name).kernel
        return logits_of(hidden, weight.get_value(), tied=self.tied, dtype=self.dtype)

    @staticmethod
    def blocks(config: GPT2Config) -> tuple[str, ...]:
        """Where the blocks are in the model."""
        del config
        return "transformer", "h"

    @staticmethod
    def turns(config: GPT2Config, positions: Int[AnyArray, "b t"]) -> Callable[..., None]:
        """No rotation: positions are embedded."""
        del config, positions
        return lambda slides: None
