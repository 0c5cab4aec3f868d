"""FP8, MXFP4, GPTQ, AWQ and compressed-tensors: their own numbers, held as they are."""

import json
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.checkpoint.safetensors import load_file, open_directory
from lora_jax.models.saving import save_merged, save_model
from lora_jax.quant.array import is_quant

pytestmark = pytest.mark.once

OUT, IN = 256, 384


def words(codes, axis):
    """Eight codes in a word of 32 bits, the first in the lowest bits."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    packed = np.bitwise_or.reduce(eights << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def pairs(codes):
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def float8(rng, shape):
    raw = rng.integers(0, 256, shape).astype(np.uint8)
    raw[raw & 127 == 127] = 0
    return torch.from_numpy(raw).view(torch.float8_e4m3fn)


def as_float32(x):
    return x.to(torch.float32).numpy()


def fp8_squares(rng, shape=(OUT, IN)):
    weight = float8(rng, shape)
    grid = [-(-n // 128) for n in shape]
    scale = torch.from_numpy(rng.random(grid).astype(np.float32) / 1000)
    tensors = {"weight": weight, "weight_scale_inv": scale}
    if all(n % 128 == 0 for n in shape):
        want = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32).numpy()
    else:  # transformers has whole squares only
        wide = scale.numpy().repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
        want = as_float32(weight) * wide
    return {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors, want


def fp8_odd(rng):
    return fp8_squares(rng, (200, 320))


def fp8_tensor(rng):
    weight, scale = float8(rng, (OUT, IN)), torch.tensor(0.003)
    want = Fp8Dequantize(None)._dequantize_one(weight, scale.reshape(1, 1), torch.float32)
    tensors = {"weight": weight, "weight_scale_inv": scale, "activation_scale": torch.tensor(1.0)}
    return {"quant_method": "fp8", "activation_scheme": "static"}, tensors, want.numpy()


def fp8_channel(rng):
    weight = float8(rng, (OUT, IN))
    scale = torch.from_numpy(rng.random((OUT, 1)).astype(np.float32)).bfloat16()
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    want = as_float32(weight) * as_float32(scale)
    return settings, {"weight": weight, "weight_scale": scale}, want


def int8_channel(rng):
    weight = torch.from_numpy(rng.integers(-128, 128, (OUT, IN)).astype(np.int8))
    scale = torch.from_numpy(rng.random((OUT, 1)).astype(np.float32))
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return settings, {"weight": weight, "weight_scale": scale}, as_float32(weight) * scale.numpy()


def integers(rng, group, count=IN):
    """Codes and zero points (in, out), (groups, out), and halves as scales."""
    codes = rng.integers(0, 16, (count, OUT)).astype(np.uint8)
    zeros = rng.integers(1, 16, (count // group, OUT)).astype(np.uint8)
    return codes, zeros, (rng.random(zeros.shape) / 100).astype(np.float16)


def of_groups(codes, zeros, scale, group):
    """`(code - zero) * scale` of the group of each input, as every one of these formats has it."""
    z, s = zeros.astype(np.float32)[group], scale.astype(np.float32)[group]
    return ((codes.astype(np.float32) - z) * s).T


def gptq(rng, group=128, ordered=False, version="gptq"):
    """Source: AutoGPTQ's `qlinear_cuda_old.py`: zero points less one, in version 1."""
    codes, zeros, scale = integers(rng, group)
    index = np.arange(IN) // group
    index = rng.permutation(index) if ordered else index
    tensors = {
        "qweight": words(codes, 0),
        "qzeros": words((zeros - (version == "gptq")).astype(np.uint8), 1),
        "scales": scale,
        "g_idx": index.astype(np.int32),
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": ordered,
                "sym": False, "checkpoint_format": version}  # fmt: skip
    found = {name: torch.from_numpy(x) for name, x in tensors.items()}
    return settings, found, of_groups(codes, zeros, scale, index)


def gptq_ordered(rng):
    return gptq(rng, 64, ordered=True)


def gptq_whole(rng):
    return gptq(rng, IN, version="gptq_v2")


def awq(rng):
    """Source: AutoAWQ's `linear/gemm.py`: `order_map = [0, 2, 4, 6, 1, 3, 5, 7]`."""
    codes, zeros, scale = integers(rng, 64)

    def packed(x):
        return words(x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape), 1)

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scale}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    found = {name: torch.from_numpy(x) for name, x in tensors.items()}
    return settings, found, of_groups(codes, zeros, scale, np.arange(IN) // 64)


def packed_integers(rng, zero=True):
    """Source: compressed-tensors' `compressors/quantized_compressors/pack_quantized.py`."""
    codes, zeros, scale = integers(rng, 128)
    zeros = zeros if zero else np.full_like(zeros, 8)
    tensors = {
        "weight_packed": words(codes.T, 1),
        "weight_scale": np.ascontiguousarray(scale.T),
        "weight_shape": np.array([OUT, IN]),
    }
    if zero:
        tensors["weight_zero_point"] = words(zeros.T, 0)
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    found = {name: torch.from_numpy(x) for name, x in tensors.items()}
    return settings, found, of_groups(codes, zeros, scale, np.arange(IN) // 128)


def packed_symmetric(rng):
    return packed_integers(rng, zero=False)


VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nvfp4(rng):
    """Source: compressed-tensors' `nvfp4_quantized.py`: scales divided by the global one."""
    codes, scale = rng.integers(0, 16, (OUT, IN)), float8(rng, (OUT, IN // 16))
    whole = np.array([37.5], np.float32)
    tensors = {
        "weight_packed": torch.from_numpy(pairs(codes)),
        "weight_scale": scale,
        "weight_global_scale": torch.from_numpy(whole),
    }
    settings = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    want = VALUES[codes] * np.repeat(as_float32(scale) / whole, 16, axis=1)
    return settings, tensors, want


CASES = {
    f.__name__: f
    for f in (
        fp8_squares, fp8_odd, fp8_tensor, fp8_channel, int8_channel, gptq, gptq_ordered,
        gptq_whole, awq, packed_integers, packed_symmetric, nvfp4,
    )
}  # fmt: skip


def saved(directory, settings, tensors, config=None):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    text = json.dumps({**(config or {}), "quantization_config": settings})
    (directory / "config.json").write_text(text)
    return open_directory(directory)


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
    # A float for an output is 1 % of 384 inputs; three blocks, or 320 inputs, are filled up.
    more = {"fp8_odd": 1.2, "gptq": 1.05, "packed_integers": 1.05, "packed_symmetric": 1.05}
    assert q.nbytes <= more.get(case, 1.02) * bytes_


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


def tiny(directory, settings, make, width=128):
    """A small Llama whose projections are quantized; its float twin's tensors."""
    config = models.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    save_model(directory, model, model.params)
    tensors, rng = {}, np.random.default_rng(0)
    for name, weight in load_file(directory / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = torch.from_numpy(weight)
            continue
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{n}": x for n, x in make(rng, weight).items()}
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    return directory


def in_squares(rng, weight):
    """As DeepSeek's."""
    grid = [n // 128 for n in weight.shape]
    blocks = weight.reshape(grid[0], 128, grid[1], 128)
    scale = np.abs(blocks).max((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(weight.shape)
    weight = torch.from_numpy(codes.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    return {"weight": weight.view(torch.float8_e4m3fn), "weight_scale_inv": torch.from_numpy(scale)}


def in_groups(rng, weight):
    outputs, inputs = weight.shape
    blocks = weight.T.reshape(inputs // 32, 32, outputs)
    scale = (np.abs(blocks).max(1) / 7).astype(np.float16)
    codes = np.clip(np.round(blocks / scale[:, None]) + 8, 0, 15).reshape(inputs, outputs)
    index = rng.permutation(np.arange(inputs) // 32).astype(np.int32)
    found = {
        "qweight": words(codes, 0),
        "qzeros": words(np.full(scale.shape, 7), 1),
        "scales": scale,
        "g_idx": index,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in found.items()}


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


@pytest.mark.slow
def test_experts_apart_in_a_file_are_held_side_by_side(tmp_path):
    raw = {"model_type": "qwen3_moe", **SIZES, "moe_intermediate_size": 256, "num_experts": 4,
           "num_experts_per_tok": 2}  # fmt: skip
    model = models.init(jax.random.key(0), models.LlamaConfig.from_hf(raw))
    save_model(tmp_path / "m", model, model.params)

    def make(name, weight):
        found = in_squares(None, weight) if name.endswith("_proj.weight") else {}
        return {f"{name.removesuffix('.weight')}.{n}": x for n, x in found.items()}

    rewritten(tmp_path / "m", {"quant_method": "fp8"}, make)
    floats, held = models.load(tmp_path / "m"), models.load(tmp_path / "m", quantize="file")
    experts = held.params["model"]["layers"]["mlp"]["experts"]
    assert experts["gate_up_proj"].format == "fp8_block"
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    same_logits(held, floats, np.arange(16).reshape(2, 8))
