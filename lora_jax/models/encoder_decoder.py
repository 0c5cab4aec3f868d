"""Encoder-decoders as pure functions of their parameters, as `model.Forward` is for decoders.

    apply    logits of the second text, whose tokens attend to all of the first
    encode   a cache with what the decoder attends to of the first text
    decode   logits of further tokens of the second, and the cache with them

B batch, S tokens of the first text, T tokens of the second, D width, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.attention import Cache, Kept, Read
from lora_jax.models.layers import Specs, automatic, on_rows, run_blocks
from lora_jax.models.model import Dtype, check_inputs, check_options
from lora_jax.models.remat import Remat, rematerialized
from lora_jax.models.structure import module_with, stacked, structure
from lora_jax.models.t5 import T5, Attending, Attention, Pairs, Stack
from lora_jax.models.t5_config import T5Config
from lora_jax.transform import eager


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderForward:
    """An encoder-decoder without its parameters.

    Attributes:
      config: the architecture.
      dtype: dtype of the computation; norms, softmax and logits stay float32.
      param_dtype: dtype of the parameters.
      scan: stack the blocks on a leading axis and scan over them, or keep them apart by number.
      remat, offload: what the backward pass recomputes of a block; see `Forward`.
      rows: axes of the mesh that shard the batch; see `Forward`.
      gathered: what a block gathers of its weights; see `Forward`.
    """

    config: T5Config
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    scan: bool = True
    remat: Remat = False
    offload: bool = False
    rows: tuple[str, ...] = ()
    gathered: Specs = ()

    def __post_init__(self) -> None:
        check_options(self.dtype, self.param_dtype, self.remat, self.offload)
        if not isinstance(self.scan, bool):
            raise ValueError(
                "`scan` stacks the blocks of an encoder-decoder all together, but the file has "
                "them in several formats: pass scan=False"
            )

    @property
    def module(self) -> type[T5]:
        """The NNX class."""
        return T5

    def apply(
        self,
        params: Any,
        tokens: Int[AnyArray, "b s"],
        decoder_tokens: Int[AnyArray, "b t"],
        *,
        mask: Bool[AnyArray, "b s"] | None = None,
        decoder_mask: Bool[AnyArray, "b t"] | None = None,
        return_hidden: bool = False,
    ) -> Array:
        """Logits, or hidden states, of the second text.

        Args:
          params: nested dictionaries of arrays, as in `Model.params`.
          tokens: token ids of the first text, which the encoder reads.
          decoder_tokens: those of the second, behind `config.decoder_start_token_id`: the logits of
            a token are of the one after it.
          mask: true at real tokens of the first text; padding may be on either side.
          decoder_mask: the same of the second. Padding on the right needs none.
          return_hidden: return the input of the head instead of logits.

        Returns:
          Float32 logits (b, t, v), or hidden states (b, t, d) in the compute dtype.

        Raises:
          ValueError: an input of the wrong shape or dtype, or parameters of another model.
        """
        check_inputs(tokens, mask)
        check_inputs(decoder_tokens, decoder_mask, of="decoder_")
        if jnp.shape(tokens)[0] != jnp.shape(decoder_tokens)[0]:
            raise ValueError(
                f"`tokens` have {jnp.shape(tokens)[0]} rows, but `decoder_tokens` "
                f"{jnp.shape(decoder_tokens)[0]}: give a second text to each first"
            )
        inputs = {"decoder_tokens": decoder_tokens, "mask": mask, "decoder_mask": decoder_mask}
        run = partial(self._apply, return_hidden=return_hidden)
        return automatic(run, params, tokens, **inputs)

    @eager.compiled("self", "return_hidden")
    def _apply(
        self,
        params: Any,
        tokens: Int[AnyArray, "b s"],
        *,
        decoder_tokens: Int[AnyArray, "b t"],
        mask: Bool[AnyArray, "b s"] | None,
        decoder_mask: Bool[AnyArray, "b t"] | None,
        return_hidden: bool,
    ) -> Array:
        model = module_with(self, params)
        text = self._encoded(model, tokens, mask)

        def read(attention: Attention, number: Int[Array, ""]) -> Pairs:
            return attention.pairs(text)

        at = jnp.arange(decoder_tokens.shape[1])
        back = at[:, None] - at
        seen = (back >= 0)[None, None]
        if decoder_mask is not None:
            seen = seen & jnp.asarray(decoder_mask)[:, None, None, :]
        by = Attending(
            own=lambda pairs, stored, number: (pairs, stored),
            seen=seen,
            bias=model.decoder.bias(back, self.config, decoder=True),
            read=read,
            text=None if mask is None else jnp.asarray(mask)[:, None, None, :],
        )
        hidden, _ = self._run(model.decoder, model.shared(decoder_tokens), by, None)
        return hidden if return_hidden else model.head(hidden)

    def encode(
        self,
        params: Any,
        tokens: Int[AnyArray, "b s"],
        *,
        mask: Bool[AnyArray, "b s"] | None = None,
        cache_length: int,
    ) -> Cache:
        """Reads the first text.

        Args:
          params, tokens, mask: as for `apply`.
          cache_length: the most tokens of the second text, the one that starts it included.

        Returns:
          A cache for `decode`.
        """
        check_inputs(tokens, mask)
        model, config = module_with(self, params), self.config
        text = self._encoded(model, tokens, mask)
        rows, count = tokens.shape
        sizes = config.num_attention_heads, config.head_dim

        def empty(length: int) -> Array:
            return jnp.zeros((config.num_decoder_layers, rows, length, *sizes), self.dtype)

        def write(block: Any, kept: Any, number: Int[Array, ""], own: Any) -> Any:
            return _written(kept, block.layer["1"].EncDecAttention.pairs(text), number, 0)

        read = run_blocks(
            model.decoder.blocks, (empty(count), empty(count)), write,
            wrap=rematerialized(False, self.gathered),
            each=(False,) * config.num_decoder_layers,
        )  # fmt: skip
        known = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
        own = empty(cache_length)
        valid = jnp.zeros((rows, cache_length), bool)
        return Cache(own, own, valid, jnp.int32(0), read=Read(read[0], read[1], known))

    def decode(
        self,
        params: Any,
        tokens: Int[AnyArray, "b t"],
        *,
        cache: Cache,
        mask: Bool[AnyArray, "b t"] | None = None,
        return_hidden: bool = False,
    ) -> tuple[Array, Cache]:
        """Logits, or hidden states, of new tokens of the second text, and the cache with them.

        Args:
          params: nested dictionaries of arrays, as in `Model.params`.
          tokens: the new tokens; the first one of a text is `config.decoder_start_token_id`.
          cache: from `encode` or an earlier call. It must have room for the tokens.
          mask: true at real tokens.
          return_hidden: return the input of the head instead of logits.
        """
        check_inputs(tokens, mask)
        model, start = module_with(self, params), cache.length
        new = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
        valid = lax.dynamic_update_slice(cache.valid, new, (0, start))
        back = start + jnp.arange(tokens.shape[1])[:, None] - jnp.arange(valid.shape[1])
        text: Any = cache.read

        def own(pairs: Pairs, stored: Kept, number: Int[Array, ""]) -> tuple[Any, Kept]:
            stored = Kept(*_written(stored[:2], pairs, number, start))
            return _read(stored, number), stored

        by = Attending(
            own=own,
            seen=(back >= 0) & valid[:, None, None, :],
            bias=model.decoder.bias(back, self.config, decoder=True),
            read=lambda attention, number: _read(text, number),
            text=text.mask[:, None, None, :],
        )
        kept = Kept(cache.keys, cache.values)
        hidden, kept = self._run(model.decoder, model.shared(tokens), by, kept)
        cache = cache._replace(
            keys=kept.keys, values=kept.values, valid=valid, length=start + tokens.shape[1]
        )
        return (hidden if return_hidden else model.head(hidden)), cache

    def head(self, params: Any, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits of hidden states that `apply(..., return_hidden=True)` returned."""

        def run(params: Any, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
            return module_with(self, params).head(hidden)

        return automatic(run, params, hidden)

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = structure(self)[1]
        if self.scan:
            # The blocks' names have their numbers: no count is needed.
            for stack in ("encoder", "decoder"):
                shapes = stacked(shapes, (stack, "block"), 0)
        return shapes

    def _encoded(
        self, model: Any, tokens: Int[AnyArray, "b s"], mask: Bool[AnyArray, "b s"] | None
    ) -> Float[Array, "b s d"]:
        at = jnp.arange(tokens.shape[1])
        by = Attending(
            own=lambda pairs, stored, number: (pairs, stored),
            seen=None if mask is None else jnp.asarray(mask)[:, None, None, :],
            bias=model.encoder.bias(at[:, None] - at, self.config, decoder=False),
        )
        return self._run(model.encoder, model.shared(tokens), by, None)[0]

    def _run(
        self, stack: Stack, x: Float[Array, "b t d"], by: Attending, stored: Kept | None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The stack's last hidden states after its norm, and what is stored."""

        def call(block: Any, carry: Any, number: Int[Array, ""], own: Any) -> Any:
            x, stored = carry
            x, stored = block(on_rows(x, self.rows), by, stored, number)
            return on_rows(x, self.rows), stored

        x, stored = run_blocks(
            stack.blocks,
            (on_rows(x, self.rows), stored),
            call,
            wrap=rematerialized(self.remat, self.gathered, offload=self.offload),
            each=(False,) * stack.count,
        )
        return stack.final_layer_norm(x), stored


def _written(kept: Any, new: Pairs, number: Int[Array, ""], start: Any) -> Any:
    """Keys and values of all blocks, with those of new tokens in one of them."""
    at = (number, 0, start, 0, 0)
    return tuple(
        lax.dynamic_update_slice(old, x[None].astype(old.dtype), at)
        for old, x in zip(kept, new, strict=True)
    )


def _read(kept: Any, number: Int[Array, ""]) -> Pairs:
    """Keys and values of one block."""
    keys, values = (lax.dynamic_index_in_dim(x, number, keepdims=False) for x in kept[:2])
    return keys, values
