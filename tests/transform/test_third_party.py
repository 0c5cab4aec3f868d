"""Blocks of third-party libraries: what "all-linear" adapts, against merged weights in float64.

Each is written anew, as small as it can be, from the papers and libraries that it is named after.
"""

import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint

import lora_jax as lora
from lora_jax.plan.decide import LeftOutWarning

from tests.laws.cases import adapted, assert_near, loss
from tests.support.random_arrays import normal

pytestmark = pytest.mark.slow

X = (2, 5, 8)


def causal(x, kernel):
    """A depthwise convolution over positions, as shifted copies."""
    padded = jnp.pad(x, ((0, 0), (kernel.shape[0] - 1, 0), (0, 0)))
    return sum(padded[:, i : i + x.shape[1]] * kernel[i] for i in range(kernel.shape[0]))


def over_time(step, start, *arrays):
    """A scan over the positions of arrays (batch, positions, ...)."""
    ys = lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in arrays))[1]
    return jnp.moveaxis(ys, 0, 1)


def recurrence(a, b):
    """`h = a·h + b` along axis 1."""
    return lax.associative_scan(
        lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1]), (a, b), axis=1
    )[1]


def mamba2(p, x):
    z, xbc, dt = jnp.split(x @ p["in"], [8, 22], -1)
    u, b, c = jnp.split(jax.nn.silu(causal(xbc, p["conv"])), [8, 11], -1)
    dt = jax.nn.softplus(dt + p["dt_bias"])

    def step(h, given):
        u, b, c, dt = given
        h = h * jnp.exp(-dt * jnp.exp(p["A_log"]))[..., None, None]
        h = h + jnp.einsum("bhp,bn,bh->bhpn", u, b, dt)
        return h, jnp.einsum("bhpn,bn->bhp", h, c)

    y = over_time(step, jnp.zeros((2, 2, 4, 3)), u.reshape(2, 5, 2, 4), b, c, dt)
    return (y.reshape(2, 5, 8) * jax.nn.silu(z)) @ p["out"]


def mamba1(p, x):
    u, z = jnp.split(x @ p["in"], 2, -1)
    dt, b, c = jnp.split(u @ p["x_proj"], [2, 5], -1)
    dt = jax.nn.softplus(dt @ p["dt_proj"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["A_log"]))
    h = recurrence(decay, jnp.einsum("btd,btn,btd->btdn", dt, b, u))
    return (jnp.einsum("btdn,btn->btd", h, c) * jax.nn.silu(z)) @ p["out"]


def griffin(p, x):
    u, gate = causal(x @ p["x"], p["conv"]), jax.nn.gelu(x @ p["y"])
    heads = u.reshape(2, 5, 2, 4)
    r = jax.nn.sigmoid(jnp.einsum("...hi,hij->...hj", heads, p["a_gate"])).reshape(2, 5, 8)
    a = jnp.exp(-8 * r * jax.nn.softplus(p["a"]))
    return (recurrence(a, u * jnp.sqrt(1 - a * a + 1e-6)) * gate) @ p["out"]


def absorbed(p, x):
    """Latent attention whose query and key, and value and output, are one matrix a head."""
    qk = jnp.einsum("dhk,chk->hdc", p["q"], p["k"])
    vo = jnp.einsum("chv,hvd->hcd", p["v"], p["o"])
    c = x @ p["latent"]
    scores = jax.nn.softmax(jnp.einsum("btd,hdc,bsc->bhts", x, qk, c))
    return jnp.einsum("bhts,bsc,hcd->btd", scores, c, vo)


def hyena(p, x):
    v, a, b = jnp.split(x @ p["in"], 3, -1)
    t = jnp.linspace(0, 1, 5)[:, None]
    kernel = jnp.sin(jnp.concatenate([t, jnp.cos(6 * t)], -1) @ p["f1"]) @ p["f2"]
    spectra = jnp.fft.rfft(v * a, n=10, axis=1) * jnp.fft.rfft(kernel, n=10, axis=0)
    return (jnp.fft.irfft(spectra, n=10, axis=1)[:, :5] * b) @ p["out"]


def kan(p, x):
    basis = jnp.exp(-((x[..., None] - jnp.linspace(-2, 2, 7)) ** 2))
    spline = jnp.einsum("btig,iog->bto", basis, p["coef"] * p["scale"][..., None])
    return jax.nn.silu(x) @ p["base"] + spline


def sorted_experts(p, x):
    tokens = x.reshape(-1, 8)
    gates = jax.nn.softmax(tokens @ p["router"])
    expert = jnp.argmax(gates, -1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
    h = jax.nn.silu(lax.ragged_dot(tokens[order], p["up"], sizes))
    y = jnp.zeros_like(tokens).at[order].set(lax.ragged_dot(h, p["down"], sizes))
    return y * jnp.max(gates, -1)[:, None]


def expert_choice(p, x):
    tokens = x.reshape(-1, 8)
    weights, chosen = lax.top_k(jax.nn.softmax(tokens @ p["router"]).T, 4)
    h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", tokens[chosen], p["up"]))
    y = jnp.einsum("ecf,efd->ecd", h, p["down"]) * weights[..., None]
    return jnp.zeros_like(tokens).at[chosen.reshape(-1)].add(y.reshape(-1, 8))


def product_keys(p, x):
    left, right = jnp.split(x @ p["query"], 2, -1)
    s1, i1 = lax.top_k(left @ p["k1"].T, 2)
    s2, i2 = lax.top_k(right @ p["k2"].T, 2)
    scores = jax.nn.softmax((s1[..., :, None] + s2[..., None, :]).reshape(2, 5, 4))
    rows = (i1[..., :, None] * 4 + i2[..., None, :]).reshape(2, 5, 4)
    return jnp.einsum("btk,btkd->btd", scores, p["values"][rows])


def graph_bases(p, x):
    weights = jnp.einsum("rb,bio->rio", p["coef"], p["basis"])
    edges = jax.nn.relu(normal(9, 3, 5, 5))
    return x @ p["self"] + jnp.einsum("rnm,bmi,rio->bno", edges, x, weights)


def state_space(p, x):
    decay = jnp.exp(-jnp.exp(p["nu"]) + 1j * jnp.arange(6))
    u = x @ (p["b_re"] + 1j * p["b_im"]).T
    h = recurrence(jnp.broadcast_to(decay, u.shape), u)
    return (h @ (p["c_re"] + 1j * p["c_im"]).T).real


def fourier_operator(p, x):
    h = x @ p["lift"]
    modes = jnp.fft.rfft(h, axis=1)
    y = jnp.einsum("bki,iok->bko", modes, p["re"] + 1j * p["im"])
    return jnp.fft.irfft(y, n=5, axis=1) + h @ p["w"]


def monarch(p, x):
    y = jnp.einsum("btkp,kqp->btkq", x.reshape(2, 5, 2, 4), p["left"]).swapaxes(-1, -2)
    return jnp.einsum("btqk,qrk->btqr", y, p["right"])


def modulated(p, x):
    w = p["w"] * (1 + x.mean(1) @ p["style"])[:, :, None]
    w = w * lax.rsqrt((w * w).sum(1, keepdims=True) + 1e-3)
    return jnp.einsum("btd,bdo->bto", x, w)


def members(p, x):
    return jnp.einsum("btd,do,eo->ebto", x, p["w"], p["gain"])


def standardised(p, x):
    w = p["w"] - p["w"].mean((0, 1))
    w = w * lax.rsqrt(w.var((0, 1)) + 1e-4) * p["gain"]
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def delta(p, x):
    def step(state, given):
        q, k, v = given
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        state = state + jnp.einsum("bk,bv->bkv", k, v - jnp.einsum("bkv,bk->bv", state, k))
        return state, jnp.einsum("bkv,bk->bv", state, q)

    return over_time(step, jnp.zeros((2, 8, 8)), *(x @ p[n] for n in "qkv")) @ p["o"]


def equilibrium(p, x):
    def residual(z):
        return jnp.tanh(0.1 * z @ p["w"] + x @ p["u"]) - z

    def solve(f, z):
        return lax.fori_loop(0, 60, lambda _, z: z + f(z), z)

    def tangent(g, y):
        size = y.size
        matrix = jax.jacobian(lambda v: g(v.reshape(y.shape)).reshape(-1))(jnp.zeros(size))
        return jnp.linalg.solve(matrix, y.reshape(-1)).reshape(y.shape)

    return lax.custom_root(residual, jnp.zeros_like(x), solve, tangent) @ p["o"]


def differential(p, x):
    def field(y, t, p):
        return jnp.tanh(y @ p["a"]) @ p["b"]

    return odeint(field, x, jnp.array([0.0, 0.5]), p)[-1]


def quaternions(p, x):
    r, i, j, k = (p[n] for n in "rijk")
    rows = [[r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r]]
    return x @ jnp.block(rows)


def pipeline(p, x):
    def stage(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def tick(state, _):
        state = jax.vmap(stage)(p["w"], jnp.roll(state, 1, 0).at[0].set(x))
        return state, state[-1]

    return lax.scan(tick, jnp.zeros((2, *x.shape)), None, 3)[1]


def chebyshev(p, x):
    edges = normal(9, 5, 5)
    terms = [x, edges @ x]
    terms.append(2 * edges @ terms[1] - x)
    return jnp.einsum("kbnd,kdo->bno", jnp.stack(terms), p["w"])


def blocks_of_scales(p, x):
    return x @ jnp.einsum("gio,go->gio", p["q"].reshape(2, 4, 6), p["scales"]).reshape(8, 6)


# The model, the shapes of its parameters, and the roles of what "all-linear" adapts. What it leaves
# out is a vector, scales, a table, or features that are no projection.
MODELS: Mapping[str, tuple[Callable, Mapping[str, tuple], Mapping[str, str]]] = {
    "mamba 2": (mamba2, {"in": (8, 24), "conv": (4, 14), "dt_bias": (2,), "A_log": (2,),
                         "out": (8, 8)}, {"in": "io", "out": "io"}),
    "mamba": (mamba1, {"in": (8, 16), "x_proj": (8, 8), "dt_proj": (2, 8), "A_log": (8, 3),
                       "out": (8, 8)}, dict.fromkeys(("in", "x_proj", "dt_proj", "out"), "io")),
    "griffin": (griffin, {"x": (8, 8), "y": (8, 8), "conv": (4, 8), "a_gate": (2, 4, 4), "a": (8,),
                          "out": (8, 8)}, {"x": "io", "y": "io", "a_gate": "sio", "out": "io"}),
    "absorbed latent attention": (
        absorbed, {"q": (8, 2, 5), "k": (7, 2, 5), "latent": (8, 7), "v": (7, 2, 4),
                   "o": (2, 4, 8)},
        {"q": "osi", "k": "osi", "latent": "io", "v": "osi", "o": "sio"}),
    "hyena": (hyena, {"in": (8, 24), "f1": (2, 6), "f2": (6, 8), "out": (8, 8)},
              dict.fromkeys(("in", "f1", "f2", "out"), "io")),
    "kan": (kan, {"base": (8, 6), "coef": (8, 6, 7), "scale": (8, 6)},
            {"base": "io", "coef": "ioi"}),
    "sorted experts": (sorted_experts, {"router": (8, 3), "up": (3, 8, 6), "down": (3, 6, 8)},
                       {"router": "io", "up": "sio", "down": "sio"}),
    "expert choice": (expert_choice, {"router": (8, 3), "up": (3, 8, 6), "down": (3, 6, 8)},
                      {"router": "io", "up": "sio", "down": "sio"}),
    "product keys": (product_keys, {"query": (8, 8), "k1": (4, 4), "k2": (4, 4),
                                    "values": (16, 8)}, {"query": "io", "k1": "oi", "k2": "oi"}),
    "bases of relations": (graph_bases, {"coef": (3, 2), "basis": (2, 8, 6), "self": (8, 6)},
                           {"coef": "oi", "basis": "ioo", "self": "io"}),
    "diagonal state space": (
        state_space, {"nu": (6,), "b_re": (6, 8), "b_im": (6, 8), "c_re": (8, 6), "c_im": (8, 6)},
        dict.fromkeys(("b_re", "b_im", "c_re", "c_im"), "oi")),
    "fourier operator": (
        fourier_operator, {"lift": (8, 6), "re": (6, 4, 3), "im": (6, 4, 3), "w": (6, 4)},
        {"lift": "io", "re": "ios", "im": "ios", "w": "io"}),
    "monarch": (monarch, {"left": (2, 4, 4), "right": (4, 2, 2)}, {"left": "soi", "right": "soi"}),
    "modulated": (modulated, {"w": (8, 6), "style": (8, 8)}, {"w": "io", "style": "io"}),
    "members with gains": (members, {"w": (8, 6), "gain": (3, 6)}, {"w": "io"}),
    "standardised": (standardised, {"w": (3, 8, 6), "gain": (6,)}, {"w": "iio"}),
    "delta rule": (delta, dict.fromkeys("qkvo", (8, 8)), dict.fromkeys("qkvo", "io")),
    "equilibrium": (equilibrium, {"w": (8, 8), "u": (8, 8), "o": (8, 4)},
                    {"w": "io", "u": "io", "o": "io"}),
    "differential equation": (differential, {"a": (8, 6), "b": (6, 8)}, {"a": "io", "b": "io"}),
    "quaternions": (quaternions, dict.fromkeys("rijk", (2, 3)), dict.fromkeys("rijk", "io")),
    "pipeline": (pipeline, {"w": (2, 2, 8, 8)}, {"w": "ssio"}),
    "chebyshev": (chebyshev, {"w": (3, 8, 6)}, {"w": "iio"}),
    "scales of blocks": (blocks_of_scales, {"q": (8, 6), "scales": (2, 6)}, {"q": "io"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
def test_all_linear_adapts_every_projection_exactly(name: str):
    fn, shapes, roles = MODELS[name]
    with jax.enable_x64(True):
        params = {n: normal(i, *s).astype(float) for i, (n, s) in enumerate(shapes.items())}
        x = 0.2 * normal(99, *X).astype(float)
        with warnings.catch_warnings():
            warnings.simplefilter("error", LeftOutWarning)
            config = lora.LoraConfig(rank=1, target_modules="all-linear")
            plan = lora.plan(config, fn, params, x)
        assert {leaf.path: leaf.roles for leaf in plan.adapted} == roles
        tree = jax.tree.map(lambda a: a.astype(float), adapted(plan, params))
        trainable, frozen = lora.split(tree)

        def value_and_grad(fn):
            value = jax.value_and_grad(lambda t: loss(fn(lora.combine(t, frozen), x)))
            return jax.jit(value)(trainable)

        got = value_and_grad(lora.lorafy(fn))
        want = value_and_grad(lambda t, x: fn(lora.merge(t), x))
        # float64: two orders of the same sums, through loops of up to sixty steps.
        assert_near(got, want, 1e-9, name)
