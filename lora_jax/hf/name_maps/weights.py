"""A model's whole weights as Hugging Face safetensors, read and written through a name map."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import processes
from lora_jax.array import check_plain, dense, leaves_by_path
from lora_jax.config.arguments import check_argument
from lora_jax.files import check_new, replacing
from lora_jax.hf.checkpoint.fill import Leaf, filled
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.checkpoint.shards import NewTensor, cast, dtype_of, size_of, write_shards
from lora_jax.hf.checkpoint.weights import Weights, check_fit
from lora_jax.hf.name_maps.layout import part_to_ours, their_shape
from lora_jax.hf.name_maps.rules import NameMap, Placed, at, place, scaled
from lora_jax.paths import spell
from lora_jax.sharding import Rules, spreading


def from_hugging_face(
    shapes: Any,
    weights: str | os.PathLike | Weights,
    using: NameMap,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Any:
    """Fills a model's parameters from a Hugging Face checkpoint.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`s, as `jax.eval_shape` of an init makes it.
      weights: the checkpoint's directory, or what
        `lora_jax.hf.checkpoint.safetensors.open_directory` has opened.
      using: the map.
      mesh: spread the parameters over it as they are read: of each tensor a process reads what its
        own devices hold, layer by layer.
      rules: which of its axes shard which dims, as in `lora_jax.sharding.place`; given with `mesh`.

    Returns:
      The tree with arrays of those shapes and dtypes.

    Raises:
      ValueError: tensors missing, left over or misshapen, all in one message; or a mesh without
        rules.

    Warns:
      UserWarning: leaves that every device of the mesh holds whole.
    """
    order = "hf.from_hugging_face(shapes, weights, using)"
    check_argument(order, "weights", weights, (str, os.PathLike, Weights))
    check_argument(order, "using", using, NameMap)
    if not isinstance(weights, Weights):
        weights = open_directory(Path(weights))
    if (mesh is None) != (rules is None):
        raise ValueError("`mesh` and `rules` go together: give both, or neither")
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    places = [place(spell(path), leaf.shape, using) for path, leaf in leaves]
    wanted = {
        part.tensor: their_shape(placed.layout, placed.sizes)
        for placed in places
        for part in placed.parts
    }
    # Before anything is read, so that a wrong map fails at once and with all that is wrong.
    check_fit(wanted, weights, ignored=using.ignored)
    made = [
        Leaf(spell(path), like, _layers(like.shape, placed))
        for (path, like), placed in zip(leaves, places, strict=True)
    ]
    with spreading(mesh, rules or Rules({}, ())) as spread:
        return jax.tree.unflatten(tree, filled(made, weights, spread=spread))


class _Layer(NamedTuple):
    """One of Hugging Face's tensors, as the block of a leaf that it is."""

    placed: Placed
    tensor: str

    def read(self, weights: Weights, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the block, with a slice of each of its dims; () is all of it."""
        placed, read = self.placed, partial(weights.read, self.tensor)
        if not part:
            return placed.here(read())
        return scaled(part_to_ours(placed.layout, read, placed.sizes, part), 1 / placed.factor)


class _Layers(NamedTuple):
    """The tensors of a leaf whose stacks are not its first dims."""

    placed: Placed
    shape: tuple[int, ...]

    def read(self, weights: Weights, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the leaf, with a slice of each of its dims; () is all of it."""
        stacks, part = self.placed.layout.stacks, part or tuple(slice(0, n) for n in self.shape)
        inner = tuple(s for d, s in enumerate(part) if d not in stacks)
        out = None
        for one in self.placed.parts:
            index = tuple(i - part[d].start for i, d in zip(one.index, stacks, strict=True))
            room = [part[d].stop - part[d].start for d in stacks]
            if not all(0 <= i < n for i, n in zip(index, room, strict=True)):
                continue
            block = _Layer(self.placed, one.tensor).read(weights, inner)
            if out is None:
                out = np.empty([s.stop - s.start for s in part], block.dtype)
            out[at(index, stacks, out.ndim)] = block
        assert out is not None  # no part of a leaf is empty
        return out


def _layers(shape: tuple[int, ...], placed: Placed) -> dict[tuple[int, ...], Any]:
    """What `filled` reads of a leaf: each layer by itself where layers are its first dims."""
    stacks = placed.layout.stacks
    if stacks != tuple(range(len(stacks))):
        return {(): _Layers(placed, shape)}
    return {part.index: _Layer(placed, part.tensor) for part in placed.parts}


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
    numbers = dtype_of(dtype)
    check_plain(params)
    leaves = leaves_by_path(params)
    places = {path: _place(path, leaf, name_map) for path, leaf in leaves.items()}
    entries = [
        NewTensor(part.tensor, tuple(their_shape(placed.layout, placed.sizes)), numbers)
        for placed in places.values()
        for part in placed.parts
    ]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"name map `{name_map.name}`: two leaves are tensor `{twice[0]}`")
    values = (x for path in leaves for x in _tensors(leaves[path], places[path], numbers))
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


def _tensors(leaf: Any, placed: Placed, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A leaf's tensors, one after the other; only one leaf is on the host at a time."""
    value = np.asarray(processes.whole(dense(leaf)))
    for part in placed.parts:
        block = value[at(part.index, placed.layout.stacks, value.ndim)]
        yield cast(placed.there(block), dtype, part.tensor)
