"""Cases of contractions: every form of dot_general, einsum, convolution, gather and ragged_dot."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.laws.case import BFLOAT16, Case, features, normal


def _one(fn, w, *args):
    """A model of one weight: `fn(w, *args)`."""
    return lambda: (lambda p, *xs: fn(p["w"], *xs), {"w": w}, args or (features(),))


def _einsum(equation: str, w, x):
    return _one(lambda w, x: jnp.einsum(equation, x, w), w, x)


def _square(seed: int = 3):
    return normal(seed, 8, 8)


def _stack(seed: int = 4):
    return normal(seed, 3, 8, 6)


def _partial(w, x):
    whole = jnp.einsum("bij,ijo->bo", x, w)
    return whole, jnp.einsum("bi,ijo->bjo", x[:, :, 0], w), jnp.einsum("bj,ijo->bio", x[:, 0], w)


def _inner_product(w, x):
    y = jnp.einsum("bi,io->bo", x[:, :, 0], w)
    return y, jnp.einsum("bio,io->b", x, w), jnp.einsum("bio,io->bi", x, w)


def _preferred(w, x):
    dims = (((2,), (0,)), ((), ()))
    low = jnp.bfloat16
    return lax.dot_general(x.astype(low), w.astype(low), dims, preferred_element_type=jnp.float32)


def _conv(dims: tuple[str, str, str], kernel, x, **options):
    def fn(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=dims, **options)

    return _one(fn, kernel, x)


_CONVS = (
    Case(
        "conv_1d",
        _conv(("NWC", "WIO", "NWC"), normal(3, 3, 8, 6), features(),
              window_strides=(1,), padding="SAME"),
        {"w": "iio"},
    ),
    Case(
        "conv_2d_strided",
        _conv(("NHWC", "HWIO", "NHWC"), normal(3, 3, 2, 4, 6), features(2, 6, 5, 4),
              window_strides=(2, 1), padding="SAME"),
        {"w": "iiio"},
    ),
    Case(
        "conv_2d_torch_layout",
        _conv(("NCHW", "OIHW", "NCHW"), normal(3, 6, 4, 3, 2), features(2, 4, 6, 5),
              window_strides=(1, 2), padding="VALID"),
        {"w": "oiii"},
    ),
    Case(
        "conv_2d_dilated",
        _conv(("NHWC", "HWIO", "NHWC"), normal(3, 2, 3, 4, 6), features(2, 6, 7, 4),
              window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 3)),
        {"w": "iiio"},
    ),
    Case(
        "conv_2d_transposed",
        _conv(("NHWC", "HWIO", "NHWC"), normal(3, 3, 3, 4, 6), features(2, 3, 4, 4),
              window_strides=(1, 1), padding=((1, 2), (2, 1)), lhs_dilation=(2, 2)),
        {"w": "iiio"},
    ),
    Case(
        "conv_3d",
        _conv(("NDHWC", "DHWIO", "NDHWC"), normal(3, 2, 2, 3, 3, 4), features(1, 3, 4, 3, 3),
              window_strides=(1, 2, 1), padding="SAME"),
        {"w": "iiiio"},
    ),
    Case(
        "conv_grouped",
        _conv(("NWC", "WIO", "NWC"), normal(3, 3, 4, 6), features(),
              window_strides=(1,), padding="SAME", feature_group_count=2),
        {"w": "iio"},
    ),
    Case(
        "conv_depthwise",
        _conv(("NWC", "WIO", "NWC"), normal(3, 3, 1, 8), features(),
              window_strides=(2,), padding="SAME", feature_group_count=8),
        {"w": "iio"},
    ),
    Case(
        "conv_depthwise_multiplied",
        _conv(("NHWC", "HWIO", "NHWC"), normal(3, 2, 3, 1, 12), features(2, 4, 5, 4),
              window_strides=(1, 1), padding="VALID", feature_group_count=4),
        {"w": "iiio"},
    ),
    Case(
        "conv_batch_groups",
        _conv(("NWC", "WIO", "NWC"), normal(3, 3, 8, 6), features(2, 5, 8),
              window_strides=(1,), padding="SAME", batch_group_count=2),
        {"w": "iio"},
        frozenset({("w", "conv_general_dilated")}),
    ),
    Case(
        "conv_patches_by_dot",
        _one(lambda w, x: jnp.einsum("nhawbc,abcd->nhwd", x.reshape(2, 2, 3, 2, 2, 4), w),
             normal(3, 3, 2, 4, 6), features(2, 6, 4, 4)),
        {"w": "iiio"},
    ),
)  # fmt: skip

_DOTS = (
    Case("dot_matmul", _one(lambda w, x: x @ w, normal(3, 8, 6)), {"w": "io"}),
    Case("dot_vector", _one(lambda w, x: w @ x, normal(3, 6, 8), features(8)), {"w": "oi"}),
    Case("dot_transposed", _one(lambda w, x: x @ w.T, normal(3, 6, 8)), {"w": "oi"}),
    Case(
        "dot_weight_left",
        _one(lambda w, x: lax.dot_general(w, x, (((0,), (2,)), ((), ()))), normal(3, 8, 6)),
        {"w": "io"},
    ),
    Case("dot_ioo", _einsum("btd,dhk->bthk", normal(3, 8, 2, 6), features()), {"w": "ioo"}),
    Case("dot_oio", _einsum("btd,hdk->bthk", normal(3, 2, 8, 6), features()), {"w": "oio"}),
    Case("dot_ooi", _einsum("btd,hkd->bthk", normal(3, 2, 6, 8), features()), {"w": "ooi"}),
    Case("dot_iio", _einsum("bhk,hkd->bd", normal(3, 5, 8, 6), features()), {"w": "iio"}),
    Case("dot_ioi", _einsum("bhk,hdk->bd", normal(3, 5, 6, 8), features()), {"w": "ioi"}),
    Case("dot_ooio", _einsum("btd,chdk->cbthk", normal(3, 3, 2, 8, 4), features()), {"w": "ooio"}),
    Case("dot_batched", _einsum("ecd,edf->ecf", _stack(), features(3, 5, 8)), {"w": "sio"}),
    Case("dot_batched_last", _einsum("ecd,dfe->ecf", normal(3, 8, 6, 3), features(3, 5, 8)),
         {"w": "ios"}),
    Case("dot_two_batches", _einsum("abd,abdf->abf", normal(3, 2, 5, 8, 6), features()),
         {"w": "ssio"}),
    Case("dot_partial", _one(_partial, normal(3, 5, 8, 6), features()), {"w": "iio"}),
    Case("dot_inner_product", _one(_inner_product, normal(3, 5, 8), features()), {"w": "io"}),
    Case(
        "dot_both_ways",
        _one(lambda w, x: jnp.tanh(x @ w) @ w.T, normal(3, 8, 6)),
        {"w": "io"},
    ),
    Case(
        "dot_expanded_weight",
        _one(lambda w, x: jnp.einsum("bti,zio->bto", x, w[None]), normal(3, 8, 6)),
        {"w": "io"},
    ),
    Case(
        "dot_unit_in",
        _one(lambda w, x: x[..., :1] @ w[:, 0], normal(3, 1, 1, 6)),
        {"w": "ioo"},
        config={"rank": 1},
    ),
    Case("dot_preferred", _one(_preferred, normal(3, 8, 6)), {"w": "io"}, tolerance=BFLOAT16,
         numerical=False),
    Case("dot_kron", _one(lambda w, x: jnp.tensordot(x, w, axes=((1, 2), (1, 0))),
                          normal(3, 8, 5, 6)), {"w": "iio"}),
    Case("dot_two_weights", lambda: (
        lambda p, x: x @ (p["w"] @ p["v"]), {"w": normal(3, 8, 5), "v": normal(4, 5, 6)},
        (features(),)), {"w": "oi", "v": "io"}),
)  # fmt: skip


def _embedding(tied: bool):
    def fn(p, ids):
        h = jnp.tanh(p["embed"][ids] @ p["w"])
        return h @ (p["embed"].T if tied else p["head"])

    params = {"embed": normal(3, 11, 8), "w": normal(4, 8, 8)}
    if not tied:
        params["head"] = normal(5, 8, 11)
    return lambda: (fn, params, (jnp.arange(10).reshape(2, 5),))


def _take(mode: str):
    ids = jnp.asarray([[0, 3, 10, -1, 4]] if mode == "wrap" else [[0, 3, 10, 2, 4]])
    return _one(lambda w, i: jnp.take(w, i, axis=0, mode=mode), normal(3, 11, 8), ids)


def _filled(w, ids):
    rows = w.at[ids].get(mode="fill", fill_value=7.0, wrap_negative_indices=False)
    return jnp.sin(rows)


def _ragged(w, x):
    return lax.ragged_dot(x, w, jnp.array([1, 3, 2]))


def _ragged_transposed(w, x):
    return lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), jnp.array([1, 3, 2]))


def _chosen_experts(p, x, ids):
    h = jax.nn.relu(jnp.einsum("nd,ndf->nf", x, p["up"][ids]))
    return jnp.einsum("nf,nfd->nd", h, p["down"][ids])


def _top_two(w, x, ids):
    return jnp.einsum("nd,nkdf->nkf", x, w[ids])


_GATHERS = (
    Case("gather_embedding", _embedding(False), {"embed": "io", "w": "io", "head": "io"},
         linear=("w",)),
    Case("gather_tied", _embedding(True), {"embed": "io", "w": "io"}, linear=("w",)),
    Case("gather_columns", _one(lambda w, i: w[:, i], normal(3, 8, 11), jnp.arange(5)),
         {"w": "oi"}, linear=()),
    Case("gather_take_clip", _take("clip"), {"w": "io"}, linear=()),
    Case("gather_take_wrap", _take("wrap"), {"w": "io"}, linear=()),
    Case("gather_filled", _one(_filled, normal(3, 11, 8), jnp.array([0, 11, -1, 4])), {"w": "io"},
         linear=()),
    Case("gather_one_hot", _one(lambda w, i: jax.nn.one_hot(i, 11) @ w, normal(3, 11, 8),
                                jnp.array([4, 2])), {"w": "io"}),
    Case(
        "gather_experts",
        lambda: (_chosen_experts, {"up": normal(3, 3, 8, 6), "down": normal(4, 3, 6, 8)},
                 (features(4, 8), jnp.array([0, 2, 1, 1]))),
        {"up": "sio", "down": "sio"},
    ),
    Case("gather_two_experts",
         _one(_top_two, _stack(), features(4, 8), jnp.array([[0, 2], [1, 0], [1, 2], [2, 0]])),
         {"w": "sio"}),
    Case("ragged_dot", _one(_ragged, _stack(), features(6, 8)), {"w": "sio"}, mapped=False),
    Case("ragged_dot_transposed", _one(_ragged_transposed, normal(4, 3, 6, 8), features(6, 8)),
         {"w": "soi"}, mapped=False),
)  # fmt: skip

CASES = (*_DOTS, *_CONVS, *_GATHERS)
