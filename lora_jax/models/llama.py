"""Llama's decoder: grouped-query attention and an MLP or a mixture of experts, with norms.

    x <- x + Attention(RMSNorm(x))
    x <- x + W_down (act(W_gate n) * W_up n),  n = RMSNorm(x)

Modules and parameters are Flax NNX's, module names are Hugging Face's. The families that share this
decoder differ only in their configuration (`lora_jax.models.families`): in where the norms are,
which blocks rotate or have a window, factors, biases, and the kind of MLP.

B batch, T new tokens, D width, N query heads, K key/value heads, H size of a head, V vocabulary.
"""

from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models import beside
from lora_jax.models.attention import Attend, Stored, Turns
from lora_jax.models.config import LlamaConfig
from lora_jax.models.delta_net import GatedDeltaNet
from lora_jax.models.dialect import Kind
from lora_jax.models.experts import Experts, Load, MixtureMLP
from lora_jax.models.heads import DECODER_HEADS
from lora_jax.models.latent import LatentAttention
from lora_jax.models.layers import Embedding, LayerNorm, RMSNorm, logits_of, stack_of
from lora_jax.models.llama_parts import MLP, Attention, PlainNorm, norm_of
from lora_jax.models.turns import turns_of


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after them."""

    def __init__(
        self,
        config: LlamaConfig,
        kind: Kind,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.names = config.modules
        self.mixer = "linear_attn" if kind.linear else self.names.attention
        if kind.linear:
            mixer = GatedDeltaNet(config, **options)
        elif config.kv_lora_rank is None:
            mixer = Attention(config, kind, **options)
        else:
            mixer = LatentAttention(config, **options)
        setattr(self, self.mixer, mixer)
        double = kind.shares and config.wide_shared_mlp
        size = config.intermediate_size * (1 + double)
        mlp = MLP(config, size=size, **options) if kind.dense else MixtureMLP(config, **options)
        if not kind.dense and config.shared_expert_size is not None:
            shared = MLP(config, size=config.shared_expert_size, **options)
            setattr(mlp, self.names.shared, shared)
        setattr(self, self.names.mlp, mlp)
        self.norms = config.norms
        self.parallel = config.parallel_mlp
        self.factor = config.residual_multiplier
        self.beside = config.experts_beside
        if self.beside:
            self.router = beside.Router(config, **options)
            self.experts = Experts(config, dtype=dtype, param_dtype=param_dtype)
        self.activation = config.hidden_activation
        if inner := config.per_layer_size:
            linear = partial(nnx.Linear, use_bias=False, **options)
            self.per_layer_input_gate = linear(config.hidden_size, inner)
            self.per_layer_projection = linear(inner, config.hidden_size)
            self.post_per_layer_input_norm = norm_of(config, config.hidden_size, param_dtype)
        self.scalar = config.layer_scalar
        if self.scalar:
            self.layer_scalar = nnx.Param(jnp.ones((1,), param_dtype))
        for name in filter(None, (*config.norms, *(beside.NORMS if self.beside else ()))):
            setattr(self, name, norm_of(config, config.hidden_size, param_dtype))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        attend: Attend,
        stored: Stored,
        block: Int[Array, ""],
        *,
        given: Float[Array, "b t p"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Stored]:
        return self.counted(x, attend, stored, block=block, real=None, given=given)[:2]

    def counted(
        self,
        x: Float[Array, "b t d"],
        attend: Attend,
        stored: Stored,
        *,
        block: Int[Array, ""],
        real: Bool[Array, "b t"] | None,
        given: Float[Array, "b t p"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Stored, Load | None]:
        """As a call, and the load of the experts by the tokens that are `real`, if given."""
        norms = self.norms
        inputs = self.normalized(norms.before_attention, x)
        mixed, stored = getattr(self, self.mixer)(inputs, attend, stored, block)
        if self.parallel:
            # GPT-NeoX has a norm for each of the two; Cohere and Phi have one for both.
            if norms.before_mlp is not None:
                inputs = self.normalized(norms.before_mlp, x)
            out, load = self.run_mlp(inputs, real)
            return x + self.scaled(mixed) + self.scaled(out), stored, load
        x = x + self.scaled(self.normalized(norms.after_attention, mixed))
        out, load = self.run_mlp(self.normalized(norms.before_mlp, x), real)
        if self.beside:
            out, load = beside.with_experts(self, x, out, real)
        x = x + self.scaled(self.normalized(norms.after_mlp, out))
        x = x if given is None else x + beside.of_token(self, x, given)
        if self.scalar:
            x = x * lax.stop_gradient(self.layer_scalar.get_value()).astype(x.dtype)
        return x, stored, load

    def run_mlp(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], Load | None]:
        """The MLP's output, and the load of its experts, if it has any."""
        mlp = getattr(self, self.names.mlp)
        # Without the loss nothing is counted: the program is that of a plain call.
        if real is None or not isinstance(mlp, MixtureMLP):
            return mlp(x), None
        return mlp.counted(x, real)

    def normalized(self, name: str | None, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """`x` after the norm of this name, if there is one."""
        return x if name is None else getattr(self, name)(x)

    def scaled(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """`x` times the factor of what is added."""
        return x if self.factor == 1 else x * self.factor


class Decoder(nnx.Module):
    """Embedding, blocks, final norm.

    `layers` is one block whose parameters have a leading axis L (`scan`), a dictionary of such
    blocks where they are of two kinds, or one of L blocks named by their number.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        scan: bool | tuple[int, ...],
        rngs: nnx.Rngs,
    ) -> None:
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.names = config.modules
        table = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype
        )
        setattr(self, self.names.table, table)
        if inner := config.per_layer_size:
            wide = inner * config.num_hidden_layers
            self.embed_tokens_per_layer = Embedding(
                config.per_layer_vocab, wide, dtype=dtype, param_dtype=param_dtype
            )
            self.per_layer_model_projection = nnx.Linear(
                config.hidden_size, wide, use_bias=False, **options
            )
            self.per_layer_projection_norm = norm_of(config, inner, param_dtype)
        self.layers = stack_of(config.kinds, partial(Block, config, **options), scan=scan)
        setattr(self, self.names.last_norm, norm_of(config, config.hidden_size, param_dtype))

    @property
    def table(self) -> Embedding:
        """The embedding."""
        return getattr(self, self.names.table)

    @property
    def last_norm(self) -> RMSNorm | LayerNorm | PlainNorm:
        """The norm after the last block."""
        return getattr(self, self.names.last_norm)


class Holder(nnx.Module):
    """Holds modules of a vision-language model under that model's names, which adapters use."""

    def __init__(self, **modules: nnx.Module) -> None:
        for name, module in modules.items():
            setattr(self, name, module)


class CausalLM(nnx.Module):
    """The decoder and its head, unless that is the embedding: a language model's, or `score`."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        scan: bool | tuple[int, ...],
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        decoder = Decoder(config, dtype=dtype, param_dtype=param_dtype, scan=scan, rngs=rngs)
        self.place = config.place
        *holders, last = self.place
        parts: dict[str, nnx.Module] = {last: decoder}
        self.tied = config.tie_word_embeddings
        own = DECODER_HEADS.get(config.task)
        self.head_name = "lm_head" if own is None else str(own.last)
        self.softcap = config.final_logit_softcapping
        scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.embedding_scale = scale * config.embedding_multiplier
        self.logits_scaling, self.per_layer_size = config.logits_scaling, config.per_layer_size
        if not self.tied:
            parts[self.head_name] = nnx.Linear(
                config.hidden_size,
                len(config.labels) or config.vocab_size,
                use_bias=config.head_bias if own is None else own.biased[1],
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        self.with_head = config.held_with_head
        if holders and not self.with_head:
            parts[holders[0]] = Holder(**{last: parts.pop(last)})
        elif holders:
            parts = {holders[0]: Holder(**parts)}
        for name, module in parts.items():
            setattr(self, name, module)

    @property
    def decoder(self) -> Decoder:
        """The decoder, wherever it is."""
        return reduce(getattr, self.place, self)

    @staticmethod
    def blocks(config: LlamaConfig) -> tuple[str, ...]:
        """Where the blocks are in the model."""
        return (*config.place, "layers")

    def embed(
        self, tokens: Int[AnyArray, "b t"], positions: Int[AnyArray, "#b t"]
    ) -> Float[Array, "b t d"]:
        """The input of the first block."""
        del positions  # the blocks rotate by them
        x = self.decoder.table(tokens)
        # Gemma's own code rounds the factor to the compute dtype first: in bfloat16 the root of
        # 3072, 55.4256, becomes 55.5.
        return x if self.embedding_scale == 1 else x * jnp.asarray(self.embedding_scale, x.dtype)

    def of_blocks(
        self, tokens: Int[AnyArray, "b t"], embedded: Float[Array, "b t d"]
    ) -> Float[Array, "l b t p"] | None:
        """What each block is given beside the output of the one before, or None."""
        size = self.per_layer_size
        return None if size is None else beside.vectors(self.decoder, tokens, embedded, size)

    def final(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of the head."""
        return self.decoder.last_norm(x)

    def head(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits in float32; products in the compute dtype, sums in float32."""
        within = getattr(self, self.place[0]) if self.with_head else self
        head = None if self.tied else getattr(within, self.head_name)
        # (v, d), or (d, v)
        weight = self.decoder.table.embedding if head is None else head.kernel
        logits = logits_of(hidden, weight.get_value(), tied=self.tied, dtype=self.dtype)
        # Of a language model only Phi's head has one, which no table shares.
        if head is not None and head.bias is not None:
            logits = logits + head.bias.get_value().astype(logits.dtype)
        if self.head_name != "lm_head":  # what follows is of words
            return logits
        logits = logits if self.logits_scaling == 1 else logits / self.logits_scaling
        return logits if self.softcap is None else jnp.tanh(logits / self.softcap) * self.softcap

    @staticmethod
    def turns(config: LlamaConfig, positions: Int[AnyArray, "b t"]) -> Turns:
        """What blocks do to queries and keys at these positions."""
        return turns_of(config, positions)
