"""One small decoder written five times: Flax linen, NNX, Equinox, Keras and torch.

Each uses its weights as models of its framework do, which is what an adapting library meets:

    qkv    (3, d, d)  an einsum                      out, up   (in, out)  the framework's own layer
    down   (d, f)     x @ down.T, as torch stores it  embed    (v, d)     a lookup, and x @ embed.T

The linen and Equinox models run their blocks in a scan over stacked weights; the others in a loop.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx
from torch.nn import functional as F

VOCABULARY, WIDTH, INNER, HEADS, LAYERS = 2048, 256, 1024, 4, 4
NAMES = ("embed", "qkv", "out", "up", "down")


def numbers() -> dict[str, np.ndarray]:
    """The weights of all five; those of a block are stacked."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "qkv": (LAYERS, 3, WIDTH, WIDTH),
        "out": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, WIDTH, INNER),
        "down": (LAYERS, WIDTH, INNER),
    }
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attend(qkv):
    """Causal attention: (3, b, t, d) to (b, t, d)."""
    _, b, t, d = qkv.shape
    q, k, v = qkv.reshape(3, b, t, HEADS, d // HEADS)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d)


# ---- Flax linen


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        qkv = self.param("qkv", nn.initializers.zeros, (3, WIDTH, WIDTH))
        down = self.param("down", nn.initializers.zeros, (WIDTH, INNER))
        h = attend(jnp.einsum("btd,cde->cbte", norm(x), qkv))
        x = x + nn.Dense(WIDTH, use_bias=False, name="out")(h)
        h = nn.Dense(INNER, use_bias=False, name="up")(norm(x))
        return x + nn.gelu(h) @ down.T, None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = self.param("embed", nn.initializers.zeros, (VOCABULARY, WIDTH))
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(LinenBlock, length=LAYERS, **stacked)(name="blocks")(embed[tokens], None)
        return norm(x) @ embed.T


def linen_model() -> tuple[LinenModel, dict]:
    w = numbers()
    blocks = {"qkv": w["qkv"], "down": w["down"], "out": {"kernel": w["out"]}}
    blocks["up"] = {"kernel": w["up"]}
    return LinenModel(), {
        "embed": jnp.asarray(w["embed"]),
        "blocks": jax.tree.map(jnp.asarray, blocks),
    }


# ---- Flax NNX


class NnxBlock(nnx.Module):
    def __init__(self, w: dict, layer: int) -> None:
        self.qkv, self.down = nnx.Param(w["qkv"][layer]), nnx.Param(w["down"][layer])
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=nnx.Rngs(0))
        self.out.kernel[...], self.up.kernel[...] = w["out"][layer], w["up"][layer]

    def __call__(self, x):
        x = x + self.out(attend(jnp.einsum("btd,cde->cbte", norm(x), self.qkv[...])))
        return x + jax.nn.gelu(self.up(norm(x))) @ self.down[...].T


class NnxModel(nnx.Module):
    def __init__(self) -> None:
        w = jax.tree.map(jnp.asarray, numbers())
        self.embed = nnx.Param(w["embed"])
        self.blocks = nnx.List(NnxBlock(w, layer) for layer in range(LAYERS))

    def __call__(self, tokens):
        x = self.embed[...][tokens]
        for block in self.blocks:
            x = block(x)
        return norm(x) @ self.embed[...].T


# ---- Equinox


class EquinoxBlock(eqx.Module):
    qkv: jax.Array
    down: jax.Array
    out: eqx.nn.Linear
    up: eqx.nn.Linear

    def __call__(self, x):
        h = attend(jnp.einsum("btd,cde->cbte", norm(x), self.qkv))
        x = x + jax.vmap(jax.vmap(self.out))(h)
        return x + jax.nn.gelu(jax.vmap(jax.vmap(self.up))(norm(x))) @ self.down.T


class EquinoxModel(eqx.Module):
    embed: jax.Array
    blocks: EquinoxBlock  # stacked

    def __call__(self, tokens):
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), self.embed[tokens], self.blocks)
        return norm(x) @ self.embed.T


def equinox_model() -> EquinoxModel:
    w = jax.tree.map(jnp.asarray, numbers())

    def linear(weight):
        # Equinox stores (out, in).
        layer = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
        return eqx.tree_at(lambda m: m.weight, layer, weight.swapaxes(-1, -2))

    block = EquinoxBlock(w["qkv"], w["down"], linear(w["out"]), linear(w["up"]))
    return EquinoxModel(w["embed"], block)


# ---- Keras


class KerasBlock(keras.layers.Layer):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.qkv = keras.layers.EinsumDense("btd,dce->btce", (None, 3, WIDTH), name="qkv")
        self.out = keras.layers.Dense(WIDTH, use_bias=False, name="out")
        self.up = keras.layers.Dense(INNER, use_bias=False, name="up")
        self.down = self.add_weight(shape=(WIDTH, INNER), name="down")

    def call(self, x):
        x = x + self.out(attend(jnp.moveaxis(self.qkv(norm(x)), 2, 0)))
        return x + jax.nn.gelu(self.up(norm(x))) @ self.down.value.T


class KerasModel(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed = keras.layers.Embedding(VOCABULARY, WIDTH, name="embed")
        self.blocks = [KerasBlock(name=f"block_{layer}") for layer in range(LAYERS)]

    def call(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return keras.ops.matmul(norm(x), keras.ops.transpose(self.embed.embeddings))


def keras_model(tokens) -> KerasModel:
    model, w = KerasModel(), numbers()
    model(tokens)
    model.embed.set_weights([w["embed"]])
    for layer, block in enumerate(model.blocks):
        block.qkv.set_weights([w["qkv"][layer].swapaxes(0, 1)])
        block.out.set_weights([w["out"][layer]])
        block.up.set_weights([w["up"][layer]])
        block.down.assign(w["down"][layer])
    return model


# ---- torch


class TorchBlock(torch.nn.Module):
    def __init__(self, w: dict, layer: int) -> None:
        super().__init__()
        self.qkv, self.down = (torch.nn.Parameter(w[name][layer]) for name in ("qkv", "down"))
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = torch.nn.Linear(WIDTH, INNER, bias=False)
        self.out.weight.data, self.up.weight.data = w["out"][layer].T, w["up"][layer].T

    def forward(self, x):
        b, t, d = x.shape
        qkv = torch.einsum("btd,cde->cbte", torch_norm(x), self.qkv)
        q, k, v = qkv.view(3, b, t, HEADS, d // HEADS).transpose(2, 3)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(b, t, d))
        h = F.gelu(self.up(torch_norm(x)), approximate="tanh")
        return x + F.linear(h, self.down)


def torch_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        w = {name: torch.from_numpy(value) for name, value in numbers().items()}
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH, _weight=w["embed"])
        self.blocks = torch.nn.ModuleList(TorchBlock(w, layer) for layer in range(LAYERS))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(torch_norm(x), self.embed.weight)
