"""Quantized weights on meshes of eight devices: specs, values, kernels partitioned by hand."""

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import quant
from lora_jax.quant import encode
from lora_jax.quant.matmul import linear
from lora_jax.quant.sharding import array_specs, local_part, put, shardings

K, N = 512, 256
SPECS = {"w1": P("data", "model"), "w2": P("model", None)}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def base(**options):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (K, N)) / 16,
        "w2": jax.random.normal(keys[1], (N, K)) / 16,
    }
    quantized = lora.quantize(params, ["w1", "w2"], block_size=32, **options)
    return quantized, jax.random.normal(keys[2], (40, K))


def adapted(params, x):
    config = lora.LoraConfig(rank=4, target_modules=("w1", "w2"), init="random")
    return lora.init(jax.random.key(5), lora.plan(config, mlp, params, x), params)


def value_and_grad(lora_params, x):
    trainable, frozen = lora.split(lora_params)

    def loss(trainable, frozen, x):
        return jnp.sum(jnp.sin(lora.lorafy(mlp)(lora.combine(trainable, frozen), x)))

    return jax.jit(jax.value_and_grad(loss))(trainable, frozen, x)


@pytest.mark.parametrize(
    "options", [dict(backend="gpu_interpret", format="uint4"), dict(double_quant=True)],
    ids=str,
)  # fmt: skip
def test_sharded_values_and_gradients_are_those_of_one_device(mesh, options):
    params, x = base(**options)
    plain = jax.tree.map(lambda q: dataclasses.replace(q, backend="reference"), params,
                         is_leaf=quant.is_quant)  # fmt: skip
    want = value_and_grad(adapted(plain, x), x)
    sharded = {k: put(q, NamedSharding(mesh, SPECS[k])) for k, q in params.items()}
    packed = sharded["w1"].packed
    assert packed.sharding.spec == P("data", "model")
    assert packed.addressable_shards[0].data.shape == (K // 8, N // 2)
    lora_params = adapted(sharded, x)
    assert lora_params["w1"].a.sharding.spec == P("data", None)
    got = value_and_grad(lora_params, jax.device_put(x, NamedSharding(mesh, P("data"))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
        jax.tree.leaves(got), jax.tree.leaves(want),
    )  # fmt: skip


def test_a_partitioned_kernel_moves_no_codes(mesh):
    """Each device decodes its own shard: no collective gives it another's codes."""
    params, _ = base(backend="gpu_interpret")
    q = put(params["w1"], NamedSharding(mesh, SPECS["w1"]))
    x = jax.device_put(jnp.ones((40, K)), NamedSharding(mesh, P(None, "data")))
    text = jax.jit(quant.matmul).lower(x, q).compile().as_text()
    assert text is not None and "all-reduce" in text
    assert "all-gather" not in text and "u8[256,256]" not in text


@pytest.mark.parametrize(
    "backend, format, dtype",
    [("gpu_interpret", "int4", "bfloat16"), ("tpu_interpret", "nf4", "float32")],
)
def test_fused_products_are_partitioned_too(mesh, backend, format, dtype):
    """Few rows: each device multiplies with its own codes, and only sums are exchanged."""
    params, x = base(backend=backend, format=format)
    q = params["w1"].astype(dtype)
    x = x[:8].astype(dtype)
    both = jax.jit(lambda x, q: jax.value_and_grad(
        lambda x: jnp.sum(jnp.sin(quant.matmul(x, q).astype(jnp.float32))))(x))  # fmt: skip
    plain = dataclasses.replace(q, backend="reference")
    want = both(x, plain)
    sharded = put(q, NamedSharding(mesh, SPECS["w1"]))
    run = both.lower(x, sharded).compile()
    text = run.as_text()
    assert text and "all-gather" not in text
    got = run(x, sharded)
    close: dict[str, Any] = (
        dict(rtol=2e-2, atol=5e-2) if dtype == "bfloat16" else dict(rtol=1e-4, atol=1e-4)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), **close)


def test_specs_of_a_quantized_base_and_its_adapters(mesh):
    params, x = base(double_quant=True)
    specs = lora.partition_specs(adapted(params, x), SPECS)
    assert specs["w1"].w.packed == specs["w1"].w.scale == P("data", "model")
    assert specs["w1"].w.scale2 == P() and specs["w1"].b == P(None, "model")
    w = quant.quantize_array(jnp.ones((64, 4, 16)), block_size=32, roles="ioo")
    both = lora.partition_specs({"w": w}, {"w": P(None, "model")})["w"]
    assert both.packed == P(None, "model")
    spread = put(w, NamedSharding(mesh, P(None, "model")))
    assert spread.sharding.spec == P(None, "model", None)
    with pytest.raises(ValueError, match=r"`w`: spec .* dims \(1, 2\) are stored as one"):
        lora.partition_specs({"w": w}, {"w": P(None, None, "model")})


@pytest.mark.parametrize(
    "spec, x_spec, out",
    [(P(None, "model"), P(), P(None, "model")), (P("model", None), P(None, "model"), P())],
)
def test_inside_a_shard_map(mesh, spec, x_spec, out):
    params, x = base()

    def fn(p, x):
        def inside(w, x):
            y = x @ w
            return y if out != P() else jax.lax.psum(y, "model")

        return jax.shard_map(inside, mesh=mesh, in_specs=(spec, x_spec), out_specs=out)(p["w1"], x)

    got = jax.jit(lora.lorafy(fn))({"w1": params["w1"]}, x)
    want = x @ params["w1"].dequantize()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(lora.lorafy(fn)({"w1": params["w1"]}, x) ** 2)))(x)
    np.testing.assert_allclose(grad, 2 * want @ params["w1"].dequantize().T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["matmul", "linear"])
@pytest.mark.parametrize("varying", [False, True])
def test_a_gradient_is_summed_over_devices_where_x_is_the_same_on_all(mesh, kind, varying):
    """Each device has some outputs, so each gives a part of dx; where x differs, each its own."""
    params, x = base()
    q = params["w1"]
    specs = array_specs(q, P(None, "model"))

    def inside(q, x):
        q = local_part(q, P(None, "model"), mesh)
        if varying:
            x = jax.lax.pcast(x, "model", to="varying")
        if kind == "matmul":
            return quant.matmul(x, q)
        return linear(lambda x, w: jnp.einsum("mk,kn->mn", x, w), x, q)

    run = jax.shard_map(inside, mesh=mesh, in_specs=(specs, P()), out_specs=P(None, "model"))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(q, x)))))(x)
    w = q.dequantize()
    want = jnp.cos(x @ w) @ w.T
    np.testing.assert_allclose(grad, want, rtol=1e-3, atol=1e-3)


def experts(w, x):
    return jnp.einsum("emd,edh->emh", x, w)


def heads(w, x):
    return jnp.einsum("md,dnh->mnh", x, w)


@pytest.mark.parametrize(
    "inside, shape, roles, specs",
    [
        (experts, (4, 64, 32), "sio", (P("model"), P("model"), P("model"))),
        (heads, (64, 4, 8), "ioo", (P(None, "model"), P(), P(None, "model"))),
    ],
)
def test_stacks_and_heads_inside_a_shard_map(mesh, inside, shape, roles, specs):
    w = jax.random.normal(jax.random.key(0), shape)
    q = quant.quantize_array(w, block_size=16, roles=roles)
    x = jax.random.normal(jax.random.key(1), (4, 5, 64) if roles == "sio" else (5, 64))

    def fn(p, x):
        w_spec, x_spec, out = specs
        return jax.shard_map(inside, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out)(p["w"], x)

    def loss(w, x):
        return jnp.sum(jnp.sin(lora.lorafy(fn)({"w": w}, x)))

    got = jax.jit(jax.value_and_grad(loss, 1))(q, x)
    want = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(inside(q.dequantize(), x))))(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_filled_up_weight_is_not_split_inside_a_shard_map(mesh):
    """96 inputs are stored as two superblocks of 64: the first shard would hold 64 of them."""
    q = quant.quantize_array(jnp.ones((96, 16)), block_size=32)

    def fn(p, x):
        def inside(w, x):
            return jax.lax.psum(x @ w, "model")

        specs = (P("model", None), P(None, "model"))
        return jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=P())(p["w"], x)

    with pytest.raises(ValueError, match="has 96 inputs filled up to 128: inside a shard_map"):
        lora.lorafy(fn)({"w": q}, jnp.ones((3, 96)))


def test_shards_must_be_whole_superblocks(mesh):
    w = quant.quantize_array(jnp.ones((128, 16)), block_size=64)
    with pytest.raises(ValueError, match="has 1 superblocks of 128 inputs: they cannot be split"):
        put(w, NamedSharding(mesh, P("data", None)))


FORMATS = [
    dict(format="nf4"),
    dict(format="nf4", double_quant=True),
    dict(format="int8", double_quant=True),
    dict(format="int4", scale_dtype="float32"),
    dict(format="uint4", scale_dtype="float16"),
]


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_what_lies_on_a_mesh_is_quantized_where_it_lies(axis, options):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis,) * 2)
    specs = {"a": P("data", "model"), "b": P("model"), "c": P(None, "data", "model"), "d": P()}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (K, N)),
        "b": jax.random.normal(keys[1], (N, 192)),
        "c": jax.random.normal(keys[2], (3, K, N)).astype("bfloat16"),
        "d": jnp.ones((K, 8)),
    }
    want = lora.quantize(params, list(params), block_size=32, **options)
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
    with jax.set_mesh(mesh) if axis == AxisType.Explicit else contextlib.nullcontext():
        found = lora.quantize(placed, list(params), block_size=32, **options)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    for name, q in found.items():
        expected = shardings(q, mesh, specs[name])
        for x, s in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
            assert x.sharding.mesh == mesh


def test_nothing_is_sent_while_a_mesh_quantizes(mesh):
    """By XLA's own program, which has no collective."""
    where = NamedSharding(mesh, P("data", "model"))
    how = encode._How("io", quant.formats.FORMATS["nf4"], 32, jnp.dtype("bfloat16"), False)
    program = encode._encoder(where, where, how).lower(jax.device_put(jnp.ones((K, N)), where))
    text = program.compile().as_text()
    assert not re.search(r"all-(reduce|gather|to-all)|reduce-scatter|collective-permute", text)


@pytest.mark.parametrize(
    ("shape", "roles", "spec", "kept"),
    [
        ((96, 64), "io", P("data", "model"), P(None, "model")),  # parts of 24 inputs
        ((64, 4, 32), "ioo", P("model", None, "data"), P("model", None, None)),
        ((64, 256), "oi", P("data", "model"), P("data", "model")),
    ],
)
def test_a_shard_that_cuts_superblocks_is_gathered_with_a_warning(mesh, shape, roles, spec, kept):
    w = jax.random.normal(jax.random.key(0), shape)
    want = quant.quantize_array(w, block_size=16, roles=roles)
    placed = jax.device_put(w, NamedSharding(mesh, spec))
    with contextlib.ExitStack() as stack:
        if kept != spec:
            text = r"`w` \(.*which cuts superblocks of 32 inputs or dims that are stored as one"
            stack.enter_context(pytest.warns(UserWarning, match=text))
        found = quant.quantize_array(placed, block_size=16, roles=roles)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert found.sharding.spec == kept


@pytest.mark.parametrize("double", [False, True])
def test_values_are_checked_on_a_mesh_too(mesh, double):
    where = NamedSharding(mesh, P("data", "model"))
    bad = jax.device_put(jnp.ones((K, N)).at[400, 200].set(jnp.nan), where)
    with pytest.raises(ValueError, match="`w` is not finite"):
        quant.quantize_array(bad, double_quant=double)
    if not double:
        tiny = jax.device_put(jnp.ones((K, N)).at[:64, 3].set(1e-8), where)
        with pytest.raises(ValueError, match="the scales of `w` leave the range of float16"):
            quant.quantize_array(tiny, scale_dtype="float16", block_size=32)
