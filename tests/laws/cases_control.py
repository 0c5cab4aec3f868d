"""Cases of control flow, custom derivatives, kernels and meshes around a weight's use."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.ode import odeint
from jax.sharding import PartitionSpec as P

from tests.laws.case import Case, features, normal


def _one(fn, *shape: int, x=None):
    return lambda: (lambda p, x: fn(p["w"], x), {"w": normal(3, *(shape or (8, 8)))},
                    (features() if x is None else x,))  # fmt: skip


def _layer(c, w):
    return jnp.tanh(c @ w), None


def _scan_carry(w, x):
    def body(carry, _):
        return (carry[0], jnp.tanh(carry[1] @ carry[0])), None

    return lax.scan(body, (w, x), None, length=3)[0][1]


def _scan_changed_carry(w, x):
    def body(carry, _):
        return (carry[0] * 0.5, jnp.tanh(carry[1] @ carry[0])), None

    return lax.scan(body, (w, x), None, length=3)[0][1]


def _scan_ys(w, x):
    _, turned = lax.scan(lambda c, w: (c, w.T), 0, w)
    return lax.scan(_layer, x, turned)[0]


def _scan_axis(axis: int):
    return lambda w, x: lax.scan(_layer, x, jnp.moveaxis(w, axis, 0))[0]


def _scan_nested(w, x):
    return lax.scan(lambda c, ws: lax.scan(_layer, c, ws), x, w)[0]


def _scan_between(w, x):
    """Layers stacked between the two contracted axes: `(heads, layers, head_dim, d)`."""

    def body(c, layer):
        return jnp.tanh(jnp.einsum("bthk,hkd->btd", c.reshape(2, 5, 2, 4), layer)), None

    return lax.scan(body, x, jnp.moveaxis(w, 1, 0))[0]


def _while(w, x):
    return lax.while_loop(lambda c: c[1] < 3, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0))[0]


def _while_carry(w, x):
    def body(c):
        return jnp.tanh(c[0] @ c[2]), c[1] + 1, c[2]

    return lax.while_loop(lambda c: c[1] < 3, body, (x, 0, w))[0]


def _while_condition(w, x):
    def unsettled(c):
        return (c[1] < 3) & (jnp.sum(c[0] @ w) < 1e9)

    return lax.while_loop(unsettled, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0))[0]


def _cond(w, x):
    return lax.cond(jnp.sum(x) > 0, lambda w, x: x @ w, lambda w, x: x @ w.T, w, x)


def _switch_layers(w, x):
    branches = [lambda w, x, i=i: jnp.tanh(x @ w[i]) for i in range(3)]
    return lax.switch(jnp.argmax(x[0, 0]) % 3, branches, w, x)


def _cond_returns(w, x):
    return x @ lax.cond(jnp.sum(x) > 0, lambda w: w, lambda w: w.T, w)


def _fori(w, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)


def _checkpoint(policy=None, name: str = ""):
    def fn(w, x):
        def block(w, x):
            h = jnp.sin(x @ w)
            return (checkpoint_name(h, name) if name else h) @ w.T

        return jax.checkpoint(block, policy=policy)(w, x)

    return fn


_SAVE_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_SAVE_NAMED = jax.checkpoint_policies.save_only_these_names("hidden")


def _scan_checkpoint(w, x):
    return lax.scan(jax.checkpoint(_layer, prevent_cse=False, policy=_SAVE_DOTS), x, w)[0]


@jax.custom_vjp
def _attend(q, k):
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ k


def _attend_plain(q, k):
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ k


_attend.defvjp(lambda q, k: (_attend(q, k), (q, k)), lambda r, g: jax.vjp(_attend_plain, *r)[1](g))


@jax.custom_vjp
def _linear(w, x):
    return x @ w


_linear.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, g: (jnp.einsum("bti,bto->io", r[1], g), g @ r[0].T)
)


@jax.custom_vjp
def _times(w, x, count):
    return count * (x @ w)


def _times_forward(w, x, count):
    # As the rules of equinox do, on which diffrax's and optimistix's loops are built.
    assert not count.perturbed
    return _times(w.value, x.value, count.value), (w.value, x.value, count.value)


def _times_backward(saved, g):
    w, x, count = saved
    return count * jnp.einsum("bti,bto->io", x, g), count * (g @ w.T), None


_times.defvjp(_times_forward, _times_backward, symbolic_zeros=True)


@jax.custom_jvp
def _counted(w, x):
    return x @ w, jnp.sum(x > 0)


@_counted.defjvp
def _counted_derivative(primals, tangents) -> Any:
    (w, x), (dw, dx) = primals, tangents
    out, count = _counted(w, x)
    return (out, count), (x @ dw + dx @ w, np.zeros((), jax.dtypes.float0))


@jax.custom_jvp
def _squash(x):
    return jnp.tanh(x)


_squash.defjvp(lambda xs, ts: (jnp.tanh(xs[0]), ts[0] * (1 - jnp.tanh(xs[0]) ** 2)))


@jax.custom_jvp
def _product(x, w):
    return x @ w


_product.defjvp(lambda xs, ts: (xs[0] @ xs[1], ts[0] @ xs[1] + xs[0] @ ts[1]))


_TABLE = np.asarray(normal(51, 8))


def _with_a_table(rule):
    """A custom rule that closes over an array, which becomes an operand of the equation."""

    def fn(w, x):
        with jax.ensure_compile_time_eval():
            table = jnp.asarray(_TABLE)

        def plain(w, x):
            return jnp.sin((x * table) @ w)

        return rule(plain)(w, x)

    return jax.jit(fn)


def _vjp_rule(plain):
    run = jax.custom_vjp(plain)
    run.defvjp(lambda w, x: (plain(w, x), (w, x)), lambda saved, g: jax.vjp(plain, *saved)[1](g))
    return run


def _jvp_rule(plain):
    run = jax.custom_jvp(plain)
    run.defjvp(lambda xs, ts: jax.jvp(plain, xs, ts))
    return run


def _neural_ode(w, x):
    """JAX's own solver, its adjoint a custom rule that closes over the method's coefficients."""
    return odeint(lambda y, t, w: jnp.tanh(y @ w) * 0.3, x, jnp.array([0.0, 0.5]), w)[-1]


def _adjoint(w, x):
    """As diffrax and optimistix do it: a rule on what a closure-converted function holds."""
    f, held = jax.closure_convert(lambda x: jnp.tanh(x @ w), x)

    @jax.custom_vjp
    def run(x, held):
        return f(x, *held)

    run.defvjp(lambda x, held: (f(x, *held), (x, held)),
               lambda saved, g: jax.vjp(lambda x, held: f(x, *held), *saved)[1](g))  # fmt: skip
    return run(x, held)


def _dense_solve(g, y):
    """`g(v) = y` solved for v; the decomposition has no form for 16 bits."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.linalg.solve(jax.jacobian(g)(y).astype(wide), y.astype(wide)).astype(y.dtype)


def _fixed_point(w, x):
    """A deep equilibrium layer, differentiated by the implicit function theorem."""

    def solve(x):
        return lax.custom_root(
            lambda z: z - jnp.tanh(x + 0.1 * z @ w),
            jnp.zeros_like(x),
            lambda f, z: lax.fori_loop(0, 40, lambda i, z: z - f(z), z),
            _dense_solve,
        )

    return jax.vmap(solve)(x[0])


# Up to JAX 0.11 a function with a derivative of its own; later a primitive whose rule is JAX's.
_ROOT_IS_OPAQUE = any(
    eqn.primitive.name == "call_hi_primitive"
    for eqn in jax.make_jaxpr(
        lambda x: lax.custom_root(
            lambda z: z - x, x, lambda f, z: z - f(z), lambda g, y: y / g(jnp.ones_like(y))
        )
    )(1.0).eqns
)
_ROOT_FALLBACKS = frozenset({("w", "call_hi_primitive")} if _ROOT_IS_OPAQUE else ())


def _linear_solve(w, x):
    def iterate(product, b):
        return lax.fori_loop(0, 60, lambda i, z: z + 0.2 * (b - product(z)), jnp.zeros_like(b))

    return lax.custom_linear_solve(lambda z: 4 * z + 0.3 * z @ w, x, iterate, iterate)


def _inner_gradient(w, x):
    return x - 0.1 * jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x)


def _inner_forward(w, x):
    return jax.jvp(lambda x: jnp.sin(x @ w), (x,), (jnp.ones_like(x),))[1]


def _double(ref, out):
    out[...] = jnp.tanh(ref[...]) * 2


def _pallas(w, x):
    h = x @ w
    out = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return pl.pallas_call(_double, out_shape=out, interpret=True)(h)


def _mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def _megatron(p, x):
    @functools.partial(jax.shard_map, mesh=_mesh(), out_specs=P("data"),
                       in_specs=(P(None, "model"), P("model"), P("data")))  # fmt: skip
    def run(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "model")

    return run(p["up"], p["down"], x)


def _shard_map_closed(w, x):
    run = jax.shard_map(lambda x: jnp.tanh(x @ w), mesh=_mesh(), in_specs=P("data"),
                        out_specs=P("data"))  # fmt: skip
    return run(x)


def _shard_map_scan(p, x):
    def body(c, layer):
        return lax.psum(jnp.tanh(c @ layer[0]) @ layer[1], "model"), None

    run = jax.shard_map(
        lambda up, down, x: lax.scan(body, x, (up, down))[0],
        mesh=_mesh(),
        in_specs=(P(None, None, "model"), P(None, "model"), P("data")),
        out_specs=P("data"),
    )
    return run(p["up"], p["down"], x)


def _pmap(w, x):
    return jax.pmap(lambda x: lax.psum(jnp.tanh(x @ w), "i"), axis_name="i")(x)


def _pair(fn, up, down):
    return lambda: (fn, {"up": normal(3, *up), "down": normal(4, *down)}, (features(4, 8),))


def _callback(w, x):
    jax.debug.callback(lambda s: None, jnp.sum(x))
    return x @ w


def _repeated_block(p, x):
    block = jax.jit(lambda w, v, x: x + jnp.tanh(x @ w) @ v)
    for i in range(3):
        x = block(p["w"][i], p["v"][i], x)
    return block(p["w"][0], p["v"][0], x)


def _vmap_weights(w, x):
    return jax.vmap(lambda w, x: jnp.tanh(x @ w))(w, x)


_CALLS = (
    Case("jit", _one(lambda w, x: jax.jit(lambda w, x: jnp.sin(x @ w))(w, x)), {"w": "io"}),
    Case("jit_returns_transposed",
         _one(lambda w, x: x @ jax.jit(lambda w: w.T.astype(jnp.float32))(w)), {"w": "oi"},
         numerical=False),
    Case("jit_repeated", lambda: (_repeated_block, {"w": normal(3, 3, 8, 6),
                                                    "v": normal(4, 3, 6, 8)}, (features(),)),
         {"w": "sio", "v": "sio"}),
    Case("checkpoint", _one(_checkpoint(), 8, 6), {"w": "io"}),
    Case("checkpoint_policy", _one(_checkpoint(_SAVE_DOTS), 8, 6), {"w": "io"}),
    Case("checkpoint_named", _one(_checkpoint(_SAVE_NAMED, "hidden"), 8, 6), {"w": "io"}),
    Case("custom_vjp_on_activations", _one(lambda w, x: _attend(x @ w, x @ w.T)), {"w": "io"}),
    Case("custom_vjp_takes_weight", _one(lambda w, x: _linear(w, x)), {"w": "io"},
         dropout=False),
    Case("custom_vjp_sees_what_varies", _one(lambda w, x: _times(w, x, 2.0)), {"w": "io"},
         dropout=False),
    Case("custom_vjp_closure_converted", _one(_adjoint), {"w": "io"}, dropout=False),
    Case("custom_vjp_with_a_table", _one(_with_a_table(_vjp_rule)), {"w": "io"}, dropout=False),
    Case("custom_jvp_with_a_table", _one(_with_a_table(_jvp_rule)), {"w": "io"}, dropout=False),
    Case("custom_vjp_of_an_ode", _one(_neural_ode, x=features(2, 8)), {"w": "io"}, dropout=False,
         mapped=False),
    Case("custom_root", _one(_fixed_point), {"w": "io"}, _ROOT_FALLBACKS, dropout=False,
         config={"roles": {"w": "io"}}, linear=("w",)),
    Case("custom_linear_solve", _one(_linear_solve), {"w": "io"}),
    Case("custom_jvp_on_activations", _one(lambda w, x: _squash(x @ w)), {"w": "io"}),
    Case("custom_jvp_takes_weight", _one(lambda w, x: _product(x, w)), {"w": "io"},
         dropout=False),
    Case("custom_jvp_returns_an_integer", _one(lambda w, x: _counted(w, x)[0]), {"w": "io"},
         dropout=False),
    Case("custom_jvp_of_a_weight", _one(lambda w, x: x @ jax.nn.relu(w)), {"w": "io"},
         frozenset({("w", "custom_jvp_call")}), numerical=False),
    Case("inner_vmap", _one(lambda w, x: jax.vmap(jax.vmap(lambda x: x @ w))(x)), {"w": "io"}),
    Case("inner_vmap_weights", _one(_vmap_weights, 3, 8, 6, x=features(3, 5, 8)), {"w": "sio"}),
    Case("inner_gradient", _one(_inner_gradient), {"w": "io"}),
    Case("inner_forward_mode", _one(_inner_forward), {"w": "io"}),
    Case("debug_callback", _one(_callback), {"w": "io"}),
    Case("pallas_on_activations", _one(_pallas), {"w": "io"}, reverse=False),
    Case("shard_map", _pair(_megatron, (8, 12), (12, 8)), {"up": "io", "down": "io"}),
    Case("shard_map_closed_over", _one(_shard_map_closed, x=features(4, 8)), {"w": "io"}),
    Case("shard_map_scan", _pair(_shard_map_scan, (2, 8, 12), (2, 12, 8)),
         {"up": "sio", "down": "sio"}),
    Case("pmap", _one(_pmap, x=features(8, 2, 8)), {"w": "io"}, mapped=False),
)  # fmt: skip

_LOOPS = (
    Case("scan", _one(lambda w, x: lax.scan(_layer, x, w)[0], 3, 8, 8), {"w": "sio"}),
    Case("scan_reversed", _one(lambda w, x: lax.scan(_layer, x, w, reverse=True)[0], 3, 8, 8),
         {"w": "sio"}),
    Case("scan_unrolled", _one(lambda w, x: lax.scan(_layer, x, w, unroll=2)[0], 3, 8, 8),
         {"w": "sio"}),
    Case("scan_axis_1", _one(_scan_axis(1), 8, 3, 8), {"w": "iso"}),
    Case("scan_axis_2", _one(_scan_axis(2), 8, 8, 3), {"w": "ios"}),
    Case("scan_between_contracted", _one(_scan_between, 2, 3, 4, 8), {"w": "isio"}),
    Case("scan_nested", _one(_scan_nested, 2, 3, 8, 8), {"w": "ssio"}),
    Case("scan_constant", _one(lambda w, x: lax.scan(lambda c, _: _layer(c, w), x, None, 3)[0]),
         {"w": "io"}),
    Case("scan_carry", _one(_scan_carry), {"w": "io"}),
    Case("scan_changed_carry", _one(_scan_changed_carry), {"w": "io"}),
    Case("scan_growing_carry", _one(lambda w, x: x @ lax.fori_loop(
        0, 3, lambda _, c: c + 0.5 * w.T, w)), {"w": "io"},
        frozenset({("w", "scan")})),
    Case("scan_ys", _one(_scan_ys, 3, 8, 8), {"w": "soi"}),
    Case("scan_checkpoint", _one(_scan_checkpoint, 3, 8, 8), {"w": "sio"}),
    Case("scan_rows_of_in", _one(lambda w, x: lax.scan(
        lambda c, wx: (c + wx[0][None] * wx[1][:, None], None), jnp.zeros((2, 6)), (w, x.T))[0],
        8, 6, x=features(2, 8)), {"w": "io"}, frozenset({("w", "scan")}),
        config={"roles": {"w": "io"}}, linear=("w",)),
    Case("while", _one(_while), {"w": "io"}, reverse=False),
    Case("while_carry", _one(_while_carry), {"w": "io"}, reverse=False),
    Case("while_condition", _one(_while_condition), {"w": "io"}, reverse=False),
    Case("fori", _one(_fori, 3, 8, 8), {"w": "sio"}),
    Case("cond", _one(_cond), {"w": "oi"}),
    Case("cond_returns_weight", _one(_cond_returns), {"w": "oi"}),
    Case("switch_layers", _one(_switch_layers, 3, 8, 6), {"w": "sio"}),
)  # fmt: skip

CASES = (*_CALLS, *_LOOPS)
