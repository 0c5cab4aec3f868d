"""Encoders of the BERT family: embeddings, blocks, and the head of a task.

Modules and parameters are Flax NNX's, module names are Hugging Face's. The blocks run as one
`jax.lax.scan` over their stacked parameters, or one after the other if they are not stacked.

B batch, T tokens, D width, C classes, V vocabulary.

Sources: Liu et al. 2019, arXiv:1907.11692; Clark et al. 2020, arXiv:2003.10555.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models import deberta, modernbert
from lora_jax.models.bert_config import (
    ANSWERS,
    CLASSIFICATION,
    FEATURES,
    MASKED_LM,
    TOKENS,
    BertConfig,
)
from lora_jax.models.bert_parts import Attending, Build, Dense, DistilLayer, Embeddings, Layer
from lora_jax.models.context import check_tokens, of_own_tokens, of_whole_rows
from lora_jax.models.layers import ACTIVATIONS, logits_of, on_rows, run_blocks


class Features(NamedTuple):
    """The result of an encoder without a head.

    Attributes:
      hidden: the last block's hidden states.
      pooled: `tanh` of the pooler's layer on the first hidden state, or None without a pooler.
    """

    hidden: Float[Array, "b t d"]
    pooled: Float[Array, "b d"] | None


class Stack(nnx.Module):
    """The blocks.

    `layer` is one block whose parameters have a leading axis L (`scan`), or a dictionary of L
    blocks named by their number. DeBERTa's have a table of distances in common.
    """

    def __init__(self, build: Build, *, scan: bool) -> None:
        config = build.config
        numbers = range(config.num_hidden_layers)
        block = {
            "distilbert": DistilLayer,
            "deberta": partial(Layer, attention=deberta.SelfAttention),
        }.get(config.kind.head, Layer)
        if config.kind.head == "deberta":
            if config.own.distances:
                self.rel_embeddings = build.table(2 * config.own.span)
            if config.own.normed:
                self.LayerNorm = build.norm()
        self.layer = block(build) if scan else nnx.Dict({str(i): block(build) for i in numbers})


class Encoder(nnx.Module):
    """Embeddings, blocks and, where the config has one, the pooler."""

    def __init__(self, build: Build, *, scan: bool) -> None:
        config = build.config
        self.blocks, self.own = config.kind.blocks, config.own
        self.measured = config.kind.head == "deberta" and config.own.distances > 0
        self.embeddings = Embeddings(build)
        self.projects = config.embedded_size != config.hidden_size
        if self.projects:
            self.embeddings_project = build.linear(config.embedded_size, config.hidden_size)
        setattr(self, self.blocks, Stack(build, scan=scan))
        if config.pooler:
            self.pooler = Dense(config.hidden_size, build)

    @property
    def stack(self) -> Any:
        """The blocks."""
        return getattr(self, self.blocks).layer

    def distances(self, tokens: int) -> Float[Array, "c d"] | None:
        """DeBERTa's vectors of the distances between so many tokens."""
        if not self.measured:
            return None
        found: Any = getattr(self, self.blocks)
        vectors = found.rel_embeddings(deberta.distance_rows(tokens, self.own))
        return found.LayerNorm(vectors) if self.own.normed else vectors

    def final(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The hidden states, which are the last block's."""
        return x

    def embed(
        self,
        tokens: Int[AnyArray, "b t"],
        token_type_ids: Int[AnyArray, "b t"],
        positions: Int[AnyArray, "#b t"],
    ) -> Float[Array, "b t d"]:
        """The input of the first block."""
        x = self.embeddings(tokens, token_type_ids, positions)
        return self.embeddings_project(x) if self.projects else x


class Transform(nnx.Module):
    """BERT's dense layer and norm before the vocabulary."""

    def __init__(self, build: Build) -> None:
        self.dense = build.linear(build.config.hidden_size, build.config.hidden_size)
        self.LayerNorm = build.norm()


class Predictions(nnx.Module):
    """BERT's masked-LM head; its table is the word embedding."""

    def __init__(self, build: Build) -> None:
        self.transform = Transform(build)
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class Cls(nnx.Module):
    """The level that Hugging Face names `cls` around BERT's masked-LM head."""

    def __init__(self, build: Build) -> None:
        self.predictions = Predictions(build)


class LMHead(nnx.Module):
    """RoBERTa's masked-LM head; its table is the word embedding."""

    def __init__(self, build: Build) -> None:
        self.dense = build.linear(build.config.hidden_size, build.config.hidden_size)
        self.layer_norm = build.norm()
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class WordHead(nnx.Module):
    """DeBERTa's masked-LM head; its table is the word embedding."""

    def __init__(self, build: Build) -> None:
        self.dense = build.linear(build.config.hidden_size, build.config.hidden_size)
        self.LayerNorm = build.norm()
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class LMPredictions(nnx.Module):
    """The level that Hugging Face names `lm_predictions` around DeBERTa's masked-LM head."""

    def __init__(self, build: Build) -> None:
        self.lm_head = WordHead(build)


class Bias(nnx.Module):
    """What DistilBERT's masked-LM head has of its own beside the word embedding."""

    def __init__(self, build: Build) -> None:
        self.bias = nnx.Param(jnp.zeros((build.config.vocab_size,), build.param_dtype))


class FirstTokenHead(nnx.Module):
    """`W_2 act(W_1 x + b_1) + b_2` of the first hidden state: act is RoBERTa's tanh, or a gelu."""

    def __init__(self, build: Build) -> None:
        width = build.config.hidden_size
        self.dense = build.linear(width, width)
        self.out_proj = build.linear(width, len(build.config.labels))


class Headed(nnx.Module):
    """An encoder under its family's name, and the head of a task."""

    def __init__(self, build: Build, *, scan: bool) -> None:
        config = build.config
        # `bert` or `roberta`, as the checkpoint's tensors begin.
        setattr(self, config.kind.prefix, Encoder(build, scan=scan))
        head, width = config.kind.head, config.hidden_size
        if config.task == TOKENS:
            self.classifier = build.linear(width, len(config.labels))
        elif config.task == ANSWERS:
            self.qa_outputs = build.linear(width, 2)
        elif config.task == CLASSIFICATION and head in ("roberta", "electra"):
            self.classifier = FirstTokenHead(build)
        elif config.task == CLASSIFICATION:
            # It reads the result of another layer, which `logits` gives it: BERT's pooler, or one
            # of these.
            if head == "distilbert":
                self.pre_classifier = build.linear(width, width)
            elif head == "deberta":
                self.pooler = Dense(width, build)
            self.classifier = build.linear(width, len(config.labels))
        elif head == "distilbert":
            self.vocab_transform = build.linear(width, width)
            self.vocab_layer_norm = build.norm()
            self.vocab_projector = Bias(build)
        elif head == "roberta":
            self.lm_head = LMHead(build)
        elif head == "deberta" and not config.own.legacy:
            self.lm_predictions = LMPredictions(build)
        else:
            self.cls = Cls(build)


def make(
    config: BertConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, scan: bool, rngs: nnx.Rngs
) -> nnx.Module:
    """Makes the module for a config's task: the bare encoder, or one with a head."""
    build = Build(config, dtype, param_dtype, rngs)
    if config.kind.head == "modernbert":
        return modernbert.make(build, scan=scan)
    return (Encoder if config.task == FEATURES else Headed)(build, scan=scan)


def encoder_of(module: nnx.Module, config: BertConfig) -> Encoder:
    """The encoder in a model."""
    found: Any = module
    return found if config.task == FEATURES else getattr(found, config.kind.prefix)


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
    modern = config.kind.head == "modernbert"
    turned = modernbert.rotations(config, positions) if modern else ()
    by = Attending(of_whole_rows(mask, over), over, turned, encoder.distances(tokens.shape[1]))
    x = encoder.embed(tokens, token_type_ids, positions)
    x = run_blocks(
        encoder.stack,
        on_rows(x, rows, over),
        lambda block, x, number, own: on_rows(block(on_rows(x, rows, over), by, own), rows, over),
        wrap=wrap,
        each=config.slides,
    )
    return encoder.final(x)


def pooled(encoder: Encoder, hidden: Float[Array, "b t d"]) -> Float[Array, "b d"]:
    """`tanh(W x + b)` of the first hidden state."""
    return jnp.tanh(encoder.pooler.dense(hidden[:, 0]))


def logits(
    module: Any,
    config: BertConfig,
    hidden: Float[Array, "b t d"],
    mask: Bool[AnyArray, "b t"] | None = None,
) -> Array:
    """The head's float32 logits: (b, c) of a classifier, else (b, t, ·), two for answers."""
    if config.kind.head == "modernbert":
        return modernbert.logits(module, config, hidden, mask)
    encoder = encoder_of(module, config)
    if config.task == MASKED_LM:
        return _vocabulary(module, config, hidden)
    if config.task == ANSWERS:
        return module.qa_outputs(hidden).astype(jnp.float32)
    head: Any = module.classifier
    if config.task == TOKENS:
        return head(hidden).astype(jnp.float32)
    first = hidden[:, 0]
    if config.kind.head == "bert":
        return head(pooled(encoder, hidden)).astype(jnp.float32)
    if config.kind.head == "deberta":
        act = ACTIVATIONS[config.own.pooler_act]
        return head(act(module.pooler.dense(first))).astype(jnp.float32)
    if config.kind.head == "distilbert":
        return head(jax.nn.relu(module.pre_classifier(first))).astype(jnp.float32)
    act = jnp.tanh if config.kind.head == "roberta" else ACTIVATIONS["gelu"]
    return head.out_proj(act(head.dense(first))).astype(jnp.float32)


def _vocabulary(
    module: Headed, config: BertConfig, hidden: Float[Array, "b t d"]
) -> Float[Array, "b t v"]:
    """Scores of the words: a dense layer, an activation and a norm before the tied table."""
    if config.kind.head == "distilbert":
        head = module.vocab_projector
        x = ACTIVATIONS[config.hidden_act](module.vocab_transform(hidden))
        x = module.vocab_layer_norm(x)
    elif config.kind.head == "roberta":
        head = module.lm_head
        # transformers' RobertaLMHead has a gelu, whatever `hidden_act` is.
        x = head.layer_norm(ACTIVATIONS["gelu"](head.dense(hidden)))
    elif config.kind.head == "deberta" and not config.own.legacy:
        head = module.lm_predictions.lm_head
        x = head.LayerNorm(ACTIVATIONS[config.hidden_act](head.dense(hidden)))
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
