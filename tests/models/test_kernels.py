"""Kernels of attention against XLA's attention, and the table that chooses one.

No TPU or GPU is needed: splash attention runs in Pallas' interpret mode, and cuDNN's call is read
from a program that is lowered for a GPU.
"""

import dataclasses
import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models import attention, kernels
from lora_jax.models.mixing import Mixing

from tests.support.decoders import FAMILIES, family, packed
from tests.support.tiny import SMALL

pytestmark = pytest.mark.once

INTERPRETED = tuple(
    row._replace(run=functools.partial(kernels.splash, interpret=True))
    if row.name == "splash"
    else row
    for row in kernels.TABLE
)
CASE = kernels.Case("tpu", 0, jnp.dtype("bfloat16"), 128)
T = 200


def on(monkeypatch, platform, since=0):
    """Pretends that programs are traced for this platform; a TPU's kernel is interpreted."""
    monkeypatch.setattr(kernels, "target", lambda: (platform, since))
    monkeypatch.setattr(kernels, "apart", lambda: "")
    monkeypatch.setattr(kernels, "TABLE", INTERPRETED)
    monkeypatch.setattr(kernels, "KERNELS_FROM", 1)


def mixed(*, heads=2, segments=None, mask=None, slides=False, **options):
    """Values and gradients of one block's attention in rows of T tokens; padding counts for 0."""
    mixing = Mixing(slides=(False,), scale=0.3, **options)
    draw = np.random.default_rng(0)
    q, w = draw.normal(size=(2, 1, T, 2, 8)).astype(np.float32)
    k, v = draw.normal(size=(2, 1, T, heads, 8)).astype(np.float32)
    real = np.ones((1, T), bool) if mask is None else mask
    real = real if segments is None else segments > 0

    def loss(q, k, v, slides):
        attend_of, _, _ = attention.attention(
            jnp.zeros((1, T), jnp.int32), mask, None, segments=segments, mixing=mixing,
            turns=lambda _: None,
        )  # fmt: skip
        out, _ = attend_of(slides)(q, k, v, stored=None, block=jnp.int32(0))
        out = jnp.where(real[..., None, None], out, 0)
        return jnp.sum(out * w), out

    # A fresh function: nothing of another platform's program is reused.
    if isinstance(slides, bool):
        fn = functools.partial(loss, slides=slides)
        return jax.jit(jax.value_and_grad(fn, (0, 1, 2), has_aux=True))(q, k, v)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v, slides)


SEGMENTS = np.repeat([3, 1, 2, 0], [1, 149, 40, 10])[None].astype(np.int32)
KINDS = {
    "causal": {},
    "grouped heads": dict(heads=1),
    "window": dict(window=40, slides=True),
    "window of another block": dict(window=40, slides=np.bool_(True)),
    "no window in this block": dict(window=40, slides=np.bool_(False)),
    "window longer than the row": dict(window=T, slides=True),
    "soft cap": dict(softcap=2.0),
    "padding on the left": dict(mask=np.arange(T)[None] >= 30),
    "segments": dict(segments=SEGMENTS),
    "all at once": dict(
        segments=SEGMENTS, window=50, slides=np.bool_(True), softcap=2.0, heads=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_splash_attention_is_attention(kind, monkeypatch):
    want = mixed(**KINDS[kind])
    on(monkeypatch, "tpu")
    got = mixed(**KINDS[kind])
    # The values and three gradients; their sum alone would round differently.
    for a, b in zip([got[0][1], *got[1]], [want[0][1], *want[1]], strict=True):
        assert np.abs(a - b).max() <= 2e-6 * np.abs(b).max()


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# Gemma 3's blocks differ within their scan, and one kernel of each kind is compiled.
@pytest.mark.parametrize(
    "kind", ["gemma3_text", *map(_slow, sorted({*FAMILIES} - {"gemma3_text"}))]
)
def test_a_family_by_splash_attention(kind, monkeypatch):
    """Packed rows have XLA's logits; a changed text changes no number of its neighbours."""
    model = family(kind, remat="projections")
    tokens, segments, _ = packed()
    places = segments == np.array([[2], [1], [3]])
    changed = np.where(places, (tokens + 7) % 61, tokens)
    others = ((segments > 0) & ~places)[..., None]

    def run(params, tokens):
        def total(params):
            hidden = model.apply(params, tokens, segments=segments, return_hidden=True)
            return jnp.sum(jnp.sin(hidden) * others), hidden

        (_, hidden), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return hidden, gradient

    want = jax.jit(lambda *args: run(*args))(model.params, tokens)
    on(monkeypatch, "tpu")
    one, two = (jax.jit(lambda *args: run(*args))(model.params, rows) for rows in (tokens, changed))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(want), strict=True):
        real = (segments > 0)[..., None] if a.shape == want[0].shape else 1
        assert np.linalg.norm((a - b) * real) <= 1e-5 * max(np.linalg.norm(b * real), 1e-3)
    real = (segments > 0) & ~places
    np.testing.assert_array_equal(np.asarray(one[0])[real], np.asarray(two[0])[real])
    # Other tokens put an expert's rows in other tiles, whose sums are added in another order.
    most = 0 if getattr(model.config, "num_experts", None) is None else 1e-5
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=most)


def test_adapters_of_tokens_pass_through_a_kernel(monkeypatch):
    model = family("llama")
    config = lora.LoraConfig(rank=2, init="random")
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    stacked = lora.stack([lora.init(jax.random.key(i), plan, model.params) for i in range(2)])
    tokens, segments, _ = packed()
    ids = jnp.asarray(np.where(segments % 2 == 1, 1, -1).astype(np.int32))

    def run():
        fn = jax.jit(lora.lorafy(model.apply))
        return np.asarray(fn(stacked, tokens, segments=jnp.asarray(segments), adapter_ids=ids))

    want = run()
    on(monkeypatch, "tpu")
    real = segments > 0
    assert np.abs(run() - want)[real].max() <= 1e-5 * np.abs(want[real]).max()


@pytest.mark.parametrize("axes", [dict(data=2, tensor=2), dict(fsdp=2), dict(tensor=4)])
def test_on_a_mesh_each_device_has_its_rows_and_heads(axes, monkeypatch):
    mesh = models.make_mesh(**axes, devices=jax.devices()[: int(np.prod([*axes.values()]))])
    model = family("llama")
    tokens, segments, _ = packed(lengths=((7, 1, 5, 9), (16, 6)))

    def run(params):
        return model.apply(params, tokens, segments=segments)

    want = np.asarray(jax.jit(lambda p: run(p))(model.params))
    on(monkeypatch, "tpu")
    with jax.set_mesh(mesh):
        jitted = jax.jit(lambda p: run(p))
        # Four key heads would be needed for `tensor` of 4: the rows alone are then a device's.
        assert "shard_map" in str(jax.make_jaxpr(run)(model.params))
        got = np.asarray(jitted(model.params))
    real = segments > 0
    assert np.abs(got - want)[real].max() <= 1e-5 * np.abs(want[real]).max()


def test_cudnn_never_attends_in_packed_or_padded_rows(monkeypatch):
    """JAX's cuDNN attention takes no segments, and would mix the texts without an error."""
    asked, plain = [], jax.nn.dot_product_attention

    def recorded(*args, implementation=None, **options):
        asked.append((implementation, options.get("mask") is not None))
        return plain(*args, **options)

    on(monkeypatch, "gpu", since=9)
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    model = models.init(jax.random.key(0), SMALL, dtype="bfloat16")
    rows = jnp.ones((1, 64), jnp.int32)
    for options, calls in (
        ({}, {("cudnn", False)}),
        ({"segments": rows}, set()),
        ({"mask": rows > 0}, set()),
    ):
        asked.clear()
        jax.eval_shape(lambda p, options=options: model.apply(p, rows, **options), model.params)
        assert set(asked) == calls


def lowered_for_cuda(monkeypatch, window=None, scale=None):
    """The calls of cuDNN in the lowered gradient, each with its options."""
    from jax._src.cudnn import fused_attention_stablehlo

    # JAX asks for the version of a library that is not here.
    version = type("Version", (), {"cudnn_get_version": staticmethod(lambda: 91200)})
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    on(monkeypatch, "gpu", since=9)
    mixing = Mixing(slides=(False,), window=window, scale=scale)

    def loss(q, k, v):
        attend_of, _, _ = attention.attention(
            jnp.zeros((1, 256), jnp.int32), None, None, mixing=mixing, turns=lambda _: None
        )
        out, _ = attend_of(window is not None)(q, k, v, stored=None, block=jnp.int32(0))
        return jnp.sum(out.astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "256x256" not in text, "an array of all pairs of tokens"
    calls = re.findall(r'custom_call @(__cudnn\S+?)\(.*?backend_config = "(\{.*?\})"', text)
    unquoted = [(name, config.replace("\\22", '"')) for name, config in calls]
    return [(n, json.loads(c)["cudnn_fmha_backend_config"]) for n, c in unquoted]


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_gets_our_mask(window, monkeypatch):
    calls = lowered_for_cuda(monkeypatch, window=window, scale=0.3)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, options in calls:
        assert options["mask_type"] == "CAUSAL" and options["fmha_scale"] == 0.3
        # Tokens that a token sees, itself included, as `Mixing.window` counts them.
        assert options["sliding_window_length"] == (window or 0)
        assert options["max_seg_per_batch"] == 1


@pytest.mark.parametrize(
    "change, taken",
    [
        ({}, "splash"),
        (dict(kinds=frozenset({"windows", "soft caps", "padding", "segments"})), "splash"),
        (dict(size=96), "splash"),
        (dict(size=192), "xla"),
        (dict(dtype=jnp.dtype("float16")), "xla"),
        (dict(apart="needs the mesh"), "xla"),
        (dict(platform="gpu", since=8), "cudnn"),
        (dict(platform="gpu", since=7), "xla"),
        (dict(platform="gpu", since=0), "xla"),
        (dict(platform="gpu", since=8, size=256), "xla"),
        (dict(platform="gpu", since=9, size=256), "cudnn"),
        (dict(platform="gpu", since=9, size=100), "xla"),
        (dict(platform="gpu", since=9, dtype=jnp.dtype("float32")), "xla"),
        (dict(platform="gpu", since=9, kinds=frozenset({"windows"})), "cudnn"),
        (dict(platform="gpu", since=9, kinds=frozenset({"segments"})), "xla"),
        (dict(platform="gpu", since=9, kinds=frozenset({"padding"})), "xla"),
        (dict(platform="gpu", since=9, kinds=frozenset({"soft caps"})), "xla"),
        (dict(platform="cpu"), "xla"),
    ],
)
def test_the_table_chooses(change, taken):
    assert kernels.choose("auto", CASE._replace(**change)).name == taken
    assert kernels.choose("xla", CASE._replace(**change)).name == "xla"


@pytest.mark.parametrize(
    "wanted, change, message",
    [
        ("cudnn", {}, "runs on an NVIDIA GPU since Ampere, and the device is a TPU"),
        ("splash", dict(platform="cpu"), "runs on a TPU, and the device is a CPU"),
        ("splash", dict(size=200), "takes heads of sizes below 128, or multiples of 128, and"),
        ("cudnn", dict(platform="gpu", since=9, dtype=jnp.dtype("float32")),
         "takes bfloat16 and float16, and the model computes in float32"),
        ("cudnn", dict(platform="gpu", since=9, kinds=frozenset({"segments", "soft caps"})),
         "has no soft cap of the scores and cannot keep texts of one row apart"),
        ("splash", dict(apart="needs the mesh of"), "needs the mesh of"),
    ],
)  # fmt: skip
def test_a_named_row_that_lacks_a_case_gives_the_reason_once(wanted, change, message):
    kernels._report.cache_clear()
    case = CASE._replace(**change)
    with pytest.warns(UserWarning, match=f'`attention="{wanted}"` {message}.*"xla" takes its'):
        assert kernels.choose(wanted, case).name == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose(wanted, case).name == "xla"


def test_a_name_that_is_none():
    message = "`attention` must be one of auto, splash, cudnn, xla, got 'flash'"
    with pytest.raises(ValueError, match=message):
        models.init(jax.random.key(0), SMALL, attention="flash")  # type: ignore[arg-type]


def test_an_encoder_has_no_kernel():
    config = models.config_from_hf({"model_type": "bert", "architectures": ["BertModel"]})
    with pytest.raises(ValueError, match="`attention` is for decoders, and `bert` is an enc"):
        models.init(jax.random.key(0), config, attention="splash")


def test_a_platform_follows_from_the_device(monkeypatch):
    def found(platform, capability, count=1):
        device = type("Device", (), dict(platform=platform, compute_capability=capability))()
        monkeypatch.setattr(kernels.compat, "default_device", lambda: device)
        monkeypatch.setattr(jax, "device_count", lambda: count)
        return kernels.target(), kernels.apart()

    assert found("gpu", "9.0") == (("gpu", 9), "") and found("gpu", "7.5") == (("gpu", 7), "")
    assert found("gpu", "gfx942") == (("gpu", 0), "") and found("cpu", None) == (("cpu", 0), "")
    assert "`jax.set_mesh`" in found("tpu", None, count=4)[1]
    # Devices that are not attached: a compiler's alone.
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, platform="tpu")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    ):
        assert kernels.target() == ("tpu", 0) and kernels.apart() == ""


def test_a_short_row_and_a_cache_take_xlas_attention(monkeypatch):
    on(monkeypatch, "tpu")
    monkeypatch.setattr(kernels, "KERNELS_FROM", 128)
    model = models.init(jax.random.key(0), dataclasses.replace(SMALL, max_position_embeddings=256))
    rows = jax.ShapeDtypeStruct((1, 127), jnp.int32)
    assert "pallas" not in str(jax.make_jaxpr(model.apply)(model.params, rows))
    rows = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    assert "pallas" in str(jax.make_jaxpr(model.apply)(model.params, rows))
    cached = functools.partial(model.apply, cache=model.init_cache(1, 256))
    assert "pallas" not in str(jax.make_jaxpr(cached)(model.params, rows))
