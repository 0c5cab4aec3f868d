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

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.attention import Attend, Stored, Turns, with_sinks
from lora_jax.models.classifier import HEAD
from lora_jax.models.config import LlamaConfig
from lora_jax.models.delta_net import GatedDeltaNet
from lora_jax.models.experts import Load, MixtureMLP
from lora_jax.models.latent import LatentAttention
from lora_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    RMSNorm,
    kept,
    logits_of,
    stack_of,
)
from lora_jax.models.rope import by_halves
from lora_jax.models.turns import turns_of


class Attention(nnx.Module):
    """Attention; one key/value head serves N/K query heads."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        width, size = config.hidden_size, config.head_dim
        # Outputs of the projections of queries, and of keys or values.
        queries, pairs = config.num_attention_heads * size, config.num_key_value_heads * size

        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.head_dim = size
        # Where a fused projection is cut.
        self.parts = (queries, queries + pairs)
        self.names, self.fused = config.modules, config.fused_projections
        self.by_head = config.qkv_by_head
        if self.fused:
            setattr(self, self.names.fused, linear(width, queries + 2 * pairs, config.qkv_bias))
        else:
            gates = queries if config.attention_gate else 0
            self.q_proj = linear(width, queries + gates, config.qkv_bias)
            self.k_proj = linear(width, pairs, config.qkv_bias)
            self.v_proj = linear(width, pairs, config.qkv_bias)
        setattr(self, self.names.output, linear(queries, width, config.o_bias))
        self.interleaved = config.rotary_dim if config.rope_interleaved else 0
        self.qk_norm = config.qk_norm
        self.norm_whole = config.qk_norm_whole
        self.limit = config.clip_qkv
        self.sunk, self.gated = config.attention_sinks, config.attention_gate
        if self.sunk:
            self.sinks = nnx.Param(jnp.zeros((config.num_attention_heads,), param_dtype))
        if self.qk_norm:
            whole = config.qk_norm_whole
            self.q_norm = _norm(config, queries if whole else size, param_dtype)
            self.k_norm = _norm(config, pairs if whole else size, param_dtype)

    def project(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t nh"], Float[Array, "b t kh"], Float[Array, "b t kh"]]:
        """Queries, keys and values of all heads."""
        if self.fused:
            fused = kept(getattr(self, self.names.fused)(x))
            # Made for tensor parallelism: a device's part of the projection has whole heads.
            if self.by_head:
                apart = fused.reshape(*x.shape[:2], -1, 3, self.head_dim)  # (b, t, n, 3, h)
                q, k, v = (apart[..., i, :].reshape(*x.shape[:2], -1) for i in range(3))
            else:
                q, k, v = jnp.split(fused, self.parts, axis=-1)
            return q, k, v
        return kept(self.q_proj(x)), kept(self.k_proj(x)), kept(self.v_proj(x))

    def __call__(
        self, x: Float[Array, "b t d"], attend: Attend, stored: Stored, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Stored]:
        q, k, v = self.project(x)
        if self.gated:  # beside each head's queries
            both = q.reshape(*x.shape[:2], -1, 2, self.head_dim)
            q, gate = (both[..., i, :].reshape(*x.shape[:2], -1) for i in range(2))
        # Norms come before the rotation, which `attend` does.
        if self.qk_norm and self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.limit is not None:
            q, k, v = (jnp.clip(y, -self.limit, self.limit) for y in (q, k, v))
        # (b, t, n, h) and (b, t, k, h)
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm and not self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.interleaved:
            q, k = (by_halves(y, self.interleaved) for y in (q, k))
        if self.sunk:
            q = with_sinks(q, self.sinks.get_value())
        mixed, stored = attend(q, k, v, stored=stored, block=block)  # (b, t, n, h)
        mixed = mixed.reshape(*x.shape[:2], -1)
        mixed = mixed * jax.nn.sigmoid(gate) if self.gated else mixed
        return kept(getattr(self, self.names.output)(mixed)), stored


class MLP(nnx.Module):
    """`W_down (act(W_gate x) * W_up x)`, or `W_down act(W_up x)`; `size` is its width."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        size: int | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        width, inner = config.hidden_size, size or config.intermediate_size
        self.names, self.activation = config.modules, config.hidden_activation
        self.fused, self.gated = config.fused_mlp, config.gated_mlp
        if self.fused:
            self.gate_up_proj = linear(width, 2 * inner)
        else:
            setattr(self, self.names.up, linear(width, inner))
        if self.gated and not self.fused:
            self.gate_proj = linear(width, inner)
        setattr(self, self.names.down, linear(inner, width))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        activation = ACTIVATIONS[self.activation]
        down = getattr(self, self.names.down)
        if not self.gated:
            return down(activation(kept(getattr(self, self.names.up)(x))))
        if self.fused:
            gate, up = jnp.split(kept(self.gate_up_proj(x)), 2, axis=-1)
        else:
            gate, up = kept(self.gate_proj(x)), kept(getattr(self, self.names.up)(x))
        return down(activation(gate) * up)


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after them."""

    def __init__(
        self,
        config: LlamaConfig,
        kind: tuple[bool, bool],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        dense, linear = kind
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.names = config.modules
        self.mixer = "linear_attn" if linear else self.names.attention
        attention = Attention if config.kv_lora_rank is None else LatentAttention
        setattr(self, self.mixer, (GatedDeltaNet if linear else attention)(config, **options))
        mlp = (MLP if dense else MixtureMLP)(config, **options)
        if not dense and config.shared_expert_size is not None:
            shared = MLP(config, size=config.shared_expert_size, **options)
            setattr(mlp, self.names.shared, shared)
        setattr(self, self.names.mlp, mlp)
        self.norms = config.norms
        self.parallel = config.parallel_mlp
        self.factor = config.residual_multiplier
        for name in filter(None, config.norms):
            setattr(self, name, _norm(config, config.hidden_size, param_dtype))

    def __call__(
        self, x: Float[Array, "b t d"], attend: Attend, stored: Stored, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Stored]:
        return self.counted(x, attend, stored, block=block, real=None)[:2]

    def counted(
        self,
        x: Float[Array, "b t d"],
        attend: Attend,
        stored: Stored,
        *,
        block: Int[Array, ""],
        real: Bool[Array, "b t"] | None,
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
        return x + self.scaled(self.normalized(norms.after_mlp, out)), stored, load

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
        block = partial(Block, config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.names = config.modules
        table = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype
        )
        setattr(self, self.names.table, table)
        self.layers = stack_of(config.kinds, block, scan=scan)
        setattr(self, self.names.last_norm, _norm(config, config.hidden_size, param_dtype))

    @property
    def table(self) -> Embedding:
        """The embedding."""
        return getattr(self, self.names.table)

    @property
    def last_norm(self) -> RMSNorm | LayerNorm:
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
        *holders, own = self.place
        parts: dict[str, nnx.Module] = {own: decoder}
        self.tied = config.tie_word_embeddings
        self.head_name = HEAD if config.labels else "lm_head"
        self.softcap = config.final_logit_softcapping
        scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.embedding_scale = scale * config.embedding_multiplier
        self.logits_scaling = config.logits_scaling
        if not self.tied:
            parts[self.head_name] = nnx.Linear(
                config.hidden_size,
                len(config.labels) or config.vocab_size,
                use_bias=config.head_bias and not config.labels,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        self.with_head = config.held_with_head
        if holders and not self.with_head:
            parts[holders[0]] = Holder(**{own: parts.pop(own)})
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
        if self.head_name == HEAD:  # what follows is of words
            return logits
        # Only Phi's head has one, which no table shares.
        if head is not None and head.bias is not None:
            logits = logits + head.bias.get_value().astype(logits.dtype)
        logits = logits if self.logits_scaling == 1 else logits / self.logits_scaling
        return logits if self.softcap is None else jnp.tanh(logits / self.softcap) * self.softcap

    @staticmethod
    def turns(config: LlamaConfig, positions: Int[AnyArray, "b t"]) -> Turns:
        """What blocks do to queries and keys at these positions."""
        return turns_of(config, positions)


def _norm(config: LlamaConfig, size: int, param_dtype: DTypeLike) -> RMSNorm | LayerNorm:
    if config.norm_bias:
        return LayerNorm(size, eps=config.rms_norm_eps, param_dtype=param_dtype)
    return RMSNorm(
        size,
        eps=config.rms_norm_eps,
        param_dtype=param_dtype,
        offset=config.norm_offset,
        centered=config.norm_centered,
        wide=config.norm_wide,
    )
