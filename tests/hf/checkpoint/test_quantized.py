"""FP8, MXFP4, GPTQ, AWQ and compressed-tensors: their own numbers, held as they are."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.models.requantizing import save_requantized
from lora_jax.models.saving import save_merged, save_model
from lora_jax.quant.array import is_quant

from tests.support.gguf_files import adapted, config_with
from tests.support.quantized_files import (
    CASES,
    METHODS,
    float8,
    in_groups,
    in_squares,
    saved,
    tiny,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize("case", CASES)
def test_a_weight_has_the_numbers_of_its_format(case, tmp_path):
    settings, tensors, want = CASES[case](np.random.default_rng(0))
    weights = saved(tmp_path / "m", settings, {f"up.{n}": x for n, x in tensors.items()})
    assert dict(weights.shapes) == {"up.weight": want.shape}
    # XLA's division on CPUs, of NVFP4's scales alone, misses the last bit of some numbers.
    equal = partial(np.testing.assert_allclose, rtol=2e-7 if case == "nvfp4" else 0)
    equal(weights.read("up.weight"), want)
    part = (slice(3, 133), slice(70, 201))
    equal(weights.read("up.weight", part), want[part])
    q = weights.blocks("up.weight")
    equal(q.dequantize(), want)
    bytes_ = sum(x.numel() * x.element_size() for x in tensors.values())
    # A float for an output is 1 % of 384 inputs.
    assert q.nbytes <= 1.02 * bytes_


# `quantization_config` and what makes the tensors of a projection, with any numbers.
TENSORS = {"quant_method": "compressed-tensors"}
WHOLE = {
    **METHODS,
    "fp8 of one scale": (
        {"quant_method": "fp8"},
        lambda rng, w: {"weight": float8(rng, w.shape), "weight_scale_inv": torch.tensor(0.003)},
    ),
    "fp8 of outputs": (
        {**TENSORS, "format": "float-quantized"},
        lambda rng, w: {
            "weight": float8(rng, w.shape), "weight_scale": torch.ones(len(w), 1).bfloat16()
        },
    ),
    "int8": (
        {**TENSORS, "format": "int-quantized"},
        lambda rng, w: {
            "weight": torch.ones(w.shape, dtype=torch.int8), "weight_scale": torch.ones(len(w), 1)
        },
    ),
    "nvfp4": (
        {**TENSORS, "format": "nvfp4-pack-quantized"},
        lambda rng, w: {
            "weight_packed": torch.ones(len(w), w.shape[1] // 2, dtype=torch.uint8),
            "weight_scale": float8(rng, (len(w), w.shape[1] // 16)),
            "weight_global_scale": torch.tensor([37.5]),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", WHOLE)
def test_a_whole_model_takes_the_bytes_of_its_file(method, tmp_path):
    directory = tiny(tmp_path / "m", *WHOLE[method], width=384)
    held = models.load(directory, quantize="file")
    leaves = jax.tree.leaves(held.params, is_leaf=is_quant)
    assert sum(map(is_quant, leaves)) == 7
    # A float for an output, where the file has one for the whole weight.
    file = (directory / "model.safetensors").stat().st_size
    assert sum(x.nbytes for x in leaves) <= 1.02 * file


def test_experts_of_mxfp4_have_transformers_numbers(tmp_path):
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (2, 96, 4, 16)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(100, 140, (2, 96, 4)).astype(np.uint8))
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    weights = saved(tmp_path / "m", {"quant_method": "mxfp4"}, tensors)
    assert dict(weights.shapes) == {"experts.down_proj": want.shape}
    np.testing.assert_array_equal(weights.read("experts.down_proj"), want)
    part = (slice(1, 2), slice(40, 90), slice(5, 50))
    np.testing.assert_array_equal(weights.read("experts.down_proj", part), want[part])
    q = weights.blocks("experts.down_proj")
    assert q.nbytes == blocks.numel() + scales.numel()


BROKEN = {
    "no scale": ("gptq", lambda t: t.pop("scales"), "tensor `up.scales` is missing"),
    "shape": ("gptq", lambda t: t.update(qzeros=t["qzeros"][:, :-1].contiguous()), "has shape"),
    "dtype": ("awq", lambda t: t.update(qweight=t["qweight"].to(torch.int64)), "is I64 of shape"),
    "groups": ("gptq_ordered", lambda t: t["g_idx"].fill_(0), "does not name 6 groups"),
    "grid": ("fp8_squares", lambda t: t.update(weight_scale_inv=torch.ones(3, 3)), "has shape"),
    "nan": ("fp8_squares", lambda t: t["weight"].view(torch.uint8).fill_(127), "holds NaN"),
    "nan scale": ("nvfp4", lambda t: t["weight_scale"].view(torch.uint8).fill_(127), "holds NaN"),
    "scales": ("awq", lambda t: t["scales"].fill_(float("inf")), "scales hold NaN or infinity"),
    "alone": ("fp8_channel", lambda t: t.pop("weight_scale"), "no scales are beside it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_sentence(case, tmp_path):
    name, damage, text = BROKEN[case]
    settings, tensors, _ = CASES[name](np.random.default_rng(0))
    damage(tensors)
    with pytest.raises(ValueError, match=text):
        weights = saved(tmp_path / "m", settings, {f"up.{n}": x for n, x in tensors.items()})
        weights.read("up.weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, make",
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, in_squares),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, in_groups),
    ],
    ids=["fp8", "gptq"],
)
def test_a_model_is_held_adapted_merged_and_saved(settings, make, tmp_path):
    directory = tiny(tmp_path / "m", settings, make)
    floats, held = models.load(directory), models.load(directory, quantize="file")
    kernels = [x for x in jax.tree.leaves(held.params, is_leaf=is_quant) if is_quant(x)]
    assert len(kernels) == 7
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    tokens = np.arange(16).reshape(2, 8)
    config = lora.LoraConfig(rank=2, target_modules="all-linear", init="gaussian")

    def gradients(model):
        plan = lora.plan(config, model.apply, model.params, tokens)
        params = lora.init(jax.random.key(1), plan, model.params)
        trainable, frozen = lora.split(params)

        def loss(trainable):
            y = lora.lorafy(model.apply)(lora.combine(trainable, frozen), tokens)
            return (y**2).mean()

        return params, *jax.jit(jax.value_and_grad(loss))(trainable)

    (adapted, got, got_grad), (_, want, want_grad) = gradients(held), gradients(floats)
    # Sums of float32 in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got_grad, want_grad
    )
    save_merged(tmp_path / "merged", held, adapted)
    merged = models.load(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, merged.params, lora.merge(adapted))


def same_logits(a, b, tokens):
    apply = [jax.jit(lambda p, t, m=m: lora.lorafy(m.apply)(p, t)) for m in (a, b)]
    got, want = apply[0](a.params, tokens), apply[1](b.params, tokens)
    # Sums of float32 in another order.
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "gptq"])
def test_blocks_lie_on_a_mesh_as_floats_do(kind, tmp_path):
    settings, make = {
        "fp8": ({"quant_method": "fp8"}, in_squares),
        "gptq": ({"quant_method": "gptq", "bits": 4}, lambda r, w: _in_turn(in_groups(r, w))),
    }[kind]
    directory = tiny(tmp_path / "m", settings, make, width=256)
    mesh = models.make_mesh(fsdp=2, tensor=2, data=2)
    here, there = (models.load(directory, quantize="file", mesh=m) for m in (None, mesh))
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(there.params))
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
    with jax.set_mesh(mesh):
        tokens = np.arange(16).reshape(2, 8)
        got = jax.jit(lambda p, t: lora.lorafy(there.apply)(p, t))(there.params, tokens)
    want = jax.jit(lambda p, t: lora.lorafy(here.apply)(p, t))(here.params, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def _in_turn(tensors):
    inputs = len(tensors["g_idx"])
    return {**tensors, "g_idx": torch.arange(inputs, dtype=torch.int32) // 32}


def rewritten(directory, settings, make):
    """A saved model with some tensors replaced: `make(name, weight)` gives them, or None."""
    tensors = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        tensors |= make(name, weight) or {name: torch.from_numpy(weight)}
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))


SIZES = dict(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.slow
def test_gpt_oss_loads_as_it_is_shipped(tmp_path):
    raw = {"model_type": "gpt_oss", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = models.init(jax.random.key(0), models.LlamaConfig.from_hf(raw))
    save_model(tmp_path / "m", model, model.params)
    rng = np.random.default_rng(0)

    def make(name, weight):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32)
        blocks = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
        scales = rng.integers(118, 123, shape).astype(np.uint8)
        return {
            f"{name}_blocks": torch.from_numpy(blocks),
            f"{name}_scales": torch.from_numpy(scales),
        }

    rewritten(tmp_path / "m", {"quant_method": "mxfp4"}, make)
    floats, held = models.load(tmp_path / "m"), models.load(tmp_path / "m", quantize="file")
    experts = held.params["model"]["layers"]["mlp"]["experts"]
    assert experts["down_proj"].format == "mxfp4"
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    same_logits(held, floats, np.arange(16).reshape(2, 8))


# Gate and up of an expert have the same inputs, and so the same order of them.
APART = {
    "fp8_block": ({"quant_method": "fp8"}, in_squares),
    "uint4_zero": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        lambda _, weight: in_groups(np.random.default_rng(0), weight),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("format", APART)
def test_experts_apart_in_a_file_are_held_side_by_side(format, tmp_path):
    settings, packed = APART[format]
    raw = {"model_type": "qwen3_moe", **SIZES, "moe_intermediate_size": 256, "num_experts": 4,
           "num_experts_per_tok": 2}  # fmt: skip
    model = models.init(jax.random.key(0), models.LlamaConfig.from_hf(raw))
    save_model(tmp_path / "m", model, model.params)

    def make(name, weight):
        found = packed(None, weight) if name.endswith("_proj.weight") else {}
        return {f"{name.removesuffix('.weight')}.{n}": x for n, x in found.items()}

    rewritten(tmp_path / "m", settings, make)
    floats, held = models.load(tmp_path / "m"), models.load(tmp_path / "m", quantize="file")
    experts = held.params["model"]["layers"]["mlp"]["experts"]
    assert experts["gate_up_proj"].format == format
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    same_logits(held, floats, np.arange(16).reshape(2, 8))
    tree = adapted(held, config_with(target_parameters=("gate_up_proj",)))
    save_requantized(tmp_path / "out", held, tree)
    # The halves are rounded each by itself, to 4 or 8 bits once more.
    back = models.load(tmp_path / "out").params["model"]["layers"]["mlp"]["experts"]
    want = lora.merge(tree)["model"]["layers"]["mlp"]["experts"]["gate_up_proj"]
    assert jnp.linalg.norm(back["gate_up_proj"] - want) < 0.1 * jnp.linalg.norm(want)
