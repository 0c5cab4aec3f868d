"""Writing new numbers into the tensors of a GGUF file, each in its own type.

Types, shapes and places stay, so that metadata and all other tensors are those of the file.
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_jax.compat import require
from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES, gguf_architecture
from lora_jax.hf.gguf.file import Gguf, heads, names_there, read_tensor, to_halves, to_pairs
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
    original = names_there(file).get(name)
    if original is None:
        raise ValueError(
            f"{file.path}: it has no tensor for `{name}`, which the adapter changes (a tied or a "
            "fresh head); merge without `requantize`"
        )
    permuted = GGUF_ARCHITECTURES[gguf_architecture(file.metadata, file.path)].permuted
    count = heads(file).get(name.split(".")[-2]) if permuted else None
    there = numbers if count is None else to_pairs(numbers, count)
    place = file.tensors[original]
    raw = _encoded(file, original, there)
    with Path(file.path).open("r+b") as out:
        out.seek(place.start)
        out.write(np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data)
    back = read_tensor(file, original)
    return back if count is None else to_halves(back, count)


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
    rows = file.stored(name)
    like = from_gguf(rows.reshape(math.prod(rows.shape[:-1]), -1), kind.name, roles="oi", name=name)
    matrix = jnp.asarray(numbers.reshape(like.shape))
    return to_gguf(requantized(matrix, like, name=name), kind.name)
