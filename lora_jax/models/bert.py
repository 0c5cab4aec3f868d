"""Encoders of the BERT family: embeddings, blocks, and the head of a task.

Modules and parameters are Flax NNX's, module names are Hugging Face's. The blocks run as one
`jax.lax.scan` over their stacked parameters, or one after the other if they are not stacked.

B batch, T tokens, D width, C classes, V vocabulary.

Sources: Liu et al. 2019, arXiv:1907.11692; Clark et al. 2020, arXiv:2003.10555.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models import deberta, modernbert
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.bert_parts import Attending, Build, Dense, DistilLayer, Embeddings, Layer
from lora_jax.models.context import check_tokens, of_own_tokens, of_whole_rows
from lora_jax.models.heads import FEATURES, Head, nested
from lora_jax.models.layers import ACTIVATIONS, logits_of, on_rows, run_blocks, stack_of


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

    def __init__(self, build: Build, *, scan: bool | tuple[int, ...]) -> None:
        config = build.config
        numbers = (None,) * config.num_hidden_layers
        block = {
            "distilbert": DistilLayer,
            "deberta": partial(Layer, attention=deberta.SelfAttention),
        }.get(config.kind.family, Layer)
        if config.kind.family == "deberta":
            if config.own.distances:
                self.rel_embeddings = build.table(2 * config.own.span)
            if config.own.normed:
                self.LayerNorm = build.norm()
            if config.own.taps:
                self.conv = deberta.Convolution(build)
        self.layer = stack_of(numbers, lambda _: block(build), scan=scan)


class Encoder(nnx.Module):
    """Embeddings, blocks and, where the config has one, the pooler."""

    def __init__(self, build: Build, *, scan: bool | tuple[int, ...]) -> None:
        config = build.config
        self.blocks, self.own = config.kind.blocks, config.own
        self.measured = config.kind.family == "deberta" and config.own.distances > 0
        self.convolved = config.kind.family == "deberta" and config.own.taps > 0
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

    @property
    def table(self) -> Any:
        """The embedding of the words."""
        return self.embeddings.word_embeddings

    def distances(self, tokens: int) -> Float[Array, "c d"] | None:
        """DeBERTa's vectors of the distances between so many tokens."""
        if not self.measured:
            return None
        found: Any = getattr(self, self.blocks)
        vectors = found.rel_embeddings(deberta.distance_rows(tokens, self.own))
        return found.LayerNorm(vectors) if self.own.normed else vectors

    def after(
        self, x: Float[Array, "b t d"], mask: Bool[AnyArray, "b t"] | None
    ) -> Callable[[Float[Array, "b t d"], Any], Float[Array, "b t d"]]:
        """A function of a block's result and its number; DeBERTa's may change the first one's."""
        if not self.convolved:
            return lambda y, number: y
        found: Any = getattr(self, self.blocks)
        return found.conv.after(x, mask)

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


class Layers(nnx.Module):
    """The modules and parameters of a head, under Hugging Face's names."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            setattr(self, name, Layers(part) if isinstance(part, dict) else part)


def head_layers(build: Build) -> dict[str, Any]:
    """The layers of the task's head, as nested dictionaries; BERT's pooler is the encoder's."""
    config, head = build.config, build.config.head
    width, (first, last) = config.hidden_size, head.biased
    layers = {}
    if head.dense is not None and not config.needs_pooler:
        layers[head.dense] = build.linear(width, width, bias=first)
    if head.norm is not None:
        layers[head.norm] = build.norm()
    if head.last is not None:
        layers[head.last] = build.linear(width, len(config.labels), bias=last)
    elif head.bias is not None and last:
        layers[head.bias] = nnx.Param(jnp.zeros((config.vocab_size,), build.param_dtype))
    return nested(layers.items())


def make(
    config: BertConfig,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    scan: bool | tuple[int, ...],
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Makes the module for a config's task: the bare encoder, or one with a head."""
    build = Build(config, dtype, param_dtype, rngs)
    modern = config.kind.family == "modernbert"
    encoder = (modernbert.Encoder if modern else Encoder)(build, scan=scan)
    if config.task == FEATURES:
        return encoder
    # `bert` or `roberta`, as the checkpoint's tensors begin.
    return Layers({config.kind.prefix: encoder, **head_layers(build)})


def encoder_of(module: nnx.Module, config: BertConfig) -> Encoder | modernbert.Encoder:
    """The encoder in a model."""
    found: Any = module
    return found if config.task == FEATURES else getattr(found, config.kind.prefix)


def hidden_states(
    encoder: Encoder | modernbert.Encoder,
    config: BertConfig,
    tokens: Int[AnyArray, "b t"],
    *,
    mask: Bool[AnyArray, "b t"] | None,
    token_type_ids: Int[AnyArray, "b t"] | None,
    positions: Int[AnyArray, "b t"] | None,
    wrap: Callable[..., Callable],
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
    modern = config.kind.family == "modernbert"
    turned = modernbert.rotations(config, positions) if modern else ()
    by = Attending(of_whole_rows(mask, over), over, turned, encoder.distances(tokens.shape[1]))
    x = encoder.embed(tokens, token_type_ids, positions)
    after = encoder.after(x, mask)

    def call(block: Any, x: Float[Array, "b t d"], number: Any, own: Any) -> Float[Array, "b t d"]:
        return on_rows(after(block(on_rows(x, rows, over), by, own), number), rows, over)

    x = run_blocks(
        encoder.stack,
        on_rows(x, rows, over),
        call,
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
    head: Head = config.head

    def layer(path: str) -> Any:
        return reduce(getattr, path.split("."), module)

    x = _read(head, hidden, mask)
    if head.dense is not None:
        x = ACTIVATIONS[head.act or config.hidden_act](layer(head.dense)(x))
    if head.norm is not None:
        x = layer(head.norm)(x)
    if head.last is not None:
        return layer(head.last)(x).astype(jnp.float32)
    table = encoder_of(module, config).table.embedding.get_value()  # (v, d)
    scores = logits_of(x, table, tied=True, dtype=x.dtype)
    if head.bias is None or not head.biased[1]:
        return scores
    return scores + layer(head.bias).get_value().astype(jnp.float32)


def _read(
    head: Head, hidden: Float[Array, "b t d"], mask: Bool[AnyArray, "b t"] | None
) -> Float[Array, "b *t d"]:
    """The hidden states that a head reads."""
    if head.reads == "each":
        return hidden
    if head.reads == "first":
        return hidden[:, 0]
    real = jnp.ones(hidden.shape[:2], bool) if mask is None else jnp.asarray(mask)
    weights = real.astype(jnp.float32)
    summed = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weights)
    return (summed / weights.sum(axis=1)[:, None]).astype(hidden.dtype)


def _positions(tokens: Int[AnyArray, "b t"], config: BertConfig) -> Int[Array, "#b t"]:
    if not config.kind.offset_positions:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # As in fairseq, which trained RoBERTa: real tokens count from pad_token_id + 1 and padding has
    # row pad_token_id. It depends on the token ids alone, not on the mask.
    real = tokens != config.pad_token_id
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + jnp.int32(config.pad_token_id)
