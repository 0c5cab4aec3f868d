"""Quantized weights of a Hugging Face directory, as the `quantization_config` of config.json says.

    fp8                 X.weight F8_E4M3 (out, in), X.weight_scale_inv: one number, or one for each
                        128 × 128 numbers (DeepSeek, Qwen)
    fbgemm_fp8          X.weight, X.weight_scale (out, 1)
    mxfp4               X_blocks U8 (E, out, in/32, 16), X_scales U8 (E, out, in/32) (gpt-oss)
    gptq, awq           integers in four bits, see `integers` beside this file
    compressed-tensors  X.weight or .weight_packed, .weight_scale, .weight_zero_point and others

Each is held without loss in a format of `lora_jax.quant`; as floats, weights are computed in
float32 and rounded once, to the dtype that the model is loaded in.

Source: transformers 5, `integrations/finegrained_fp8.py`, `integrations/mxfp4.py`;
compressed-tensors `compressors/`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from lora_jax.hf.checkpoint.held import (
    FLOATS,
    File,
    Tensor,
    cut_groups,
    made,
    modules_of,
    power,
    tensor_of,
)
from lora_jax.hf.checkpoint.integers import awq, gptq, packed_weight
from lora_jax.hf.checkpoint.weights import Part, Weights, blocks_of
from lora_jax.quant.array import QuantArray, units
from lora_jax.quant.foreign import from_codes

# Of activations, and what the shapes of other tensors show.
_UNUSED = (
    ".input_scale", ".activation_scale", ".weight_shape", ".input_global_scale", ".k_scale",
    ".v_scale", ".q_scale", ".output_scale", ".input_zero_point",
)  # fmt: skip


def check_config(settings: Any) -> None:
    """Refuses a `quantization_config` of config.json whose weights cannot be read.

    Raises:
      ValueError: an unknown method, or a number of bits that is not read.
    """
    settings = settings if isinstance(settings, Mapping) else {}
    bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    # Older configs have no `quant_method`, only bitsandbytes' own flags.
    kind = settings.get("quant_method", "bitsandbytes" if bits else "unknown")
    known = ("bitsandbytes", *METHODS)
    if kind not in known:
        raise ValueError(
            f"config: the weights are quantized (`quantization_config`, method `{kind}`), which "
            f"cannot be read; load the unquantized model, or one of {', '.join(known)}"
        )
    count = settings.get("bits", settings.get("w_bit"))
    if kind in ("gptq", "awq") and count != 4:
        raise ValueError(
            f"config: `quantization_config` has {count} bits of method `{kind}`, of "
            "which 4 can be read; load a model in 4 bits, or the unquantized one"
        )
    if kind == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        raise ValueError(
            f"config: AWQ's version `{settings['version']}` cannot be read, only `gemm`; load the "
            "model in that, or the unquantized one"
        )


def is_known(settings: Any) -> bool:
    """Whether these are the settings of a method that is read here."""
    return isinstance(settings, Mapping) and settings.get("quant_method") in METHODS


def held(file: File) -> Weights:
    """The checkpoint under its plain names: dequantized when read, or in its own blocks.

    Raises:
      ValueError: tensors that do not fit together; the message names file and tensor.
    """
    found = {t.name: t for t in METHODS[file.settings["quant_method"]](file)}
    used = {name for t in found.values() for name in t.of}
    rest = {n: s for n, s in file.plain.shapes.items() if n not in used and not n.endswith(_UNUSED)}
    for name in rest:
        if file.dtypes[name] not in ("F64", *FLOATS, "I64", "I32", "BOOL"):
            raise file.error(name, f"is {file.dtypes[name]}, and no scales are beside it")

    def blocks(name: str, part: Part = ()) -> QuantArray:
        tensor = found[name]
        part = part or tuple(slice(0, n) for n in tensor.shape)
        inputs = tensor.blocks.roles.index("i")
        if tensor.blocks.ordered and part[inputs] != slice(0, tensor.shape[inputs]):
            raise file.error(
                tensor.of[0],
                "has its inputs in an order of their own (act-order), which devices cannot share: "
                'use a mesh that does not shard them, or a format such as "nf4"',
            )
        return tensor.make(part)

    def read(name: str, part: Part = ()) -> np.ndarray:
        if name not in found:
            return file.plain.read(name, part)
        return _numbers(found[name], part)

    return file.plain._replace(
        shapes=rest | {name: t.shape for name, t in found.items()},
        read=read,
        where=lambda name: file.plain.where(found[name].of[0] if name in found else name),
        formats={name: t.blocks for name, t in found.items()},
        blocks=blocks,
    )


def _numbers(tensor: Tensor, part: Part) -> np.ndarray:
    """A part of a weight in float32, cut out of whole superblocks."""
    form = tensor.blocks
    empty = QuantArray(None, None, format=form.format, block=form.block, slab=form.slab)
    unit = dict(zip("io", units(empty), strict=True), s=1)
    if tensor.blocks.ordered:
        unit["i"] = max(tensor.shape)
    wide, cut = [], []
    part = part or tuple(slice(0, n) for n in tensor.shape)
    for role, size, at in zip(tensor.blocks.roles, tensor.shape, part, strict=True):
        start = at.start // unit[role] * unit[role]
        wide.append(slice(start, min(-(-at.stop // unit[role]) * unit[role], size)))
        cut.append(slice(at.start - start, at.stop - start))
    return np.asarray(tensor.make(tuple(wide)).dequantize())[tuple(cut)]


def _fp8(file: File, scale_end: str) -> list[Tensor]:
    return [_scaled(file, m, m + scale_end) for m in modules_of(file, scale_end)]


def _scaled(file: File, module: str, scales: str) -> Tensor:
    """8 bits a number, FP8 or int8, with one scale, one an output or one a square of 128."""
    name = f"{module}.weight"
    outputs, inputs = file.shape(name, "F8_E4M3", "I8", count=2)
    shape = (outputs, inputs)
    have = file.shape(scales, *FLOATS, "F8_E8M0")
    grid = (-(-outputs // 128), -(-inputs // 128))
    float8, squares = file.dtypes[name] == "F8_E4M3", have == grid and have != (1, 1)
    if not squares and math.prod(have) not in (1, outputs) or squares and not float8:
        raise file.error(
            scales, f"has shape {have}, expected one number, {outputs} or {grid} for {shape}"
        )
    block = 128 if squares else power(inputs, 128)
    format = ("fp8_block" if squares else "fp8_channel") if float8 else "int8_channel"

    def make(part: Part) -> QuantArray:
        rows, columns = part
        codes = file.stored(name, np.uint8 if float8 else np.int8, shape, part)
        if float8 and np.any(codes & 127 == 127):
            raise file.error(name, "holds NaN; download it again")
        if squares:
            scale = file.floats(scales, have, (cut_groups(rows, 128), cut_groups(columns, 128))).T
        else:
            every = file.floats(scales, (math.prod(have),), (slice(None),))
            scale = np.broadcast_to(every, (outputs,))[None, rows]
        return made(
            codes.T, scale, name=file.where(name), format=format, block=block, inputs=inputs
        )

    return tensor_of((name, scales), module, shape, make, format, block)


def _pairs(raw: np.ndarray) -> np.ndarray:
    """Two codes of each byte along the last dim, the low four bits first."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def _float4_weight(file: File, module: str, weight: str, scales: str) -> Tensor:
    """NVFP4 (16 inputs a scale, of 8 bits, and one of the whole) or MXFP4 (32, powers of two)."""
    outputs, half = file.shape(weight, "U8", count=2)
    names, whole = (weight, scales), f"{module}.weight_global_scale"
    nv = whole in file.plain.shapes
    block, format = (16, "nvfp4") if nv else (32, "mxfp4")
    have = (outputs, 2 * half // block)
    file.same(scales, have, *(("F8_E4M3",) if nv else ("U8", "F8_E8M0")))
    if nv:
        names = (*names, whole)
        if math.prod(file.shape(whole, "F32")) != 1:
            raise file.error(whole, f"has shape {file.plain.shapes[whole]}, expected one number")

    def make(part: Part) -> QuantArray:
        rows, columns = part
        half_ = slice(columns.start // 2, columns.stop // 2)
        codes = _pairs(file.stored(weight, np.uint8, (outputs, half), (rows, half_))).T
        scale = file.stored(scales, np.uint8, have, (rows, cut_groups(columns, block))).T
        if np.any((scale & 127 == 127) if nv else scale == 255):
            raise file.error(scales, "holds NaN; download it again")
        rest = ()
        if nv:
            outer = file.stored(whole, np.float32, (1,), (slice(None),))
            rest = (None, np.repeat(outer[None], codes.shape[1], axis=1))
        return made(
            codes,
            scale,
            *rest,
            name=file.where(weight),
            format=format,
            block=block,
            inputs=2 * half,
        )

    return tensor_of(names, module, (outputs, 2 * half), make, format, block)


def _packed(file: File, module: str) -> Tensor:
    """Integers in words, or 4-bit floats in bytes."""
    weight = f"{module}.weight_packed"
    file.shape(weight, "I32", "U8", count=2)
    if file.dtypes[weight] == "I32":
        return packed_weight(file, module)
    return _float4_weight(file, module, weight, f"{module}.weight_scale")


def _compressed(file: File) -> list[Tensor]:
    packed = [_packed(file, m) for m in modules_of(file, ".weight_packed")]
    done = {t.name for t in packed}
    eight = [m for m in modules_of(file, ".weight_scale") if f"{m}.weight" not in done]
    return [*packed, *(_scaled(file, m, f"{m}.weight_scale") for m in eight)]


def _mxfp4(file: File) -> list[Tensor]:
    return [_experts(file, name) for name in modules_of(file, "_blocks")]


def _experts(file: File, name: str) -> Tensor:
    """All experts of a block, (E, in, out) here and (E, out, in) in the file."""
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    experts, outputs, count, size = whole = file.shape(blocks, "U8", count=4)
    file.same(blocks, (experts, outputs, count, 16), "U8")
    file.same(scales, whole[:3], "U8")

    def make(part: Part) -> QuantArray:
        each, inputs, rows = part
        there = (each, rows, cut_groups(inputs, 2 * size))
        raw = _pairs(file.stored(blocks, np.uint8, whole, there))
        codes = raw.reshape(*raw.shape[:2], -1).swapaxes(1, 2)
        scale = file.stored(scales, np.uint8, whole[:3], there).swapaxes(1, 2)
        if np.any(scale == 255):
            raise file.error(scales, "holds NaN; download it again")
        return from_codes(
            codes,
            scale,
            format="mxfp4",
            block_size=32,
            slab=form.slab_size,
            name=file.where(blocks),
        )

    shape = (experts, 2 * size * count, outputs)
    form = blocks_of("mxfp4", 32, shape[1], roles="sio")
    return Tensor(name, (blocks, scales), shape, form, make)


# `quant_method` -> the weights of a file.
METHODS: Mapping[str, Callable[[File], list[Tensor]]] = {
    "fp8": partial(_fp8, scale_end=".weight_scale_inv"),
    "fbgemm_fp8": partial(_fp8, scale_end=".weight_scale"),
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
    "gptq": gptq,
    "awq": awq,
}
