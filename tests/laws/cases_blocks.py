"""Cases of blocks as third-party models write them, and of the rarer ways to use a weight."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.laws.case import Case, features, normal


def _model(fn, *args, **shapes):
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return lambda: (fn, params, args or (features(),))


def _grouped_query(p, x):
    """Two query heads a key head, through JAX's own attention."""
    q = (x @ p["q"]).reshape(2, 5, 4, 3)
    k, v = ((x @ p[n]).reshape(2, 5, 2, 3) for n in "kv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(2, 5, 12) @ p["o"]


def _fused_qkv(p, x):
    qkv = (x @ p["qkv"]).reshape(2, 5, 3, 2, 4)
    q, k, v = (qkv[:, :, i] for i in range(3))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(2, 5, 8) @ p["out"]


def _multi_latent(p, x):
    """Keys and values through a low-rank latent, the up-projection split by head."""
    latent = x @ p["down"]
    up = p["up"].reshape(4, 2, 6)
    k, v = jnp.einsum("btc,chk->bthk", latent, up[..., :3]), jnp.einsum(
        "btc,chk->bthk", latent, up[..., 3:])  # fmt: skip
    return jnp.einsum("bthk,bshk->bhts", k, v)


def _dispatched_experts(p, x):
    """Capacity-based routing: one-hot dispatch, experts as a batch dim, combine."""
    gates = jax.nn.softmax(x @ p["router"])
    dispatch = jax.nn.one_hot(jnp.argmax(gates, -1), 3)[..., None] * jnp.eye(5)[None, :, None]
    slots = jnp.einsum("btec,btd->ebcd", dispatch, x)
    h = jax.nn.relu(jnp.einsum("ebcd,edf->ebcf", slots, p["up"]))
    y = jnp.einsum("ebcf,efd->ebcd", h, p["down"])
    return jnp.einsum("btec,ebcd->btd", dispatch * gates[..., None], y)


def _block_diagonal(p, x):
    """Griffin's block-diagonal linear: a batch dim of the weight for each block of features."""
    blocks = x.reshape(2, 5, 2, 4)
    return jnp.einsum("bthi,hij->bthj", blocks, p["w"]).reshape(2, 5, -1)


def _selective_scan(p, x):
    """A linear recurrence whose gates come from a projection."""
    gate, inner = jnp.split(x @ p["in"], 2, -1)

    def step(h, xs):
        a, u = xs
        h = jax.nn.sigmoid(a) * h + u
        return h, h

    _, ys = lax.scan(step, jnp.zeros((2, 6)), (jnp.moveaxis(gate, 1, 0), jnp.moveaxis(inner, 1, 0)))
    return jnp.moveaxis(ys, 0, 1) @ p["out"]


def _implicit_filter(p, x):
    """Hyena: a filter over positions, from a small network, convolved with the features."""
    t = jnp.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
    h = jnp.sin(jnp.concatenate([t, jnp.cos(9 * t), jnp.sin(9 * t)], -1) @ p["first"])
    h = jnp.fft.rfft(jnp.sin(h @ p["hidden"]) @ p["last"], 10, axis=0)
    return jnp.fft.irfft(jnp.fft.rfft(x, 10, axis=1) * h, 10, axis=1)[:, :5]


def _recurrent(p, x):
    def step(h, row):
        return jnp.tanh(row @ p["x"] + h @ p["h"]), h @ p["y"]

    return lax.scan(step, jnp.zeros((2, 6)), jnp.moveaxis(x, 1, 0))


def _mixed_scan(p, x):
    """Stacked layers that share one weight and index another by number."""

    def layer(c, xs):
        i, w = xs
        return jnp.tanh(c @ w) @ p["shared"] + c @ p["indexed"][i], None

    return lax.scan(layer, x, (jnp.arange(3), p["layers"]))[0]


def _alternating(p, x):
    """Every other layer through a branch."""

    def layer(c, xs):
        i, w = xs
        return lax.cond(i % 2 == 0, lambda: jnp.tanh(c @ w), lambda: c @ w.T), None

    return lax.scan(layer, x, (jnp.arange(3), p["layers"]))[0]


def _relative_positions(p, x):
    """A table looked up by distance, contracted with the queries."""
    distance = jnp.arange(5)[:, None] - jnp.arange(5)[None] + 4
    table = p["table"][distance]
    return jnp.einsum("btd,tsd->bts", x @ p["q"], table)


def _scaled_embedding(p, ids):
    x = p["embed"][ids] * jnp.sqrt(8.0)
    return jnp.tanh(x @ p["w"]) @ p["embed"].T


def _per_example_rows(w, ids):
    return jax.vmap(lambda i: jnp.tanh(w[i]))(ids)


def _mapped(w, x):
    return lax.map(lambda row: jnp.tanh(row @ w), x)


def _vmapped_kernels(w, x):
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="SAME",
                             dimension_numbers=("NWC", "WIO", "NWC"))  # fmt: skip
    return jax.vmap(conv)(x, w)


def _solved(w, x):
    return jnp.linalg.solve(w + 4 * jnp.eye(8), x[0].T)


def _transformed_kernel(w, x):
    return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * jnp.fft.rfft(w, 5, axis=0), 5, axis=1)


def _smoothed(w):
    spectrum = jnp.fft.rfft2(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
    return jnp.fft.irfft2(spectrum / (1 + jnp.arange(4)), (8, 6))


def _closed_over(p, x):
    """A custom_vjp that closes over the weight it uses."""

    @jax.custom_vjp
    def f(x):
        return x * 2

    f.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))
    return f(x @ p["w"]) + jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(x)


def _repeated_heads(w, x):
    """A key head's weight repeated for its group of query heads."""
    return jnp.einsum("btd,dhk->bthk", x, jnp.repeat(w, 2, axis=1))


def _outer(w, x):
    return jnp.einsum("bt,io->btio", x[..., 0], w) + x[:, :, :, None] @ jnp.ones((1, 6)) * (x @ w)[
        :, :, None]  # fmt: skip


CASES = (
    Case("block_grouped_query", _model(_grouped_query, q=(8, 12), k=(8, 6), v=(8, 6), o=(12, 8)),
         {n: "io" for n in "qkvo"}),
    Case("block_fused_qkv", _model(_fused_qkv, qkv=(8, 24), out=(8, 8)),
         {"qkv": "io", "out": "io"}),
    Case("block_multi_latent", _model(_multi_latent, down=(8, 4), up=(4, 12)),
         {"down": "io", "up": "io"}),
    Case("block_dispatched_experts", _model(_dispatched_experts, router=(8, 3), up=(3, 8, 6),
                                            down=(3, 6, 8)),
         {"router": "io", "up": "sio", "down": "sio"}),
    Case("block_diagonal", _model(_block_diagonal, w=(2, 4, 6)), {"w": "sio"}),
    Case("block_selective_scan", _model(_selective_scan, **{"in": (8, 12), "out": (6, 8)}),
         {"in": "io", "out": "io"}),
    Case("block_implicit_filter", _model(_implicit_filter, first=(3, 6), hidden=(6, 6),
                                         last=(6, 8)),
         {n: "io" for n in ("first", "hidden", "last")}),
    Case("block_recurrent", _model(_recurrent, x=(8, 6), h=(6, 6), y=(6, 4)),
         {"x": "io", "h": "io", "y": "io"}),
    Case("block_mixed_scan", _model(_mixed_scan, layers=(3, 8, 8), shared=(8, 8),
                                    indexed=(3, 8, 8)),
         {"layers": "sio", "shared": "io", "indexed": "sio"}),
    Case("block_alternating", _model(_alternating, layers=(3, 8, 8)), {"layers": "soi"}),
    Case("block_relative_positions", _model(_relative_positions, table=(9, 6), q=(8, 6)),
         {"table": "io", "q": "io"}, config={"roles": {"table": "io"}}),
    Case("block_scaled_embedding", _model(_scaled_embedding, jnp.arange(10).reshape(2, 5),
                                          embed=(11, 8), w=(8, 8)),
         {"embed": "io", "w": "io"}, linear=("w",)),
    Case("block_rows_by_vmap", _model(lambda p, i: _per_example_rows(p["w"], i),
                                      jnp.array([3, 1, 1]), w=(11, 8)), {"w": "io"}, linear=()),
    Case("block_mapped", _model(lambda p, x: _mapped(p["w"], x), w=(8, 6)), {"w": "io"}),
    Case("block_vmapped_kernels", _model(lambda p, x: _vmapped_kernels(p["w"], x),
                                         features(3, 2, 5, 8), w=(3, 3, 8, 6)), {"w": "siio"},
         frozenset({("w", "reshape")}), config={"roles": {"w": "siio"}}),
    Case("block_solved", _model(lambda p, x: _solved(p["w"], x) + x[0].T @ jnp.ones((5, 5)) +
                                (x[0] @ p["w"]).T, w=(8, 8)), {"w": "io"},
         frozenset({("w", "lu")})),
    Case("block_fourier_kernel", _model(lambda p, x: _transformed_kernel(p["w"], x) + x @ (
        p["w"].T @ jnp.ones((5, 8))), w=(5, 8)), {"w": "io"}, frozenset({("w", "mul")})),
    Case("block_fourier_smoothed", _model(lambda p, x: x @ _smoothed(p["w"]).astype(x.dtype),
                                          w=(8, 6)), {"w": "io"}, frozenset({("w", "fft")})),
    Case("block_closed_over", _model(_closed_over, w=(8, 8)), {"w": "io"}),
    Case("block_repeated_heads", _model(lambda p, x: _repeated_heads(p["w"], x), w=(8, 2, 3)),
         {"w": "ioo"}),
    Case("block_outer", _model(lambda p, x: _outer(p["w"], x), w=(8, 6)), {"w": "io"}),
)  # fmt: skip
