"""Cases of whole trees as real models have them: layouts, containers, odd keys, precisions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tests.laws.case import BFLOAT16, Case, features, normal


def _model(fn, params, *args):
    return lambda: (fn, params, args or (features(),))


def _attention(p, x, heads: int = 2):
    """Attention whose four projections are given as functions of their own layout."""
    q, k, v = p["q"](x), p["k"](x), p["v"](x)
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
    return p["o"](jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), v))


def _heads(q: str, kv: str, o: str):
    def fn(p, x):
        return _attention(
            {
                "q": lambda x: jnp.einsum(q, x, p["q"]),
                "k": lambda x: jnp.einsum(kv, x, p["k"]),
                "v": lambda x: jnp.einsum(kv, x, p["v"]),
                "o": lambda x: jnp.einsum(o, x, p["o"]),
            },
            x,
        )

    return fn


def _head_params(q, kv, o):
    return {n: normal(i, *s) for i, (n, s) in enumerate(
        {"q": q, "k": kv, "v": kv, "o": o}.items())}  # fmt: skip


_IOO = _model(_heads("btd,dhk->bthk", "btd,dhk->bthk", "bthk,hkd->btd"),
              _head_params((8, 2, 4), (8, 2, 4), (2, 4, 8)))  # fmt: skip
_OIO = _model(_heads("btd,hdk->bthk", "btd,hdk->bthk", "bthk,hkd->btd"),
              _head_params((2, 8, 4), (2, 8, 4), (2, 4, 8)))  # fmt: skip


def _gemma(p, x):
    """Fused projections `(3, heads, d, head_dim)`, and an output `(heads, head_dim, d)`."""
    q, k, v = jnp.einsum("BTD,SNDH->SBTNH", x, p["qkv_einsum"]["w"])
    scores = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q * 4**-0.5, k))
    return jnp.einsum("BTNH,NHD->BTD", jnp.einsum("BNTS,BSNH->BTNH", scores, v),
                      p["attn_vec_einsum"]["w"])  # fmt: skip


def _mixed_layouts(p, x):
    h = jax.nn.relu(x @ p["a"]["kernel"])
    return h @ p["b"]["kernel"].T


def _experts(p, x):
    """The expert axis is kept by the first contraction and batched by the second."""
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["up"]))
    y = jnp.einsum("btef,efd->bted", h, p["down"])
    gates = jax.nn.softmax(x @ p["router"])
    return jnp.einsum("bted,bte->btd", y, gates)


def _summed_experts(p, x):
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["up"]))
    return jnp.einsum("btef,efd->btd", h, p["down"])


def _gated_experts(p, x):
    gate = jnp.einsum("btd,edf->ebtf", x, p["gate"])
    up = jnp.einsum("btd,edf->ebtf", x, p["up"])
    return jnp.einsum("ebtf,efd->ebtd", jax.nn.silu(gate) * up, p["down"]).sum(0)


def _position_attention(p, x):
    """q and k on content and on positions: one leaf, several uses."""
    where = jnp.asarray(features(5, 8, seed=7))
    q, k = x @ p["q"], x @ p["k"]
    content = jnp.einsum("btd,bsd->bts", q, k)
    position = jnp.einsum("btd,sd->bts", q, where @ p["k"])
    mixed = jnp.einsum("td,bsd->bts", where @ p["q"], k)
    return jax.nn.softmax((content + position + mixed) / 8) @ (x @ p["v"])


def _applied_often(p, x):
    def step(c, _):
        return c + jnp.tanh(c @ p["block"]["w"]) @ p["block"]["v"], None

    return lax.scan(step, x, None, length=4)[0] @ p["block"]["w"]


def _norm_scale_as_batch(p, x):
    """A norm's scale feeds a dot_general as a batch dim: no linear map."""
    h = lax.dot_general(x, p["norm"], (((), ()), ((2,), (0,))))
    return jnp.moveaxis(h, 0, -1) @ p["w"]


def _dead_subtree(p, x):
    unused = x @ p["unused"]["w"]
    del unused
    return x @ p["used"]["w"] + 0 * p["counter"]


def _dead_norm(p, x):
    """What only a dead equation would materialise is no fallback."""
    dead = p["w"] / jnp.linalg.norm(p["w"])
    del dead
    return x @ p["w"]


def _int8(p, x):
    """An int8 kernel with its scales beside a float one: only the float one can be adapted."""
    w = p["quantized"]["q"].astype(jnp.float32) * p["quantized"]["scales"]
    return jnp.tanh(x @ w) @ p["out"]["kernel"]


class Weights(NamedTuple):
    up: Any
    down: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Boxed:
    """As a named array: the leaf is one attribute further down."""

    array: Any
    names: tuple = dataclasses.field(metadata={"static": True}, default=("in", "out"))


def _tuple_tree(p, x):
    return jnp.tanh(x @ p.up) @ p.down


def _list_tree(p, x):
    for layer in p["layers"]:
        x = jnp.tanh(x @ layer.weight.T + layer.bias)
    return x


def _boxed_tree(p, x):
    return x @ p["w"].array


def _haiku(p, x):
    h = jnp.tanh(x @ p["mlp/~/linear_0"]["w"] + p["mlp/~/linear_0"]["b"])
    return h @ p["mlp/~/linear_1"]["w"]


def _spaced(p, x):
    return x @ p["Dense layer 0"]["my kernel"]


def _flat(p, x):
    return jnp.tanh(x @ p["encoder/layer_0/kernel"]) @ p["encoder/layer_1/kernel"]


def _residual_stream(p, x):
    """Pre-norm layers in one scan, everything stacked on axis 0, with rematerialization."""

    @jax.checkpoint
    def block(x, layer):
        h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * layer["norm"]
        h = jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])
        return x + h @ layer["down"], None

    x, _ = lax.scan(block, x, p["layers"])
    return x @ p["embed"].T


_STREAM = {
    "layers": {
        "norm": 1 + normal(0, 3, 8, scale=0.1),
        "gate": normal(1, 3, 8, 6),
        "up": normal(2, 3, 8, 6),
        "down": normal(3, 3, 6, 8),
    },
    "embed": normal(4, 11, 8),
}
_LOW = jnp.bfloat16
_STREAM_ROLES = {f"layers.{n}": "sio" for n in ("gate", "up", "down")}

CASES = (
    Case("heads_ioo", _IOO, {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio"}),
    Case("heads_oio", _OIO, {"q": "oio", "k": "oio", "v": "oio", "o": "iio"}),
    Case("heads_fused_ooio", _model(_gemma, {"qkv_einsum": {"w": normal(1, 3, 2, 8, 4)},
                                             "attn_vec_einsum": {"w": normal(2, 2, 4, 8)}}),
         {"qkv_einsum.w": "ooio", "attn_vec_einsum.w": "iio"}),
    Case("layouts_mixed", _model(_mixed_layouts, {"a": {"kernel": normal(1, 8, 6)},
                                                  "b": {"kernel": normal(2, 4, 6)}}),
         {"a.kernel": "io", "b.kernel": "oi"}),
    Case("experts_routed", _model(_experts, {"up": normal(1, 3, 8, 6), "down": normal(2, 3, 6, 8),
                                             "router": normal(3, 8, 3)}),
         {"up": "sio", "down": "sio", "router": "io"}),
    Case("experts_summed", _model(_summed_experts, {"up": normal(1, 3, 8, 6),
                                                    "down": normal(2, 3, 6, 8)}),
         {"up": "sio", "down": "sio"}),
    Case("experts_summed_read_as_heads",
         _model(_summed_experts, {"up": normal(1, 3, 8, 6), "down": normal(2, 3, 6, 8)}),
         {"up": "oio", "down": "iio"}, config={"roles": {"up": "oio", "down": "iio"}}),
    Case("mlp_of_two_hidden_dims",
         _model(lambda p, x: jnp.einsum("bthk,hkd->btd", jnp.tanh(
             jnp.einsum("btd,dhk->bthk", x, p["up"])), p["down"]),
             {"up": normal(1, 8, 3, 6), "down": normal(2, 3, 6, 8)}),
         {"up": "ioo", "down": "iio"}),
    Case("experts_override", _model(_experts, {"up": normal(1, 3, 8, 6), "router": normal(3, 8, 3),
                                               "down": normal(2, 3, 6, 8)}),
         {"up": "oio", "down": "sio", "router": "io"}, config={"roles": {"up": "oio"}}),
    Case("experts_gated", _model(_gated_experts, {n: normal(i, *s) for i, (n, s) in enumerate(
        {"gate": (3, 8, 6), "up": (3, 8, 6), "down": (3, 6, 8)}.items())}),
        {"gate": "sio", "up": "sio", "down": "sio"}),
    Case("used_on_content_and_positions",
         _model(_position_attention, {n: normal(i, 8, 8) for i, n in enumerate("qkv")}),
         {"q": "io", "k": "io", "v": "io"}),
    Case("block_applied_often", _model(_applied_often, {"block": {"w": normal(1, 8, 6),
                                                                  "v": normal(2, 6, 8)}}),
         {"block.w": "io", "block.v": "io"}),
    Case("norm_scale_as_batch", _model(_norm_scale_as_batch, {"norm": 1 + normal(1, 8),
                                                              "w": normal(2, 8, 6)}),
         {"w": "io"}),
    Case("dead_subtree", _model(_dead_subtree, {"used": {"w": normal(1, 8, 6)},
                                                "unused": {"w": normal(2, 8, 6)},
                                                "counter": jnp.zeros((), jnp.int32)}),
         {"used.w": "io", "unused.w": "io"}),
    Case("dead_materialization", _model(_dead_norm, {"w": normal(1, 8, 6)}), {"w": "io"}),
    Case("int8_base_with_scales",
         _model(_int8, {"quantized": {"q": jnp.arange(48, dtype=jnp.int8).reshape(8, 6) - 24,
                                      "scales": 0.02 + jnp.abs(normal(1, 6, scale=0.01))},
                        "out": {"kernel": normal(2, 6, 4)}}),
         {"out.kernel": "io"}),
    Case("container_named_tuple", _model(_tuple_tree, Weights(normal(1, 8, 6), normal(2, 6, 8))),
         {"up": "io", "down": "io"}),
    Case("container_dataclass", _model(_list_tree, {"layers": [
        Layer(normal(1, 6, 8), normal(2, 6)), Layer(normal(3, 4, 6), normal(4, 4))]}),
        {"layers.0.weight": "oi", "layers.1.weight": "oi"}),
    Case("container_boxed", _model(_boxed_tree, {"w": Boxed(normal(1, 8, 6))}), {"w": "io"}),
    Case("keys_of_haiku", _model(_haiku, {"mlp/~/linear_0": {"w": normal(1, 8, 6),
                                                             "b": normal(2, 6)},
                                          "mlp/~/linear_1": {"w": normal(3, 6, 4)}}),
         {"mlp.~.linear_0.w": "io", "mlp.~.linear_1.w": "io"}),
    Case("keys_with_spaces", _model(_spaced, {"Dense layer 0": {"my kernel": normal(1, 8, 6)}}),
         {"Dense layer 0.my kernel": "io"}),
    Case("keys_flat", _model(_flat, {"encoder/layer_0/kernel": normal(1, 8, 6),
                                     "encoder/layer_1/kernel": normal(2, 6, 4)}),
         {"encoder.layer_0.kernel": "io", "encoder.layer_1.kernel": "io"}),
    Case("decoder_scanned", _model(_residual_stream, _STREAM), _STREAM_ROLES | {"embed": "oi"},
         linear=(*_STREAM_ROLES, "embed")),
    Case("decoder_bfloat16",
         _model(_residual_stream, jax.tree.map(lambda x: x.astype(_LOW), _STREAM),
                features().astype(_LOW)),
         _STREAM_ROLES, linear=(*_STREAM_ROLES, "embed"), tolerance=BFLOAT16, numerical=False),
)  # fmt: skip
