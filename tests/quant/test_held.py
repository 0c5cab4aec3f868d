"""Weights held as files have them: numbers of the formats' own libraries, products, kernels."""

import contextlib
import dataclasses
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lora_jax import quant
from lora_jax.quant import dispatch
from lora_jax.quant.array import abstract, coded
from lora_jax.quant.foreign import beside
from lora_jax.quant.formats import decode
from lora_jax.quant.gguf import GGUF_KINDS
from lora_jax.quant.kernels import gpu, tpu
from lora_jax.quant.requantize import requantized
from lora_jax.quant.scales import HELD, _powers
from lora_jax.quant.sharding import check_shards

from tests.support.compilations import lowered
from tests.support.gguf_files import gguf_bytes

pytestmark = pytest.mark.once

K, N = 512, 256


def made(name):
    """A weight in a format of `HELD`, with every code and every kind of scale."""
    kinds = {row.format: kind for kind, row in GGUF_KINDS.items()}
    if name in kinds:
        return quant.from_gguf(gguf_bytes(kinds[name]), kinds[name], roles="io")
    rng, held, block = np.random.default_rng(0), HELD[name], 128 if "block" in name else 32
    bits = sum(held.form.packing.planes)
    codes = rng.integers(0, 2**bits, (K, N)).astype(np.uint8)
    codes = np.where(codes & 127 == 127, 0, codes) if bits == 8 else codes  # NaN of e4m3
    parts = {}
    for part in ("scale", "bias", "scale2"):
        if (stored := getattr(held, part)) is None:
            continue
        shape = stored.shape(K // block, N)
        if stored.dtypes == ("uint8",):
            parts[part] = rng.integers(1, 120, shape).astype(np.uint8)
        else:
            parts[part] = (rng.random(shape) + 0.5).astype(np.float32)
    codes = codes.astype(held.form.packing.dtype)
    return quant.from_codes(codes, **parts, format=name, block_size=block)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_ggufs_numbers_come_to_the_bit_in_as_many_bytes(kind):
    raw = gguf_bytes(kind)
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    q = quant.from_gguf(raw, kind, roles="oi")
    np.testing.assert_array_equal(q.dequantize(), want)
    assert q.nbytes == raw.size


# One of each way in which scales are stored; the others take as long and differ in a row only.
_QUICK = ("fp8_block", "uint4_zero", "q4_k")
EACH = [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in HELD]


@pytest.mark.parametrize("name", EACH)
def test_products_gradients_and_rows_are_those_of_the_floats(name):
    q = made(name)
    w = q.dequantize()
    size = jnp.abs(w).max()  # powers of two reach far
    x = jax.random.normal(jax.random.key(1), (5, K))

    def loss(x, w):
        y = quant.matmul(x, w) if isinstance(w, quant.QuantArray) else x @ w
        return jnp.sum(jnp.sin(y / size))

    both = jax.jit(lambda x: [jax.value_and_grad(loss)(x, each) for each in (q, w)])
    (got, got_dx), (want, want_dx) = both(x)
    # Sums of float32 in another order.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got_dx, want_dx, rtol=1e-4, atol=1e-4)
    index = jnp.array([0, 3, 255])
    take = jax.jit(quant.ops.take, static_argnums=2)
    np.testing.assert_array_equal(take(q, index, 0), w[index])
    np.testing.assert_array_equal(take(q, index, 1), w[:, index].T)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kernels", [gpu, tpu], ids=["gpu", "tpu"])
def test_kernels_decode_held_weights_to_the_bit(kernels, name):
    q = made(name)
    if kernels.obstacle(coded(q).form, q.block, q.packed.shape):
        assert kernels is tpu and q.block == 16  # the reference decodes it there
        return
    got = kernels.decode(coded(q), dtype=jnp.bfloat16, name="forward", interpret=True)
    want = decode(coded(q), jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("platform, backend", [("cuda", "gpu"), ("tpu", "tpu")])
@pytest.mark.parametrize("name", EACH)
def test_held_weights_lower_for_the_device_from_here(platform, backend, name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    q = dataclasses.replace(made(name), backend=backend, dtype=jnp.dtype("bfloat16"))
    x = jax.ShapeDtypeStruct((512, K), jnp.bfloat16)

    def loss(x, q):
        return jnp.sum(quant.matmul(x, q).astype(jnp.float32) ** 2)

    call = "__gpu$xla.gpu.triton" if platform == "cuda" else "tpu_custom_call"
    kernel = backend == "gpu" or q.block >= 32
    dispatch._warn_once.cache_clear()
    with contextlib.nullcontext() if kernel else pytest.warns(quant.ReferenceWarning):
        text = lowered(jax.grad(loss), platform, x, q)
    assert text.count(call) == (2 if kernel else 0)


def odd(name, inputs):
    """A weight whose blocks are no whole superblocks, and the bytes of its file."""
    if name in GGUF_KINDS:
        raw = gguf_bytes(name, N, inputs)
        return quant.from_gguf(raw, name), raw.size
    rng, groups = np.random.default_rng(0), inputs // 128
    codes = rng.integers(0, 16, (inputs, N)).astype(np.uint8)
    scale = rng.random((groups, N)).astype(np.float16)
    zeros = rng.integers(0, 256, (-(-groups // 2), N)).astype(np.uint8)
    q = quant.from_codes(codes, scale, zeros, format="uint4_zero", block_size=128)
    number = np.arange(groups)
    each = (zeros[number // 2] >> (4 * (number % 2))[:, None]) & 15
    want = (codes - np.repeat(each, 128, 0).astype(np.float32)) * np.repeat(scale, 128, 0)
    np.testing.assert_array_equal(q.dequantize(), want)
    return q, codes.size // 2 + scale.nbytes + groups * N // 2


_QUICK_ODD = ("Q5_0", "uint4_zero")
ODD = {"Q5_0": 896, "uint4_zero": 384, "Q4_1": 96, "Q5_1": 32, "IQ4_NL": 864}


@pytest.mark.parametrize(
    "name",
    [n if n in ("Q5_0", "uint4_zero") else pytest.param(n, marks=pytest.mark.slow) for n in ODD],
)
def test_blocks_that_fill_no_superblock_take_no_more_bytes(name, monkeypatch):
    q, size = odd(name, ODD[name])
    # A byte has the zero points of two groups.
    assert size <= q.nbytes <= size + N / 2 and q.slab is not None and q.block % q.slab == 0
    w, x = q.dequantize(), jax.random.normal(jax.random.key(1), (5, ODD[name]))
    if name in GGUF_KINDS:
        raw = gguf_bytes(name, N, ODD[name])
        want = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(w, want.T)

    def loss(x, w):
        y = quant.matmul(x, w) if isinstance(w, quant.QuantArray) else x @ w
        return jnp.sum(jnp.sin(y))

    (got, got_dx), (want, want_dx) = jax.jit(
        lambda x: [jax.value_and_grad(loss)(x, each) for each in (q, w)]
    )(x)
    # Sums of float32 in another order.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got_dx, want_dx, rtol=1e-4, atol=1e-4)
    rows, columns = jnp.array([0, 3, ODD[name] - 1]), jnp.array([0, 3, N - 1])
    np.testing.assert_array_equal(quant.ops.take(q, rows, 0), w[rows])
    np.testing.assert_array_equal(quant.ops.take(q, columns, 1), w[:, columns].T)
    form = coded(q)
    decoded = gpu.decode(form, dtype=jnp.float32, name="forward", interpret=True)
    np.testing.assert_array_equal(decoded, w)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    small = tpu.obstacle(form.form, form.block, q.packed.shape) != ""
    for platform, backend in (("cuda", "gpu"), ("tpu", "tpu")):
        there = dataclasses.replace(q, backend=backend, dtype=jnp.dtype("bfloat16"))
        call = "__gpu$xla.gpu.triton" if platform == "cuda" else "tpu_custom_call"
        dispatch._warn_once.cache_clear()
        reference = platform == "tpu" and small
        shape = jax.ShapeDtypeStruct((512, ODD[name]), jnp.bfloat16)
        with pytest.warns(quant.ReferenceWarning) if reference else contextlib.nullcontext():
            text = lowered(quant.matmul, platform, shape, there)
        assert text.count(call) == (0 if reference else 1)
    # As merged weights are rounded: the codes of the numbers that they stand for.
    again = requantized(w, q, name="w")
    assert jax.tree.structure(again) == jax.tree.structure(q)


def test_an_order_of_inputs_is_undone():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 96, 24)).astype(np.uint8)
    scale = rng.random((2, 3, 24)).astype(np.float16)
    zeros = rng.integers(0, 256, (2, 2, 24)).astype(np.uint8)
    order = np.stack([rng.permutation(96), rng.permutation(96)])
    options: dict[str, Any] = dict(bias=zeros, format="uint4_zero", block_size=32)
    plain = quant.from_codes(codes, scale, **options).dequantize()
    q = quant.from_codes(codes, scale, **options, order=order)
    want = np.stack([np.asarray(w)[np.argsort(o)] for w, o in zip(plain, order, strict=True)])
    np.testing.assert_array_equal(q.dequantize(), want)
    x = jax.random.normal(jax.random.key(0), (2, 5, 96))
    np.testing.assert_allclose(quant.matmul(x, q), x @ want, rtol=1e-4, atol=1e-4)
    dx = jax.grad(lambda x: jnp.sum(quant.matmul(x, q) ** 2))(x)
    dense = jax.grad(lambda x: jnp.sum((x @ want) ** 2))(x)
    np.testing.assert_allclose(dx, dense, rtol=1e-3, atol=1e-2)


def test_what_lies_together_is_not_divided():
    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    codes, scale = np.zeros((256, 256), np.uint8), np.ones((2, 2), np.float32)
    squares = quant.from_codes(codes, scale, format="fp8_block", block_size=128)
    for spec, text in [(P(None, "x"), "a scale for 128 outputs"), (P("x"), "2 superblocks of 128")]:
        with pytest.raises(ValueError, match=text):
            check_shards(squares, spec, mesh)
    ordered = quant.from_codes(
        codes, np.ones((8, 256), np.float32), np.zeros((4, 256), np.uint8), format="uint4_zero",
        block_size=32, order=np.arange(256)[::-1],
    )  # fmt: skip
    check_shards(ordered, P(None, "x"), mesh)
    with pytest.raises(ValueError, match=r"in an order of their own \(act-order\)"):
        check_shards(ordered, P("x"), mesh)


@pytest.mark.parametrize("name", HELD)
def test_a_format_is_known_without_its_arrays(name):
    q = abstract(jax.ShapeDtypeStruct((K, N), jnp.bfloat16), name)
    real = dataclasses.replace(made(name), format=name)
    assert q.packed.shape == real.packed.shape
    bits = 8 * q.nbytes / (K * N)
    assert sum(HELD[name].form.packing.planes) <= bits < 1.4 * sum(HELD[name].form.packing.planes)


def test_scales_that_are_powers_of_two_have_the_lowest_one():
    """2^-127 is no normal float32: a processor may take it for 0, its bits are what counts."""
    name = next(n for n, held in HELD.items() if held.floats is _powers)
    scale, _ = HELD[name].floats(jnp.array([[0, 1, 127, 254]], jnp.uint8), None, None, 1, 4)
    want = np.array([[2**-127, 2**-126, 1, 2.0**127]], np.float32)
    np.testing.assert_array_equal(np.asarray(scale).view(np.uint32), want.view(np.uint32))


def test_weights_side_by_side_keep_their_numbers_or_are_refused():
    rng = np.random.default_rng(0)

    def squares(outputs):
        codes = rng.integers(0, 120, (256, outputs)).astype(np.uint8)
        scale = rng.random((2, -(-outputs // 128))).astype(np.float32)
        return quant.from_codes(codes, scale, format="fp8_block", block_size=128)

    def ordered(order):
        w = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
        q = quant.quantize_array(w, format="int4", block_size=16)
        return dataclasses.replace(q, order=None if order is None else jnp.asarray(order))

    turned = np.arange(32)[::-1]
    for parts in ((squares(128), squares(100)), (ordered(turned), ordered(turned))):
        want = np.concatenate([q.dequantize() for q in parts], axis=-1)
        np.testing.assert_array_equal(beside(parts, "w").dequantize(), want)
    one = ordered(turned)
    for parts in (
        (squares(100), squares(128)),
        (one, ordered(np.arange(32))),
        (one, ordered(None)),
    ):
        with pytest.raises(ValueError, match="`w` are one weight here, and their blocks cannot be"):
            beside(parts, "w")
