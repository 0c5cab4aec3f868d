"""Our parameter tree, filled from a checkpoint: on one device, or spread over a mesh.

Every key is accounted for before the first tensor is read. Then a process reads of each tensor
what its own devices hold, quantizes it there, and writes it into its leaf in place: beside the
parameters there is never more than one tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from lora_jax import processes
from lora_jax.compat import require
from lora_jax.hf.checkpoint.layer import Beside, LayerTensor
from lora_jax.hf.checkpoint.names import ANY, Family, stack_depth, tensors_of
from lora_jax.hf.checkpoint.weights import Part, Weights, check_fit
from lora_jax.paths import spell
from lora_jax.quant import ops
from lora_jax.quant import sharding as quant_sharding
from lora_jax.quant.array import QuantArray, resized
from lora_jax.quant.loading import FILE, QuantConfig, in_format, outline

# (path, leaf) -> the sharding of the leaf's own dims
Spread = Callable[[str, Any], NamedSharding]
_Ends = tuple[tuple[int, int], ...]  # first index and end along each dim


def is_shared(spread: Spread | None) -> bool:
    """Whether several processes load together, onto one mesh."""
    nothing = jax.ShapeDtypeStruct((), "float32")
    return spread is not None and not spread("", nothing).is_fully_addressable


class Leaf(NamedTuple):
    """A leaf that is to be filled, and the tensor of each of its layers (or experts).

    Attributes:
      path: of the leaf.
      like: its shape and dtype.
      tensors: index of a layer -> what has `read`, as `LayerTensor` does, and where the leaf may be
        quantized its other attributes.
    """

    path: str
    like: jax.ShapeDtypeStruct
    tensors: Mapping[tuple[int, ...], Any]

    @property
    def depth(self) -> int:
        """How many dims of the leaf are layers, each of them a tensor of its own."""
        return len(next(iter(self.tensors)))


class _Source(NamedTuple):
    """A checkpoint, how its weights are held, and what is called after each tensor.

    `failures` receives the errors of parts that other processes wait for; None raises them.
    """

    weights: Weights
    quantize: QuantConfig | None
    spread: Spread | None
    advance: Callable[[int], Any]
    failures: list[Exception] | None = None


def fill(
    shapes: Any,
    weights: Weights,
    *,
    family: Family = ANY,
    quantize: QuantConfig | None = None,
    spread: Spread | None = None,
) -> Any:
    """Fills a parameter tree from a checkpoint.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`s, paths as in `lora_jax.hf.checkpoint.names`.
      weights: the checkpoint.
      family: the table of names.
      quantize: how leaves are quantized; a progress bar is shown.
      spread: (path, leaf) -> the sharding of its dims, to load onto a mesh; likewise.

    Returns:
      The tree with arrays of those shapes and dtypes.

    Raises:
      ValueError: keys missing, left over or misshapen, all in one message; or a tensor that cannot
        be read or quantized.
    """
    leaves, tree = _leaves(shapes, weights, family)
    return jax.tree.unflatten(tree, filled(leaves, weights, quantize=quantize, spread=spread))


def outlined(
    shapes: Any,
    weights: Weights,
    *,
    family: Family = ANY,
    quantize: QuantConfig,
    spread: Spread | None = None,
) -> Any:
    """As `fill` with the format "file", without arrays: a `ShapeDtypeStruct` for each.

    Of a quantized leaf the first layer alone is read, which has the dtypes of its scales.
    """
    del spread
    leaves, tree = _leaves(shapes, weights, family)

    def held(leaf: Leaf) -> Any:
        tensors = list(leaf.tensors.values())
        found = outline(quantize, weights, path=leaf.path, leaf=leaf.like, tensors=tensors)
        if found is None:
            return leaf.like
        stack, inner = leaf.like.shape[: leaf.depth], leaf.like.shape[leaf.depth :]
        piece = _Piece(leaf, weights, (0,) * leaf.depth, stack)
        first = piece.blocks(((0, 1),) * leaf.depth + tuple((0, size) for size in inner))
        return resized(first, found.shape)

    return jax.tree.unflatten(tree, [held(leaf) for leaf in leaves])


def _leaves(shapes: Any, weights: Weights, family: Family) -> tuple[list[Leaf], Any]:
    """The leaves of a tree and its structure, after a check that they are the checkpoint's."""
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = [_leaf(spell(path), like, family) for path, like in flat]
    wanted = {
        name: shape
        for leaf in leaves
        for tensor in leaf.tensors.values()
        for name, shape in tensor.wanted(leaf.like.shape[leaf.depth :])
    }
    check_fit(wanted, weights, ignored=family.ignored)
    return leaves, tree


def filled(
    leaves: Sequence[Leaf],
    weights: Weights,
    *,
    quantize: QuantConfig | None = None,
    spread: Spread | None = None,
) -> list[Any]:
    """Fills leaves from a checkpoint that has their tensors; other arguments: `fill`."""
    total = sum(len(leaf.tensors) for leaf in leaves)
    shown = (quantize is not None or spread is not None) and processes.is_first()
    with require("tqdm").tqdm(
        total=total, desc="loading", unit="tensor", disable=None if shown else True
    ) as bar:
        # A number that is not finite is found by the process alone that reads it. Where the others
        # exchange scales with it, it goes on with zeros to the end.
        shared = is_shared(spread)
        failures: list[Exception] = []
        exchanges = shared and quantize is not None and quantize.double_quant
        source = _Source(weights, quantize, spread, bar.update, failures if exchanges else None)

        def fill_all() -> list[Any]:
            found = [_filled(leaf, source) for leaf in leaves]
            if failures:
                raise failures[0]
            return found

        with processes.reachable():
            return processes.together(fill_all, ValueError) if shared else fill_all()


def _leaf(path: str, like: jax.ShapeDtypeStruct, family: Family) -> Leaf:
    # Leading dims are layers (or experts), each a tensor of its own in the checkpoint.
    depth = stack_depth(path, family=family)
    indices = product(*map(range, like.shape[:depth]))

    def tensor(index: tuple[int, ...]) -> LayerTensor | Beside:
        parts = tuple(LayerTensor(*part) for part in tensors_of(path, index, family=family))
        return parts[0] if len(parts) == 1 else Beside(parts, like.shape[-1] // len(parts))

    return Leaf(path, like, {index: tensor(index) for index in indices})


def _filled(leaf: Leaf, source: _Source) -> Any:
    held, spread = None, source.spread
    if source.quantize is not None:
        tensors = list(leaf.tensors.values())
        held = outline(
            source.quantize, source.weights, path=leaf.path, leaf=leaf.like, tensors=tensors
        )
    if held is None and spread is None:
        return _on_host(leaf, source)
    where = spread and spread(leaf.path, leaf.like if held is None else held)
    out: list[jax.Array] = []
    kinds = set()
    for at, piece in _pieces(leaf, source, where, quantized=held is not None):
        if not leaf.depth:
            return piece
        arrays, kind = jax.tree.flatten(piece)
        kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(
                f"{source.weights.source}: the layers of `{leaf.path}` are quantized differently: "
                'use a format such as "nf4"'
            )
        stacks = out or [_empty(leaf, x, where) for x in arrays]
        out = [_written(stack, x, at) for stack, x in zip(stacks, arrays, strict=True)]
    whole = jax.tree.unflatten(kinds.pop(), out)
    return whole if held is None else dataclasses.replace(whole, shape=held.shape)


def _on_host(leaf: Leaf, source: _Source) -> jax.Array:
    """A leaf of floats on one device: filled on the host, where nothing has to be compiled."""
    out = np.empty(leaf.like.shape, leaf.like.dtype)
    for index, tensor in leaf.tensors.items():
        out[index] = tensor.read(source.weights, ())
        source.advance(1)
    return jax.device_put(out)


def _pieces(
    leaf: Leaf, source: _Source, where: NamedSharding | None, *, quantized: bool
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The layers one after the other: the number of a layer on its device, and the layer.

    Where an axis of the mesh shards the layers, devices hold different ones: a piece is a stack of
    those that have the number.
    """
    shards = _shards(where, len(leaf.like.shape))
    stack, inner = shards[: leaf.depth], leaf.like.shape[leaf.depth :]
    each = tuple(n // k for n, k in zip(leaf.like.shape, stack, strict=False))  # layers of a device
    shape = (*stack, *inner)
    for at in product(*map(range, each)):
        piece = _Piece(leaf, source.weights, at, each)
        config = source.quantize if quantized else None
        if config is None:
            made = _assembled(shape, where, functools.partial(piece.floats, dtype=leaf.like.dtype))
        elif config.format == FILE:
            made = _assembled(shape, where, piece.blocks)
        else:
            numbers = _assembled(shape, where, _or_zeros(piece, source.failures))
            made = in_format(config, numbers, leaf.tensors[at].name).astype(leaf.like.dtype)
        source.advance(math.prod(stack))
        yield at, made


def _or_zeros(piece: "_Piece", failures: list[Exception] | None) -> Callable[[_Ends], np.ndarray]:
    """`piece.floats`; where there are `failures`, they receive its error, and it gives zeros."""

    def made(ends: _Ends) -> np.ndarray:
        try:
            return piece.floats(ends)
        except (OSError, ValueError) as error:
            if failures is None:
                raise
            failures.append(error)
            return np.zeros([end - start for start, end in ends], piece.leaf.like.dtype)

    return made


class _Piece(NamedTuple):
    """The layers that have the number `at` on their devices.

    Attributes:
      leaf, weights: where they go, and come from.
      at: a number for each stack dim.
      each: the number of layers that a device has along each stack dim.
    """

    leaf: Leaf
    weights: Weights
    at: tuple[int, ...]
    each: tuple[int, ...]

    def find(self, ends: _Ends) -> tuple[Any, Part]:
        """The tensor with a part of the piece, and the part of it."""
        shard = [start for start, _ in ends[: self.leaf.depth]]
        index = tuple(k * n + a for k, n, a in zip(shard, self.each, self.at, strict=True))
        tensor = self.leaf.tensors[index]
        return tensor, tuple(slice(*e) for e in ends[self.leaf.depth :])

    def floats(self, ends: _Ends, dtype: DTypeLike | None = None) -> np.ndarray:
        """A part in the file's dtype, or in another."""
        tensor, part = self.find(ends)
        found = tensor.read(self.weights, part)
        return found[(None,) * self.leaf.depth].astype(dtype or found.dtype, copy=False)

    def blocks(self, ends: _Ends) -> QuantArray:
        """A part in the file's blocks."""
        tensor, part = self.find(ends)
        q = tensor.blocks(self.weights, part)
        for _ in range(self.leaf.depth):
            q = ops.with_stack(jax.tree.map(lambda x: x[None], q), 1)
        return q.astype(self.leaf.like.dtype)


def _shards(where: NamedSharding | None, ndim: int) -> tuple[int, ...]:
    """The number of shards along each dim."""
    if where is None:
        return (1,) * ndim
    spec = (*where.spec, *(None,) * (ndim - len(where.spec)))
    return tuple(quant_sharding.parts_of(where.mesh, axes) for axes in spec)


def _assembled(
    shape: tuple[int, ...], where: NamedSharding | None, made: Callable[[_Ends], Any]
) -> Any:
    """An array or `QuantArray` of which this process makes the parts of its own devices.

    Args:
      shape: of the whole.
      where: the sharding of its dims, or None for one device.
      made: makes a part.
    """
    if where is None:
        return jax.tree.map(jnp.asarray, made(tuple((0, n) for n in shape)))
    parts: dict[_Ends, Any] = {}  # devices that hold the same part share it
    local = []
    for device, index in where.addressable_devices_indices_map(shape).items():
        ends = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        if ends not in parts:
            parts[ends] = made(ends)
        local.append(jax.device_put(parts[ends], device))
    if not isinstance(local[0], QuantArray):
        return jax.make_array_from_single_device_arrays(shape, where, local)
    specs = quant_sharding.array_specs(local[0], where.spec)
    whole = jax.tree.map(
        lambda spec, *xs: _joined(xs, NamedSharding(where.mesh, spec)),
        dataclasses.replace(specs, shape=local[0].shape),
        *local,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return dataclasses.replace(whole, shape=shape)


def _joined(parts: Sequence[jax.Array], where: NamedSharding) -> jax.Array:
    """The array of which each device of this process has a part of one size."""
    shards = _shards(where, parts[0].ndim)
    shape = tuple(n * k for n, k in zip(parts[0].shape, shards, strict=True))
    return jax.make_array_from_single_device_arrays(shape, where, list(parts))


def _empty(leaf: Leaf, layer: jax.Array, where: NamedSharding | None) -> jax.Array:
    """Room for all layers of an array, sharded as one of them is."""
    shape = (*leaf.like.shape[: leaf.depth], *layer.shape[leaf.depth :])
    return jnp.zeros(shape, layer.dtype, device=where and layer.sharding)


def _written(stack: jax.Array, layer: jax.Array, at: tuple[int, ...]) -> jax.Array:
    where = layer.sharding if isinstance(layer.sharding, NamedSharding) else None
    # Waited for: with many layers on their way, as many would be in memory.
    return jax.block_until_ready(_writer(where)(stack, layer, np.array(at, np.int32)))


@functools.lru_cache
def _writer(where: NamedSharding | None) -> Callable:
    """Writes a layer into its stack, in place, on every device."""

    def write(stack: Array, layer: Array, at: Int[Array, " depth"]) -> Array:
        start = [*at, *[0] * (stack.ndim - at.size)]
        return lax.dynamic_update_slice(stack, layer, start)

    if where is not None:
        specs = (where.spec, where.spec, PartitionSpec())
        write = jax.shard_map(write, mesh=where.mesh, in_specs=specs, out_specs=where.spec)
    return jax.jit(write, donate_argnums=0, out_shardings=where)
