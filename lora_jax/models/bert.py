"""The encoder: blocks of full attention and an MLP, a norm after each (BERT, RoBERTa).

    x <- LayerNorm(x + W_o Attention(x) + b_o)
    x <- LayerNorm(x + W_2 act(W_1 x + b_1) + b_2)

Modules and parameters are Flax NNX's, module names are Hugging Face's. The blocks run as one
`jax.lax.scan` over their stacked parameters, or one after the other if they are not stacked.
Dropout of the base model is not applied: adapters have their own.

B batch, T tokens, D width, N heads, H size of a head, L blocks, C classes, V vocabulary.

Sources: Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.bert_config import CLASSIFICATION, MASKED_LM, BertConfig
from lora_jax.models.context import check_tokens, of_own_tokens, of_whole_rows, over_tokens
from lora_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    kept,
    logits_of,
    on_rows,
    run_blocks,
)


class Attending(NamedTuple):
    """What a query attends to.

    Attributes:
      mask: true at the keys, of all heads; None for all.
      over: the axis of the mesh that the tokens of a row are spread over, or None.
    """

    mask: Bool[AnyArray, "b s"] | None
    over: str | None


class Features(NamedTuple):
    """The result of an encoder without a head.

    Attributes:
      hidden: the last block's hidden states.
      pooled: `tanh` of the pooler's layer on the first hidden state, or None without a pooler.
    """

    hidden: Float[Array, "b t d"]
    pooled: Float[Array, "b d"] | None


class _Build(NamedTuple):
    """The options that all modules share."""

    config: BertConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(
            inputs, outputs, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs
        )

    def norm(self) -> LayerNorm:
        config = self.config
        return LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps, param_dtype=self.param_dtype
        )

    def table(self, rows: int) -> Embedding:
        width = self.config.hidden_size
        return Embedding(rows, width, dtype=self.dtype, param_dtype=self.param_dtype)


class Embeddings(nnx.Module):
    """The sum of a token's, its type's and its position's vectors, normalized."""

    def __init__(self, build: _Build) -> None:
        config = build.config
        self.word_embeddings = build.table(config.vocab_size)
        self.position_embeddings = build.table(config.max_position_embeddings)
        self.token_type_embeddings = build.table(config.type_vocab_size)
        self.LayerNorm = build.norm()

    def __call__(
        self,
        tokens: Int[AnyArray, "b t"],
        token_type_ids: Int[AnyArray, "b t"],
        positions: Int[AnyArray, "#b t"],
    ) -> Float[Array, "b t d"]:
        x = self.word_embeddings(tokens) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(x + self.position_embeddings(positions))


class SelfAttention(nnx.Module):
    """Every token attends to every real token."""

    def __init__(self, build: _Build) -> None:
        width = build.config.hidden_size
        self.heads = build.config.num_attention_heads
        self.query = build.linear(width, width)
        self.key = build.linear(width, width)
        self.value = build.linear(width, width)

    def __call__(self, x: Float[Array, "b t d"], by: Attending) -> Float[Array, "b t d"]:
        # (b, t, n, h) each
        q, k, v = (
            kept(project(x)).reshape(*x.shape[:2], self.heads, -1)
            for project in (self.query, self.key, self.value)
        )

        def mix(q: Array, k: Array, v: Array, first: Any, mask: Any) -> Array:
            del first
            seen = None if mask is None else jnp.asarray(mask)[:, None, None, :]  # (b, 1, 1, s)
            return jax.nn.dot_product_attention(q, k, v, mask=seen)

        return over_tokens(mix, q, k, v, by.mask, axis=by.over).reshape(x.shape)


class Output(nnx.Module):
    """`LayerNorm(residual + W x + b)`: the last step of attention and of the MLP."""

    def __init__(self, inputs: int, build: _Build) -> None:
        self.dense = build.linear(inputs, build.config.hidden_size)
        self.LayerNorm = build.norm()

    def __call__(
        self, x: Float[Array, "b t f"], residual: Float[Array, "b t d"]
    ) -> Float[Array, "b t d"]:
        return self.LayerNorm(residual + kept(self.dense(x)))


class Attention(nnx.Module):
    """Attention and its output layer; `Layer` calls the two."""

    def __init__(self, build: _Build) -> None:
        self.self = SelfAttention(build)
        self.output = Output(build.config.hidden_size, build)


class Dense(nnx.Module):
    """A dense layer one level deeper, as Hugging Face names it (`intermediate.dense`)."""

    def __init__(self, outputs: int, build: _Build) -> None:
        self.dense = build.linear(build.config.hidden_size, outputs)


class Layer(nnx.Module):
    """One block."""

    def __init__(self, build: _Build) -> None:
        config = build.config
        self.act = config.hidden_act
        self.attention = Attention(build)
        self.intermediate = Dense(config.intermediate_size, build)
        self.output = Output(config.intermediate_size, build)

    def __call__(self, x: Float[Array, "b t d"], by: Attending) -> Float[Array, "b t d"]:
        x = self.attention.output(self.attention.self(x, by), x)
        wide = kept(self.intermediate.dense(x))  # (b, t, f)
        return self.output(ACTIVATIONS[self.act](wide), x)


class Stack(nnx.Module):
    """The blocks.

    `layer` is one block whose parameters have a leading axis L (`scan`), or a dictionary of L
    blocks named by their number.
    """

    def __init__(self, build: _Build, *, scan: bool) -> None:
        numbers = range(build.config.num_hidden_layers)
        self.layer = Layer(build) if scan else nnx.Dict({str(i): Layer(build) for i in numbers})


class Encoder(nnx.Module):
    """Embeddings, blocks and, where the config has one, the pooler."""

    def __init__(self, build: _Build, *, scan: bool) -> None:
        self.embeddings = Embeddings(build)
        self.encoder = Stack(build, scan=scan)
        if build.config.pooler:
            self.pooler = Dense(build.config.hidden_size, build)


class Transform(nnx.Module):
    """BERT's dense layer and norm before the vocabulary."""

    def __init__(self, build: _Build) -> None:
        self.dense = build.linear(build.config.hidden_size, build.config.hidden_size)
        self.LayerNorm = build.norm()


class Predictions(nnx.Module):
    """BERT's masked-LM head; its table is the word embedding."""

    def __init__(self, build: _Build) -> None:
        self.transform = Transform(build)
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class Cls(nnx.Module):
    """The level that Hugging Face names `cls` around BERT's masked-LM head."""

    def __init__(self, build: _Build) -> None:
        self.predictions = Predictions(build)


class LMHead(nnx.Module):
    """RoBERTa's masked-LM head; its table is the word embedding."""

    def __init__(self, build: _Build) -> None:
        self.dense = build.linear(build.config.hidden_size, build.config.hidden_size)
        self.layer_norm = build.norm()
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class FirstTokenHead(nnx.Module):
    """RoBERTa's classification head: `W_2 tanh(W_1 x + b_1) + b_2` of the first hidden state."""

    def __init__(self, build: _Build) -> None:
        width = build.config.hidden_size
        self.dense = build.linear(width, width)
        self.out_proj = build.linear(width, len(build.config.labels))


class Headed(nnx.Module):
    """An encoder under its family's name, and the head of a task."""

    def __init__(self, build: _Build, *, scan: bool) -> None:
        config = build.config
        # `bert` or `roberta`, as the checkpoint's tensors begin.
        setattr(self, config.kind.prefix, Encoder(build, scan=scan))
        roberta = config.kind.roberta_heads
        if config.task == CLASSIFICATION:
            classes = len(config.labels)
            # BERT's classifier reads the pooler's result, which `logits` gives it.
            pooled = FirstTokenHead if roberta else lambda b: b.linear(config.hidden_size, classes)
            self.classifier = pooled(build)
        elif roberta:
            self.lm_head = LMHead(build)
        else:
            self.cls = Cls(build)


def make(
    config: BertConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, scan: bool, rngs: nnx.Rngs
) -> nnx.Module:
    """Makes the module for a config's task: the bare encoder, or one with a head."""
    build = _Build(config, dtype, param_dtype, rngs)
    headed = config.task in (CLASSIFICATION, MASKED_LM)
    return (Headed if headed else Encoder)(build, scan=scan)


def encoder_of(module: nnx.Module, config: BertConfig) -> Encoder:
    """The encoder in a model."""
    return getattr(module, config.kind.prefix) if isinstance(module, Headed) else module  # type: ignore[return-value]


def hidden_states(
    encoder: Encoder,
    config: BertConfig,
    tokens: Int[AnyArray, "b t"],
    *,
    mask: Bool[AnyArray, "b t"] | None,
    token_type_ids: Int[AnyArray, "b t"] | None,
    positions: Int[AnyArray, "b t"] | None,
    wrap: Callable[[Callable], Callable],
    rows: tuple[str, ...] = (),
    over: str | None = None,
) -> Float[Array, "b t d"]:
    """Runs the encoder up to its last block.

    Args:
      encoder: the module, holding its parameters.
      config: its configuration.
      tokens: token ids.
      mask: true at real tokens; None if there is no padding.
      token_type_ids: which of two texts a token belongs to; None is 0 everywhere.
      positions: rows of the position table; None counts them as the family does.
      wrap: applied to the function that runs one block (rematerialization).
      rows: axes of the mesh that shard the batch, see `lora_jax.models.layers.on_rows`.
      over: the axis that the tokens of a row are spread over, or None.

    Returns:
      Hidden states; those at padding are meaningless.
    """
    check_tokens(tokens.shape[1], over)
    if positions is None:
        positions = of_own_tokens(_positions(of_whole_rows(tokens, over), config), over)
    if token_type_ids is None:
        token_type_ids = jnp.zeros_like(tokens)
    # Keys that all queries and heads attend to, (b, 1, 1, t).
    by = Attending(of_whole_rows(mask, over), over)
    x = encoder.embeddings(tokens, token_type_ids, positions)
    return run_blocks(
        encoder.encoder.layer,
        on_rows(x, rows, over),
        lambda block, x, number, own: on_rows(block(on_rows(x, rows, over), by), rows, over),
        wrap=wrap,
        each=(False,) * config.num_hidden_layers,
    )


def pooled(encoder: Encoder, hidden: Float[Array, "b t d"]) -> Float[Array, "b d"]:
    """`tanh(W x + b)` of the first hidden state."""
    return jnp.tanh(encoder.pooler.dense(hidden[:, 0]))


def logits(module: Headed, config: BertConfig, hidden: Float[Array, "b t d"]) -> Array:
    """The head's float32 logits: (b, c) of a classifier, (b, t, v) of a masked LM."""
    encoder = encoder_of(module, config)
    if config.task == MASKED_LM:
        return _vocabulary(module, config, hidden)
    if not config.kind.roberta_heads:
        return module.classifier(pooled(encoder, hidden)).astype(jnp.float32)
    head = module.classifier
    return head.out_proj(jnp.tanh(head.dense(hidden[:, 0]))).astype(jnp.float32)


def _vocabulary(
    module: Headed, config: BertConfig, hidden: Float[Array, "b t d"]
) -> Float[Array, "b t v"]:
    """Scores of the words: a dense layer, an activation and a norm before the tied table."""
    if config.kind.roberta_heads:
        head = module.lm_head
        # transformers' RobertaLMHead has a gelu, whatever `hidden_act` is.
        x = head.layer_norm(ACTIVATIONS["gelu"](head.dense(hidden)))
    else:
        head = module.cls.predictions
        x = ACTIVATIONS[config.hidden_act](head.transform.dense(hidden))
        x = head.transform.LayerNorm(x)
    # (v, d)
    table = encoder_of(module, config).embeddings.word_embeddings.embedding.get_value()
    scores = logits_of(x, table, tied=True, dtype=x.dtype)
    return scores + head.bias.get_value().astype(jnp.float32)


def _positions(tokens: Int[AnyArray, "b t"], config: BertConfig) -> Int[Array, "#b t"]:
    if not config.kind.offset_positions:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # As in fairseq, which trained RoBERTa: real tokens count from pad_token_id + 1 and padding has
    # row pad_token_id. It depends on the token ids alone, not on the mask.
    real = tokens != config.pad_token_id
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + jnp.int32(config.pad_token_id)
