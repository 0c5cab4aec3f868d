"""Kernels: interpreted on the CPU against plain jnp, and lowered for CUDA and TPU from here."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from lora_jax import quant
from lora_jax.quant import dispatch
from lora_jax.quant.array import coded
from lora_jax.quant.formats import decode
from lora_jax.quant.kernels import gpu, reference, tpu
from lora_jax.quant.kernels.partition import whole_decode

from tests.support.compilations import lowered

KERNELS = {"gpu": gpu, "tpu": tpu}


def quantized(rows, cols, **options):
    w = jax.random.normal(jax.random.key(0), (rows, cols)) / 8
    return quant.quantize_array(w, **{"block_size": 16, "format": "nf4"} | options)


@pytest.mark.parametrize("format", ["nf4", "uint4", "int8"])
@pytest.mark.parametrize("device", KERNELS)
def test_decoding_is_that_of_the_reference_to_the_bit(device, format):
    kernels = KERNELS[device]
    q = quantized(128, 256, format=format, block_size=32)
    want = decode(coded(q), jnp.bfloat16)
    got = kernels.decode(coded(q), dtype=jnp.bfloat16, name="forward", interpret=True)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("format, transposed", [("nf4", False), ("int4", True), ("uint4", False)])
@pytest.mark.parametrize("device", KERNELS)
def test_fused_products_are_those_of_the_reference(device, format, transposed):
    kernels = KERNELS[device]
    q = quantized(256, 128, format=format, block_size=64)
    x = jax.random.normal(jax.random.key(1), (5, 128 if transposed else 256))
    options: dict[str, Any] = dict(transposed=transposed, dtype=jnp.float32)
    want = reference.matmul(x, coded(q), **options)
    got = kernels.matmul(x, coded(q), **options, interpret=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["gpu_interpret", "tpu_interpret"])
def test_products_and_gradients_go_through_the_kernels(backend):
    q = dataclasses.replace(quantized(256, 128, block_size=64), backend=backend)
    plain = dataclasses.replace(q, backend="reference")
    x = jax.random.normal(jax.random.key(1), (2, 140, 256))  # too many rows for the fused kernel

    def loss(x, q):
        return jnp.sum(jnp.sin(quant.matmul(x, q)))

    text = str(jax.make_jaxpr(jax.grad(loss))(x, q))
    assert "quant_decode_forward" in text and "quant_decode_backward" in text
    got, want = jax.jit(lambda x: [jax.value_and_grad(loss)(x, each) for each in (q, plain)])(x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 140], ids=["fused", "decoded"])
@pytest.mark.parametrize("backend", ["gpu_interpret", "tpu_interpret"])
def test_a_filled_up_weight_gives_its_own_products(backend, rows):
    w = jax.random.normal(jax.random.key(0), (200, 128))
    q = quant.quantize_array(w, format="int4", block_size=64, pad=True)
    assert q.packed.shape == (128, 128)  # 256 inputs
    x = jax.random.normal(jax.random.key(1), (rows, 200), jnp.bfloat16)

    def run(backend):
        one = dataclasses.replace(q, backend=backend)
        y, back = jax.vjp(lambda x: quant.matmul(x, one, preferred=jnp.float32), x)
        return y, *back(jnp.cos(y))

    for got, want in zip(run(backend), run("reference"), strict=True):
        assert got.shape == want.shape
        # bfloat16 has 8 bits.
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * np.abs(want).max())


def test_the_table_decides_by_rows_and_a_shape_no_kernel_takes_is_told():
    q = dataclasses.replace(quantized(128, 128, block_size=64), backend="gpu")

    def way(rows, dtype=jnp.bfloat16, q=q, shape=(64, 128)):
        return dispatch.choose_kernel(q, rows, shape, transposed=False, dtype=dtype)

    assert not way(1).fused  # a look into a table for every weight is slower than decoding first
    q = dataclasses.replace(quantized(128, 128, format="int4", block_size=64), backend="gpu")
    assert way(1, q=q).fused and way(16, q=q).fused and not way(17, q=q).fused
    assert way(64, q=q, shape=(64, 14336)).fused and not way(65, q=q, shape=(64, 14336)).fused
    assert not way(1, jnp.float32, q=q).fused
    assert not way(1, q=quantized(128, 128, format="int8")).fused
    with pytest.warns(quant.ReferenceWarning, match="has no kernel of gpu: 10 outputs are no mult"):
        odd = way(1, shape=(64, 10))
    assert odd.reason and not odd.fused
    with pytest.raises(ValueError, match="`backend` must be one of auto, reference, gpu"):
        way(1, q=dataclasses.replace(q, backend="cuda"))


def test_kernels_of_tpus_on_a_mesh_decode_whole_weights():
    """JAX gives XLA no rule there by which it could split them."""
    q = dataclasses.replace(quantized(128, 128, block_size=64), backend="tpu")

    def kernel(q=q):
        return dispatch.choose_kernel(q, 4, (64, 128), transposed=False, dtype=jnp.bfloat16)

    def mesh(*sizes, kind=AxisType.Auto):
        return jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(kind,) * 2)

    assert kernel().fused
    with jax.set_mesh(mesh(8, 1)):
        assert not kernel().fused and not kernel().is_reference
        assert kernel(dataclasses.replace(q, backend="tpu_interpret")).fused
        inside = jax.shard_map(
            lambda x: 2 * x if kernel().fused else x, in_specs=jax.P(), out_specs=jax.P()
        )
        assert inside(jnp.float32(1)) == 2
    for other in (mesh(4, 2), mesh(8, 1, kind=AxisType.Explicit)):
        with jax.set_mesh(other), warnings.catch_warnings():
            # Once a process.
            warnings.simplefilter("ignore", quant.ReferenceWarning)
            assert kernel().is_reference and "cannot split its kernels" in kernel().reason


def test_every_device_decodes_a_whole_weight_from_its_part_of_the_codes():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    parts = (np.arange(64.0, dtype=np.float32).reshape(8, 8), np.ones(8, np.float32))
    placed = jax.device_put(parts, NamedSharding(mesh, jax.P("fsdp")))
    with jax.set_mesh(mesh):
        decode = jax.jit(lambda *parts: whole_decode(lambda a, b: a @ a + b, *parts))
        got, text = decode(*placed), decode.lower(*placed).compile().as_text()
    np.testing.assert_array_equal(got, parts[0] @ parts[0] + 1)
    assert got.sharding.is_fully_replicated and text.count(" all-gather(") == 2


@pytest.mark.parametrize("platform, backend", [("cuda", "gpu"), ("tpu", "tpu")])
@pytest.mark.parametrize("rows, format", [(4, "nf4"), (4, "int4"), (512, "nf4")])
def test_kernels_lower_for_the_device_from_here(platform, backend, rows, format, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    shape = jax.ShapeDtypeStruct((1408, 512), jnp.bfloat16)  # 11 superblocks: no power of two
    q = jax.eval_shape(lambda w: quant.quantize_array(w, format=format), shape)
    q = dataclasses.replace(q, backend=backend)
    x = jax.ShapeDtypeStruct((rows, 1408), jnp.bfloat16)

    def loss(x, q):
        return jnp.sum(quant.matmul(x, q).astype(jnp.float32) ** 2)

    text = lowered(jax.grad(loss), platform, x, q)
    call = "__gpu$xla.gpu.triton" if platform == "cuda" else "tpu_custom_call"
    fused = rows <= 256 and (platform == "tpu" or format == "int4")
    forward, backward = "matmul" if fused else "decode", "decode"
    if platform == "tpu":
        backward = forward
    assert text.count(call) == 2
    assert f"quant_{forward}_forward" in text and f"quant_{backward}_backward" in text
