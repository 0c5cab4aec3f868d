"""Leaves that train, split into Hugging Face's tensors and put together again.

For Hugging Face, a leaf `(layers, d_model, heads, head_dim)` with roles `sioo` is one matrix
(in, out) a layer. Its A and B are permuted as the weight's rows and columns are:

    ours_flat = theirs_flat[order]      for the in dims, and for the out dims
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import processes
from lora_jax.array import LoraArray, RowsArray, SavedArray, is_lora
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import in_dims, out_dims, sizes, stack_dims
from lora_jax.hf.name_maps.layout import order
from lora_jax.hf.name_maps.rules import Part, Placed, at, block_here, block_there, scaled
from lora_jax.hf.name_maps.rules import shape_there as shape_of_part
from lora_jax.hf.peft.index import adapts, is_embedding
from lora_jax.hf.peft.tying import HEAD
from lora_jax.paths import module_of, spell


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A leaf that does not train: its shape and dtype alone."""

    shape: tuple[int, ...]
    dtype: Any


def to_theirs(
    leaves: Mapping[str, Any],
    places: Mapping[str, Placed],
    *,
    config: LoraConfig | None = None,
) -> dict[str, Any]:
    """Leaves in Hugging Face's terms: by path, one for each tensor.

    Args:
      leaves: parameters by path, with or without leaves that train.
      places: the place of each, from `places_of`; frozen leaves without one are left out.
      config: in Hugging Face's names; the layers that it adapts carry an adapter. None: those
        whose scale is not 0.

    Returns:
      `LoraArray`s (in, out) with NumPy arrays, `SavedArray`s, `RowsArray`s; `Frozen` for the rest.

    Raises:
      ValueError: two leaves are one tensor, or an adapter cannot be split into tensors.
    """
    flat: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if path not in places and is_lora(leaf):
            raise ValueError(f"leaf `{path}`: it trains, and the name map has no rule for it")
        if path not in places:
            continue
        placed = places[path]
        apart = _APART.get(type(leaf), _frozen)(path, leaf, placed)
        for part, one in zip(placed.parts, apart, strict=True):
            if part.path in flat:
                raise ValueError(f"leaf `{path}`: another leaf is tensor `{part.tensor}` already")
            if isinstance(one, LoraArray) and not _means(config, part, one):
                one = Frozen(one.shape, one.dtype)
            flat[part.path] = one
    return flat


def _means(config: LoraConfig | None, part: Part, leaf: LoraArray) -> bool:
    if config is None:
        return bool(leaf.scale != 0)
    return adapts(config, part.path, module_of(part.path))


def _frozen(path: str, leaf: Any, placed: Placed) -> list[Frozen]:
    return [Frozen(shape_of_part(placed, part), leaf.dtype) for part in placed.parts]


def _orders(path: str, leaf: LoraArray, placed: Placed) -> tuple[np.ndarray, np.ndarray]:
    """The orders of the in and of the out dims."""
    stacks = tuple(stack_dims(leaf.roles))
    if leaf.window is not None or stacks != placed.layout.stacks:
        wanted = "".join(
            "s" if d in placed.layout.stacks else role for d, role in enumerate(leaf.roles)
        )
        raise ValueError(
            f"leaf `{path}`: its adapter has roles `{leaf.roles}`, which stack dims {stacks}, but "
            f"layout `{placed.layout.text}` stacks {placed.layout.stacks}; only matrices, stacked "
            f'alike, can be exchanged under a name map: plan it with roles={{"{path}": "{wanted}"}}'
        )
    try:
        ins = order(placed.layout, in_dims(leaf.roles), placed.sizes)
        return ins, order(placed.layout, out_dims(leaf.roles), placed.sizes)
    except ValueError as error:
        raise ValueError(f"leaf `{path}`: {error}") from None


def _lora_apart(path: str, leaf: LoraArray, placed: Placed) -> list[LoraArray]:
    ins, outs = _orders(path, leaf, placed)
    _, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
    # The factors are copied once and then cut; a leaf may hold hundreds of tensors.
    host = {p: np.asarray(getattr(leaf, p)) for p in ("a", "b", "scale")}
    rows = {p: None if (x := getattr(leaf, p)) is None else np.asarray(x) for p in ("m", "bias")}
    # theirs_flat = ours_flat[argsort(order)], the inverse of the order.
    back_in, back_out, factor = np.argsort(ins), np.argsort(outs), placed.factor

    def one(part: Part) -> LoraArray:
        vectors = {
            p: None if x is None else scaled(x[part.index].reshape(fan_out)[back_out], factor)
            for p, x in rows.items()
        }
        return LoraArray(
            w=_base(leaf, placed, part, (fan_in, fan_out)),
            a=host["a"][part.index].reshape(fan_in, -1)[back_in],
            b=scaled(host["b"][part.index].reshape(-1, fan_out)[:, back_out], factor),
            scale=host["scale"][part.index],
            roles="io",
            dropout=leaf.dropout,
            tied=leaf.tied,
            **vectors,
        )

    return [one(part) for part in placed.parts]


def _base(leaf: LoraArray, placed: Placed, part: Part, shape: tuple[int, int]) -> Any:
    """The base weight where PEFT may repeat it in the file, else its shape alone."""
    if is_embedding(part.path) or module_of(part.path).rpartition(".")[2] == HEAD:
        return block_there(np.asarray(leaf.w), placed, part)
    return Frozen(shape, leaf.dtype)


def _saved_apart(path: str, leaf: SavedArray, placed: Placed) -> list[Any]:
    value, w = np.asarray(leaf.value), np.asarray(leaf.w)
    return [
        SavedArray(
            w=block_there(w, placed, part),
            value=block_there(value, placed, part),
            tied=leaf.tied,
        )
        if leaf.only is None or part.index in leaf.only
        else Frozen(shape_of_part(placed, part), leaf.dtype)
        for part in placed.parts
    ]


def _rows_apart(path: str, leaf: RowsArray, placed: Placed) -> list[RowsArray]:
    back = np.argsort(_features(path, leaf, placed))
    part = placed.parts[0]
    table = block_there(np.asarray(leaf.w), placed, part)
    # Under Hugging Face's path a table is (vocabulary, features), a head (features, vocabulary).
    axis = 0 if is_embedding(part.path) else 1
    rows = scaled(np.asarray(leaf.rows)[:, back], placed.factor)
    return [RowsArray(w=table, rows=rows, ids=leaf.ids, axis=axis)]


def _features(path: str, leaf: RowsArray, placed: Placed) -> np.ndarray:
    """The order of a table's features; its tokens must have Hugging Face's numbers."""
    if len(placed.parts) != 1 or len(leaf.shape) != 2:
        raise ValueError(f"leaf `{path}`: rows that train must be those of one table")
    tokens = order(placed.layout, [leaf.axis], placed.sizes)
    if np.any(tokens != np.arange(len(tokens))):
        raise ValueError(
            f"leaf `{path}`: layout `{placed.layout.text}` renumbers the tokens, by which trained "
            "rows are named; write a layout that keeps the order of the vocabulary"
        )
    return order(placed.layout, [1 - leaf.axis], placed.sizes)


_APART = {LoraArray: _lora_apart, SavedArray: _saved_apart, RowsArray: _rows_apart}


def to_ours(theirs: Mapping[str, Any], lora_params: Any, places: Mapping[str, Placed]) -> Any:
    """Puts leaves in Hugging Face's terms back into a tree: the inverse of `to_theirs`.

    Args:
      theirs: leaves by path.
      lora_params: the tree they came from; leaves that do not train are taken from it.
      places: the place of each of its leaves.

    Returns:
      The tree; ranks that differ from layer to layer are filled up with zeros.
    """

    def whole(key_path: tuple, leaf: Any) -> Any:
        if not is_lora(leaf):
            return leaf
        path = spell(key_path)
        placed = places[path]
        return _WHOLE[type(leaf)](path, leaf, placed, [theirs[p.path] for p in placed.parts])

    return jax.tree_util.tree_map_with_path(whole, lora_params, is_leaf=is_lora)


def _lora_whole(path: str, leaf: LoraArray, placed: Placed, found: list[Any]) -> LoraArray:
    ins, outs = _orders(path, leaf, placed)
    # Layers of smaller ranks are filled up with zeros, which add nothing to the product.
    rank = max(one.rank for one in found if isinstance(one, LoraArray))
    stack, _, _ = sizes(leaf.shape, leaf.roles)
    shape_in = [leaf.shape[d] for d in in_dims(leaf.roles)]
    shape_out = [leaf.shape[d] for d in out_dims(leaf.roles)]
    a = np.zeros((*stack, *shape_in, rank), np.float32)
    b = np.zeros((*stack, rank, *shape_out), np.float32)
    scale = np.zeros(stack, np.float32)
    rows = {p: None if (x := getattr(leaf, p)) is None else np.array(x) for p in ("m", "bias")}
    for part, one in zip(placed.parts, found, strict=True):
        if not isinstance(one, LoraArray):
            continue
        a[(*part.index, ..., slice(one.rank))] = np.asarray(one.a)[ins].reshape(*shape_in, one.rank)
        outwards = scaled(np.asarray(one.b)[:, outs], 1 / placed.factor)
        b[(*part.index, slice(one.rank))] = outwards.reshape(one.rank, *shape_out)
        scale[part.index] = one.scale
        for name, x in rows.items():
            if x is not None:
                row = np.asarray(getattr(one, name))[outs].reshape(shape_out)
                x[part.index] = scaled(row, 1 / placed.factor)
    return dataclasses.replace(leaf, **_like(leaf, {"a": a, "b": b, "scale": scale, **rows}))


def _saved_whole(path: str, leaf: SavedArray, placed: Placed, found: list[Any]) -> SavedArray:
    value = np.array(leaf.value)  # layers that do not train keep the base's numbers
    for part, one in zip(placed.parts, found, strict=True):
        if isinstance(one, SavedArray):
            place_there = at(part.index, placed.layout.stacks, value.ndim)
            value[place_there] = block_here(np.asarray(one.value), placed, part)
    return dataclasses.replace(leaf, **_like(leaf, {"value": value}))


def _rows_whole(path: str, leaf: RowsArray, placed: Placed, found: list[Any]) -> RowsArray:
    rows = np.asarray(found[0].rows)[:, _features(path, leaf, placed)]
    rows = scaled(rows, 1 / placed.factor)
    return dataclasses.replace(leaf, **_like(leaf, {"rows": rows}))


_WHOLE = {LoraArray: _lora_whole, SavedArray: _saved_whole, RowsArray: _rows_whole}


def _like(leaf: Any, parts: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    """New arrays on the devices, sharded as those before were."""
    placed = {}
    for name, new in parts.items():
        sharding = getattr(getattr(leaf, name), "sharding", None)
        named = isinstance(sharding, jax.sharding.NamedSharding)
        if new is not None:
            placed[name] = processes.put(new, sharding) if named else jnp.asarray(new)
    return placed
