"""The mesh of a run: where its state and its batches lie, and how the model keeps rows there."""

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax import sharding
from lora_jax.models.sharding import ROWS
from lora_jax.train.step import TrainState


class Placement(NamedTuple):
    """Where the arrays of a run lie.

    Attributes:
      mesh: the devices.
      rows: the mesh axes that the rows of a batch are spread over; () copies every batch to all.
    """

    mesh: Mesh
    rows: tuple[str, ...]


def placement(model: Any, params: Any) -> Placement | None:
    """The placement that follows from the base's own arrays; None on a single device.

    The mesh is that of the parameters, or else that of `jax.set_mesh`. Rows are spread over the
    axes that the model names (`forward.rows`), or else over `data` and `fsdp`. Where axes are
    explicit the model has to name them: there every operation of a model must state how it treats
    sharded rows.
    """
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(params))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding))
    mesh = next((m for m in meshes if isinstance(m, Mesh) and m.size > 1), None) or _mesh_in_use()
    if mesh is None:
        return None
    rows = getattr(getattr(model, "forward", None), "rows", ())
    if not rows and AxisType.Explicit not in mesh.axis_types:
        rows = (a for a in ROWS if a in mesh.axis_names)
    return Placement(mesh, tuple(rows))


def _mesh_in_use() -> Mesh | None:
    mesh = jax.sharding.get_mesh()
    return mesh if not mesh.empty and mesh.size > 1 else None


def model_on(model: Any, at: Placement | None) -> Any:
    """The model with its activations kept where the rows of the batch are.

    Explicit axes keep them there by themselves; so does a model without a `forward` of ours.
    """
    forward: Any = getattr(model, "forward", None)
    if at is None or not hasattr(forward, "rows") or AxisType.Explicit in at.mesh.axis_types:
        return model
    return dataclasses.replace(model, forward=dataclasses.replace(forward, rows=at.rows))


def params_on(params: Any, at: Placement | None) -> Any:
    """The tree with every leaf on the mesh: adapters like their weights, the rest copied to all."""
    if at is None:
        return params
    return jax.tree.map(lambda x: on_mesh(x, at.mesh), sharding.follow(params))


def on_mesh(x: Any, mesh: Mesh) -> Any:
    """The array itself if it lies on the mesh, else a copy on every device of it."""
    found = getattr(x, "sharding", None)
    if isinstance(found, NamedSharding) and found.mesh == mesh:
        return x
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def state_on(
    state: TrainState, tx: optax.GradientTransformation, at: Placement | None
) -> TrainState:
    """The state with moments like their parameters, and numbers copied to all devices."""
    if at is None:
        return state
    moments = optax.tree.map_params(
        tx, lambda m, p: jax.device_put(m, p.sharding), state.opt_state, state.trainable
    )
    state = state._replace(opt_state=moments)
    return jax.tree.map(lambda x: on_mesh(x, at.mesh), state)


def results(state: TrainState, at: Placement | None) -> Any:
    """The shardings of a step's results, so that the next step can take them; None off a mesh."""
    if at is None:
        return None
    whole = NamedSharding(at.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x.sharding, state), whole


def entered(at: Placement | None) -> contextlib.AbstractContextManager:
    """The mesh as the context's, for what names axes without a mesh."""
    return contextlib.nullcontext() if at is None else jax.set_mesh(at.mesh)


def batch_on(batch: Any, at: Placement | None) -> Any:
    """A batch as global arrays: each process hands over the rows of its own devices."""
    if at is None:
        return batch
    rows = NamedSharding(at.mesh, PartitionSpec(None, at.rows))
    whole = NamedSharding(at.mesh, PartitionSpec())
    places = batch._replace(**{f: rows if f == "tokens" else whole for f in batch._fields})
    return jax.tree.map(_global, batch, places)


def _global(x: np.ndarray, where: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def check_rows(at: Placement | None, batch_size: int, name: str = "batch_size") -> None:
    """Checks that the rows of a batch can be spread evenly.

    Raises:
      ValueError: the axes of the rows have a number of devices that does not divide the batch.
    """
    if at is None:
        return
    parts = math.prod(at.mesh.shape[a] for a in at.rows)
    if batch_size % parts:
        axes = " x ".join(f"{a}={at.mesh.shape[a]}" for a in at.rows)
        raise ValueError(
            f"`{name}` is {batch_size}, but its rows are spread over {parts} devices ({axes}): "
            f"take a multiple of {parts}"
        )
