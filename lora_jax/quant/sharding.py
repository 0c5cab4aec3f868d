"""Shardings of quantized weights: one spec for codes, scales and biases.

The arrays of a weight are those of its matrix `(stack..., K, N)`. So a spec of the weight's own
dims becomes one of the matrix: K and N have the axes of their first dim, because their other dims
follow it in memory. The scales of scales are few, and replicated.
"""

import dataclasses
import math
from typing import Any

import jax.core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax import processes
from lora_jax.dims import in_dims, out_dims, stack_dims
from lora_jax.quant.array import ARRAYS, QuantArray, known, matrix_sizes, stored_inputs, units


def matrix_spec(q: QuantArray, spec: PartitionSpec) -> PartitionSpec:
    """The spec of `packed`, `scale` and `bias` from one of the weight's own dims.

    Raises:
      ValueError: a dim is sharded that is not the first of its group.
    """
    # A spec may be shorter than its array.
    full = tuple(spec) + (None,) * (q.ndim - len(spec))
    groups = (in_dims(q.roles), out_dims(q.roles))
    for group in groups:
        if any(full[d] is not None for d in group[1:]):
            raise ValueError(
                f"spec {spec} of a quantized weight of shape {q.shape}, roles {q.roles}: the dims "
                f"{tuple(group)} are stored as one, and only the first of them can be sharded; "
                "leave the others whole, None in a spec or a dim of no axis in rules"
            )
    # A `QuantArray` may have lost all in or out dims to a slice.
    owners = [full[group[0]] if group else None for group in groups]
    return PartitionSpec(*(full[d] for d in stack_dims(q.roles)), *owners)


def array_specs(q: QuantArray, spec: PartitionSpec) -> QuantArray:
    """A `QuantArray` with a spec in place of each array."""
    matrix = matrix_spec(q, spec)
    # The scales of scales run over the whole matrix and follow only its stack, as orders do.
    stack = PartitionSpec(*tuple(matrix)[:-2])
    specs: dict[str, PartitionSpec] = {name: stack for name in ARRAYS}
    specs |= {name: matrix for name in ("packed", "scale", "bias")}
    held = known(q.format)[1]
    for name, array in held.arrays.items() if held else ():
        # One row for all inputs is the same in every part of them.
        if array is not None:
            specs[name] = matrix if array.blocks else PartitionSpec(*stack, None, matrix[-1])
    return dataclasses.replace(
        q, **{name: spec for name, spec in specs.items() if getattr(q, name) is not None}
    )


def shardings(q: QuantArray, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> QuantArray:
    """A `QuantArray` with a sharding in place of each array, for `jax.device_put` and `jit`."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        array_specs(q, spec),
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


def check_shards(q: QuantArray, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> None:
    """Raises unless each shard of the inputs is made of whole superblocks.

    Raises:
      ValueError: a superblock would be split.
    """
    parts = _parts(q, spec, mesh)
    # The halves of a superblock share bytes: a shard cannot end between them.
    rows, outputs = units(q)
    blocks = -(-stored_inputs(q) // rows)
    if parts > 1 and q.order is not None:
        raise ValueError(
            f"a quantized weight of shape {q.shape}, roles {q.roles}, has its inputs in an order "
            "of their own (act-order): they cannot be split among devices; shard another dim"
        )
    columns = parts_of(mesh, matrix_spec(q, spec)[-1])
    if outputs > 1 and q.packed.shape[-1] % (outputs * columns) and columns > 1:
        raise ValueError(
            f"a quantized weight of shape {q.shape}, roles {q.roles}, has a scale for {outputs} "
            f"outputs: they cannot be split among {columns} devices; shard another dim"
        )
    if parts > 1 and stored_inputs(q) % (rows * parts):
        raise ValueError(
            f"a quantized weight of shape {q.shape}, roles {q.roles}, has {blocks} superblocks of "
            f"{rows} inputs: they cannot be split among {parts} devices; shard another dim or "
            f"use a smaller block"
        )


def _parts(q: QuantArray, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of the inputs."""
    return parts_of(mesh, matrix_spec(q, spec)[-2])


def parts_of(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """The number of parts of a dim that has these axes in a spec."""
    return math.prod(mesh.shape[name] for name in axes_of(axes))


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes that an entry of a `PartitionSpec` names: one, several, or none for None."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def put(q: QuantArray, sharding: Any) -> QuantArray:
    """Moves a weight to a device or a memory space, or spreads it over a mesh."""
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(q, sharding)
    check_shards(q, sharding.spec, sharding.mesh)
    places = shardings(q, sharding.mesh, sharding.spec)
    if sharding.memory_kind is not None:
        places = jax.tree.map(lambda s: s.with_memory_kind(sharding.memory_kind), places)
    return jax.tree.map(processes.put, q, places)


def local_part(q: QuantArray, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> QuantArray:
    """The weight inside a `shard_map`, where each device has its shard of the shape.

    Args:
      q: with expanded scales; its arrays are replaced by the local ones afterwards.
      spec: of the weight's own dims.
      mesh: whose axes the spec names.

    Raises:
      ValueError: a shard's inputs are not whole superblocks of its own.
    """
    check_shards(q, spec, mesh)
    stored, inputs = stored_inputs(q), matrix_sizes(q)[1]
    # All padding is at the end, so the last shard would have fewer true inputs than the others.
    if stored != inputs and _parts(q, spec, mesh) > 1:
        raise ValueError(
            f"a quantized weight of shape {q.shape}, roles {q.roles}, has {inputs} inputs filled "
            f"up to {stored}: inside a shard_map they cannot be split; shard another dim or use a "
            f"block of which {2 * _parts(q, spec, mesh)} divide the inputs"
        )
    # Inside a `shard_map` the static shape must be the local one: it is what `matmul` checks.
    shape = list(q.shape)
    for d, axes in enumerate(spec):
        shape[d] //= parts_of(mesh, axes)
    return dataclasses.replace(q, shape=tuple(shape))
