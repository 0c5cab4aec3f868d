"""The yardstick: LoRA written by hand into a Llama forward, as one would without this library."""

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.rope import rotate, rotation

LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def factors(lora_params) -> dict:
    """`{"q_proj": (a, b), ...}` of a stacked model's LoRA tree."""
    layers = lora_params["model"]["layers"]
    leaves = {n: layers[g][n]["kernel"] for g, names in LINEAR.items() for n in names}
    return {name: (leaf.a, leaf.b) for name, leaf in leaves.items()}


def logits(adapters: dict, params: dict, tokens, *, config, scale: float):
    """Logits (B, T, V) of a stacked Llama with one adapter on every linear layer.

    Args:
      adapters: name to `(a (L, in, r), b (L, r, out))`.
      params: the base.
      tokens: int32 (B, T), padded on the right.
      config: `LlamaConfig`.
      scale: alpha / r.
    """
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    turn = rotation(
        positions,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        context=config.max_position_embeddings,
    )

    def norm(x, weight):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * weight

    def block(x, layer):
        base, extra = layer

        def linear(group, name, x):
            a, b = extra[name]
            return x @ base[group][name]["kernel"] + scale * (x @ a) @ b

        def heads(y):
            return y.reshape(*y.shape[:2], -1, config.head_dim)

        h = norm(x, base["input_layernorm"]["scale"])
        q, k, v = (heads(linear("self_attn", f"{n}_proj", h)) for n in "qkv")
        mixed = jax.nn.dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        x = x + linear("self_attn", "o_proj", mixed.reshape(*x.shape[:2], -1))
        h = norm(x, base["post_attention_layernorm"]["scale"])
        h = jax.nn.silu(linear("mlp", "gate_proj", h)) * linear("mlp", "up_proj", h)
        return x + linear("mlp", "down_proj", h), None

    table = params["model"]["embed_tokens"]["embedding"]
    x, _ = lax.scan(block, jnp.take(table, tokens, axis=0), (params["model"]["layers"], adapters))
    return norm(x, params["model"]["norm"]["scale"]) @ table.T
