"""A mesh in use: where parameters lie, the axes of the rows, and a model that keeps rows there."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax import compat, processes, sharding
from lora_jax.array import is_lora, leaves_by_path
from lora_jax.models.layers import Specs
from lora_jax.models.sharding import EXPERTS, ROWS, TOKENS
from lora_jax.quant.sharding import axes_of


class Placement(NamedTuple):
    """Where the arrays of a run lie.

    Attributes:
      mesh: the devices. The models of this package run on automatic axes: where the axes of the
        user's mesh are explicit, this is the same mesh with automatic ones.
      rows: the mesh axes that the rows of a batch are spread over; () copies every batch to all.
      given: the mesh of the user's own arrays, on which results are returned.
      tokens: the mesh axis that the tokens of a row are spread over, or None.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    given: Mesh
    tokens: str | None = None

    @property
    def parts(self) -> int:
        """The number of devices that the rows are spread over."""
        return math.prod(self.mesh.shape[a] for a in self.rows)

    @property
    def spans(self) -> int:
        """The number of devices that the tokens of a row are spread over."""
        return 1 if self.tokens is None else self.mesh.shape[self.tokens]


def placement(model: Any, params: Any) -> Placement | None:
    """The placement that follows from the base's own arrays; None on a single device.

    The mesh is that of the parameters, or else that of `jax.set_mesh`. Rows are spread over the
    axes that the model names (`forward.rows`), or else over `data` and `fsdp`. On explicit axes a
    model of the user's own has to name them: there every operation of a model must state how it
    treats sharded rows.
    """
    meshes = map(_mesh_of, jax.tree.leaves(params))
    given = next((m for m in meshes if m is not None and m.size > 1), None) or _mesh_in_use()
    if given is None:
        return None
    forward = getattr(model, "forward", None)
    mesh = _automatic(given) if hasattr(forward, "rows") else given
    rows = getattr(forward, "rows", ())
    # Models of others have no `rows`: XLA's partitioner then finds the places of activations.
    if not rows and AxisType.Explicit not in mesh.axis_types:
        rows = (a for a in ROWS if a in mesh.axis_names)
    spreads = hasattr(forward, "tokens") and mesh.shape.get(TOKENS, 1) > 1
    return Placement(mesh, tuple(rows), given, TOKENS if spreads else None)


def _automatic(mesh: Mesh) -> Mesh:
    """The same mesh with automatic axes, whatever the types of its own."""
    return Mesh(mesh.devices, mesh.axis_names)


def _mesh_of(x: Any) -> Mesh | None:
    """The mesh that an array lies on, or None."""
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def _mesh_in_use() -> Mesh | None:
    mesh = jax.sharding.get_mesh()
    return mesh if not mesh.empty and mesh.size > 1 else None


def model_on(model: Any, params: Any, at: Placement | None) -> Any:
    """The model with its activations kept where the rows are, to which its weights are brought.

    A model of the user's own keeps its activations where they are by itself.
    """
    forward: Any = getattr(model, "forward", None)
    if at is None or not hasattr(forward, "rows"):
        return model
    found = {"rows": at.rows, "gathered": gathered_of(params, at)}
    if hasattr(forward, "tokens"):
        found["tokens"] = at.tokens
    return dataclasses.replace(model, forward=dataclasses.replace(forward, **found))


def gathered_of(params: Any, at: Placement) -> Specs:
    """Where weights are used that are stored over the axes of a batch too: on all of those."""
    # Experts stay where they are: the tokens come to them.
    found, spread = [], {*at.rows, at.tokens} - {EXPERTS}
    for path, leaf in leaves_by_path(params).items():
        stored = getattr(leaf.w if is_lora(leaf) else leaf, "sharding", None)
        if not isinstance(stored, NamedSharding):
            continue
        left = ([a for a in axes_of(entry) if a not in spread] for entry in stored.spec)
        used = PartitionSpec(*map(tuple, left))
        if used != stored.spec:
            found.append((path, used))
    return tuple(found)


def params_on(params: Any, at: Placement | None) -> Any:
    """The tree with every leaf on the mesh: adapters like their weights, the rest copied to all."""
    if at is None:
        return params
    return on_mesh(sharding.follow(params), at.mesh)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The tree's arrays that lie on these devices where they are, of others a copy on each one."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> Any:
        found = _mesh_of(x)
        if found == mesh:
            return x
        if found is None or _automatic(found) != _automatic(mesh):
            return processes.put(x, everywhere)
        # The same mesh with axes of another type: the parts stay as they are.
        parts = [shard.data for shard in x.addressable_shards]
        where = NamedSharding(mesh, x.sharding.spec, memory_kind=x.sharding.memory_kind)
        return jax.make_array_from_single_device_arrays(x.shape, where, parts)

    return jax.tree.map(placed, tree)


@contextlib.contextmanager
def entered(at: Placement | None) -> Iterator[None]:
    """The mesh as the context's, for what names axes without a mesh."""
    if at is None:
        yield
        return
    with jax.set_mesh(at.mesh), compat.ordered_collectives(at.mesh.devices.flat):
        yield


def check_rows(at: Placement | None, batch_size: int, name: str = "batch_size") -> None:
    """Checks that a batch can be spread over the mesh.

    Raises:
      ValueError: the axes of the rows have a number of devices that does not divide the batch, or
        the model cannot spread the tokens of a row.
    """
    if at is None:
        return
    if at.tokens is None and at.mesh.shape.get(TOKENS, 1) > 1:
        raise ValueError(
            f'`mesh` has {at.mesh.shape[TOKENS]} devices along "{TOKENS}", which spreads the '
            "tokens of a row, and of the models only decoders and encoders of BERT's kind in "
            "`lora_jax.models` do that: use "
            "`data`, `fsdp` or `tensor`, or an axis of another name"
        )
    if batch_size % at.parts:
        axes = " x ".join(f"{a}={at.mesh.shape[a]}" for a in at.rows)
        raise ValueError(
            f"`{name}` is {batch_size}, but its rows are spread over {at.parts} devices ({axes}): "
            f"take a multiple of {at.parts}"
        )
