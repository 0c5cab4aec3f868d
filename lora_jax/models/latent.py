"""Attention whose keys and values are made of one short vector a token (DeepSeek's MLA).

    [c, k_r] = W_kva x         c of rank R, and a rotated part k_r, one for all heads
    [k_n, v] = W_kvb norm(c)   a key without rotation and a value, for each of N heads
    q = W_qb norm(W_qa x)      or W_q x; split into rotated and other dims as [k_r, k_n]

The cache holds keys and values of all heads, as those of other decoders.

Source: DeepSeek-AI 2024, arXiv:2405.04434.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.models.attention import Attend, Stored
from lora_jax.models.config import LlamaConfig
from lora_jax.models.layers import RMSNorm, kept
from lora_jax.models.rope import by_halves

_EPS = 1e-6  # of the norms inside, whatever the model's are


class LatentAttention(nnx.Module):
    """Attention over keys and values that are expanded from latent vectors."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        heads, width, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        assert rank is not None  # a configuration without it has an `Attention`
        self.heads, self.rank, self.rotated = heads, rank, config.rotary_dim
        self.plain, self.values = config.head_dim - self.rotated, config.value_dim
        self.interleaved = config.rope_interleaved

        def linear(inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        short = config.q_lora_rank
        self.direct = short is None
        if short is None:
            self.q_proj = linear(width, heads * config.head_dim)
        else:
            self.q_a_proj = linear(width, short, config.qkv_bias)
            self.q_a_layernorm = RMSNorm(short, eps=_EPS, param_dtype=param_dtype)
            self.q_b_proj = linear(short, heads * config.head_dim)
        self.kv_a_proj_with_mqa = linear(width, rank + self.rotated, config.qkv_bias)
        self.kv_a_layernorm = RMSNorm(rank, eps=_EPS, param_dtype=param_dtype)
        self.kv_b_proj = linear(rank, heads * (self.plain + self.values))
        self.o_proj = linear(heads * self.values, width, config.o_bias)

    def __call__(
        self, x: Float[Array, "b t d"], attend: Attend, stored: Stored, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Stored]:
        over = (*x.shape[:2], self.heads, -1)
        if self.direct:
            q = kept(self.q_proj(x))
        else:
            q = kept(self.q_b_proj(self.q_a_layernorm(kept(self.q_a_proj(x)))))
        # Rotated dims come first here, as `attend` rotates the first ones.
        q = jnp.roll(q.reshape(over), self.rotated, axis=-1)  # (b, t, n, h)
        short, turned = jnp.split(kept(self.kv_a_proj_with_mqa(x)), [self.rank], axis=-1)
        both = kept(self.kv_b_proj(self.kv_a_layernorm(short))).reshape(over)
        k, v = jnp.split(both, [self.plain], axis=-1)
        shared = jnp.broadcast_to(turned[:, :, None], (*k.shape[:3], self.rotated))
        k = jnp.concatenate((shared, k), axis=-1)
        if self.interleaved:
            q, k = (by_halves(y, self.rotated) for y in (q, k))
        # Attention takes keys and values of one size.
        more = k.shape[-1] - self.values
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, more)))
        mixed, stored = attend(q, k, v, stored=stored, block=block)
        return kept(self.o_proj(mixed[..., : self.values].reshape(*x.shape[:2], -1))), stored
