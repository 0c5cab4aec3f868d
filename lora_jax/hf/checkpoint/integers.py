"""Weights `(code - zero) · scale` in four bits: GPTQ's, AWQ's and compressed-tensors'.

    gptq                X.qweight I32 (in/8, out), .qzeros I32 (groups, out/8), .scales, .g_idx
    awq                 X.qweight I32 (in, out/8), .qzeros I32 (groups, out/8), .scales
    compressed-tensors  X.weight_packed I32 (out, in/8), .weight_scale (out, groups),
                        .weight_zero_point I32 (out/8, groups), .weight_g_idx

Source: AutoGPTQ `qlinear_cuda_old.py`, AutoAWQ `linear/gemm.py`, compressed-tensors
`pack_quantized.py`.
"""

from collections.abc import Callable

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
from lora_jax.hf.checkpoint.weights import Part
from lora_jax.quant.array import QuantArray
from lora_jax.quant.formats import FormatName
from lora_jax.quant.scales import HeldName

# The column of each of an AWQ number's eight nibbles, turned round: the nibble of each column.
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
_LARGEST_BLOCK = 1024


def _nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """Eight numbers of four bits for each word, along an axis."""
    raw = words.view(np.uint32)
    parts = [(raw >> np.uint32(4 * j) & np.uint32(15)).astype(np.uint8) for j in range(8)]
    shape = list(words.shape)
    shape[axis] *= 8
    return np.stack(parts, axis=axis + 1).reshape(shape)


def _of_eight(part: slice) -> tuple[slice, slice]:
    """The words that have some of their numbers, and where these are in the numbers of all."""
    words = cut_groups(part, 8)
    return words, slice(part.start - 8 * words.start, part.stop - 8 * words.start)


def _block_of(size: int) -> int:
    """Inputs of a block: a group, or a part of a large one, so that devices can share it."""
    block = power(size, _LARGEST_BLOCK)
    return block if size > _LARGEST_BLOCK and 2 * block >= _LARGEST_BLOCK else size


def _zero_pairs(zeros: np.ndarray) -> np.ndarray:
    """The zero points of two blocks in a byte."""
    even = np.pad(zeros, [(0, len(zeros) % 2), (0, 0)])
    return even[::2] | even[1::2] << 4


def _order(file: File, name: str, inputs: int, size: int) -> np.ndarray | None:
    """The inputs in the order of their groups; None where they are in it."""
    if name not in file.plain.shapes:
        return None
    file.same(name, (inputs,), "I32")
    group = file.stored(name, np.int32, (inputs,), (slice(None),))
    count = inputs // size
    if group.min() < 0 or np.any(np.bincount(group, minlength=count) != size):
        raise file.error(name, f"does not name {count} groups of {size} inputs each")
    order = np.argsort(group, kind="stable")
    return None if np.array_equal(order, np.arange(inputs)) else order


def _four_bits(
    file: File, module: str, names: tuple[str, ...], shape: tuple[int, int], count: int,
    read: Callable[[Part, slice], tuple[np.ndarray, ...]], order_name: str, *,
    symmetric: bool = False,
) -> Tensor:  # fmt: skip
    """A weight `(code - zero) · scale`.

    Args:
      file, module, names, shape: of the weight.
      count: its groups of inputs.
      read: `(part, groups)` to codes `(in, out)`, scales and zero points `(groups, out)`.
      order_name: the tensor with the group of each input, which need not be there.
      symmetric: every zero point is 8, and none is read.
    """
    name, inputs = names[0], shape[1]
    if not count or inputs % count:
        raise file.error(name, f"has {inputs} inputs, which are no {count} groups of one size")
    size = inputs // count
    block, order = _block_of(size), _order(file, order_name, inputs, size)
    format: FormatName | HeldName = "int4" if symmetric else "uint4_zero"

    def make(part: Part) -> QuantArray:
        codes, *rest = read(part, cut_groups(part[1], size))
        scale, *zeros = (np.repeat(x, size // block, axis=0) for x in rest)
        return made(
            codes if order is None else codes[order],
            scale,
            *map(_zero_pairs, zeros),
            name=file.where(name),
            format=format,
            block=block,
            inputs=inputs,
            order=order,
        )

    used = (*names, order_name) if order_name in file.plain.shapes else names
    ordered = order is not None
    return tensor_of(used, module, shape, make, format, block, ordered=ordered)


def gptq(file: File) -> list[Tensor]:
    return [_gptq_weight(file, m) for m in modules_of(file, ".qweight")]


def _gptq_weight(file: File, module: str) -> Tensor:
    weight, zeros_, scales = names = tuple(f"{module}.{n}" for n in ("qweight", "qzeros", "scales"))
    words, outputs = file.shape(weight, "I32", count=2)
    count = file.shape(scales, *FLOATS, count=2)[0]
    file.same(scales, (count, outputs), *FLOATS)
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


def awq(file: File) -> list[Tensor]:
    return [_awq_weight(file, m) for m in modules_of(file, ".qweight")]


def _awq_weight(file: File, module: str) -> Tensor:
    weight, zeros_, scales = names = tuple(f"{module}.{n}" for n in ("qweight", "qzeros", "scales"))
    inputs, words = file.shape(weight, "I32", count=2)
    count = file.shape(scales, *FLOATS, count=2)[0]
    file.same(scales, (count, 8 * words), *FLOATS)
    file.same(zeros_, (count, words), "I32")

    def columns_of(name: str, rows: int, part: Part) -> np.ndarray:
        of, inside = _of_eight(part[1])
        raw = _nibbles(file.stored(name, np.int32, (rows, words), (part[0], of)), 1)
        each = raw.reshape(len(raw), -1, 8)[..., AWQ_NIBBLES]
        return each.reshape(len(raw), -1)[:, inside]

    def read(part: Part, groups: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = part
        scale = file.floats(scales, (count, 8 * words), (groups, rows))
        codes = columns_of(weight, inputs, (columns, rows))
        return codes, scale, columns_of(zeros_, count, (groups, rows))

    return _four_bits(file, module, names, (8 * words, inputs), count, read, f"{module}.g_idx")


def packed_weight(file: File, module: str) -> Tensor:
    """compressed-tensors' integers."""
    weight, scales = (f"{module}.{n}" for n in ("weight_packed", "weight_scale"))
    outputs, words = file.shape(weight, "I32", count=2)
    count = file.shape(scales, *FLOATS, count=2)[1]
    file.same(scales, (outputs, count), *FLOATS)
    zeros_, packed = f"{module}.weight_zero_point", -(-outputs // 8)
    names, symmetric = (weight, scales), zeros_ not in file.plain.shapes
    if not symmetric:
        file.same(zeros_, (packed, count), "I32")
        names = (*names, zeros_)

    def read(part: Part, groups: slice) -> tuple[np.ndarray, ...]:
        rows, columns = part
        of, inside = _of_eight(columns)
        codes = _nibbles(file.stored(weight, np.int32, (outputs, words), (rows, of)), 1)[:, inside]
        scale = file.floats(scales, (outputs, count), (rows, groups)).T
        if symmetric:
            return codes.T, scale
        of, inside = _of_eight(rows)
        raw = file.stored(zeros_, np.int32, (packed, count), (of, groups))
        return codes.T, scale, _nibbles(raw, 0)[inside].T

    if _bits_of(file) == 8:
        return _eights(file, module, names, count)
    order = f"{module}.weight_g_idx"
    shape = (outputs, 8 * words)
    return _four_bits(file, module, names, shape, count, read, order, symmetric=symmetric)


def _bits_of(file: File) -> int:
    """The bits of packed integers; a checkpoint has one kind of them."""
    groups = file.settings.get("config_groups")
    weights = [g.get("weights") or {} for g in groups.values()] if groups else []
    bits = {w.get("num_bits", 4) for w in weights} or {4}
    if not bits <= {4, 8} or len(bits) > 1:
        raise ValueError(
            f"{file.plain.source}: `config_groups` has {sorted(bits)} bits, of which one of 4 and "
            "8 can be read; load the unquantized model"
        )
    return bits.pop()


def _eights(file: File, module: str, names: tuple[str, ...], count: int) -> Tensor:
    """Integers of eight bits without zero points, four in a word."""
    weight, scales = names[:2]
    if len(names) > 2:
        raise file.error(names[2], "is there: of 8 bits only symmetric ones can be read")
    outputs, words = file.shape(weight, "I32", count=2)
    inputs = 4 * words
    if not count or inputs % count:
        raise file.error(weight, f"has {inputs} inputs, which are no {count} groups of one size")
    size = inputs // count
    block = _block_of(size)

    def make(part: Part) -> QuantArray:
        rows, columns = part
        codes = file.stored(weight, np.uint8, (outputs, inputs), (rows, columns))
        scale = file.floats(scales, (outputs, count), (rows, cut_groups(columns, size))).T
        scale = np.repeat(scale, size // block, axis=0)
        signed = (codes ^ 128).view(np.int8).T  # as they are stored, 128 stands for 0
        return made(
            signed, scale, name=file.where(weight), format="int8", block=block, inputs=inputs
        )

    return tensor_of(names, module, (outputs, inputs), make, "int8", block)
