"""A model's whole weights, written as Hugging Face safetensors through a name map."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lora_jax import processes
from lora_jax.array import check_plain, dense, leaves_by_path
from lora_jax.config.arguments import check_argument
from lora_jax.files import check_new, replacing
from lora_jax.hf.checkpoint.shards import DTYPES, NewTensor, cast, size_of, write_shards
from lora_jax.hf.name_maps.layout import their_shape, to_theirs
from lora_jax.hf.name_maps.rules import NameMap, Placed, at, place


def save_weights(
    directory: str | Path,
    params: Any,
    name_map: NameMap,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes the weights of a model of your own as a Hugging Face checkpoint, whole or not at all.

    Only weights: add the `config.json` and the tokenizer of the model that the map names. Of
    several processes all have to call it, and the first one writes.

    Args:
      directory: to be made; nothing may be there yet.
      params: plain parameters, as `lora.merge` makes them.
      name_map: Hugging Face's names of the parameters, from `lora.hf.name_map`.
      dtype: of the tensors.
      max_shard_size: bytes in one file, or as Hugging Face writes it: "5GB".

    Raises:
      FileExistsError: the directory exists already.
      ValueError: a leaf has an adapter, has no rule, is another's tensor, or holds numbers that are
        not finite in `dtype`.

    Example:
      lora.hf.save_weights("merged", lora.merge(lora_params), MAP, dtype="bfloat16")
    """
    order = "hf.save_weights(directory, params, name_map)"
    check_argument(order, "directory", directory, (str, os.PathLike))
    check_argument(order, "name_map", name_map, NameMap)
    directory = Path(directory)
    processes.together(lambda: check_new(directory), FileExistsError)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_plain(params)
    leaves = leaves_by_path(params)
    places = {path: _place(path, leaf, name_map) for path, leaf in leaves.items()}
    entries = [
        NewTensor(part.tensor, tuple(their_shape(placed.layout, placed.sizes)), DTYPES[dtype])
        for placed in places.values()
        for part in placed.parts
    ]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"name map `{name_map.name}`: two leaves are tensor `{twice[0]}`")
    values = (x for path in leaves for x in _tensors(leaves[path], places[path], dtype))
    most = size_of(max_shard_size)

    def write(values: Iterator[np.ndarray]) -> None:
        with replacing(directory) as new:
            new.mkdir()
            write_shards(new, entries, values, max_shard_size=most)

    processes.write_in_first(values, write)


def _place(path: str, leaf: Any, name_map: NameMap) -> Placed:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"leaf `{path}` is {leaf.dtype}, expected floats: leave it out")
    return place(path, leaf.shape, name_map)


def _tensors(leaf: Any, placed: Placed, dtype: str) -> Iterator[np.ndarray]:
    """A leaf's tensors, one after the other; only one leaf is on the host at a time."""
    value = np.asarray(processes.whole(dense(leaf)))
    for part in placed.parts:
        block = value[at(part.index, placed.layout.stacks, value.ndim)]
        yield cast(to_theirs(placed.layout, block, placed.sizes), DTYPES[dtype], part.tensor)
