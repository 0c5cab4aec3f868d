"""A gated delta net in the place of attention (Qwen3-Next, Qwen3.5).

    q, k, v = silu(conv(W_qkv x))          a convolution over the last W tokens, channel by channel
    β = sigmoid(W_b x),  g = -exp(A) softplus(W_a x + c)
    y = W_out (RMSNorm(o) * silu(W_z x))   o of `lora_jax.models.delta_rule`

The cache holds a state for each head and the last W - 1 inputs of the convolution, however long the
text is.

B batch, T tokens, D width, C channels, and the letters of `lora_jax.models.delta_rule`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.config import LlamaConfig
from lora_jax.models.context import of_own_tokens, of_whole_rows
from lora_jax.models.delta_rule import DeltaSizes, convolved, delta_rule
from lora_jax.models.layers import ACTIVATIONS, RMSNorm, kept

# (inputs, decay, beta, kernel=, heads=, stored=, block=) -> (what tokens read, stored)
Recur = Callable[..., tuple[Array, Any]]


def recurrence(
    mask: Bool[AnyArray, "b t"] | None,
    texts: Int[AnyArray, "b t"] | None,
    *,
    sizes: DeltaSizes,
    place: Callable[[Any], Any],
    over: str | None,
) -> Recur:
    """What the delta nets of one call do between their projections.

    Args:
      mask, texts: as in `lora_jax.models.delta_rule`.
      sizes: of the nets.
      place: the number of a block -> the place of its state among those of all nets.
      over: the axis of the mesh that the tokens of a row are spread over: every device computes
        whole rows then.
    """

    def recur(
        x: Float[Array, "b t c"],
        decay: Float[Array, "b t n"],
        beta: Float[Array, "b t n"],
        *,
        kernel: Float[Array, "w 1 c"],
        heads: Callable[[Array], tuple[Array, Array, Array]],
        stored: Any,
        block: Int[Array, ""],
    ) -> tuple[Float[Array, "b t n v"], Any]:
        x, decay, beta = (of_whole_rows(y, over) for y in (x, decay, beta))
        if mask is not None:
            decay, beta = (jnp.where(mask[..., None], y, 0) for y in (decay, beta))
        if stored is None:
            before, state = first_states(sizes, len(x), x.dtype)
        else:
            at = place(block)
            before, state = (
                lax.dynamic_index_in_dim(y, at, keepdims=False)
                for y in (stored.convs, stored.states)
            )
        mixed, before = convolved(x, kernel, before, mask=mask, texts=texts)
        out, state = delta_rule(*heads(mixed), decay, beta, state, texts=texts)
        if stored is not None:
            convs, states = (
                lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), at, 0)
                for old, new in ((stored.convs, before), (stored.states, state))
            )
            stored = stored._replace(convs=convs, states=states)
        return of_own_tokens(out, over), stored

    return recur


def first_states(
    sizes: DeltaSizes, *shape_and_dtype: Any
) -> tuple[Float[Array, "*b past c"], Float[Array, "*b n k v"]]:
    """The inputs before a text, and the states, 0; `shape_and_dtype` are *b and the inputs'."""
    *shape, dtype = shape_and_dtype
    channels = 2 * sizes.key_heads * sizes.key_dim + sizes.value_heads * sizes.value_dim
    return (
        jnp.zeros((*shape, sizes.taps - 1, channels), dtype),
        jnp.zeros((*shape, sizes.value_heads, sizes.key_dim, sizes.value_dim)),
    )


def among(own: Sequence[bool]) -> Callable[[Any], Any]:
    """The number of a block -> its place among the blocks of its kind."""
    if all(own):
        return lambda block: block
    places = np.cumsum(own) - 1
    return lambda block: jnp.asarray(places, jnp.int32)[block]


class GatedDeltaNet(nnx.Module):
    """Projections, a convolution, the delta rule, and a gated norm of each head."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        sizes = config.delta
        assert sizes is not None  # a configuration without it has no such blocks
        self.sizes, self.activation, self.dtype = sizes, config.hidden_activation, dtype
        self.keys, self.values = (
            sizes.key_heads * sizes.key_dim,
            sizes.value_heads * sizes.value_dim,
        )
        width, channels = config.hidden_size, 2 * self.keys + self.values
        options: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if sizes.fused:
            self.in_proj_qkvz = nnx.Linear(width, channels + self.values, **options)
            self.in_proj_ba = nnx.Linear(width, 2 * sizes.value_heads, **options)
        else:
            self.in_proj_qkv = nnx.Linear(width, channels, **options)
            self.in_proj_z = nnx.Linear(width, self.values, **options)
            self.in_proj_b = nnx.Linear(width, sizes.value_heads, **options)
            self.in_proj_a = nnx.Linear(width, sizes.value_heads, **options)
        # Its kernel alone is used, by `convolved`.
        self.conv1d = nnx.Conv(
            channels, channels, (sizes.taps,), feature_group_count=channels, **options
        )
        self.dt_bias = nnx.Param(jnp.ones((sizes.value_heads,), param_dtype))
        self.A_log = nnx.Param(jnp.zeros((sizes.value_heads,), param_dtype))
        self.norm = RMSNorm(sizes.value_dim, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.out_proj = nnx.Linear(self.values, width, **options)

    def __call__(
        self, x: Float[Array, "b t d"], recur: Recur, stored: Any, block: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Any]:
        mixed, gate, beta, step = self.project(x)
        # float32: exp(A) of float16 overflows.
        rate = jnp.exp(self.A_log.get_value().astype(jnp.float32))
        shift = self.dt_bias.get_value().astype(jnp.float32)
        decay = -rate * jax.nn.softplus(step.astype(jnp.float32) + shift)
        out, stored = recur(
            mixed, decay, jax.nn.sigmoid(beta), kernel=self.conv1d.kernel.get_value(),
            heads=self.heads, stored=stored, block=block,
        )  # fmt: skip
        normal = self.norm(out.astype(x.dtype)).astype(jnp.float32)
        out = (normal * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)  # (b, t, n, v)
        return kept(self.out_proj(out.reshape(*x.shape[:2], -1))), stored

    def project(
        self, x: Float[Array, "b t d"]
    ) -> tuple[
        Float[Array, "b t c"], Float[Array, "b t n v"], Float[Array, "b t n"], Float[Array, "b t n"]
    ]:
        """Inputs of the convolution, gates, and the numbers that β and g are made of."""
        over, sizes = x.shape[:2], self.sizes
        if not sizes.fused:
            gate = kept(self.in_proj_z(x)).reshape(*over, -1, sizes.value_dim)
            return kept(self.in_proj_qkv(x)), gate, self.in_proj_b(x), self.in_proj_a(x)
        of_each = sizes.value_heads // sizes.key_heads * sizes.value_dim
        parts = kept(self.in_proj_qkvz(x)).reshape(*over, sizes.key_heads, -1)
        ends = (sizes.key_dim, 2 * sizes.key_dim, 2 * sizes.key_dim + of_each)
        *qkv, gate = jnp.split(parts, ends, axis=-1)  # (b, t, g, ...)
        mixed = jnp.concatenate([y.reshape(*over, -1) for y in qkv], axis=-1)
        both = self.in_proj_ba(x).reshape(*over, sizes.key_heads, -1)
        beta, step = (y.reshape(*over, -1) for y in jnp.split(both, 2, axis=-1))
        return mixed, gate.reshape(*over, -1, sizes.value_dim), beta, step

    def heads(
        self, mixed: Float[Array, "b t c"]
    ) -> tuple[Float[Array, "b t g k"], Float[Array, "b t g k"], Float[Array, "b t n v"]]:
        """Queries, keys and values of the heads, from the sums of the convolution."""
        over, sizes = mixed.shape[:2], self.sizes
        mixed = ACTIVATIONS[self.activation](mixed).astype(self.dtype)
        q, k, v = jnp.split(mixed, (self.keys, 2 * self.keys), axis=-1)
        q, k = (y.reshape(*over, -1, sizes.key_dim) for y in (q, k))
        return q, k, v.reshape(*over, -1, sizes.value_dim)
