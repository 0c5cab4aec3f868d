"""What Gemma 4's blocks have beside attention and MLP: experts, and a vector for each token.

Experts, with a router of its own norm; the sum of both replaces the MLP's output:

    p = softmax(W (n / rms(n) * s / sqrt(D)))              float32, over the E experts
    y = norm_1(MLP(norm(x))) + norm_2(Σ_e p_e c_e expert_e(norm'(x)))   over the k largest p_e

A vector v of size P for each token and block, of a second table and of the embedding x_0:

    v = (norm(W_0 x_0 / sqrt(D)) + sqrt(P) table[token]) / sqrt(2)
    x <- x + norm(W_out (act(W_gate x) * v))

B batch, T tokens, D width, E experts, L blocks, P size of the vectors.

Source: transformers' `Gemma4ForCausalLM`.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.config import LlamaConfig
from lora_jax.models.experts import Chosen, Load, choose_experts, load_of
from lora_jax.models.layers import ACTIVATIONS, kept, normal

# The norms around the experts of a block, and after its MLP.
NORMS = (
    "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm_1",
)  # fmt: skip


class Router(nnx.Module):
    """Logits of the experts, and a factor of each one's weight."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        assert config.num_experts is not None
        width, self.count = config.hidden_size, config.num_experts_per_tok
        self.eps, self.factor = config.rms_norm_eps, width**-0.5
        self.proj = nnx.Linear(
            width, config.num_experts, use_bias=False, dtype=dtype, param_dtype=param_dtype,
            rngs=rngs,
        )  # fmt: skip
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.per_expert_scale = nnx.Param(jnp.ones((config.num_experts,), param_dtype))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        scale = self.scale.get_value().astype(x.dtype)
        return self.proj(normal(x, self.eps) * scale * self.factor)

    def chosen(self, logits: Float[Array, "b t e"]) -> Chosen:
        """What tokens with these logits choose."""
        flat = logits.reshape(-1, logits.shape[-1])
        experts, weights = choose_experts(flat, self.count, normalized=True)
        weights = weights * jnp.take(self.per_expert_scale.get_value(), experts)
        return Chosen(*(y.reshape(*logits.shape[:-1], -1) for y in (experts, weights)))


def with_experts(
    block: Any,
    x: Float[Array, "b t d"],
    out: Float[Array, "b t d"],
    real: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t d"], Load | None]:
    """The MLP's output and the experts' together, and the experts' load by the `real` tokens.

    Args:
      block: has `router`, `experts` and `NORMS`.
      x: before the MLP and its norm.
      out: the MLP's output.
      real: as in `lora_jax.models.experts.MixtureMLP.counted`.
    """
    before, after, beside = (getattr(block, name) for name in NORMS)
    logits, choose = block.router(x), block.router.chosen
    load = None if real is None else load_of(logits, choose(logits).experts, real)
    return beside(out) + after(block.experts(before(x), logits, choose)), load


def of_token(
    block: Any, x: Float[Array, "b t d"], given: Float[Array, "b t p"]
) -> Float[Array, "b t d"]:
    """What a block adds last, of the vectors that it is given."""
    gate = ACTIVATIONS[block.activation](kept(block.per_layer_input_gate(x)))
    return block.post_per_layer_input_norm(kept(block.per_layer_projection(gate * given)))


def vectors(
    decoder: Any, tokens: Int[AnyArray, "b t"], embedded: Float[Array, "b t d"], size: int
) -> Float[Array, "l b t p"]:
    """The vectors of size P that each block is given."""
    shape = (*tokens.shape, -1, size)
    own = decoder.embed_tokens_per_layer(tokens)
    own = (own * jnp.asarray(size**0.5, own.dtype)).reshape(shape)
    made = kept(decoder.per_layer_model_projection(embedded)) * embedded.shape[-1] ** -0.5
    both = (decoder.per_layer_projection_norm(made.reshape(shape)) + own) * 2**-0.5
    return jnp.moveaxis(both, 2, 0)
