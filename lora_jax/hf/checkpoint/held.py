"""The tensors of a quantized checkpoint, and what the readers of its methods have in common."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora_jax.hf.checkpoint.weights import Blocks, Part, Weights, blocks_of
from lora_jax.quant.array import QuantArray
from lora_jax.quant.foreign import from_codes
from lora_jax.quant.formats import FormatName
from lora_jax.quant.scales import HeldName

FLOATS = ("F32", "BF16", "F16")
_SCALES = {
    "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


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

    def path(self, name: str) -> str:
        """The file of a tensor."""
        return os.path.join(self.plain.source, self.plain.where(name))

    def where(self, name: str) -> str:
        """A tensor's file and name, for messages."""
        return f"{self.path(name)}: {name}"

    def error(self, name: str, text: str) -> ValueError:
        return ValueError(f"{self.path(name)}: tensor `{name}` {text}")

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
    """

    name: str
    of: tuple[str, ...]
    shape: tuple[int, ...]
    blocks: Blocks
    make: Callable[[Part], QuantArray]


def tensor_of(
    names: tuple[str, ...], module: str, shape: tuple[int, int],
    make: Callable[[Part], QuantArray], format: FormatName | HeldName, block: int, *,
    ordered: bool = False,
) -> Tensor:  # fmt: skip
    """The weight of a linear layer, torch's (out, in), made of these tensors."""
    blocks = blocks_of(format, block, shape[1], ordered=ordered)
    return Tensor(f"{module}.weight", names, shape, blocks, make)


def modules_of(file: File, end: str) -> list[str]:
    """Modules that have a tensor of this name."""
    return [name.removesuffix(end) for name in file.plain.shapes if name.endswith(end)]


def made(
    codes: np.ndarray, scale: np.ndarray, *rest: Any, name: str, format: FormatName | HeldName,
    block: int, inputs: int, order: Any = None,
) -> QuantArray:  # fmt: skip
    """The blocks of a matrix, torch's (out, in), or of a part of it, which has `inputs` in all."""
    slab = blocks_of(format, block, inputs).slab_size
    return from_codes(
        codes, scale, *rest, format=format, block_size=block, slab=slab, roles="oi",
        shape=codes.shape[::-1], order=order, name=name,
    )  # fmt: skip


def cut_groups(part: slice, size: int) -> slice:
    """The groups of so many numbers that have a part of them."""
    return slice(part.start // size, -(-part.stop // size))


def power(size: int, most: int) -> int:
    """The largest power of two that divides a size."""
    return math.gcd(size, most)
