"""Which axes are experts: models whose norms, heads and scales have looked like them."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax.plan.decide import LeftOutWarning

X = jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and what the plan must find in it.

    Attributes:
      fn: of `(params, x)`.
      shapes: of the parameters.
      roles: of the matrices.
      vectors: a vector for each head, which the plan leaves out with a warning.
    """

    fn: Callable
    shapes: Mapping[str, tuple[int, ...]]
    roles: Mapping[str, str]
    vectors: tuple[str, ...] = ()


def norm(x, scale):
    """RMSNorm as MaxText and Penzai write it: the scale is multiplied by an einsum."""
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return jnp.einsum("i...k,...k->i...k", y, scale)


def attend(q, k, v):
    scores = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
    return jnp.einsum("bnts,bsnh->btnh", scores, v)


def maxtext_decoder(p, x):
    """Pre- and post-norms around DenseGeneral projections, layers scanned over axis 1."""

    def layer(x, w):
        h = norm(x, w["pre"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, w[n]) for n in ("query", "key", "value"))
        q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        x = x + norm(jnp.einsum("btnh,nhd->btd", attend(q, k, v), w["out"]), w["post"])
        h = norm(x, w["mlp_pre"])
        h = jax.nn.silu(h @ w["wi_0"]) * (h @ w["wi_1"])
        return x + norm(h @ w["wo"], w["mlp_post"]), None

    x, _ = jax.lax.scan(layer, x, jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p["layers"]))
    return norm(x, p["final"]) @ p["logits"]


def latent_attention(p, x):
    """DeepSeek's attention: both down-projections meet a norm, the up-projections split."""
    q = jnp.einsum("btr,rnh->btnh", norm(x @ p["wq_a"], p["q_norm"]), p["wq_b"])
    latent = norm(x @ p["wkv_a"], p["kv_norm"])
    kv = jnp.einsum("btr,rnh->btnh", latent, p["wkv_b"])
    return jnp.einsum("btnh,nhd->btd", attend(q, kv[..., :8], kv[..., 8:]), p["out"])


def absorbed_attention(p, x):
    """The same with the keys' up-projection taken into the queries, head by head."""
    latent = norm(x @ p["wkv_a"], p["kv_norm"])
    q = (x @ p["wq"]).reshape(2, 5, 4, 8)
    scores = jax.nn.softmax(
        jnp.einsum("btnr,bsr->bnts", jnp.einsum("btnh,rnh->btnr", q, p["wk_b"]), latent)
    )
    values = jnp.einsum("btnr,rnh->btnh", jnp.einsum("bnts,bsr->btnr", scores, latent), p["wv_b"])
    return values.reshape(2, 5, 32) @ p["wo"]


def mamba_3(p, x):
    """One input projection cut into heads that meet matrices, vectors and scales of their own."""
    z, h, b = jnp.split(x @ p["in_proj"], [32, 64], -1)
    h = jnp.einsum("blhp,hrp->blrhp", h.reshape(2, 5, 4, 8), p["mimo_x"])
    b = norm(b.reshape(2, 5, 4, 8), p["b_norm"])
    y = jnp.einsum("blrhp,blhp->blrhp", jnp.cumsum(h, 1), b)
    y = jnp.einsum("blrhp,hrp->blhp", y, p["mimo_o"]).reshape(2, 5, 32)
    return (y * jax.nn.silu(z)) @ p["out_proj"]


def griffin(p, x):
    """A recurrent block: the gates of RG-LRU are block-diagonal weights behind a reshape."""
    y = jax.nn.gelu(x @ p["linear_y"])
    h = x @ p["linear_x"]
    h = sum(jnp.pad(h, ((0, 0), (i, 0), (0, 0)))[:, :5] * p["conv"][i] for i in range(4))
    heads = h.reshape(2, 5, 4, 8)
    gates = [
        jax.nn.sigmoid(jnp.einsum("bthi,hij->bthj", heads, p[n])).reshape(2, 5, 32)
        for n in ("input_gate", "a_gate")
    ]
    return (jnp.cumsum(h * gates[0] * jnp.exp(-gates[1]), 1) * y) @ p["linear_out"]


def penzai_attention(p, x):
    """Kernels `(heads, embedding, projection)`, and a norm behind the output."""
    q, k, v = (jnp.einsum("btd,ndh->btnh", x, p[n]) for n in ("query", "key", "value"))
    return norm(x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), p["output"]), p["scale"]) @ p["up"]


def head_scales(p, x):
    """Heads that meet one number each, and one vector each, by an einsum."""
    h = jnp.einsum("btd,dnh->btnh", x, p["first"])
    h = jnp.einsum("btnh,n->btnh", h, p["per_head"])
    scores = jnp.einsum("btnh,nh->btn", h, p["vector"])
    return jnp.einsum("btnh,btn->bth", h, scores) @ p["last"]


def headwise_matrices(p, x):
    """Heads of a whole dim, each with a matrix of its own: `(in, heads, out)` is no expert."""
    h = jnp.einsum("btd,dnh->btnh", x, p["first"])
    return jnp.einsum("btnh,nhk->btnk", h, p["headwise"]).reshape(2, 5, 64) @ p["last"]


def ensemble(p, x):
    """Every member meets the same tokens, and its own hidden layer."""
    h = jax.vmap(lambda w: jnp.tanh(x @ w))(p["first"])
    h = jax.vmap(lambda w, h: norm(h, w))(p["norm"], h)
    return jax.vmap(lambda w, h: h @ w)(p["last"], h).mean(0)


MODELS = {
    "maxtext decoder": Model(
        maxtext_decoder,
        {
            **{f"layers.{n}": (16, 3, 4, 8) for n in ("query", "key", "value")},
            **{f"layers.{n}": (16, 3, 32) for n in ("wi_0", "wi_1")},
            **{f"layers.{n}": (16, 3) for n in ("pre", "post", "mlp_pre", "mlp_post")},
            "layers.out": (4, 3, 8, 16),
            "layers.wo": (32, 3, 16),
            "layers.q_norm": (8, 3),
            "layers.k_norm": (8, 3),
            "final": (16,),
            "logits": (16, 20),
        },
        {
            **{f"layers.{n}": "isoo" for n in ("query", "key", "value")},
            **{f"layers.{n}": "iso" for n in ("wi_0", "wi_1", "wo")},
            "layers.out": "isio",
        },
    ),
    "latent attention": Model(
        latent_attention,
        {
            "wq_a": (16, 6),
            "q_norm": (6,),
            "wq_b": (6, 4, 8),
            "wkv_a": (16, 6),
            "kv_norm": (6,),
            "wkv_b": (6, 4, 16),
            "out": (4, 8, 16),
        },
        {"wq_a": "io", "wq_b": "ioo", "wkv_a": "io", "wkv_b": "ioo", "out": "iio"},
    ),
    "absorbed latent attention": Model(
        absorbed_attention,
        {
            "wkv_a": (16, 6),
            "kv_norm": (6,),
            "wq": (16, 32),
            "wk_b": (6, 4, 8),
            "wv_b": (6, 4, 8),
            "wo": (32, 16),
        },
        {"wkv_a": "io", "wq": "io", "wk_b": "osi", "wv_b": "iso", "wo": "io"},
    ),
    "mamba 3": Model(
        mamba_3,
        {
            "in_proj": (16, 96),
            "mimo_x": (4, 3, 8),
            "b_norm": (4, 8),
            "mimo_o": (4, 3, 8),
            "out_proj": (32, 16),
        },
        {"in_proj": "io", "out_proj": "io"},
        vectors=("mimo_o",),
    ),
    "griffin": Model(
        griffin,
        {
            "linear_y": (16, 32),
            "linear_x": (16, 32),
            "conv": (4, 32),
            "input_gate": (4, 8, 8),
            "a_gate": (4, 8, 8),
            "linear_out": (32, 16),
        },
        {
            "linear_y": "io",
            "linear_x": "io",
            "input_gate": "sio",
            "a_gate": "sio",
            "linear_out": "io",
        },
    ),
    "penzai attention": Model(
        penzai_attention,
        {
            **{n: (4, 16, 8) for n in ("query", "key", "value")},
            "output": (4, 8, 16),
            "scale": (16,),
            "up": (16, 32),
        },
        {"query": "oio", "key": "oio", "value": "oio", "output": "iio", "up": "io"},
    ),
    "head scales": Model(
        head_scales,
        {"first": (16, 4, 8), "per_head": (4,), "vector": (4, 8), "last": (8, 16)},
        {"first": "ioo", "last": "io"},
        vectors=("vector",),
    ),
    "headwise matrices": Model(
        headwise_matrices,
        {"first": (16, 4, 16), "headwise": (4, 16, 16), "last": (64, 8)},
        {"first": "ioo", "headwise": "sio", "last": "io"},
    ),
    "ensemble": Model(
        ensemble,
        {"first": (3, 16, 32), "norm": (3, 32), "last": (3, 32, 8)},
        {"first": "sio", "last": "sio"},
    ),
}


def tree(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    params: dict = {}
    for path, shape in shapes.items():
        *modules, name = path.split(".")
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return params


@pytest.mark.parametrize("targets", ["all-linear", "regex", "names"])
@pytest.mark.parametrize("name", MODELS)
def test_every_named_matrix_is_adapted(name: str, targets: str):
    model = MODELS[name]
    named = {
        "all-linear": "all-linear",
        "regex": rf".*\b({'|'.join(path.rsplit('.', 1)[-1] for path in model.roles)})",
        "names": tuple(model.roles),
    }[targets]
    config = lora.LoraConfig(rank=2, target_modules=named)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        plan = lora.plan(config, model.fn, tree(model.shapes), X)
    vectors = model.vectors if targets == "all-linear" else ()
    assert tuple(leaf.path for leaf in plan.left_out) == vectors
    assert {leaf.path: leaf.roles for leaf in plan.adapted} == dict(model.roles)
