"""A GGUF file's weights under Hugging Face's names, whole or in parts, in floats or in blocks."""

import math
import re
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lora_jax.compat import require
from lora_jax.hf.checkpoint.weights import Blocks, Part, Weights
from lora_jax.hf.gguf.architectures import (
    GGUF_ARCHITECTURES,
    gguf_architecture,
    row_order,
    their_names,
)
from lora_jax.hf.gguf.file import Gguf, of_bytes, read_tensor
from lora_jax.quant.array import QuantArray
from lora_jax.quant.gguf import GGUF_KINDS, from_gguf


class Place(NamedTuple):
    """Where a weight lies.

    Attributes:
      tensor: the file's.
      module: Hugging Face's.
      expert: the number of an expert in the tensor, or None.
      rows: those of an expert that are the weight, or None for all.
      turned: it is (in, out) under Hugging Face's name, where the file has (out, in).
    """

    tensor: str
    module: str
    expert: int | None = None
    rows: slice | None = None
    turned: bool = False


def weights_of(file: Gguf) -> Weights:
    """The file's weights under Hugging Face's names, dequantized when they are read.

    Tensors may only be read after `config_of` has checked the metadata.

    Raises:
      ValueError: an architecture that is not known, or a tensor that has no place in it.
    """
    theirs = places_of(file)
    kinds = require("gguf").GGMLQuantizationType
    types = {name: kinds(file.tensors[t.tensor].kind).name for name, t in theirs.items()}
    inside = {name: _inside(file, place) for name, place in theirs.items()}
    shapes = {n: shape[::-1] if theirs[n].turned else shape for n, shape in inside.items()}

    def there(name: str, part: Part) -> tuple[Any, ...]:
        """The part in the file's order of rows."""
        place = theirs[name]
        found: tuple[Any, ...] = part[::-1] if place.turned else part
        if (order := order_of(file, place)) is not None:
            rows, *rest = found or (slice(None),)
            found = np.argsort(order)[rows], *rest
        if place.expert is None:
            return found
        rows, *rest = found or tuple(slice(0, n) for n in inside[name])
        if place.rows is not None:
            rows = slice(rows.start + place.rows.start, rows.stop + place.rows.start)
        return slice(place.expert, place.expert + 1), rows, *rest

    def one(name: str, found: np.ndarray) -> np.ndarray:
        return found if theirs[name].expert is None else found[0]

    def read(name: str, part: Part = ()) -> np.ndarray:
        found = one(name, read_tensor(file, theirs[name].tensor, there(name, part)))
        found = found - added if (added := added_to(file, theirs[name])) else found
        return found.T if theirs[name].turned else found

    def blocks(name: str, part: Part = ()) -> QuantArray:
        tensor = theirs[name].tensor
        rows = one(name, file.stored(tensor, of_bytes(file, tensor, there(name, part))[0]))
        roles = "io" if theirs[name].turned else "oi"
        return from_gguf(rows, types[name], roles=roles, name=f"{file.path}: {tensor}")

    held = {name for name in theirs if types[name] in GGUF_KINDS and len(shapes[name]) == 2}
    return Weights(
        source=str(file.path),
        shapes=shapes,
        read=read,
        where=lambda name: file.path.name,
        formats={n: Blocks(GGUF_KINDS[types[n]].format, GGUF_KINDS[types[n]].block) for n in held},
        blocks=blocks,
    )


def places_of(file: Gguf) -> dict[str, Place]:
    """Where each weight lies, by Hugging Face's name."""
    kind = gguf_architecture(file.metadata, file.path)
    ours = {theirs: module for module, theirs in their_names(kind).items()}
    row, found = GGUF_ARCHITECTURES[kind], {}
    beyond = _main_blocks(file, kind)
    for name, tensor in file.tensors.items():
        block, part, ending = _parts(name)
        # The first holds no weight but divisors of RoPE, which `rope_divisors` reads; blocks beyond
        # the last predict further tokens.
        if name == "rope_freqs.weight" or block is not None and block >= beyond:
            continue
        module = ours.get(part)
        start = "" if block is None else f"{row.stack}.{block}."
        if odd := row.odd.get(f"{part}.{ending}"):
            found[f"{start}{odd}"] = Place(name, odd)
            continue
        if module is None or ending not in ("weight", "bias"):
            where = f"no place in a decoder of the architecture `{kind}`"
            raise ValueError(f"{file.path}: tensor `{name}` has {where}")
        if (experts := re.fullmatch(r"((?:.+\.)?experts)\.(\w+)", module)) and len(
            tensor.shape
        ) == 3:
            first, last = experts.groups()
            for n, (each, rows) in product(
                range(tensor.shape[0]), _parts_of(last, tensor.shape[1])
            ):
                found[f"{start}{first}.{n}.{each}.{ending}"] = Place(name, module, n, rows)
        else:
            turned = row.turned and ending == "weight" and module in row.linears
            found[f"{start}{module}.{ending}"] = Place(name, module, turned=turned)
    return found


def _inside(file: Gguf, place: Place) -> tuple[int, ...]:
    """The shape of a weight in the file."""
    shape = file.tensors[place.tensor].shape[place.expert is not None :]
    return shape if place.rows is None else (place.rows.stop - place.rows.start, *shape[1:])


def _parts_of(experts: str, rows: int) -> list[tuple[str, slice | None]]:
    """The linear layers of an expert in one tensor, and the rows of each."""
    if experts != "gate_up_proj":
        return [(experts, None)]
    return [("gate_proj", slice(0, rows // 2)), ("up_proj", slice(rows // 2, rows))]


def _parts(name: str) -> tuple[int | None, str, str]:
    """`blk.3.attn_q.weight` is (3, "attn_q", "weight"), `output.weight` (None, "output", ...)."""
    found = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(.+?)(?:\.(\w+))?", name, re.DOTALL)
    block, part, ending = found.groups(default="") if found else ("", "", "")
    return int(block) if block else None, part, ending


def _main_blocks(file: Gguf, kind: str) -> float:
    """The number of blocks without those that predict further tokens."""
    count, further = (
        file.metadata.get(f"{kind}.{key}", 0) for key in ("block_count", "nextn_predict_layers")
    )
    return count - further if type(count) is type(further) is int and further else math.inf


def added_to(file: Gguf, place: Place) -> np.float32:
    """What the file has added to each number of a weight."""
    row = GGUF_ARCHITECTURES[gguf_architecture(file.metadata, file.path)]
    return np.float32(row.added if place.module.endswith("norm") else 0)


def order_of(file: Gguf, place: Place) -> np.ndarray | None:
    """Which of Hugging Face's rows each row of a tensor is; see `row_order`."""
    kind = gguf_architecture(file.metadata, file.path)
    heads = file.metadata[f"{kind}.attention.head_count"]
    kv_heads = file.metadata.get(f"{kind}.attention.head_count_kv", heads)
    rows = file.tensors[place.tensor].shape[0]
    try:
        return row_order(kind, place.module, rows, heads=heads, kv_heads=kv_heads)
    except ValueError as error:
        raise ValueError(f"{file.path}: tensor `{place.tensor}` has {error}") from None
