"""Llama's decoder written in a manner of its own, in plain JAX: heads apart, rotary pairs side by
side, layers on whichever axis, names that are nobody's. Scores are divided by the root of a head's
size in the weights of q; the embedding and the head hold a quarter and the double of Llama's."""

import jax
import jax.numpy as jnp

from lora_jax.hf import name_map

D, N, K, H, F, V, L = 16, 4, 2, 4, 24, 40, 3

SHAPES = {
    "embed": {"table": (V, D)},
    "blocks": {
        "attn": {
            "q": (D, L, N, H), "k": (D, L, K, H), "v": (L, K, D, H), "o": (L, N, H, D),
            "q_shift": (L, N, H), "k_shift": (L, K, H), "v_shift": (L, K, H), "o_shift": (L, D),
        },
        "mlp": {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)},
        "before_attn": (L, D),
        "before_mlp": (L, D),
    },
    "last_norm": (D,),
    "out": (D, V),
}  # fmt: skip
PARAMS = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)

LAYER = "model.layers.{}"
MAP = name_map(
    "own decoder",
    [
        ("embed.table", "model.embed_tokens.weight", "", 4.0),
        ("blocks.attn.q", f"{LAYER}.self_attn.q_proj.weight", "(n p h) d -> d l n (h p)", H**0.5),
        ("blocks.attn.k", f"{LAYER}.self_attn.k_proj.weight", "(n p h) d -> d l n (h p)"),
        ("blocks.attn.v", f"{LAYER}.self_attn.v_proj.weight", "(n h) d -> l n d h"),
        ("blocks.attn.o", f"{LAYER}.self_attn.o_proj.weight", "d (n h) -> l n h d"),
        ("blocks.attn.q_shift", f"{LAYER}.self_attn.q_proj.bias", "(n p h) -> l n (h p)", H**0.5),
        ("blocks.attn.k_shift", f"{LAYER}.self_attn.k_proj.bias", "(n p h) -> l n (h p)"),
        ("blocks.attn.v_shift", f"{LAYER}.self_attn.v_proj.bias", "(n h) -> l n h"),
        ("blocks.attn.o_shift", f"{LAYER}.self_attn.o_proj.bias"),
        ("blocks.mlp.*", f"{LAYER}.mlp.*_proj.weight", "o i -> l i o"),
        ("blocks.before_attn", f"{LAYER}.input_layernorm.weight"),
        ("blocks.before_mlp", f"{LAYER}.post_attention_layernorm.weight"),
        ("last_norm", "model.norm.weight"),
        ("out", "lm_head.weight", "v d -> d v", 0.5),
    ],
    sizes={"p": 2},
)


def forward(params, tokens):
    """Logits (b, t, v) of tokens (b, t)."""
    x = 4 * params["embed"]["table"][tokens]
    attn = params["blocks"]["attn"]
    # A scan goes over leading axes: those of q and k are brought there first.
    moved = {**attn, "q": jnp.moveaxis(attn["q"], 1, 0), "k": jnp.moveaxis(attn["k"], 1, 0)}
    x, _ = jax.lax.scan(_block, x, {**params["blocks"], "attn": moved})
    return _norm(x, params["last_norm"]) @ params["out"] / 2


def _block(x, p):
    a, m = p["attn"], p["mlp"]
    h = _norm(x, p["before_attn"])
    q = _turned(jnp.einsum("btd,dnh->btnh", h, a["q"]) + a["q_shift"])
    k = _turned(jnp.einsum("btd,dnh->btnh", h, a["k"]) + a["k_shift"])
    v = jnp.einsum("btd,ndh->btnh", h, a["v"]) + a["v_shift"]
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    x = x + jnp.einsum("btnh,nhd->btd", mixed, a["o"]) + a["o_shift"]
    h = _norm(x, p["before_mlp"])
    return x + (jax.nn.silu(h @ m["gate"]) * (h @ m["up"])) @ m["down"], None


def _norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _turned(x):
    """Rotary positions, planes side by side: (0, 1), (2, 3), ..."""
    angles = jnp.arange(x.shape[1])[:, None] / 10000.0 ** (jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)
