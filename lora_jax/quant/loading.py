"""Which leaves of a model are quantized while its checkpoint is read, and in which format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax

from lora_jax.config.arguments import with_known_fields
from lora_jax.quant import formats
from lora_jax.quant.array import QuantArray, default_roles
from lora_jax.quant.encode import quantize_array
from lora_jax.quant.scales import ScaleDtype

FILE = "file"

# Modules that bitsandbytes leaves in floats too: their errors go straight into the logits.
_HEADS = frozenset(
    {
        "lm_head", "score", "classifier", "pooler", "qa_outputs", "head", "cls", "pre_classifier",
        "vocab_transform",
    }
)  # fmt: skip
# Of DeBERTa's blocks, and of ViT's patches.
_CONVOLUTIONS = frozenset({"conv", "patch_embeddings"})


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model's weights are quantized while they are loaded.

    Attributes:
      format: "nf4", "int4", "fp8" or another of `formats.FORMATS`, of the kernels but for the
        output head's; or "file": weights that the file has in blocks stay in them (GGUF's,
        bitsandbytes' 4 bits, FP8, MXFP4, GPTQ, AWQ), the others stay floats.
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


class Tensor(Protocol):
    """A layer's tensors, one or several side by side."""

    @property
    def names(self) -> Sequence[str]:
        """Their names."""
        ...

    @property
    def axes(self) -> Sequence[int] | None:
        """The order of their dims in the leaf; None leaves them."""
        ...


def outline(
    config: QuantConfig,
    weights: Any,
    *,
    path: str,
    leaf: jax.ShapeDtypeStruct,
    tensors: Sequence[Tensor],
) -> QuantArray | None:
    """What a leaf is held as: a `QuantArray` without arrays, or None for floats.

    Args:
      config: of the quantization.
      weights: the checkpoint, a `lora_jax.hf.checkpoint.weights.Weights`.
      path: of the leaf.
      leaf: its shape and dtype.
      tensors: of its layers.

    Raises:
      ValueError: "file" for a file of floats, or for layers that are quantized differently.
    """
    roles = default_roles(len(leaf.shape))
    if config.format == FILE:
        form, roles = _own_format(weights, path, tensors, roles)
    else:
        form = (config.format, config.block_size, None) if is_kernel(path, leaf) else None
    if form is None:
        return None
    format, block, slab = form
    shape = tuple(leaf.shape)
    return QuantArray(
        None,
        None,
        format=format,
        block=block,
        slab=slab,
        shape=shape,
        roles=roles,
        dtype=leaf.dtype,
    )


def in_format(config: QuantConfig, w: jax.Array, name: str) -> QuantArray:
    """A tensor's numbers, `(..., in, out)`, in the format of the configuration."""
    assert config.format != FILE  # its blocks are in the file
    return quantize_array(
        w,
        format=config.format,
        block_size=config.block_size,
        double_quant=config.double_quant,
        scale_dtype=config.scale_dtype,
        name=name,
    )


def is_kernel(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf is the kernel of a layer or of experts, and not of a head.

    Kernels of convolutions stay floats, and those of one input: a filter for each channel.
    """
    *modules, last = path.split(".")
    of_experts = modules[-1:] == ["experts"] and not last.endswith("_bias")
    kernel = last == "kernel" or of_experts
    return kernel and leaf.shape[-2:-1] > (1,) and not (_HEADS | _CONVOLUTIONS) & set(modules)


def _own_format(
    weights: Any, path: str, tensors: Sequence[Tensor], roles: str
) -> tuple[tuple[Any, int, int | None] | None, str]:
    """The file's format, block size and slab of a leaf's layers, None for floats; roles."""
    if weights.formats is None:
        raise ValueError(
            f"`quantize` has no blocks to keep, as {weights.source} holds floats: name a format, "
            'quantize="nf4"'
        )
    found = {name: weights.formats.get(name) for part in tensors for name in part.names}
    first = next(iter(found.values()))
    if any(form != first for form in found.values()):
        name, form = next((n, form) for n, form in found.items() if form != first)
        kinds = [f"{f[0]} in blocks of {f[1]}" if f else "floats" for f in (form, first)]
        raise ValueError(
            f"{weights.source}: tensor `{name}` is {kinds[0]}, not {kinds[1]} as the first layer "
            f'of `{path}`: use a format such as "nf4"'
        )
    if first is None:
        return None, roles
    there, axes = first.roles, tensors[0].axes
    own = there if axes is None else "".join(there[a] for a in axes)
    return (first.format, first.block, first.slab), roles[: len(roles) - len(own)] + own
