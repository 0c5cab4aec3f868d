"""Attention and MLP of Llama's decoder, and its norms.

B batch, T new tokens, D width, N query heads, K key/value heads, H size of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.models.attention import Attend, Stored, with_sinks
from lora_jax.models.config import LlamaConfig
from lora_jax.models.dialect import Kind
from lora_jax.models.layers import ACTIVATIONS, XIELU, LayerNorm, RMSNorm, kept, normal
from lora_jax.models.rope import by_halves


class Attention(nnx.Module):
    """Attention; one key/value head serves N/K query heads."""

    def __init__(
        self,
        config: LlamaConfig,
        kind: Kind,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        width, (heads, size) = config.hidden_size, config.heads_of(kind.slides)
        # Outputs of the projections of queries, and of keys or values.
        queries, pairs = config.num_attention_heads * size, heads * size

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
        self.shares = kind.shares
        self.keys_only = config.k_eq_v and kind.slides is False
        if not (self.fused or self.shares):
            self.k_proj = linear(width, pairs, config.qkv_bias)
        if not (self.fused or self.shares or self.keys_only):
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
            norm = head_norm_of(config, config.num_attention_heads, size, param_dtype)
            setattr(self, self.names.q_norm, norm)
        if self.qk_norm and not self.shares:
            setattr(self, self.names.k_norm, head_norm_of(config, heads, size, param_dtype))
        self.v_norm, self.eps = config.v_norm, config.rms_norm_eps

    def project(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t nh"], Float[Array, "b t kh"], Float[Array, "b t kh"]]:
        """Queries, keys and values of all heads, where a block has its own."""
        if self.fused:
            fused = kept(getattr(self, self.names.fused)(x))
            # Made for tensor parallelism: a device's part of the projection has whole heads.
            if self.by_head:
                apart = fused.reshape(*x.shape[:2], -1, 3, self.head_dim)  # (b, t, n, 3, h)
                q, k, v = (apart[..., i, :].reshape(*x.shape[:2], -1) for i in range(3))
            else:
                q, k, v = jnp.split(fused, self.parts, axis=-1)
            return q, k, v
        k = kept(self.k_proj(x))
        return kept(self.q_proj(x)), k, k if self.keys_only else kept(self.v_proj(x))

    def __call__(
        self, x: Float[Array, "b t d"], attend: Attend, stored: Stored, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Stored]:
        if self.shares:
            q = kept(self.q_proj(x)).reshape(*x.shape[:2], -1, self.head_dim)
            q = getattr(self, self.names.q_norm)(q)
            mixed, stored = attend(q, None, None, stored=stored, block=block)
            return self.output(mixed), stored
        q, k, v = self.project(x)
        if self.gated:  # beside each head's queries
            both = q.reshape(*x.shape[:2], -1, 2, self.head_dim)
            q, gate = (both[..., i, :].reshape(*x.shape[:2], -1) for i in range(2))
        # Norms come before the rotation, which `attend` does.
        if self.qk_norm and self.norm_whole:
            q, k = self.normalized(q, k)
        if self.limit is not None:
            q, k, v = (jnp.clip(y, -self.limit, self.limit) for y in (q, k, v))
        # (b, t, n, h) and (b, t, k, h)
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm and not self.norm_whole:
            q, k = self.normalized(q, k)
        v = normal(v, self.eps) if self.v_norm else v
        if self.interleaved:
            q, k = (by_halves(y, self.interleaved) for y in (q, k))
        if self.sunk:
            q = with_sinks(q, self.sinks.get_value())
        mixed, stored = attend(q, k, v, stored=stored, block=block)
        mixed = mixed * jax.nn.sigmoid(gate).reshape(mixed.shape) if self.gated else mixed
        return self.output(mixed), stored

    def normalized(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Queries and keys after their norms."""
        return getattr(self, self.names.q_norm)(q), getattr(self, self.names.k_norm)(k)

    def output(self, mixed: Float[Array, "b t n h"]) -> Float[Array, "b t d"]:
        """The projection of what the heads have mixed."""
        return kept(getattr(self, self.names.output)(mixed.reshape(*mixed.shape[:2], -1)))


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
        self.learned = self.activation == XIELU
        if self.learned:
            self.act_fn = Xielu(param_dtype=param_dtype)
        self.fused, self.gated = config.fused_mlp, config.gated_mlp
        if self.fused:
            self.gate_up_proj = linear(width, 2 * inner)
        else:
            setattr(self, self.names.up, linear(width, inner))
        if self.gated and not self.fused:
            self.gate_proj = linear(width, inner)
        setattr(self, self.names.down, linear(inner, width))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        activation = self.act_fn if self.learned else ACTIVATIONS[self.activation]
        down = getattr(self, self.names.down)
        if not self.gated:
            return down(activation(kept(getattr(self, self.names.up)(x))))
        if self.fused:
            gate, up = jnp.split(kept(self.gate_up_proj(x)), 2, axis=-1)
        else:
            gate, up = kept(self.gate_proj(x)), kept(getattr(self, self.names.up)(x))
        return down(activation(gate) * up)


# Fresh numbers of `Xielu`: their softplus is 0.8 and 0.3.
FRESH_XIELU = {"alpha_p": 0.20338, "alpha_n": -1.05023, "beta": 0.5, "eps": -1e-6}


class Xielu(nnx.Module):
    """An activation with two learned numbers, alpha_p and alpha_n; beta and eps do not train.

        softplus(alpha_p) x² + beta x                                        where x > 0
        (beta + softplus(alpha_n)) (exp(min(x, eps)) - 1 - x) + beta x       elsewhere

    Source: Huang and Schlag 2024, arXiv:2411.13010.
    """

    def __init__(self, *, param_dtype: DTypeLike) -> None:
        for name, value in FRESH_XIELU.items():
            shape = (1,) if name.startswith("alpha") else ()
            setattr(self, name, nnx.Param(jnp.full(shape, value, param_dtype)))

    def __call__(self, x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
        above, below, beta, eps = (
            getattr(self, name).get_value().astype(x.dtype) for name in FRESH_XIELU
        )
        beta, eps = lax.stop_gradient((beta, eps))
        below = (beta + jax.nn.softplus(below)) * (jnp.expm1(jnp.minimum(x, eps)) - x)
        return jnp.where(x > 0, jax.nn.softplus(above) * x * x, below) + beta * x


class HeadNorms(nnx.Module):
    """A norm of each head, under a name that is followed by the head's number in files."""

    def __init__(self, norms: RMSNorm) -> None:
        self.norms = norms

    def __call__(self, x: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
        return self.norms(x)


class PlainNorm(nnx.Module):
    """`LayerNorm` without parameters."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        return normal(wide - jnp.mean(wide, axis=-1, keepdims=True), self.eps).astype(x.dtype)


def head_norm_of(
    config: LlamaConfig, heads: int, size: int, param_dtype: DTypeLike
) -> RMSNorm | LayerNorm | PlainNorm | HeadNorms:
    """The norm of the queries, or of the keys, of so many heads of one size."""
    if config.qk_norm_whole:
        return norm_of(config, heads * size, param_dtype)
    if not config.qk_norm_by_head:
        return norm_of(config, size, param_dtype)
    # These have no bias.
    norm = RMSNorm(
        heads, size, eps=config.rms_norm_eps, param_dtype=param_dtype, centered=config.norm_centered
    )
    return HeadNorms(norm) if config.modules.head_norms_numbered else norm


def norm_of(
    config: LlamaConfig, size: int, param_dtype: DTypeLike
) -> RMSNorm | LayerNorm | PlainNorm:
    """The norm of a configuration, of so many numbers."""
    if config.norm_plain:
        return PlainNorm(config.rms_norm_eps)
    if config.norm_bias:
        return LayerNorm(
            size, eps=config.rms_norm_eps, param_dtype=param_dtype, offset=config.norm_offset
        )
    return RMSNorm(
        size,
        eps=config.rms_norm_eps,
        param_dtype=param_dtype,
        offset=config.norm_offset,
        centered=config.norm_centered,
        wide=config.norm_wide,
    )
