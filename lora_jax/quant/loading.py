"""Quantizing a checkpoint while it is read: the model in floats is never in memory.

One tensor at a time is in floats, beside the leaves that are quantized already.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.quant import formats, ops
from lora_jax.quant.array import QuantArray, ScaleDtype, quantize_array
from lora_jax.quant.foreign import stack_weights

FILE = "file"

# Modules that bitsandbytes leaves in floats too: their errors go straight into the logits.
_HEADS = frozenset({"lm_head", "score", "classifier", "pooler"})


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model's weights are quantized while they are loaded.

    Attributes:
      format: "nf4", "fp4", "int4", "uint4" or "int8", of the kernels but for the output head's;
        or "file": weights that the file has in blocks stay in them (GGUF's Q4_0, Q4_1 and Q8_0,
        bitsandbytes' 4 bits), the others stay floats.
      block_size: inputs that share a scale.
      double_quant: quantize the scales too.
      scale_dtype: of the scales, "bfloat16" if None.
    """

    format: formats.FormatName | Literal["file"] = "nf4"
    block_size: int = 64
    double_quant: bool = False
    scale_dtype: ScaleDtype | None = None

    def __post_init__(self) -> None:
        if self.format != FILE:
            formats.known_format(self.format)


def quant_config(quantize: "str | QuantConfig | None") -> QuantConfig | None:
    """The argument of `models.load(quantize=)` as a `QuantConfig`."""
    if quantize is None or isinstance(quantize, QuantConfig):
        return quantize
    if quantize == "file":
        return QuantConfig(format="file")
    if quantize not in formats.FORMATS:
        known = ", ".join([*formats.FORMATS, FILE])
        raise ValueError(f"`quantize` must be one of {known}, or a QuantConfig, got {quantize!r}")
    return QuantConfig(format=formats.FORMATS[quantize].name)


# The name of a layer's tensor, and the order of its dims in the leaf; None leaves them.
Tensor = tuple[str, Sequence[int] | None]
# (path, leaf's shape and dtype, tensors of its layers) -> leaf or None
Hold = Callable[[str, jax.ShapeDtypeStruct, Sequence[Tensor]], QuantArray | None]


def holder(config: QuantConfig, weights: Any) -> Hold:
    """The function that makes a `QuantArray` of a leaf's tensors, or None to keep it in floats.

    Args:
      config: of the quantization.
      weights: the checkpoint, a `lora_jax.hf.checkpoint.weights.Weights`.
    """

    def hold(path: str, leaf: jax.ShapeDtypeStruct, tensors: Sequence[Tensor]) -> QuantArray | None:
        # A file's own blocks come already packed; nothing is rounded again.
        if config.format == FILE:
            parts = list(_own_blocks(weights, path, leaf, tensors))
        elif is_kernel(path, leaf):
            parts = [_quantized(config, weights, leaf, tensor) for tensor in tensors]
        else:
            return None
        if not parts:
            return None
        q = parts[0] if len(leaf.shape) == 2 else _stacked(parts, path, weights)
        return ops.reshape(q, leaf.shape) if q.shape != tuple(leaf.shape) else q

    return hold


def _quantized(
    config: QuantConfig, weights: Any, leaf: jax.ShapeDtypeStruct, tensor: Tensor
) -> QuantArray:
    assert config.format != FILE  # its blocks are read by `_own_blocks`
    name, axes = tensor
    w = weights.read(name)
    # Checkpoints store (out, in); a block must run along the inputs of one output.
    w = w if axes is None else w.transpose(axes)
    return quantize_array(
        jnp.asarray(w),
        format=config.format,
        block_size=config.block_size,
        double_quant=config.double_quant,
        scale_dtype=config.scale_dtype,
        name=name,
    ).astype(leaf.dtype)


def is_kernel(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf is the kernel of a layer, and not of a head."""
    *modules, last = path.split(".")
    return last == "kernel" and len(leaf.shape) > 1 and not _HEADS & set(modules)


def _own_blocks(
    weights: Any, path: str, leaf: jax.ShapeDtypeStruct, tensors: Sequence[Tensor]
) -> Iterator[QuantArray]:
    """A file's blocks of the layers of a leaf; none where they are floats."""
    if weights.blocks is None:
        raise ValueError(
            f'{weights.source}: `quantize="file"` keeps blocks that a file holds, and this one '
            f'holds floats; use "nf4" or another format'
        )
    found = [weights.blocks(name) for name, _ in tensors]
    whole = [q for q in found if q is not None]
    if not whole:
        return
    if len(whole) < len(found):
        lost = next(name for (name, _), q in zip(tensors, found, strict=True) if q is None)
        raise ValueError(
            f"{weights.source}: tensor `{lost}` is not quantized as the other layers of `{path}` "
            f'are: load with `scan=False`, or use a format such as "nf4"'
        )
    for (_, axes), q in zip(tensors, whole, strict=True):
        # Only relabels the dims, see `ops.transpose`.
        turned = q if axes is None else ops.transpose(q, axes)
        assert turned is not None  # a file's blocks are of matrices, whose roles stay in order
        yield turned.astype(leaf.dtype)


def _stacked(parts: Sequence[QuantArray], path: str, weights: Any) -> QuantArray:
    try:
        return stack_weights(parts)
    except ValueError as error:
        raise ValueError(
            f"{weights.source}: `{path}`: {error}; load with `scan=False`, or use a format "
            f'such as "nf4"'
        ) from None
