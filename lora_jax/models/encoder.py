"""Encoders as pure functions of their parameters, as `model.Forward` is for decoders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models import bert
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.heads import FEATURES
from lora_jax.models.layers import Specs, automatic
from lora_jax.models.model import Dtype, check_inputs, check_options
from lora_jax.models.remat import Remat, rematerialized
from lora_jax.models.structure import module_with, stacked, structure
from lora_jax.transform import eager


@dataclass(frozen=True, kw_only=True)
class EncoderForward:
    """An encoder without its parameters: architecture, task and options.

    Attributes:
      config: the architecture and the task.
      dtype: dtype of the computation; norms, softmax and logits stay float32.
      param_dtype: dtype of the parameters.
      scan: stack the blocks on a leading axis and scan over them, or keep them apart by number; see
        `Forward`.
      remat: recompute each block in the backward pass; see `Forward`.
      rows: axes of the mesh that shard the batch; see `Forward`.
      tokens: axis of the mesh that the tokens of a row are spread over; see `Forward`.
      gathered: what a block gathers of its weights; see `Forward`.
    """

    config: BertConfig
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    scan: bool | tuple[int, ...] = True
    remat: Remat = False
    rows: tuple[str, ...] = ()
    tokens: str | None = None
    gathered: Specs = ()

    def __post_init__(self) -> None:
        check_options(self.dtype, self.param_dtype, self.remat)
        if self.tokens is not None and self.config.kind.family == "deberta":
            raise ValueError(
                f'`mesh` has an axis "{self.tokens}", but attention by distance of '
                f"`{self.config.model_type}` needs whole rows: spread rows and weights instead "
                "(data, fsdp, tensor)"
            )

    @property
    def module(self) -> Callable[..., nnx.Module]:
        """Makes the NNX module."""
        return bert.make

    def apply(
        self,
        params: Any,
        tokens: Int[AnyArray, "b t"],
        *,
        mask: Bool[AnyArray, "b t"] | None = None,
        token_type_ids: Int[AnyArray, "b t"] | None = None,
        positions: Int[AnyArray, "b t"] | None = None,
        return_hidden: bool = False,
    ) -> bert.Features | Array:
        """Runs the encoder and the head of its task.

        Args:
          params: nested dictionaries of arrays, as in `Model.params`.
          tokens: token ids.
          mask: true at real tokens. Needed for padding on either side, unlike in a decoder.
          token_type_ids: which of two texts a token belongs to; 0 by default.
          positions: rows of the position table; by default BERT counts from 0 and RoBERTa from
            `pad_token_id + 1` over the tokens that are not padding.
          return_hidden: return the last hidden states, whatever the task.

        Returns:
          "features": `bert.Features`; "sequence-classification": float32 logits (b, c);
          "masked-lm", "token-classification": float32 logits (b, t, v), (b, t, c);
          "question-answering": those of starts and ends of answers, (b, t, 2); with
          `return_hidden`: hidden states (b, t, d) in the compute dtype.

        Raises:
          ValueError: an input of the wrong shape or dtype, more tokens than the model's context, or
            parameters of another model.
        """
        _check(self.config, tokens, mask, token_type_ids=token_type_ids, positions=positions)
        run = partial(self._apply, return_hidden=return_hidden)
        inputs: dict[str, Any] = {
            "mask": mask,
            "token_type_ids": token_type_ids,
            "positions": positions,
        }
        return automatic(run, params, tokens, **inputs)

    @eager.compiled("self", "return_hidden")
    def _apply(
        self,
        params: Any,
        tokens: Int[AnyArray, "b t"],
        *,
        mask: Bool[AnyArray, "b t"] | None,
        token_type_ids: Int[AnyArray, "b t"] | None,
        positions: Int[AnyArray, "b t"] | None,
        return_hidden: bool,
    ) -> bert.Features | Array:
        module = module_with(self, params)
        encoder = bert.encoder_of(module, self.config)
        hidden = bert.hidden_states(
            encoder,
            self.config,
            tokens,
            mask=mask,
            token_type_ids=token_type_ids,
            positions=positions,
            wrap=rematerialized(self.remat, self.gathered, tokens=self.tokens),
            rows=self.rows,
            over=self.tokens,
        )
        if return_hidden:
            return hidden
        return self._result(module, encoder, hidden, mask)

    def _result(
        self,
        module: Any,
        encoder: Any,
        hidden: Float[Array, "b t d"],
        mask: Bool[AnyArray, "b t"] | None,
    ) -> bert.Features | Array:
        if self.config.task == FEATURES:
            state = bert.pooled(encoder, hidden) if self.config.pooler else None
            return bert.Features(hidden, state)
        return bert.logits(module, self.config, hidden, mask)

    def head(
        self,
        params: Any,
        hidden: Float[Array, "b t d"],
        *,
        mask: Bool[AnyArray, "b t"] | None = None,
    ) -> bert.Features | Array:
        """The task's result from the hidden states of `apply(..., return_hidden=True)`.

        A classifier that reads the mean of all tokens needs the mask, where there is padding.
        """

        def run(params: Any, hidden: Float[Array, "b t d"], mask: Any) -> bert.Features | Array:
            module = module_with(self, params)
            return self._result(module, bert.encoder_of(module, self.config), hidden, mask)

        return automatic(run, params, hidden, mask=mask)

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = structure(self)[1]
        # Only a model with a head has the family's prefix around the encoder.
        inside = () if self.config.task == FEATURES else (self.config.kind.prefix,)
        count, kind = self.config.num_hidden_layers, self.config.kind
        blocks = (kind.blocks,) if kind.blocks == "layers" else (kind.blocks, "layer")
        return stacked(shapes, (*inside, *blocks), count) if self.scan else shapes


def _check(
    config: BertConfig, tokens: Any, mask: Any, *, token_type_ids: Any, positions: Any
) -> None:
    check_inputs(tokens, mask)
    shape = jnp.shape(tokens)
    if config.placed and shape[1] > config.context:
        raise ValueError(
            f"`tokens` of shape {shape} are longer than the model's context of {config.context}"
        )
    if positions is not None and not config.placed:
        raise ValueError(
            f"`positions` came for `{config.model_type}`, which has no table of them: leave them "
            "out"
        )
    if token_type_ids is not None and not config.typed:
        raise ValueError(
            f"`token_type_ids` came for `{config.model_type}`, whose tokens have no types: leave "
            "them out"
        )
    for name, value in (("token_type_ids", token_type_ids), ("positions", positions)):
        if value is None:
            continue
        whole = jnp.issubdtype(jnp.result_type(value), jnp.integer)
        if jnp.shape(value) != shape or not whole:
            raise ValueError(
                f"`{name}` must be integers of the tokens' shape {shape}, got "
                f"{jnp.result_type(value)} of shape {jnp.shape(value)}"
            )
