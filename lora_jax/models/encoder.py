"""Encoders as pure functions of their parameters: the counterpart of `model.Forward`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models import bert
from lora_jax.models.bert_config import FEATURES, BertConfig
from lora_jax.models.model import (
    check_inputs,
    check_options,
    rematerialized,
    stacked,
    structure,
)


@dataclass(frozen=True, kw_only=True)
class EncoderForward:
    """How to compute an encoder: everything but its numbers.

    Attributes:
      config: the architecture and the task.
      dtype: dtype of the computation; norms, softmax and logits stay float32.
      param_dtype: dtype of the parameters.
      scan: blocks stacked on a leading axis and scanned, or kept apart by number.
      remat: recompute each block's inside in the backward pass; see `Forward`.
      rows: axes of the mesh that the batch's rows are spread over; see `Forward`.
    """

    config: BertConfig
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = True
    remat: bool | str = False
    rows: tuple[str, ...] = ()

    def __post_init__(self):
        check_options(self.dtype, self.param_dtype, self.remat)

    @property
    def module(self) -> Callable[..., nnx.Module]:
        """Makes the NNX module."""
        return bert.make

    def apply(
        self,
        params: Any,
        tokens: Int[Array, "b t"],  # noqa: F722
        *,
        mask: Bool[Array, "b t"] | None = None,  # noqa: F722
        token_type_ids: Int[Array, "b t"] | None = None,  # noqa: F722
        positions: Int[Array, "b t"] | None = None,  # noqa: F722
        return_hidden: bool = False,
    ):
        """What the task asks for.

        Args:
          params: nested dictionaries of arrays, as in `Model.params`.
          tokens: token ids.
          mask: true at real tokens. Unlike in a decoder, padding on either side needs it.
          token_type_ids: which of two texts a token belongs to; 0 by default.
          positions: rows of the position table; by default BERT counts from 0 and RoBERTa from
            `pad_token_id + 1` over the tokens that are not padding.
          return_hidden: return the last hidden states, whatever the task.

        Returns:
          "features": `bert.Features`; "sequence-classification": float32 logits (b, c);
          "masked-lm": float32 logits (b, t, v); hidden states (b, t, d) in the compute dtype.

        Raises:
          ValueError: an input of another shape or dtype, or more tokens than the position table
            has rows.
        """
        _check(self.config, tokens, mask, token_type_ids, positions)
        module = nnx.merge(structure(self)[0], params)
        encoder = bert.encoder_of(module, self.config)
        hidden = bert.hidden_states(
            encoder,
            self.config,
            tokens,
            mask=mask,
            token_type_ids=token_type_ids,
            positions=positions,
            wrap=rematerialized(self.remat),
            rows=self.rows,
        )
        if return_hidden:
            return hidden
        return self._result(module, encoder, hidden)

    def _result(self, module, encoder: bert.Encoder, hidden):
        if self.config.task == FEATURES:
            state = bert.pooled(encoder, hidden) if self.config.pooler else None
            return bert.Features(hidden, state)
        return bert.logits(module, self.config, hidden)

    def head(self, params: Any, hidden: Float[Array, "b t d"]):  # noqa: F722
        """What the task makes of hidden states that `apply(..., return_hidden=True)` returned."""
        module = nnx.merge(structure(self)[0], params)
        return self._result(module, bert.encoder_of(module, self.config), hidden)

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = structure(self)[1]
        inside = () if self.config.task == FEATURES else (self.config.kind.prefix,)
        count = self.config.num_hidden_layers
        return stacked(shapes, (*inside, "encoder", "layer"), count) if self.scan else shapes


def _check(config: BertConfig, tokens, mask, token_type_ids, positions) -> None:
    check_inputs(tokens, mask)
    shape = jnp.shape(tokens)
    if shape[1] > config.context:
        raise ValueError(
            f"`tokens` of shape {shape} are longer than the model's context of {config.context}"
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
