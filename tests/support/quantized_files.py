"""Weights and small models of quantized checkpoints, as the methods' own libraries write them."""

import json

import jax
import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from lora_jax import models
from lora_jax.hf.checkpoint.safetensors import load_file, open_directory
from lora_jax.models.saving import save_model

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


def gptq(rng, group=128, ordered=False, version="gptq", count=IN):
    """Source: AutoGPTQ's `qlinear_cuda_old.py`: zero points less one, in version 1."""
    codes, zeros, scale = integers(rng, group, count)
    index = np.arange(count) // group
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


def gptq_large(rng):
    """Groups that are cut into blocks."""
    return gptq(rng, 2048, count=4096)


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
        gptq_whole, gptq_large, awq, packed_integers, packed_symmetric, nvfp4,
    )
}  # fmt: skip


def saved(directory, settings, tensors, config=None):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    text = json.dumps({**(config or {}), "quantization_config": settings})
    (directory / "config.json").write_text(text)
    return open_directory(directory)


def tiny(directory, settings, make, width=128):
    """A small Llama whose projections are quantized; its float twin's tensors."""
    config = models.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    save_model(directory, model, model.params)
    return in_blocks(directory, settings, make)


def in_blocks(directory, settings, make):
    """A saved model with its projections quantized."""
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


def in_columns(rng, weight):
    """As AWQ's."""
    found = {name: x.numpy() for name, x in in_groups(rng, weight).items()}

    def turned(words_):
        parts = np.stack([words_.view(np.uint32) >> (4 * j) & 15 for j in range(8)], -1)
        return parts.astype(np.uint8)

    codes = turned(found["qweight"]).swapaxes(1, 2).reshape(-1, weight.shape[0])
    zeros = turned(found["qzeros"]).reshape(len(found["scales"]), -1) + 1

    def packed(x):
        return words(x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape), 1)

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": found["scales"]}
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}


# `quantization_config` and what makes the tensors of a projection.
METHODS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, in_squares),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, in_groups),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, in_columns),
}
