"""Writing new numbers into the tensors of a GGUF file, each in its own type.

Types, shapes and places stay, so that metadata and all other tensors are those of the file.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_jax.compat import require
from lora_jax.hf.gguf.file import Gguf, read_tensor
from lora_jax.hf.gguf.layout import join_kv, join_qkvz, split_kv, split_qkvz
from lora_jax.hf.gguf.places import (
    Halves,
    Place,
    columns_of,
    delta_heads,
    halves_of,
    numbers_here,
    numbers_there,
    order_of,
    places_of,
)
from lora_jax.quant.gguf import GGUF_KINDS, from_gguf, to_gguf
from lora_jax.quant.requantize import requantized


def rewrite(file: Gguf, name: str, numbers: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Writes a tensor into a file.

    Args:
      file: a copy of the base's.
      name: Hugging Face's.
      numbers: float32, in Hugging Face's order of rows.

    Returns:
      The numbers as they are read back.

    Raises:
      ValueError: there is no such tensor, a type that is only read, or numbers not finite there.
    """
    places = places_of(file)
    if halves := halves_of(file, places).get(name):
        return _both(file, places, halves, numbers)
    if name not in places:
        raise ValueError(
            f"{file.path}: it has no tensor for `{name}`, which the adapter changes (a tied or a "
            "fresh head); merge without `requantize`"
        )
    return _one(file, places[name], numbers)


def _both(
    file: Gguf, places: Mapping[str, Place], halves: Halves, numbers: np.ndarray
) -> np.ndarray:
    """Writes both tensors of a weight."""
    one, other = (places[name] for name in halves[:2])
    if halves.latent:
        heads, _, keys = file.tensors[one.tensor].shape
        first, second = split_kv(numbers, heads, keys)
        return join_kv(_one(file, one, first), _one(file, other, second))
    delta = delta_heads(file)
    assert delta is not None  # checked when the file was read
    first, second = split_qkvz(numbers, delta)
    return join_qkvz(_one(file, one, first), _one(file, other, second), delta)


def _one(file: Gguf, place: Place, numbers: np.ndarray) -> np.ndarray:
    """Writes the tensor of a weight."""
    rows, columns = order_of(file, place), columns_of(file, place)
    there = numbers_there(file, place, numbers)
    there = there if rows is None else there[rows]
    there = there if columns is None else there[:, columns]
    tensor, part = file.tensors[place.tensor], ()
    skipped = 0  # rows
    inside = place.rows or slice(0, there.shape[0])
    if place.expert is not None:  # all experts are one tensor
        part = (slice(place.expert, place.expert + 1), inside, slice(0, there.shape[1]))
        skipped = place.expert * tensor.shape[1] + inside.start
    elif place.rows is not None:
        part = (inside, *(slice(0, n) for n in there.shape[1:]))
        skipped = inside.start
    raw = _encoded(file, place.tensor, np.ascontiguousarray(there))
    width = tensor.size // math.prod(tensor.shape[:-1] or tensor.shape)  # bytes of a row
    with Path(file.path).open("r+b") as out:
        out.seek(tensor.start + skipped * width)
        out.write(np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data)
    back = read_tensor(file, place.tensor, part)
    back = back if place.expert is None else back[0]
    back = back if rows is None else back[np.argsort(rows)]
    back = back if columns is None else back[:, np.argsort(columns)]
    return numbers_here(file, place, back)


def _encoded(file: Gguf, name: str, numbers: np.ndarray) -> np.ndarray:
    """The bytes of a tensor in its type."""
    gguf, place = require("gguf"), file.tensors[name]
    numbers = numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim > 2 else numbers
    kind = gguf.GGMLQuantizationType(place.kind)
    if kind.name == "F32":
        return numbers.astype(np.float32)
    if kind.name not in GGUF_KINDS or GGUF_KINDS[kind.name].inputs == 32:
        try:
            with np.errstate(over="ignore"):  # found when it is read back
                return gguf.quantize(numbers, kind)
        except NotImplementedError:
            if kind.name not in GGUF_KINDS:
                raise ValueError(
                    f"{file.path}: tensor `{name}` has type {kind.name}, which is only read; take "
                    f"a file of {', '.join(GGUF_KINDS)}, or merge without `requantize`"
                ) from None
    size = GGUF_KINDS[kind.name].size * numbers.shape[1] // GGUF_KINDS[kind.name].inputs
    blank = np.zeros((len(numbers), size), np.uint8)
    like = from_gguf(blank, kind.name, roles="oi", name=name)
    return to_gguf(requantized(jnp.asarray(numbers), like, name=name), kind.name)
