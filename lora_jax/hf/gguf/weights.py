"""A GGUF file's weights under Hugging Face's names, whole or in parts, in floats or in blocks.

Of a weight that the file has in two tensors (`layout` says which) both are read whole. The rows of
`in_proj_qkvz` are held in the file's blocks where both have one type, or Q5_K and Q4_K, which Q5_K
holds exactly; `kv_b_proj`, whose keys are quantized along the other axis, is held in floats.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.compat import require
from lora_jax.hf.checkpoint.weights import Blocks, Part, Weights, blocks_of
from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES, gguf_architecture
from lora_jax.hf.gguf.file import Gguf, of_bytes, read_tensor
from lora_jax.hf.gguf.layout import join_kv, join_qkvz
from lora_jax.hf.gguf.places import (
    ONE,
    Halves,
    Place,
    columns_of,
    delta_heads,
    halves_of,
    inside_of,
    numbers_here,
    order_of,
    places_of,
    shape_of,
    stated_numbers,
)
from lora_jax.quant.array import QuantArray
from lora_jax.quant.gguf import GGUF_KINDS, as_q5_k, from_gguf


def weights_of(file: Gguf) -> Weights:
    """The file's weights under Hugging Face's names, dequantized when they are read.

    Tensors may only be read after `config_of` has checked the metadata.

    Raises:
      ValueError: an architecture that is not known, or a tensor that has no place in it.
    """
    kind = gguf_architecture(file.metadata, file.path)
    if not GGUF_ARCHITECTURES[kind].keys:
        raise ValueError(
            f"{file.path}: of the architecture `{kind}`, models of images and texts, only adapters "
            "are read and written as GGUF: load the model from its Hugging Face directory"
        )
    theirs = places_of(file)
    plain = _with_stated(_plain(file, theirs), stated_numbers(file))
    halves = halves_of(file, theirs)
    if not halves:
        return plain
    parts = {name for each in halves.values() for name in each[:2]}
    kinds = {name: _kind(file, theirs, each) for name, each in halves.items()}

    def read(name: str, part: Part = ()) -> np.ndarray:
        if name not in halves:
            return plain.read(name, part)
        return _joined(file, halves[name], *(plain.read(n) for n in halves[name][:2]))[part]

    def blocks(name: str, part: Part = ()) -> QuantArray:
        if name not in halves:
            assert plain.blocks is not None
            return plain.blocks(name, part)
        kind, both = GGUF_KINDS[kinds[name]], (theirs[n] for n in halves[name][:2])
        rows = _joined(file, halves[name], *(_bytes(file, x, kinds[name]) for x in both))
        if part:
            first, last = (n // kind.inputs * kind.size for n in (part[1].start, part[1].stop))
            rows = np.ascontiguousarray(rows[part[0], first:last])
        slab = held[name].slab_size
        return from_gguf(rows, kinds[name], roles="oi", slab=slab, name=f"{file.path}: {name}")

    def rest(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: x for name, x in found.items() if name not in parts}

    shapes = {n: _joined_shape(file, each, plain.shapes) for n, each in halves.items()}
    held = {name: _blocks(kind, shapes[name][1]) for name, kind in kinds.items() if kind}
    return plain._replace(
        shapes=rest(plain.shapes) | shapes,
        read=read,
        formats=rest(plain.formats or {}) | held,
        blocks=blocks,
    )


def _with_stated(weights: Weights, numbers: Mapping[str, np.ndarray]) -> Weights:
    """The weights, and those that the metadata state."""

    def read(name: str, part: Part = ()) -> np.ndarray:
        return numbers[name][part] if name in numbers else weights.read(name, part)

    shapes = {**weights.shapes, **{name: x.shape for name, x in numbers.items()}}
    return weights._replace(shapes=shapes, read=read) if numbers else weights


def _plain(file: Gguf, theirs: Mapping[str, Place]) -> Weights:
    """The weights of one tensor each."""
    kinds = require("gguf").GGMLQuantizationType
    types = {name: kinds(file.tensors[t.tensor].kind).name for name, t in theirs.items()}
    sizes = {name: inside_of(file, place) for name, place in theirs.items()}
    shapes = {n: shape_of(shape, theirs[n]) for n, shape in sizes.items()}

    def there(name: str, part: Part) -> tuple[Any, ...]:
        """The part in the file's order of rows; all columns where they have an order."""
        place = theirs[name]
        found: tuple[Any, ...] = part[::-1] if place.turned else part
        if len(found) > len(sizes[name]):
            found = tuple(np.delete(np.asarray(found, object), ONE[place.module][1]))
        if (order := order_of(file, place)) is not None:
            rows, *rest = found or (slice(None),)
            found = np.argsort(order)[rows], *rest
        if found and columns_of(file, place) is not None:
            found = found[0], slice(0, sizes[name][1])
        if place.expert is None and place.rows is None:
            return found
        rows, *rest = found or tuple(slice(0, n) for n in sizes[name])
        first = place.rows.start if place.rows is not None else 0
        if isinstance(rows, slice):
            rows = slice(rows.start + first, rows.stop + first)
        else:  # in an order
            rows = rows + first
        expert = () if place.expert is None else (slice(place.expert, place.expert + 1),)
        return *expert, rows, *rest

    def one(name: str, found: np.ndarray) -> np.ndarray:
        return found if theirs[name].expert is None else found[0]

    def read(name: str, part: Part = ()) -> np.ndarray:
        place = theirs[name]
        found = one(name, read_tensor(file, place.tensor, there(name, part)))
        if (order := columns_of(file, place)) is not None:
            found = found[:, np.argsort(order)][(slice(None), *part[1:])]
        return numbers_here(file, place, found)

    def blocks(name: str, part: Part = ()) -> QuantArray:
        place = theirs[name]
        where, order = f"{file.path}: {place.tensor}", columns_of(file, place)
        if order is not None and part and part[1] != slice(0, len(order)):
            raise ValueError(
                f"{where} has its inputs in llama.cpp's order, which devices cannot share: use a "
                'mesh that does not shard them, or a format such as "nf4"'
            )
        inside, _ = of_bytes(file, place.tensor, there(name, part))
        rows = one(name, file.stored(place.tensor, inside))
        roles = "io" if place.turned else "oi"
        slab = held[name].slab_size
        return from_gguf(rows, types[name], roles=roles, order=order, slab=slab, name=where)

    held = {
        name: _blocks(types[name], sizes[name][-1], columns_of(file, place) is not None)
        for name, place in theirs.items()
        if types[name] in GGUF_KINDS and len(shapes[name]) == 2
    }
    return Weights(
        source=str(file.path),
        shapes=shapes,
        read=read,
        where=lambda name: file.path.name,
        formats=held,
        blocks=blocks,
    )


def _blocks(kind: str, inputs: int, ordered: bool = False) -> Blocks:
    return blocks_of(GGUF_KINDS[kind].format, GGUF_KINDS[kind].block, inputs, ordered=ordered)


def _joined(file: Gguf, halves: Halves, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Both halves as one weight, in numbers or in the bytes of their rows."""
    if halves.latent:
        return join_kv(first, second)
    delta = delta_heads(file)
    assert delta is not None  # checked by `config_of`
    return join_qkvz(first, second, delta)


def _joined_shape(file: Gguf, halves: Halves, shapes: Mapping[str, Any]) -> tuple[int, ...]:
    first, second = (shapes[name] for name in halves[:2])
    if halves.latent:
        fit = len(first) == len(second) == 3 and (first[0], first[1]) == (second[0], second[2])
    else:
        fit = len(first) == len(second) == 2 and first[1] == second[1]
    if not fit:
        raise ValueError(
            f"{file.path}: the two tensors of `{halves.module}` have shapes {first} and {second}, "
            "which do not fit together; the file is damaged"
        )
    if not halves.latent:
        return first[0] + second[0], first[1]
    return second[0] * (first[2] + second[1]), second[2]


def _kind(file: Gguf, theirs: Mapping[str, Place], halves: Halves) -> str:
    """The type that holds both halves as they are, or ""."""
    kinds = require("gguf").GGMLQuantizationType
    first, second = (kinds(file.tensors[theirs[name].tensor].kind).name for name in halves[:2])
    if halves.latent:
        return ""
    if {first, second} == {"Q4_K", "Q5_K"}:
        return "Q5_K"
    return first if first == second and first in GGUF_KINDS else ""


def _bytes(file: Gguf, place: Place, kind: str) -> np.ndarray:
    """The bytes of a tensor's rows in a type."""
    rows = file.stored(place.tensor)
    same = require("gguf").GGMLQuantizationType(file.tensors[place.tensor].kind).name == kind
    return rows if same else as_q5_k(rows)
