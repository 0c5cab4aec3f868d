"""A checkpoint as names, shapes and a way to read a part of a tensor."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax import processes
from lora_jax.paths import nearest
from lora_jax.quant.array import QuantArray, known
from lora_jax.quant.formats import FormatName, slab_of
from lora_jax.quant.scales import HeldName

T = TypeVar("T")
_SHOWN = 3
# A part of a tensor: a slice of each dim, with its ends; () is all of it.
Part = tuple[slice, ...]


class Blocks(NamedTuple):
    """How a tensor is quantized in its file: the format, its block size, roles of the dims.

    `ordered` has inputs in an order of their own (act-order), which cannot be cut. `slab` is that
    of a `QuantArray` with all inputs, or None.
    """

    format: FormatName | HeldName
    block: int
    roles: str = "oi"
    ordered: bool = False
    slab: int | None = None

    @property
    def slab_size(self) -> int:
        """As `QuantArray.slab_size`."""
        return self.slab or self.block


def blocks_of(format: FormatName | HeldName, block: int, inputs: int, **more: Any) -> Blocks:
    """The blocks of a tensor with so many inputs; `more` are the other fields."""
    slab = slab_of(inputs, known(format)[0], block)
    return Blocks(format, block, slab=None if slab == block else slab, **more)


class Weights(NamedTuple):
    """A checkpoint under Hugging Face's tensor names.

    Attributes:
      source: what messages call it: a directory or a file.
      shapes: shape of every tensor, in Hugging Face's order of dimensions.
      read: (name, part) -> that part of the tensor in floats. No other bytes of the file are read,
        but those of a quantized block that the part cuts.
      where: name -> the file that holds it.
      formats: how the tensors are quantized, of those that are quantized in the file, or None for a
        file without any.
      blocks: (name, part) -> the part in the file's blocks, for the names in `formats`; the part
        must not cut one. Its scales of scales are those of the whole tensor.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[..., np.ndarray]
    where: Callable[[str], str]
    formats: Mapping[str, Blocks] | None = None
    blocks: Callable[..., QuantArray] | None = None


def read_array(
    path: str | os.PathLike,
    start: int,
    dtype: DTypeLike,
    shape: tuple[int, ...],
    *,
    part: tuple[Any, ...] = (),
) -> np.ndarray:
    """Reads a part of an array in a file; only the pages with its bytes are read.

    Args:
      path: the file, which is long enough.
      start: the array's first byte.
      dtype, shape: of the whole array, in C order.
      part: any index into the array.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:  # nothing can be mapped
        return np.empty(shape, dtype)[part]
    # Mapped for this read only: pages of a mapping count as the process's memory until it ends.
    mapped = np.memmap(path, np.uint8, mode="r", offset=start, shape=(size,))
    return np.array(mapped.view(dtype).reshape(shape)[part], order="C")


def renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """The tensors that `names` has as values, under the names that are its keys."""

    def under(find: Callable | None) -> Any:
        return None if find is None else lambda name, *part: find(names[name], *part)

    formats = weights.formats
    return Weights(
        source=weights.source,
        shapes={name: weights.shapes[old] for name, old in names.items()},
        read=under(weights.read),
        where=under(weights.where),
        formats=formats and {name: formats[old] for name, old in names.items() if old in formats},
        blocks=under(weights.blocks),
    )


_COMPARED = 1 << 22  # numbers that are compared at a time


def same(weights: Weights, name: str, other: str, *, shared: bool) -> bool:
    """Whether two tensors have equal numbers.

    Args:
      weights: the checkpoint.
      name, other: the tensors.
      shared: all processes compare them together, each a part of the rows.
    """
    shape = weights.shapes[name]
    if weights.shapes[other] != shape:
        return False
    count, number = (jax.process_count(), jax.process_index()) if shared else (1, 0)
    first, last = (shape[0] * n // count for n in (number, number + 1))
    step = max(_COMPARED // math.prod(shape[1:]), 1)
    rest = tuple(slice(0, n) for n in shape[1:])

    def rows(tensor: str, start: int) -> np.ndarray:
        return weights.read(tensor, (slice(start, min(start + step, last)), *rest))

    starts = range(first, last, step)
    equal = all(np.array_equal(rows(name, n), rows(other, n)) for n in starts)
    return all(processes.exchange(equal)) if shared else equal


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip


def check_counts(config: Any, weights: Weights, path: str | os.PathLike) -> None:
    """Compares a configuration with the tensors before anything is made in its sizes.

    Args:
      config: a model's configuration.
      weights: the checkpoint.
      path: the file with the configuration, for messages.

    Raises:
      ValueError: more blocks than tensors, or a size above every dimension.
    """
    tensors = len(weights.shapes)
    if (layers := config.num_hidden_layers) > tensors:
        raise ValueError(
            f"{path}: `num_hidden_layers` is {layers}, but there are only {tensors} tensors in "
            f"{weights.source}"
        )
    # A size above every dimension cannot be right, and would be allocated as it stands.
    largest = max((size for shape in weights.shapes.values() for size in shape), default=0)
    for name in _SIZES:
        if (size := getattr(config, name, None) or 0) > largest:
            raise ValueError(
                f"{path}: `{name}` is {size}, but the largest dimension of the tensors in "
                f"{weights.source} is {largest}"
            )


def shape_there(shape: tuple[T, ...], axes: tuple[int, ...] | None) -> tuple[T, ...]:
    """The shape in the checkpoint of a block with this shape here (or another fact of each dim)."""
    return shape if axes is None else tuple(shape[axes.index(i)] for i in range(len(shape)))


def check_fit(
    wanted: Mapping[str, tuple[int, ...]], weights: Weights, *, ignored: Sequence[str] = ()
) -> None:
    """Refuses a checkpoint whose tensors are not exactly the wanted ones.

    Args:
      wanted: shapes by name.
      weights: the checkpoint.
      ignored: globs of further tensors that may be there.

    Raises:
      ValueError: keys missing, left over or misshapen, all in one message.
    """
    have = weights.shapes
    missing = [n for n in wanted if n not in have]
    extra = [n for n in have if n not in wanted and not any(fnmatchcase(n, g) for g in ignored)]
    wrong = [
        f"`{n}` in {weights.where(n)} has shape {tuple(have[n])}, expected {shape}"
        for n, shape in wanted.items()
        if n in have and tuple(have[n]) != shape
    ]
    problems = [
        _listed("missing", [f"`{n}`" for n in missing]),
        _listed("not part of the model", [f"`{n}` in {weights.where(n)}" for n in extra]),
        _listed("misshapen", wrong),
    ]
    if problems := [p for p in problems if p]:
        # A missing and an extra tensor are often one, under another name.
        hint = ""
        if missing and extra:
            hint = f"; nearest to `{missing[0]}`: {nearest(missing[0], extra)}"
        raise ValueError(f"{weights.source}: tensors do not fit: {'; '.join(problems)}{hint}")


def _listed(what: str, items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{more}" if items else ""
