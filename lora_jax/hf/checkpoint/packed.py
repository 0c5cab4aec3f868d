"""The tensors of a quantized weight, as the methods of quantized checkpoints have them.

The inverse of `quantized`, `integers` and `bnb` beside this file: codes and scales are only put in
another order. A file's tensors keep their shapes and dtypes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from lora_jax.hf.checkpoint.integers import AWQ_NIBBLES
from lora_jax.hf.checkpoint.safetensors import Entry
from lora_jax.hf.checkpoint.shards import cast
from lora_jax.quant.array import QuantArray, form_of, matrix_sizes
from lora_jax.quant.foreign import codes_of, to_bitsandbytes

# The end of a tensor's name, behind the module's -> the tensor.
Tensors = dict[str, np.ndarray]


class Method(NamedTuple):
    """A way to write a weight.

    Attributes:
      formats: that it is for.
      pack: a matrix of roles "oi" to its tensors.
    """

    formats: tuple[str, ...]
    pack: Callable[[QuantArray], Tensors]


def words_of(codes: np.ndarray, axis: int, bits: int = 4) -> Int32[np.ndarray, "r c"]:
    """Codes that share a word of 32 bits, the first in the lowest; the last word is filled up."""
    count = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    each = codes.reshape(*codes.shape[:-1], -1, count)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    packed = np.bitwise_or.reduce(each << shifts, axis=-1)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def _groups(q: QuantArray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of the blocks, `(blocks, out)`, without padding."""
    count = matrix_sizes(q)[1] // q.block
    raw = np.asarray(q.bias)
    zeros = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1, raw.shape[1])
    return np.asarray(q.scale)[:count], zeros[:count]


def _in_input_order(q: QuantArray) -> np.ndarray:
    """The codes `(in, out)`, in the order of the weight's inputs."""
    codes = codes_of(q)
    return codes if q.order is None else codes[np.argsort(np.asarray(q.order))]


def _gptq(q: QuantArray, less: int = 1) -> Tensors:
    scale, zeros = _groups(q)
    return {
        ".qweight": words_of(_in_input_order(q), 0),
        ".qzeros": words_of((zeros - less) & 15, 1),
        ".scales": scale,
    }


def _gptq_v2(q: QuantArray) -> Tensors:
    return _gptq(q, less=0)


def _awq(q: QuantArray) -> Tensors:
    def packed(x: np.ndarray) -> np.ndarray:
        order = np.argsort(AWQ_NIBBLES)
        return words_of(x.reshape(len(x), -1, 8)[..., order].reshape(x.shape), 1)

    scale, zeros = _groups(q)
    return {".qweight": packed(codes_of(q)), ".qzeros": packed(zeros), ".scales": scale}


def _packed(q: QuantArray) -> Tensors:
    scale, zeros = _groups(q)
    return {
        ".weight_packed": words_of(_in_input_order(q).T, 1),
        ".weight_scale": scale.T,
        ".weight_zero_point": words_of(zeros.T, 0),
    }


def _signed(q: QuantArray) -> Tensors:
    """Plain codes and scales, for which compressed-tensors has the lowest code at 0."""
    bits = sum(form_of(q).packing.planes)
    count = matrix_sizes(q)[1] // q.block
    codes = _in_input_order(q).T.astype(np.int32) + (0 if bits == 4 else 128)
    shape = np.asarray(codes.shape, np.int64)
    scale = np.asarray(q.scale)[:count].T
    return {
        ".weight_packed": words_of(codes, 1, bits), ".weight_scale": scale, ".weight_shape": shape,
    }  # fmt: skip


def _eights(q: QuantArray, scale: str) -> Tensors:
    codes = np.asarray(q.packed)[: matrix_sizes(q)[1]].T
    return {".weight": codes, scale: np.asarray(q.scale).T}


def _scb(q: QuantArray) -> Tensors:
    eights = _eights(q, ".SCB")
    return {**eights, ".SCB": (eights[".SCB"] * np.float32(127)).reshape(-1)}


def _bnb(q: QuantArray) -> Tensors:
    return {f".weight{'.' * bool(n)}{n}": x for n, x in to_bitsandbytes(q).items()}


_EIGHTS = ("fp8_channel", "fp8_block", "int8_channel")
# By `quant_method`, in the order in which they are looked for.
PACKED: Mapping[str, tuple[Method, ...]] = {
    "bitsandbytes": (
        Method(("nf4", "fp4"), _bnb),
        Method(("int8_channel",), _scb),
    ),
    "fp8": (Method(_EIGHTS, lambda q: _eights(q, ".weight_scale_inv")),),
    "fbgemm_fp8": (Method(_EIGHTS, lambda q: _eights(q, ".weight_scale")),),
    "compressed-tensors": (
        Method(("uint4_zero",), _packed),
        Method(("int4", "int8"), _signed),
        Method(_EIGHTS, lambda q: _eights(q, ".weight_scale")),
    ),
    "gptq": (Method(("uint4_zero",), _gptq),),
    "gptq_v2": (Method(("uint4_zero",), _gptq_v2),),
    "awq": (Method(("uint4_zero",), _awq),),
}


def method_of(settings: Mapping[str, Any], q: QuantArray, name: str) -> Method:
    """How a weight is written, by the `quantization_config` of its checkpoint.

    Raises:
      ValueError: the method, or the format, is only read; or all experts of a block are one tensor.
    """
    kind = settings.get("quant_method", "bitsandbytes")
    kind = "gptq_v2" if settings.get("checkpoint_format") == "gptq_v2" else kind
    if matrix_sizes(q)[0]:
        raise ValueError(
            f"`{name}` of shape {q.shape} has all experts of a block, which no files of "
            f"`quant_method` `{kind}` hold in one tensor: merge without `requantize`"
        )
    for method in PACKED.get(str(kind), ()):
        if q.format in method.formats:
            return method
    raise ValueError(
        f"`{name}` of shape {q.shape} is held in {q.format} of `quant_method` `{kind}`, and such "
        f"weights are only read; merge without `requantize`, or over a base of {', '.join(PACKED)}"
    )


def fitted(array: np.ndarray, entry: Entry, name: str) -> np.ndarray:
    """A tensor in the shape and dtype that a file has for it.

    A file has one scale for each group of several blocks, or one for a whole weight.

    Raises:
      ValueError: it cannot be, or a number that is not finite there.
    """
    shape, dtype = entry.shape, entry.numpy
    if math.prod(shape) == 1:
        array = array.reshape(-1)[:1]
    codes = array.dtype.kind in "iu"
    for axis in range(min(array.ndim, len(shape))):
        each = array.shape[axis] // max(shape[axis], 1)
        # Bytes of codes may be typed as wider numbers.
        if each > 1 and not (codes and array.dtype.itemsize != dtype.itemsize):
            array = array[(slice(None),) * axis + (slice(None, None, each),)]
    array = np.ascontiguousarray(array)
    if codes and array.nbytes == math.prod(shape) * dtype.itemsize:
        return array.reshape(-1).view(dtype).reshape(shape)
    if array.size != math.prod(shape) or dtype.itemsize < 2:
        raise ValueError(
            f"tensor `{name}` is {entry.dtype} of shape {shape}, which is only read; merge without "
            "`requantize`"
        )
    return cast(array.reshape(shape), dtype, name)
