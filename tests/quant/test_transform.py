"""Quantized bases under the transform: values and gradients are those of the decoded weights."""

import dataclasses
import re
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax import quant

pytestmark = pytest.mark.once

D, H, R = 32, 64, 4


def weights(*shape, seed=0):
    # JAX's own would compile a program for each shape.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) / 4)


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]


def scanned(p, x):
    def step(x, w):
        return jnp.tanh(x @ w["up"]) @ w["down"], None

    return lax.scan(jax.checkpoint(step), x, p)[0]


def unrolled(p, x):
    for i in range(2):
        x = jnp.tanh(x @ p["up"][i]) @ p["down"][i]
    return x


def tied(p, tokens):
    x = jnp.take(p["table"], tokens, axis=0) @ p["mix"]
    return x @ p["table"].T


def experts(p, x):
    hidden = jnp.einsum("emd,edh->emh", jnp.stack([x, x * 2, -x]), p["up"])
    return jnp.einsum("emh,ehd->emd", jnp.tanh(hidden), p["down"])


def heads(p, x):
    q = jnp.einsum("md,dnh->mnh", x, p["q"])
    return jnp.einsum("mnh,nhd->md", jnp.tanh(q), p["o"])


def reshaped(p, x):
    q = x @ p["q"].reshape(D, -1)
    return (p["o"].reshape(-1, D).T @ q.T).T


def grouped(p, x):
    return lax.ragged_dot(x, p["up"], jnp.array([3, 2, 2], jnp.int32))


def convolved(p, x):
    image = x.reshape(1, 7, D)
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(image, p["k"], (1,), "SAME", dimension_numbers=numbers)


def branched(p, x):
    return jax.jit(lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x @ w))(p["up"], x)


MLP = {"up": weights(D, H), "down": weights(H, D, seed=1), "bias": weights(D, seed=2)}
STACK = {"up": weights(2, D, H), "down": weights(2, H, D, seed=1)}
HEADS = {"q": weights(D, 4, 8), "o": weights(4, 8, D, seed=1)}
X = weights(7, D, seed=9)
CASES = {
    "mlp": (mlp, MLP, {}, X),
    "scanned layers": (scanned, STACK, {}, X),
    "indexed layers": (unrolled, STACK, {}, X),
    "tied head": (tied, {"table": weights(64, D), "mix": weights(D, D)}, {}, jnp.array([1, 63, 5])),
    "tied head, rows of blocks": (
        tied,
        {"table": weights(64, D), "mix": weights(D, D)},
        {"table": "oi"},
        jnp.array([[1, 63], [0, 17]]),
    ),
    "experts": (experts, {"up": weights(3, D, H), "down": weights(3, H, D, seed=1)}, {}, X),
    "heads": (heads, HEADS, {"q": "ioo", "o": "iio"}, X),
    "reshaped heads": (reshaped, HEADS, {"q": "ioo", "o": "iio"}, X),
    "grouped product": (grouped, {"up": weights(3, D, H)}, {}, X),
    "convolution": (convolved, {"k": weights(3, D, H)}, {"k": "iio"}, X),
    "jit and cond": (branched, {"up": weights(D, H)}, {}, X),
}


def make(name, **options):
    """The function, its quantized parameters, and its inputs."""
    fn, params, roles, x = CASES[name]
    where = [k for k, w in params.items() if w.ndim > 1]
    chosen: dict[str, Any] = {"block_size": 16} | options
    return fn, lora.quantize(params, where, roles=roles, **chosen), x


def loss_of(fn, *args):
    def loss(trainable, frozen, x):
        return jnp.sum(jnp.sin(lora.lorafy(fn)(lora.combine(trainable, frozen), x)))

    return loss


@jax.jit
def decoded(params):
    """The parameters with their weights, adapted or not, as floats."""
    return jax.tree.map(
        lambda w: dataclasses.replace(w, w=w.w.dequantize())
        if isinstance(w, lora.LoraArray) else lora.dequantize(w),
        params, is_leaf=lambda w: lora.is_lora(w) or quant.is_quant(w),
    )  # fmt: skip


def adapted(fn, params, x, **options):
    config = lora.LoraConfig(rank=R, target_modules=".*", init="random", **options)
    plan = lora.plan(config, fn, params, x)
    return lora.init(jax.random.key(3), plan, params)


# In every run the ways a decoder uses its weights; the other operations in `make test-all`.
OFTEN = ("scanned layers", "tied head, rows of blocks", "experts", "heads", "convolution")
EACH = [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in CASES]


@pytest.mark.parametrize("name", EACH)
def test_values_and_gradients_are_those_of_the_decoded_weights(name):
    fn, params, x = make(name)
    quantized = adapted(fn, params, x)
    floats = decoded(quantized)
    assert any(isinstance(w, lora.LoraArray) and quant.is_quant(w.w) for w in jax.tree.leaves(
        quantized, is_leaf=lora.is_lora))  # fmt: skip
    both = jax.jit(lambda q, f, x: [jax.value_and_grad(loss_of(fn))(*t, x) for t in (q, f)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, want = both(lora.split(quantized), lora.split(floats), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
                 jax.tree.leaves(got), jax.tree.leaves(want))  # fmt: skip


@pytest.mark.parametrize("name", ["tied head", "grouped product"])
def test_a_quantized_base_without_adapters_is_called_through_lorafy(name):
    fn, params, x = make(name, format="int4")
    got, want = jax.jit(lambda p, x: (lora.lorafy(fn)(p, x), fn(lora.dequantize(p), x)))(params, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_gradients_reach_the_inputs_and_no_float_weight_is_kept():
    fn, params, x = make("mlp")

    def loss(params, x):
        return jnp.sum(lora.lorafy(fn)(params, x) ** 2)

    want = jax.jit(jax.grad(lambda p, x: jnp.sum(fn(p, x) ** 2), 1))(decoded(params), x)
    got, pull = jax.jit(
        lambda x: (jax.grad(loss, 1)(params, x), jax.vjp(partial(loss, params), x)[1])
    )(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    kept = [r for r in jax.tree.leaves(pull) if hasattr(r, "shape")]
    assert not [r for r in kept if r.shape in ((D, H), (H, D)) and r.dtype == jnp.float32]


def test_a_bfloat16_input_has_a_bfloat16_gradient():
    """JAX itself does not check what the backward of a product gives."""
    q = quant.quantize_array(weights(H, D))
    x = jnp.ones((3, H), jnp.bfloat16)
    y, pull = jax.vjp(lambda x: quant.matmul(x, q, preferred=jnp.float32), x)
    assert (y.dtype, pull(y)[0].dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("double", [False, True])
def test_scanned_layers_keep_their_codes_only(double):
    fn, params, x = make("scanned layers", double_quant=double)
    # Traced and never computed.
    trainable, frozen = jax.eval_shape(lambda p: lora.split(adapted(fn, p, x)), params)

    def loss(trainable, frozen, x):  # without the blocks' own checkpoint
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "checkpoint", lambda f: f)
            return loss_of(fn)(trainable, frozen, x)

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, x))
    assert f"u8[2,{D // 2},{H}]" in jaxpr
    assert f"f32[2,{D},{H}]" not in jaxpr and f"f32[2,{H},{D}]" not in jaxpr
    # Nor the scales that were expanded from their codes.
    assert f"f32[2,{D // 16},{H}]" not in jaxpr


def test_decoding_leaves_nothing_outside_the_loop_over_layers():
    """Not the codebook's constants either, which XLA would spread over the weight's shape."""
    w, x = weights(4, 128, 128), jnp.ones((2, 128))
    sizes = []
    for format in ("nf4", "int4"):
        q = quant.quantize_array(w, block_size=64, format=format)

        def loss(x, q):
            run = lora.lorafy(lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w)[0])
            return jnp.sum(run(q, x) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(x, q).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] < sizes[1] + 128 * 128 * 4 // 2 and sizes[1] < 3 * 128 * 128 * 4


def test_rows_of_a_table_are_taken_without_decoding_the_others():
    w = weights(64, D)
    for roles in ("io", "oi"):
        q = quant.quantize_array(w, block_size=16, roles=roles)

        def rows(q, ids):
            return lora.lorafy(lambda p, ids: p["table"][ids])({"table": q}, ids)

        def trained(q):
            table = lora.RowsArray(q, jnp.zeros((2, D)), (3, 60))
            return lora.lorafy(lambda p, ids: p["table"][ids])({"table": table}, jnp.array([3, 5]))

        traced = jax.jit(lambda q: (rows(q, jnp.array([63, 0, 17])), trained(q))).trace(q)
        assert not re.search(rf"f32\[(64,{D}|{D},64)\]", str(traced.jaxpr))
        got = traced.lower().compile()(q)
        want = np.asarray(decoded(q))
        np.testing.assert_array_equal(got[0], want[[63, 0, 17]])
        np.testing.assert_allclose(got[1], np.stack([np.zeros(D), want[5]]), atol=1e-6)


@pytest.mark.parametrize("name", ["grouped product", "convolution"])
def test_operations_without_a_kernel_of_their_own_decode_with_one(name):
    """Under two names, so that XLA does not keep the decoded weight from forward to backward."""
    fn, params, x = make(name, backend="gpu_interpret")
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(lora.lorafy(fn)(params, x) ** 2)))(x))
    assert "quant_decode_forward" in text and "quant_decode_backward" in text


@pytest.mark.parametrize(
    "options", [dict(format="uint4"), dict(double_quant=True), dict(block_size=64, pad=True)],
    ids=str,
)  # fmt: skip
def test_every_format_under_scan(options):
    fn, params, x = make("scanned layers", **options)
    got, want = jax.jit(lambda p, x: (lora.lorafy(fn)(p, x), fn(lora.dequantize(p), x)))(params, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_merge_gives_floats_and_counts_what_the_weights_stand_for():
    fn, params, x = make("mlp")
    lora_params = adapted(fn, params, x)
    merged = lora.merge(lora_params)
    assert {k: w.dtype for k, w in merged.items()} == dict.fromkeys(merged, jnp.float32)
    got, want = jax.jit(lambda p, m: (lora.lorafy(fn)(p, x), fn(m, x)))(lora_params, merged)
    np.testing.assert_allclose(want, got, rtol=1e-4, atol=1e-5)
    plain = decoded(params)
    same = lora.count_parameters(adapted(fn, plain, x))
    assert lora.count_parameters(lora_params) == same
    back = lora.unmerge(merged, lora_params)
    np.testing.assert_array_equal(back["up"], plain["up"])


def test_plans_of_quantized_and_of_float_bases_are_the_same():
    fn, params, x = make("heads")
    config = lora.LoraConfig(rank=R, target_modules="all-linear")
    got = lora.plan(config, fn, params, x)
    plain = decoded(params)
    want = lora.plan(config, fn, plain, x)
    assert str(got) == str(want)
    by_plan = lora.quantize(plain, want, block_size=16)
    assert {k: q.roles for k, q in by_plan.items()} == {"q": "ioo", "o": "iio"}


def test_what_needs_an_array_is_decoded_and_said():
    params = {"up": quant.quantize_array(weights(D, H), block_size=16)}

    def fn(p, x):
        return x @ (p["up"] * 2.0)

    with pytest.warns(lora.DecodedWarning, match=r"`up` \(quantized, nf4\) is decoded for `mul`"):
        got = lora.lorafy(fn)(params, X)
    np.testing.assert_allclose(got, fn(decoded(params), X), rtol=1e-5)


def test_dora_and_saved_leaves_over_a_quantized_base():
    fn, params, x = make("mlp")
    lora_params = adapted(fn, params, x, use_dora=True)
    merged, plain = lora.merge(lora_params), decoded(params)
    config = lora.LoraConfig(rank=R, target_modules=("up",), modules_to_save=("down",))
    saved = lora.init(jax.random.key(0), lora.plan(config, fn, params, x), params)
    np.testing.assert_array_equal(saved["down"].value, plain["down"])
    run = lora.lorafy(fn)
    both = jax.jit(
        lambda *trees: [(run(a, x), fn(b, x)) for a, b in zip(trees[::2], trees[1::2], strict=True)]
    )
    dora, whole = both(lora_params, merged, saved, plain)
    np.testing.assert_allclose(dora[1], dora[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*whole, rtol=1e-5)
