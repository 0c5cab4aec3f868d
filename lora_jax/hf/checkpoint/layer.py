"""The tensors of one layer of a leaf, and how a part of the layer is read from them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lora_jax.hf.checkpoint.weights import Part, Weights, shape_there
from lora_jax.quant import ops
from lora_jax.quant.array import QuantArray
from lora_jax.quant.foreign import beside


class LayerTensor(NamedTuple):
    """A tensor of a leaf: its name there, and the order of its dims in the leaf."""

    name: str
    axes: tuple[int, ...] | None

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the tensors."""
        return (self.name,)

    def wanted(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape in the checkpoint, of a leaf's layer of this shape."""
        return [(self.name, shape_there(shape, self.axes))]

    def read(self, weights: Weights, part: Part) -> np.ndarray:
        """A part of the leaf's layer, with a slice of each of its dims; () is all of it."""
        found = weights.read(self.name, shape_there(part, self.axes if part else None))
        return found if self.axes is None else found.transpose(self.axes)

    def blocks(self, weights: Weights, part: Part) -> QuantArray:
        """As `read`, in the file's blocks."""
        assert weights.blocks is not None  # `outline` has looked the format up
        q = weights.blocks(self.name, shape_there(part, self.axes if part else None))
        turned = q if self.axes is None else ops.transpose(q, self.axes)
        assert turned is not None  # a matrix of one stack, whose roles stay in order
        return turned


class Beside(NamedTuple):
    """Tensors side by side along the last dim of a leaf's layer, all of one size."""

    parts: tuple[LayerTensor, ...]
    size: int

    @property
    def name(self) -> str:
        """What messages call them."""
        return " and ".join(part.name for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """As `LayerTensor.names`."""
        return tuple(part.name for part in self.parts)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The order of the dims of each."""
        return self.parts[0].axes

    def wanted(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """As `LayerTensor.wanted`, of each."""
        each = (*shape[:-1], self.size)
        return [found for part in self.parts for found in part.wanted(each)]

    def read(self, weights: Weights, part: Part) -> np.ndarray:
        """As `LayerTensor.read`."""
        return np.concatenate([t.read(weights, cut) for t, cut in self._cuts(part)], axis=-1)

    def blocks(self, weights: Weights, part: Part) -> QuantArray:
        """As `LayerTensor.blocks`."""
        return beside([t.blocks(weights, cut) for t, cut in self._cuts(part)], self.name)

    def _cuts(self, part: Part) -> Iterator[tuple[LayerTensor, Part]]:
        """The tensors that a part takes from, and what it takes of each."""
        *rest, last = part or (slice(0, len(self.parts) * self.size),)
        for number, tensor in enumerate(self.parts):
            low, high = (
                min(max(end - number * self.size, 0), self.size) for end in (last.start, last.stop)
            )
            if low < high:
                yield tensor, (*rest, slice(low, high)) if part else ()
