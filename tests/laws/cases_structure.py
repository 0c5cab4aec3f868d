"""Cases of weights that are rearranged, scaled, joined or transformed before they are used."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tests.laws.case import Case, features, normal


def _one(fn, *shape: int, x=None):
    return lambda: (lambda p, x: fn(p["w"], x), {"w": normal(3, *shape)},
                    (features() if x is None else x,))  # fmt: skip


def _many(fn, x=None, **shapes):
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return lambda: (fn, params, (features() if x is None else x,))


def _split(w, x):
    q, k, v = jnp.split(w, 3, axis=1)
    return (x @ q) * (x @ k) + x @ v


def _split_in(w, x):
    left, right = jnp.split(w, [3])
    return x[..., :3] @ left + jnp.tanh(x[..., 3:] @ right)


def _fused_heads(w, x):
    q, k, v = w.reshape(8, 3, 2, 4).transpose(1, 0, 2, 3)
    h = jnp.einsum("btd,dhk->bhtk", x, q) * jnp.einsum("btd,dhk->bhtk", x, k)
    return h + jnp.einsum("btd,dhk->bhtk", x, v)


def _fused_ooio(w, x):
    q, k, v = jnp.einsum("btd,chdk->cbhtk", x, w)
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v


def _unstacked(w, x):
    for layer in w:
        x = jnp.tanh(x @ layer)
    return x


def _indexed(w, x):
    for i in (2, 0, 1):
        x = jnp.tanh(x @ w[i])
    return x


def _dynamic_rows(w, x):
    start = jnp.argmax(x[0, 0]) % 3
    return x[..., :5] @ lax.dynamic_slice(w, (start, 0), (5, 6))


def _reduced(w, x):
    return x @ lax.reduce_precision(w, exponent_bits=8, mantissa_bits=23)


def _constrained(w, x):
    mesh = jax.make_mesh((4, 2), ("data", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
    spec = NamedSharding(mesh, PartitionSpec(None, "model"))
    return x @ lax.with_sharding_constraint(w, spec)


def _spread(w, x):
    mesh = jax.make_mesh((4, 2), ("data", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
    return x @ jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "model")))


def _conv1d(x, kernel, **options):
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options
    )


def _weight_norm(w, x):
    return x @ (w / jnp.linalg.norm(w, axis=0))


def _standardised(w, x):
    mean, var = jnp.mean(w, (0, 1, 2)), jnp.var(w, (0, 1, 2))
    kernel = (w - mean) * lax.rsqrt(var + 1e-5)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _resampled(w, x):
    kernel = jax.image.resize(w, (4, 4, 3, 6), "bilinear")
    return lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _masked(w, x):
    return x @ jnp.where(jnp.tri(8, dtype=bool), w, 0)


def _frozen_path(w, x):
    return x @ lax.stop_gradient(w) + jnp.tanh(x @ w)


def _sum_of_weights(p, x):
    return x @ (p["w"] + p["v"])


CASES = (
    Case("transpose_moved", _one(lambda w, x: jnp.einsum("btd,dhk->bthk", x, w.transpose(2, 0, 1)),
                                 2, 6, 8), {"w": "ooi"}),
    Case("reshape_heads", _one(lambda w, x: x @ w.reshape(8, 12), 8, 2, 6), {"w": "ioo"}),
    Case("reshape_split_heads",
         _one(lambda w, x: jnp.einsum("btd,dhk->bthk", x, w.reshape(8, 2, 6)), 8, 12),
         {"w": "io"}),
    Case("reshape_joins_in", _one(lambda w, x: x @ w.reshape(8, 6), 2, 4, 6), {"w": "iio"}),
    Case("reshape_mixes", _one(lambda w, x: x @ w.reshape(8, 6), 6, 8), {"w": "io"},
         frozenset({("w", "reshape")}), config={"roles": {"w": "io"}}),
    Case("squeeze_unit", _one(lambda w, x: x @ w[0, :, 0], 1, 8, 1, 6), {"w": "siso"},
         config={"roles": {"w": "siso"}}),
    Case("slice_rows", _one(lambda w, x: x[..., 1:7:2] @ w[1:7:2], 8, 6), {"w": "io"}),
    Case("slice_columns", _one(lambda w, x: x @ w[:, :4] + x @ w[:, 2:], 8, 6), {"w": "io"}),
    Case("dynamic_slice_rows", _one(_dynamic_rows, 8, 6), {"w": "io"}),
    Case("dynamic_index", _one(lambda w, x: x @ w[jnp.argmax(x[0, 0]) % 3], 3, 8, 6),
         {"w": "sio"}),
    Case("split_columns", _one(_split, 8, 12), {"w": "io"}),
    Case("split_rows", _one(_split_in, 8, 6), {"w": "io"}),
    Case("fused_heads", _one(_fused_heads, 8, 24), {"w": "io"}),
    Case("fused_ooio", _one(_fused_ooio, 3, 2, 8, 4), {"w": "ooio"}),
    Case("unstack_layers", _one(_unstacked, 3, 8, 8), {"w": "sio"}),
    Case("static_layers", _one(_indexed, 3, 8, 8), {"w": "sio"}),
    Case("pad_rows", _one(lambda w, x: x @ jnp.pad(w, ((1, 2), (0, 0)), constant_values=0.5), 5, 6),
         {"w": "io"}),
    Case("pad_columns", _one(lambda w, x: x @ lax.pad(
        w, jnp.zeros((), w.dtype), ((0, 0, 0), (2, -1, 1))), 8, 6), {"w": "io"}),
    Case("pad_fewer_rows", _one(lambda w, x: x @ lax.pad(
        w, jnp.zeros((), w.dtype), ((-1, -1, 0), (0, 0, 0))), 10, 6), {"w": "io"}),
    Case("pad_a_stack", _one(lambda w, x: jnp.tanh(
        jnp.einsum("bti,sio->bsto", x, jnp.pad(w, ((1, 0), (0, 0), (0, 0))))), 2, 8, 6),
        {"w": "oio"}),
    Case("reverse_rows", _one(lambda w, x: x @ w[::-1], 8, 6), {"w": "io"}),
    Case("reverse_window", _one(lambda w, x: _conv1d(x, w[::-1, :, ::-1]), 3, 8, 6),
         {"w": "iio"}),
    Case("reverse_window_and_channels", _one(lambda w, x: _conv1d(x, w[::-1, ::-1]), 3, 8, 6),
         {"w": "iio"}),
    Case("convert_bf16", _one(lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), 8, 6),
         {"w": "io"}, tolerance=5e-2, numerical=False),
    Case("scale_multiplied", _one(lambda w, x: x @ (w * 8**-0.5), 8, 6), {"w": "io"}),
    Case("scale_divided", _one(lambda w, x: x @ (-w / 3.0), 8, 6), {"w": "io"}),
    Case("scale_traced", _one(lambda w, x: x @ (jnp.max(x) * w), 8, 6), {"w": "io"}),
    Case("gain_columns", _many(lambda p, x: x @ (p["w"] * p["g"]), w=(8, 6), g=(6,)),
         {"w": "io"}),
    Case("gain_rows", _many(lambda p, x: x @ (p["g"][:, None] * p["w"]), w=(8, 6), g=(8,)),
         {"w": "io"}),
    Case("gain_divided", _many(lambda p, x: x @ (p["w"] / (2 + p["g"])), w=(8, 6), g=(6,)),
         {"w": "io"}),
    Case("optimization_barrier", _one(lambda w, x: x @ lax.optimization_barrier(w), 8, 6),
         {"w": "io"}),
    Case("stop_gradient", _one(_frozen_path, 8, 6), {"w": "io"}, numerical=False),
    Case("reduce_precision", _one(_reduced, 8, 6), {"w": "io"}, numerical=False),
    Case("copy", _one(lambda w, x: x @ jnp.array(w, copy=True), 8, 6), {"w": "io"}),
    Case("sharding_constraint", _one(_constrained, 8, 6), {"w": "io"}),
    Case("concatenate_columns",
         _many(lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1),
               q=(8, 6), k=(8, 3), v=(8, 4)), {"q": "io", "k": "io", "v": "io"}),
    Case("concatenate_rows",
         _many(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]]), q=(5, 6), k=(3, 6)),
         {"q": "io", "k": "io"}),
    Case("concatenate_one_adapted",
         _many(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1), q=(8, 6), k=(8, 3)),
         {"q": "io"}, linear=("q", "k")),
    Case("stack_layers",
         _many(lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x,
                                     jnp.stack([p["q"], p["k"]]))[0], q=(8, 8), k=(8, 8)),
         {"q": "io", "k": "io"}),
    Case("weight_norm", _one(_weight_norm, 8, 6), {"w": "io"}),
    Case("weight_standardised", _one(_standardised, 3, 3, 4, 6, x=features(2, 5, 5, 4)),
         {"w": "iiio"}),
    Case("patch_kernel_resampled", _one(_resampled, 2, 2, 3, 6, x=features(1, 8, 8, 3)),
         {"w": "iiio"}),
    Case("weight_masked", _one(_masked, 8, 8), {"w": "io"}, frozenset({("w", "select_n")})),
    Case("weights_added", _many(_sum_of_weights, w=(8, 6), v=(8, 6)), {"w": "io", "v": "io"}),
    Case("device_put", _one(lambda w, x: x @ jax.device_put(w), 8, 6), {"w": "io"}),
    Case("device_put_spread", _one(_spread, 8, 6), {"w": "io"}),
    Case("kernel_of_a_matrix", _one(lambda w, x: _conv1d(x, w[None]), 8, 6), {"w": "io"}),
    Case("depthwise_kernel_of_a_matrix",
         _one(lambda w, x: _conv1d(x, w[:, None], feature_group_count=8), 3, 8), {"w": "io"}),
    Case("broadcast_over_the_batch",
         _one(lambda w, x: jnp.matmul(x, jnp.broadcast_to(w, (2, 8, 6))), 8, 6), {"w": "io"}),
    Case("mixture_of_weights",
         _one(lambda w, x: x @ jnp.einsum("e,eio->io", jax.nn.softmax(x[0, 0, :3]), w), 3, 8, 6),
         {"w": "ioo"}),
    Case("weight_padded", _one(lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 2))), 8, 6), {"w": "io"}),
    Case("weight_repeated", _one(lambda w, x: x @ jnp.tile(w, (1, 2)), 8, 6), {"w": "io"}),
    Case("weight_written_to", _one(lambda w, x: x @ w.at[0, 1].set(1.0), 8, 6), {"w": "io"},
         frozenset({("w", "scatter")})),
    Case("row_applied", _one(lambda w, x: x @ w.at[2].apply(jnp.tanh), 8, 6), {"w": "io"},
         frozenset({("w", "scatter")}), reverse=False),
    Case("experts_added_to_others", _one(lambda w, x: jnp.einsum("btd,edf->btef", x,
        jnp.zeros((2, 8, 6)).at[jnp.array([0, 1, 0])].add(w)), 3, 8, 6), {"w": "sio"},
        frozenset({("w", "scatter-add")}), config={"roles": {"w": "sio"}}),
    Case("diagonal_placed", _one(lambda w, x: x @ jnp.zeros((8, 8)).at[
        jnp.arange(8), jnp.arange(8)].set(w[:, 0]), 8, 6), {"w": "io"},
        config={"roles": {"w": "io"}}),
    Case("placed_in_features", _one(lambda w, x: x.at[:, jnp.array([0, 3])].set(w), 2, 8),
         {"w": "io"}, frozenset({("w", "scatter")}), config={"roles": {"w": "io"}}),
    Case("divided_by_a_number", _one(lambda w, x: x @ (w / 2.3), 8, 6), {"w": "io"}),
    Case("weight_symmetrised", _one(lambda w, x: x @ (w + w.T), 8, 8), {"w": "io"}),
    Case("experts_averaged", _one(lambda w, x: x @ w.sum(0) + jnp.tanh(x @ w[0]), 3, 8, 6),
         {"w": "sio"}, config={"roles": {"w": "sio"}}),
    Case("weight_returned", _one(lambda w, x: (x @ w, w), 8, 6), {"w": "io"}),
    Case("weight_returned_transposed", _one(lambda w, x: (x @ w, w.T), 8, 6), {"w": "io"}),
)  # fmt: skip
