"""LoftQ: the error that a quantized base and its adapter start with, and what each base needs."""

import dataclasses
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import checkpoint, quant

from tests.support.nf4 import quantized

pytestmark = pytest.mark.once

RANK = 4


def loftq(w, turns):
    """Algorithm 1 of the paper: the base, and the error of base and factors together."""
    change = np.zeros_like(w)
    for _ in range(turns):
        q = quantized(w - change)
        u, s, vt = np.linalg.svd(np.float64(w - q))
        change = u[:, :RANK] * s[:RANK] @ vt[:RANK]
    return q, np.linalg.norm(w - q - change)


def fn(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0] @ p["out"]


X = jnp.ones((2, 64))


@pytest.fixture(scope="module")
def base():
    rng = np.random.default_rng(0)
    # Some directions are larger than others, as in trained weights.
    w = rng.standard_normal((3, 64, 64)) * np.geomspace(1, 0.1, 64)
    return {"layers": np.float32(w[:2]), "out": np.float32(w[2])}


def started(params, turns=1, weights=None, **fields):
    fields = {"rank": RANK, "alpha": 3 * RANK, "target_modules": ("layers", "out")} | fields
    steps = {"loftq_iter": turns}
    config = lora.LoraConfig(init="loftq", loftq_config=steps, **fields)
    plan = lora.plan(config, fn, params, X)
    return lora.init(jax.random.key(0), plan, params, weights=weights), config


def error(x, w):
    return np.linalg.norm(w - x.w.dequantize() - lora.delta(x))


@pytest.mark.parametrize("turns", [1, 5])
def test_the_error_is_that_of_the_papers_algorithm(base, turns):
    """Whatever the scale of the adapter, here 3."""
    params, _ = started(base, turns)
    out = params["out"]
    want, least = loftq(base["out"], turns)
    plain = np.linalg.norm(base["out"] - quantized(base["out"]))
    assert error(out, base["out"]) == pytest.approx(least, rel=1e-3)
    assert least < {1: 0.92, 5: 0.85}[turns] * plain
    # After the first turn a last bit of the decomposition can decide between two codes.
    same = np.isclose(out.w.dequantize(), want, rtol=1e-5)
    assert same.all() if turns == 1 else same.mean() > 0.99
    for layer in range(2):
        _, least = loftq(base["layers"][layer], turns)
        one = jax.tree.map(lambda a, layer=layer: a[layer], params["layers"])
        found = one.w.packed, one.w.scale
        q = quant.QuantArray(*found, shape=(64, 64), roles="io")
        lost = base["layers"][layer] - q.dequantize() - float(one.scale) * (one.a @ one.b)
        assert np.linalg.norm(lost) == pytest.approx(least, rel=1e-3)


def test_the_error_of_a_half_base_is_not_rounded(base):
    params, _ = started({name: jnp.asarray(x, "bfloat16") for name, x in base.items()})
    out = params["out"]
    lost = np.asarray(jnp.asarray(base["out"], "bfloat16"), np.float32)
    lost = lost - out.w.astype("float32").dequantize()
    u, s, vt = np.linalg.svd(lost)
    change = out.scale * out.a @ out.b
    np.testing.assert_allclose(change, u[:, :RANK] * s[:RANK] @ vt[:RANK], atol=1e-5)


def test_a_table_is_quantized_in_blocks_of_its_rows(base):
    """As PEFT's, whose embeddings are (vocabulary, features); other weights in blocks of inputs."""
    table = base["out"][:, :32]
    blocks = {"w": np.concatenate([table, table * 3], 1)}  # a row of 64 is one block
    config = lora.LoraConfig(rank=RANK, init="loftq", target_modules=("w",))
    plan = lora.plan(config, lambda p, ids: p["w"][ids], blocks, jnp.zeros(2, int))
    leaf = lora.init(jax.random.key(0), plan, blocks)["w"]
    np.testing.assert_allclose(leaf.w.dequantize(), quantized(blocks["w"].T).T, rtol=1e-5)


@pytest.mark.parametrize("callable_", [False, True])
def test_a_quantized_base_keeps_its_format_and_in_one_turn_its_codes(base, callable_):
    options: dict[str, Any] = dict(format="int4", block_size=32, double_quant=False)
    small = lora.quantize(base, ["layers", "out"], **options)
    weights = (lambda path: base[path]) if callable_ else base
    params, _ = started(small, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, params["out"].w, small["out"])
    before = np.linalg.norm(base["out"] - small["out"].dequantize())
    once = error(params["out"], base["out"])
    again, _ = started(small, turns=4, weights=weights)
    assert jax.tree.structure(again["out"].w) == jax.tree.structure(small["out"])
    assert error(again["out"], base["out"]) < once < 0.93 * before


@pytest.mark.parametrize("options", [{"double_quant": True}, {"scale_dtype": "float32"}], ids=str)
def test_later_turns_keep_all_that_the_base_was_quantized_with(base, options):
    small = lora.quantize(base, ["layers", "out"], block_size=32, **options)
    small = {path: dataclasses.replace(q, backend="reference") for path, q in small.items()}
    again, _ = started(small, turns=2, weights=base)
    for path, q in small.items():
        now = again[path].w
        assert jax.tree.structure(now) == jax.tree.structure(q) and now.backend == "reference"
        assert [x.dtype for x in jax.tree.leaves(now)] == [x.dtype for x in jax.tree.leaves(q)]


def test_what_loftq_needs_is_said(base):
    small = lora.quantize(base, ["layers", "out"])
    with pytest.raises(ValueError, match="`layers` is quantized: LoftQ needs the floats it was"):
        started(small)
    with pytest.raises(ValueError, match="`layers` is not quantized: leave `weights` out"):
        started(base, weights=base)
    with pytest.raises(ValueError, match=r"`out` in floats with shape \(64, 64\), got none"):
        started(small, weights={"layers": base["layers"]})
    with pytest.raises(ValueError, match=r"`layers` in floats .* got float32 of shape \(1, 64, 64"):
        started(small, weights=base | {"layers": base["layers"][:1]})
    with pytest.raises(ValueError, match='`weights` are for init="loftq", got init="default"'):
        plan = lora.plan(lora.LoraConfig(target_modules=("out",)), fn, base, X)
        lora.init(jax.random.key(0), plan, base, weights=base)
    with pytest.raises(ValueError, match="`layers`: quantizing changes no number, so LoftQ"):
        started(small, weights=lora.dequantize(small))
    with pytest.raises(ValueError, match="needs one rank for the whole stack `layers.up.kernel`"):
        deep(base["layers"], init="loftq", rank_pattern={"layers.1.up": 2})
    for steps, text in [
        ({"loftq_iter": 0}, r"loftq_config\['loftq_iter'\]` must be an integer from 1, got 0"),
        ({"loftq_bits": 3}, r"loftq_config\['loftq_bits'\]` must be 4 or 8, got 3"),
        ({"iterations": 2}, "loftq_config` has .* got 'iterations'"),
    ]:
        with pytest.raises(ValueError, match=text):
            lora.LoraConfig(init="loftq", loftq_config=steps)
    with pytest.raises(ValueError, match='loftq_config` needs init="loftq", got init="default"'):
        lora.LoraConfig(loftq_config={"loftq_iter": 2})


@pytest.mark.parametrize("bits", [4, 8])
def test_the_remedies_of_a_base_in_floats_work(bits):
    params = {"out": jax.random.normal(jax.random.key(0), (72, 32))}
    config = lora.LoraConfig(rank=RANK, init="loftq", loftq_config={"loftq_bits": bits})
    plan = lora.plan(config, lambda p, x: x @ p["out"], params, jnp.ones((2, 72)))
    text = "has 72 inputs, and LoftQ .* blocks of 64" if bits == 4 else "needs a base .* quantized"
    with pytest.raises(ValueError, match=f"`out`.*{text}.*, plan, base, weights=params"):
        lora.init(jax.random.key(0), plan, params)
    form: Any = dict(format="nf4" if bits == 4 else "int8")
    held = lora.quantize(params, plan, block_size=16, pad=True, **form)
    made = lora.init(jax.random.key(0), plan, held, weights=params)
    assert error(made["out"], params["out"]) < np.linalg.norm(
        params["out"] - held["out"].dequantize()
    )


def test_a_checkpoint_is_read_over_the_floats_and_over_the_quantized_base(base, tmp_path):
    params, config = started(base, turns=2)
    checkpoint.save(tmp_path / "a", params, config)
    again, _ = checkpoint.restore(tmp_path / "a", fn, base, X)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    held = checkpoint.base_of(params)
    again, _ = checkpoint.restore(tmp_path / "a", fn, held, X)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    other = lora.quantize(base, ["layers", "out"], scale_dtype="float32")
    with pytest.raises(ValueError, match="made over another base model.* holds other numbers"):
        checkpoint.restore(tmp_path / "a", fn, other, X)


def deep(w, **fields):
    def fn(p, x):
        kernels = p["layers"]["up"]["kernel"]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    params = {"layers": {"up": {"kernel": w}}}
    config = lora.LoraConfig(rank=RANK, target_modules=("up",), **fields)
    made = lora.init(jax.random.key(0), lora.plan(config, fn, params, X), params)
    return made["layers"]["up"]["kernel"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_scales_that_differ_within_a_stack(init, base):
    """Each layer's factors are for its own scale: what a start takes from the base it gives."""
    made = deep(base["layers"], init=init, alpha_pattern={"layers.1.up": 64})
    assert len(set(made.scale.tolist())) == 2
    np.testing.assert_allclose(made.w + lora.delta(made), base["layers"], atol=1e-5)


def test_blocks_of_a_file_are_not_quantized_anew():
    floats = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
    raw = gguf.quantize(floats.T, gguf.GGMLQuantizationType.Q4_0)
    plain = {"out": quant.from_gguf(raw, "Q4_0", roles="io")}
    raw = np.random.default_rng(0).integers(0, 60, (8, 144)).astype(np.uint8)
    held = {"out": quant.from_gguf(raw, "Q4_K", roles="io")}

    def start(params, turns):
        config = lora.LoraConfig(rank=2, target_modules=("out",), init="loftq",
                                 loftq_config={"loftq_iter": turns})  # fmt: skip
        plan = lora.plan(config, lambda p, x: x @ p["out"], params, jnp.ones((1, 256)))
        return lora.init(jax.random.key(0), plan, params, weights={"out": floats})["out"]

    assert error(start(plain, 2), floats) <= error(start(plain, 1), floats)
    # What is lost of other numbers is not small: factors of rank 2 take the largest part of it.
    lost = np.linalg.norm(floats - held["out"].dequantize())
    assert error(start(held, 1), floats) < lost
    with pytest.raises(ValueError, match=r"`out` is held as its file has it \(q4_k\), and LoftQ's"):
        start(held, 2)
