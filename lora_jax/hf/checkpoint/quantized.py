"""Quantized weights of a Hugging Face directory, as the `quantization_config` of config.json says.

    fp8                 X.weight F8_E4M3 (out, in), X.weight_scale_inv: one number, or one for each
                        128 × 128 numbers (DeepSeek, Qwen)
    fbgemm_fp8          X.weight, X.weight_scale (out, 1)
    mxfp4               X_blocks U8 (E, out, in/32, 16), X_scales U8 (E, out, in/32) (gpt-oss)
    gptq                X.qweight I32 (in/8, out), .qzeros I32 (groups, out/8), .scales, .g_idx
    awq                 X.qweight I32 (in, out/8), .qzeros I32 (groups, out/8), .scales
    compressed-tensors  X.weight or .weight_packed, .weight_scale, .weight_zero_point and others

Each is held without loss in a format of `lora_jax.quant`; as floats, weights are computed in
float32 and rounded once, to the dtype that the model is loaded in.

Source: transformers 5, `integrations/finegrained_fp8.py`, `integrations/mxfp4.py`; AutoGPTQ
`qlinear_cuda_old.py`, AutoAWQ `linear/gemm.py`, compressed-tensors `compressors/`.
"""

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora_jax.hf.checkpoint import bnb
from lora_jax.hf.checkpoint.weights import Blocks, Part, Weights
from lora_jax.quant.array import QuantArray, units
from lora_jax.quant.foreign import from_codes
from lora_jax.quant.scales import HeldName

_FLOATS = ("F32", "BF16", "F16")
_SCALES = {
    "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
# Of activations, and what the shapes of other tensors show.
_UNUSED = (
    ".input_scale", ".activation_scale", ".weight_shape", ".input_global_scale", ".k_scale",
    ".v_scale", ".q_scale", ".output_scale", ".input_zero_point",
)  # fmt: skip
# The column of each of an AWQ number's eight nibbles, turned round: the nibble of each column.
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
_LARGEST_BLOCK = 1024


class File(NamedTuple):
    """The tensors on disk.

    Attributes:
      plain: names, shapes and a way to read those that are floats.
      dtypes: safetensors' dtype of each.
      stored: (name, dtype, shape, part) -> a part of one, its bytes read as that dtype.
      settings: the `quantization_config`.
    """

    plain: Weights
    dtypes: Mapping[str, str]
    stored: Callable[..., np.ndarray]
    settings: Mapping[str, Any]

    def shape(self, name: str, *dtypes: str, count: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor that must be there.

        Raises:
          ValueError: it is not, or it has another dtype or number of dims.
        """
        found = self.plain.shapes.get(name)
        if found is None:
            raise ValueError(f"{self.plain.source}: tensor `{name}` is missing")
        if self.dtypes[name] not in dtypes or (count is not None and len(found) != count):
            what = f"{' or '.join(dtypes)}" + (f" of {count} dims" if count is not None else "")
            raise self.error(name, f"is {self.dtypes[name]} of shape {found}, expected {what}")
        return found

    def same(self, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Refuses a tensor of another shape or dtype."""
        if (found := self.shape(name, *dtypes)) != shape:
            raise self.error(name, f"has shape {found}, expected {shape}")

    def error(self, name: str, text: str) -> ValueError:
        where = os.path.join(self.plain.source, self.plain.where(name))
        return ValueError(f"{where}: tensor `{name}` {text}")

    def floats(self, name: str, shape: tuple[int, ...], part: Part) -> np.ndarray:
        """A part of a tensor of scales, as it is or, of powers of two, in float32."""
        found = self.stored(name, _SCALES[self.dtypes[name]], shape, part)
        return found.astype(np.float32) if self.dtypes[name] == "F8_E8M0" else found


class Tensor(NamedTuple):
    """A weight that is held in blocks.

    Attributes:
      name: under which the model knows it.
      of: the tensors that it is made of; the first says in which file it is.
      shape: its own.
      blocks: format, block size and roles.
      make: a part, with a slice of each dim, to blocks.
      whole: its inputs cannot be cut.
    """

    name: str
    of: tuple[str, ...]
    shape: tuple[int, ...]
    blocks: Blocks
    make: Callable[[Part], QuantArray]
    whole: bool = False


def check_config(settings: Any) -> None:
    """Refuses a `quantization_config` of config.json whose weights cannot be read.

    Raises:
      ValueError: an unknown method, or a number of bits that is not read.
    """
    kind = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if kind not in METHODS:
        bnb.check_config(settings, also=METHODS)
    elif kind in ("gptq", "awq") and settings.get("bits", settings.get("w_bit")) != 4:
        raise ValueError(
            f"config: `quantization_config` has {settings.get('bits')} bits of method `{kind}`, of "
            "which 4 can be read; load a model in 4 bits, or the unquantized one"
        )
    elif kind == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
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
        if file.dtypes[name] not in ("F64", *_FLOATS, "I64", "I32", "BOOL"):
            raise file.error(name, f"is {file.dtypes[name]}, and no scales are beside it")

    def blocks(name: str, part: Part = ()) -> QuantArray:
        tensor = found[name]
        part = part or tuple(slice(0, n) for n in tensor.shape)
        inputs = tensor.blocks.roles.index("i")
        if tensor.whole and part[inputs] != slice(0, tensor.shape[inputs]):
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
    empty = QuantArray(None, None, format=tensor.blocks.format, block=tensor.blocks.block)
    unit = dict(zip("io", units(empty), strict=True), s=1)
    if tensor.whole:
        unit["i"] = max(tensor.shape)
    wide, cut = [], []
    part = part or tuple(slice(0, n) for n in tensor.shape)
    for role, size, at in zip(tensor.blocks.roles, tensor.shape, part, strict=True):
        start = at.start // unit[role] * unit[role]
        wide.append(slice(start, min(-(-at.stop // unit[role]) * unit[role], size)))
        cut.append(slice(at.start - start, at.stop - start))
    return np.asarray(tensor.make(tuple(wide)).dequantize())[tuple(cut)]


def _tensor(
    file: File, names: tuple[str, ...], module: str, shape: tuple[int, int],
    make: Callable[[Part], QuantArray], format: HeldName, block: int, *, whole: bool = False,
) -> Tensor:  # fmt: skip
    name = f"{module}.weight"
    return Tensor(name, names, shape, Blocks(format, block), make, whole)


def _modules(file: File, end: str) -> list[str]:
    """Modules that have a tensor of this name."""
    return [name.removesuffix(end) for name in file.plain.shapes if name.endswith(end)]


def _fp8(file: File, scale_end: str) -> list[Tensor]:
    return [_scaled(file, m, m + scale_end) for m in _modules(file, scale_end)]


def _scaled(file: File, module: str, scales: str) -> Tensor:
    """8 bits a number, FP8 or int8, with one scale, one an output or one a square of 128."""
    name = f"{module}.weight"
    outputs, inputs = file.shape(name, "F8_E4M3", "I8", count=2)
    shape = (outputs, inputs)
    have = file.shape(scales, *_FLOATS, "F8_E8M0")
    grid = (-(-outputs // 128), -(-inputs // 128))
    float8, squares = file.dtypes[name] == "F8_E4M3", have == grid and have != (1, 1)
    if not squares and math.prod(have) not in (1, outputs) or squares and not float8:
        raise file.error(
            scales, f"has shape {have}, expected one number, {outputs} or {grid} for {shape}"
        )
    block = 128 if squares else _power(inputs, 128)
    format = ("fp8_block" if squares else "fp8_channel") if float8 else "int8_channel"

    def make(part: Part) -> QuantArray:
        rows, columns = part
        codes = file.stored(name, np.uint8 if float8 else np.int8, shape, part)
        if float8 and np.any(codes & 127 == 127):
            raise file.error(name, "holds NaN; download it again")
        if squares:
            scale = file.floats(scales, have, (_groups(rows, 128), _groups(columns, 128))).T
        else:
            every = file.floats(scales, (math.prod(have),), (slice(None),))
            scale = np.broadcast_to(every, (outputs,))[None, rows]
        return _made(codes.T, scale, name=name, format=format, block=block)

    return _tensor(file, (name, scales), module, shape, make, format, block)


def _made(
    codes: np.ndarray, scale: np.ndarray, *rest: Any, name: str, format: HeldName, block: int,
    order: Any = None,
) -> QuantArray:  # fmt: skip
    """The blocks of a matrix, torch's (out, in)."""
    return from_codes(
        codes, scale, *rest, format=format, block_size=block, roles="oi", shape=codes.shape[::-1],
        order=order, name=name,
    )  # fmt: skip


def _groups(part: slice, size: int) -> slice:
    """The groups of so many numbers that have a part of them."""
    return slice(part.start // size, -(-part.stop // size))


def _power(size: int, most: int) -> int:
    """The largest power of two that divides a size."""
    return math.gcd(size, most)


def _nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """Eight numbers of four bits for each word, along an axis."""
    raw = words.view(np.uint32)
    parts = [(raw >> np.uint32(4 * j) & np.uint32(15)).astype(np.uint8) for j in range(8)]
    shape = list(words.shape)
    shape[axis] *= 8
    return np.stack(parts, axis=axis + 1).reshape(shape)


def _of_eight(part: slice) -> tuple[slice, slice]:
    """The words that have some of their numbers, and where these are in the numbers of all."""
    words = _groups(part, 8)
    return words, slice(part.start - 8 * words.start, part.stop - 8 * words.start)


class _Groups(NamedTuple):
    """Groups of inputs that share a scale and a zero point, and the blocks that they become."""

    size: int
    block: int

    def repeat(self, x: np.ndarray) -> np.ndarray:
        """A row for each block."""
        return np.repeat(x, self.size // self.block, axis=0)


def _groups_of(inputs: int, count: int) -> _Groups:
    """Two blocks share bytes: blocks that are not in pairs would be filled up."""
    size = inputs // count
    block = size if size <= _LARGEST_BLOCK else _power(size, _LARGEST_BLOCK)
    while (inputs // block) % 2 and block % 2 == 0:
        block //= 2
    return _Groups(size, block)


def _zero_pairs(zeros: np.ndarray) -> np.ndarray:
    """The zero points of two blocks in a byte."""
    even = np.pad(zeros, [(0, len(zeros) % 2), (0, 0)])
    return even[::2] | even[1::2] << 4


def _order(file: File, name: str, inputs: int, groups: _Groups) -> np.ndarray | None:
    """The inputs in the order of their groups; None where they are in it."""
    if name not in file.plain.shapes:
        return None
    file.same(name, (inputs,), "I32")
    group = file.stored(name, np.int32, (inputs,), (slice(None),))
    count = inputs // groups.size
    if group.min() < 0 or np.any(np.bincount(group, minlength=count) != groups.size):
        raise file.error(name, f"does not name {count} groups of {groups.size} inputs each")
    order = np.argsort(group, kind="stable")
    return None if np.array_equal(order, np.arange(inputs)) else order


def _four_bits(
    file: File, module: str, names: tuple[str, ...], shape: tuple[int, int], count: int,
    read: Callable[[Part, slice], tuple[np.ndarray, np.ndarray, np.ndarray]], order_name: str,
) -> Tensor:  # fmt: skip
    """A weight `(code - zero) · scale`.

    Args:
      file, module, names, shape: of the weight.
      count: its groups of inputs.
      read: `(part, groups)` to codes `(in, out)`, scales and zero points `(groups, out)`.
      order_name: the tensor with the group of each input, which need not be there.
    """
    name, inputs = names[0], shape[1]
    if not count or inputs % count:
        raise file.error(name, f"has {inputs} inputs, which are no {count} groups of one size")
    groups = _groups_of(inputs, count)
    order = _order(file, order_name, inputs, groups)

    def make(part: Part) -> QuantArray:
        codes, scale, zeros = read(part, _groups(part[1], groups.size))
        return _made(
            codes if order is None else codes[order],
            groups.repeat(scale),
            _zero_pairs(groups.repeat(zeros)),
            name=name,
            format="uint4_zero",
            block=groups.block,
            order=order,
        )

    used = (*names, order_name) if order_name in file.plain.shapes else names
    return _tensor(
        file, used, module, shape, make, "uint4_zero", groups.block, whole=order is not None
    )


def _gptq(file: File) -> list[Tensor]:
    return [_gptq_weight(file, m) for m in _modules(file, ".qweight")]


def _gptq_weight(file: File, module: str) -> Tensor:
    weight, zeros_, scales = names = tuple(f"{module}.{n}" for n in ("qweight", "qzeros", "scales"))
    words, outputs = file.shape(weight, "I32", count=2)
    count = file.shape(scales, *_FLOATS, count=2)[0]
    file.same(scales, (count, outputs), *_FLOATS)
    file.same(zeros_, (count, -(-outputs // 8)), "I32")
    # Version 1 of the files has zero points less one.
    less = 0 if file.settings.get("checkpoint_format") == "gptq_v2" else 1

    def read(part: Part, groups: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = part
        of, inside = _of_eight(columns)
        codes = _nibbles(file.stored(weight, np.int32, (words, outputs), (of, rows)), 0)[inside]
        scale = file.floats(scales, (count, outputs), (groups, rows))
        of, inside = _of_eight(rows)
        raw = file.stored(zeros_, np.int32, (count, -(-outputs // 8)), (groups, of))
        return codes, scale, (_nibbles(raw, 1)[:, inside] + less) & 15

    shape = (outputs, 8 * words)
    return _four_bits(file, module, names, shape, count, read, f"{module}.g_idx")


def _awq(file: File) -> list[Tensor]:
    return [_awq_weight(file, m) for m in _modules(file, ".qweight")]


def _awq_weight(file: File, module: str) -> Tensor:
    weight, zeros_, scales = names = tuple(f"{module}.{n}" for n in ("qweight", "qzeros", "scales"))
    inputs, words = file.shape(weight, "I32", count=2)
    count = file.shape(scales, *_FLOATS, count=2)[0]
    file.same(scales, (count, 8 * words), *_FLOATS)
    file.same(zeros_, (count, words), "I32")

    def columns_of(name: str, rows: int, part: Part) -> np.ndarray:
        of, inside = _of_eight(part[1])
        raw = _nibbles(file.stored(name, np.int32, (rows, words), (part[0], of)), 1)
        each = raw.reshape(len(raw), -1, 8)[..., _AWQ_NIBBLES]
        return each.reshape(len(raw), -1)[:, inside]

    def read(part: Part, groups: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = part
        scale = file.floats(scales, (count, 8 * words), (groups, rows))
        codes = columns_of(weight, inputs, (columns, rows))
        return codes, scale, columns_of(zeros_, count, (groups, rows))

    return _four_bits(file, module, names, (8 * words, inputs), count, read, f"{module}.g_idx")


def _packed_weight(file: File, module: str) -> Tensor:
    """compressed-tensors' four bits, of integers in words or of 4-bit floats in bytes."""
    weight, scales = (f"{module}.{n}" for n in ("weight_packed", "weight_scale"))
    if file.shape(weight, "I32", "U8", count=2) and file.dtypes[weight] == "U8":
        return _float4_weight(file, module, weight, scales)
    outputs, words = file.shape(weight, "I32", count=2)
    count = file.shape(scales, *_FLOATS, count=2)[1]
    file.same(scales, (outputs, count), *_FLOATS)
    zeros_, packed = f"{module}.weight_zero_point", -(-outputs // 8)
    names = (weight, scales)
    if zeros_ in file.plain.shapes:
        file.same(zeros_, (packed, count), "I32")
        names = (*names, zeros_)

    def read(part: Part, groups: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = part
        of, inside = _of_eight(columns)
        codes = _nibbles(file.stored(weight, np.int32, (outputs, words), (rows, of)), 1)[:, inside]
        scale = file.floats(scales, (outputs, count), (rows, groups)).T
        zeros = np.full(scale.shape, 8, np.uint8)
        if len(names) == 3:
            of, inside = _of_eight(rows)
            raw = file.stored(zeros_, np.int32, (packed, count), (of, groups))
            zeros = _nibbles(raw, 0)[inside].T
        return codes.T, scale, zeros

    order = f"{module}.weight_g_idx"
    return _four_bits(file, module, names, (outputs, 8 * words), count, read, order)


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
        scale = file.stored(scales, np.uint8, have, (rows, _groups(columns, block))).T
        if np.any((scale & 127 == 127) if nv else scale == 255):
            raise file.error(scales, "holds NaN; download it again")
        rest = ()
        if nv:
            outer = file.stored(whole, np.float32, (1,), (slice(None),))
            rest = (None, np.repeat(outer[None], codes.shape[1], axis=1))
        return _made(codes, scale, *rest, name=weight, format=format, block=block)

    return _tensor(file, names, module, (outputs, 2 * half), make, format, block)


def _compressed(file: File) -> list[Tensor]:
    packed = [_packed_weight(file, m) for m in _modules(file, ".weight_packed")]
    done = {t.name for t in packed}
    eight = [m for m in _modules(file, ".weight_scale") if f"{m}.weight" not in done]
    return [*packed, *(_scaled(file, m, f"{m}.weight_scale") for m in eight)]


def _mxfp4(file: File) -> list[Tensor]:
    return [_experts(file, name) for name in _modules(file, "_blocks")]


def _experts(file: File, name: str) -> Tensor:
    """All experts of a block, (E, in, out) here and (E, out, in) in the file."""
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    experts, outputs, count, size = whole = file.shape(blocks, "U8", count=4)
    file.same(blocks, (experts, outputs, count, 16), "U8")
    file.same(scales, whole[:3], "U8")

    def make(part: Part) -> QuantArray:
        each, inputs, rows = part
        there = (each, rows, _groups(inputs, 2 * size))
        raw = _pairs(file.stored(blocks, np.uint8, whole, there))
        codes = raw.reshape(*raw.shape[:2], -1).swapaxes(1, 2)
        scale = file.stored(scales, np.uint8, whole[:3], there).swapaxes(1, 2)
        if np.any(scale == 255):
            raise file.error(scales, "holds NaN; download it again")
        return from_codes(codes, scale, format="mxfp4", block_size=32, name=blocks)

    shape = (experts, 2 * size * count, outputs)
    return Tensor(name, (blocks, scales), shape, Blocks("mxfp4", 32, "sio"), make)


# `quant_method` -> the weights of a file.
METHODS: Mapping[str, Callable[[File], list[Tensor]]] = {
    "fp8": partial(_fp8, scale_end=".weight_scale_inv"),
    "fbgemm_fp8": partial(_fp8, scale_end=".weight_scale"),
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}
