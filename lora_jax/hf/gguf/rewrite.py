"""Writing new numbers into the tensors of a GGUF file, each in its own type.

Types, shapes and places stay, so that metadata and all other tensors are those of the file.
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_jax.compat import require
from lora_jax.hf.gguf.file import Gguf, read_tensor
from lora_jax.hf.gguf.weights import added_to, order_of, places_of
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
    place = places_of(file).get(name)
    if place is None:
        raise ValueError(
            f"{file.path}: it has no tensor for `{name}`, which the adapter changes (a tied or a "
            "fresh head); merge without `requantize`"
        )
    order, added = order_of(file, place), added_to(file, place)
    numbers = numbers.T if place.turned else numbers
    there = (numbers if order is None else numbers[order]) + added
    tensor, part = file.tensors[place.tensor], ()
    skipped = 0  # rows
    if place.expert is not None:  # all experts are one tensor
        rows = place.rows or slice(0, tensor.shape[1])
        part = (slice(place.expert, place.expert + 1), rows, slice(0, numbers.shape[1]))
        skipped = place.expert * tensor.shape[1] + rows.start
    raw = _encoded(file, place.tensor, there)
    width = tensor.size // math.prod(tensor.shape[:-1])
    with Path(file.path).open("r+b") as out:
        out.seek(tensor.start + skipped * width)
        out.write(np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data)
    back = read_tensor(file, place.tensor, part) - added
    back = back if place.expert is None else back[0]
    back = back if order is None else back[np.argsort(order)]
    return back.T if place.turned else back


def _encoded(file: Gguf, name: str, numbers: np.ndarray) -> np.ndarray:
    """The bytes of a tensor in its type."""
    gguf, place = require("gguf"), file.tensors[name]
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
