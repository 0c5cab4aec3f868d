"""A checkpoint as names, shapes and a way to read one tensor; and our tree filled from it.

Every key is accounted for before the first tensor is read, and no more than one stacked leaf is
held beside the parameters that are already done.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.compat import require
from lora_jax.hf.checkpoint.names import ANY, Family, stack_depth, tensor_of
from lora_jax.paths import nearest, spell

_SHOWN = 3


class Weights(NamedTuple):
    """A checkpoint under Hugging Face's tensor names.

    Attributes:
      source: what messages call it: a directory or a file.
      shapes: shape of every tensor, in Hugging Face's order of dimensions.
      read: name -> the tensor.
      where: name -> the file that holds it.
      part: (name, a slice of every dim) -> that part of the tensor, of which only the bytes that
        are needed are read; None where a tensor is read whole.
      blocks: name -> the tensor in the quantized blocks that the file has, a
        `lora_jax.quant.QuantArray`, or None; None for a file without any.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    where: Callable[[str], str]
    part: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None
    blocks: Callable[[str], Any] | None = None


def renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """The tensors that `names` has as values, under the names that are its keys."""

    def under(find: Callable | None) -> Any:
        return None if find is None else lambda name, *part: find(names[name], *part)

    return Weights(
        source=weights.source,
        shapes={name: weights.shapes[old] for name, old in names.items()},
        read=under(weights.read),
        where=under(weights.where),
        part=under(weights.part),
        blocks=under(weights.blocks),
    )


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


class _Place(NamedTuple):
    """The place of a tensor: leaf number, index into the leaf, order of dimensions, shape there."""

    leaf: int
    index: tuple[int, ...]
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]


def fill(
    shapes: Any,
    weights: Weights,
    *,
    family: Family = ANY,
    hold: Callable | None = None,
    spread: Callable[[str, Any], Any] | None = None,
) -> Any:
    """Fills a parameter tree from a checkpoint.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`s, paths as in `lora_jax.hf.checkpoint.names`.
      weights: the checkpoint.
      family: the table of names.
      hold: makes quantized leaves, see `lora_jax.quant.loading.holder`; a progress bar is shown.
      spread: (path, leaf) -> the shardings of its arrays, to load onto a mesh: a process reads the
        parts of its own devices.

    Returns:
      The tree with arrays of those shapes and dtypes.

    Raises:
      ValueError: keys missing, left over or misshapen, all in one message.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    places = _places([(spell(path), leaf.shape) for path, leaf in leaves], family)
    check_fit(
        {name: place.shape for name, place in places.items()}, weights, ignored=family.ignored
    )
    by_leaf: dict[int, list[str]] = {}
    for name, place in places.items():
        by_leaf.setdefault(place.leaf, []).append(name)
    # Leaf by leaf: no more than one is held beside those that are done.
    arrays = []
    slow = hold is not None or spread is not None
    for i, (key_path, leaf) in enumerate(_shown(leaves) if slow else leaves):
        path, here = spell(key_path), [(places[n], n) for n in by_leaf[i]]
        held = hold and hold(path, leaf, [(n, place.axes) for place, n in here])
        if held is not None:
            if spread is not None:
                held = jax.tree.map(processes.put, held, spread(path, held))
            arrays.append(held)
        elif spread is not None:
            arrays.append(_spread_leaf(leaf, here, weights, spread(path, leaf)))
        else:
            arrays.append(_leaf(leaf, here, weights.read))
    return jax.tree.unflatten(tree, arrays)


def _shown(leaves: list) -> Iterable:
    """With a progress bar, where there is a terminal."""
    return require("tqdm").tqdm(leaves, desc="loading", unit="leaf", disable=None)


def _places(leaves: list[tuple[str, tuple[int, ...]]], family: Family) -> dict[str, _Place]:
    places = {}
    for i, (path, shape) in enumerate(leaves):
        # Leading dims are layers (or experts), each a tensor of its own in the checkpoint.
        depth = stack_depth(path, family=family)
        for index in product(*(range(n) for n in shape[:depth])):
            name, axes = tensor_of(path, index, family=family)
            places[name] = _Place(i, index, axes, shape_there(shape[depth:], axes))
    return places


def shape_there(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape in the checkpoint of a block with this shape here."""
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


def _leaf(
    shape: jax.ShapeDtypeStruct, places: list[tuple[_Place, str]], read: Callable
) -> jax.Array:
    # Filled layer by layer, and cast to the leaf's dtype as each is written: no stack of copies.
    out = np.empty(shape.shape, shape.dtype)
    for place, name in places:
        tensor = read(name)  # in Hugging Face's order of dims
        out[place.index] = tensor if place.axes is None else tensor.transpose(place.axes)
    return jax.device_put(out)


def _spread_leaf(
    leaf: jax.ShapeDtypeStruct,
    places: list[tuple[_Place, str]],
    weights: Weights,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """A leaf on a mesh, of which each process reads the parts of its own devices."""
    by_index = {place.index: (place, name) for place, name in places}
    depth = len(places[0][0].index)
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share it

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(leaf.shape)
        bounds = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]
        if (key := tuple(bounds)) not in parts:
            out = np.empty([end - start for start, end in bounds], leaf.dtype)
            inner = tuple(slice(*b) for b in bounds[depth:])
            for where in product(*(range(*b) for b in bounds[:depth])):
                there = tuple(k - bounds[d][0] for d, k in enumerate(where))
                out[there] = _read_part(weights, *by_index[where], inner)
            parts[key] = out
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _read_part(weights: Weights, place: _Place, name: str, inner: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, in the order of our dims."""
    theirs = (
        inner
        if place.axes is None
        else tuple(inner[place.axes.index(d)] for d in range(len(inner)))
    )
    found = weights.read(name)[theirs] if weights.part is None else weights.part(name, theirs)
    return found if place.axes is None else found.transpose(place.axes)
