"""The mesh of a run: where its state and its batches lie, and how the model keeps rows there."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax import processes, sharding
from lora_jax.array import is_lora, leaves_by_path
from lora_jax.models.layers import Specs
from lora_jax.models.sharding import ROWS
from lora_jax.quant.sharding import axes_of
from lora_jax.train.loss import TOGETHER, Rows
from lora_jax.train.step import TrainState


class Placement(NamedTuple):
    """Where the arrays of a run lie.

    Attributes:
      mesh: the devices.
      rows: the mesh axes that the rows of a batch are spread over; () copies every batch to all.
    """

    mesh: Mesh
    rows: tuple[str, ...]

    @property
    def parts(self) -> int:
        """The number of devices that the rows are spread over."""
        return math.prod(self.mesh.shape[a] for a in self.rows)


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
    # Models of others have no `rows`: XLA's partitioner then finds the places of activations.
    if not rows and AxisType.Explicit not in mesh.axis_types:
        rows = (a for a in ROWS if a in mesh.axis_names)
    return Placement(mesh, tuple(rows))


def _mesh_in_use() -> Mesh | None:
    mesh = jax.sharding.get_mesh()
    return mesh if not mesh.empty and mesh.size > 1 else None


def model_on(model: Any, params: Any, at: Placement | None) -> Any:
    """The model with its activations kept where the rows are, to which its weights are brought.

    Explicit axes keep them there by themselves; so does a model without a `forward` of ours.
    """
    forward: Any = getattr(model, "forward", None)
    if at is None or not hasattr(forward, "rows") or AxisType.Explicit in at.mesh.axis_types:
        return model
    forward = dataclasses.replace(forward, rows=at.rows, gathered=_gathered(params, at))
    return dataclasses.replace(model, forward=forward)


def _gathered(params: Any, at: Placement) -> Specs:
    """Where weights are used that are stored over the axes of the rows too: on all of those."""
    found = []
    for path, leaf in leaves_by_path(params).items():
        stored = getattr(leaf.w if is_lora(leaf) else leaf, "sharding", None)
        if not isinstance(stored, NamedSharding):
            continue
        left = ([a for a in axes_of(entry) if a not in at.rows] for entry in stored.spec)
        used = PartitionSpec(*map(tuple, left))
        if used != stored.spec:
            found.append((path, used))
    return tuple(found)


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
    return processes.put(x, NamedSharding(mesh, PartitionSpec()))


def state_on(
    state: TrainState, tx: optax.GradientTransformation, at: Placement | None
) -> TrainState:
    """The state with moments like their parameters, and numbers copied to all devices."""
    if at is None:
        return state
    moments = optax.tree.map_params(
        tx, lambda m, p: processes.put(m, p.sharding), state.opt_state, state.trainable
    )
    state = state._replace(opt_state=moments)
    return jax.tree.map(lambda x: on_mesh(x, at.mesh), state)


def results(state: TrainState, at: Placement | None) -> Any:
    """The shardings of a step's results, so that the next step can take them; None off a mesh."""
    if at is None:
        return None
    # XLA would choose others than the arguments', and a compiled step refuses those.
    whole = NamedSharding(at.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x.sharding, state), whole


def entered(at: Placement | None) -> contextlib.AbstractContextManager:
    """The mesh as the context's, for what names axes without a mesh."""
    return contextlib.nullcontext() if at is None else jax.set_mesh(at.mesh)


def agreement(
    at: Placement | None,
) -> Callable[[signal.Signals | None], signal.Signals | None]:
    """A function from the signal that this process has received to the one that all act on.

    With several processes it is what any of them had at the call before: the numbers travel while
    the devices compute, so that no process waits for another.
    """
    if at is None or not processes.several():
        return lambda came: came
    apart = NamedSharding(at.mesh, PartitionSpec(at.mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(at.mesh, PartitionSpec()))
    # What is read now was sent a step ago.
    pending: list[Any] = [0]

    def agreed(came: signal.Signals | None) -> signal.Signals | None:
        # One number a device, that every device has a part of the array.
        own = np.full(1, came or 0, np.int32)
        flags = jax.make_array_from_callback((at.mesh.size,), apart, lambda index: own)
        pending.append(largest(flags))
        number = int(pending.pop(0))
        return signal.Signals(number) if number else None

    return agreed


def batch_on(batch: Any, at: Placement | None) -> Any:
    """A batch as global arrays: each process hands over the rows of its own devices.

    Every process plans and pads the whole batch, which takes microseconds a row: which examples
    share a batch depends on the lengths of all.
    """
    if at is None:
        return batch
    apart = NamedSharding(at.mesh, PartitionSpec(None, at.rows))
    # Positions are apart where each part of the rows has its own, see `Rows`.
    others = apart if rows_of(at).parts > 1 else NamedSharding(at.mesh, PartitionSpec())
    by_row = ("tokens", "segments")
    fields = {name: x for name, x in batch._asdict().items() if x is not None}
    return batch._replace(
        **{n: processes.put(x, apart if n in by_row else others) for n, x in fields.items()}
    )


def rows_of(at: Placement | None, params: Any = None) -> Rows:
    """How the rows of a batch are spread; explicit axes state it in the arrays' own types.

    Args:
      at: the placement of the run.
      params: the parameters on the mesh, for the loss; a batch needs none.
    """
    if at is None or AxisType.Explicit in at.mesh.axis_types:
        return TOGETHER
    # Those of the blocks are not the head's, and nothing is done for them.
    return Rows(at.rows, at.parts, () if params is None else _gathered(params, at))


def check_processes(at: Placement | None) -> None:
    """Checks that the base lies on devices of all processes, as the steps of a run do.

    Raises:
      ValueError: it lies on this process's devices alone.
    """
    if not processes.several():
        return
    mine = set() if at is None else {d.process_index for d in at.mesh.devices.flat}
    if len(mine) < jax.process_count():
        raise ValueError(
            f"`jax.distributed` runs {jax.process_count()} processes, but the parameters lie on "
            f"devices of {max(len(mine), 1)}: spread them over a mesh of all devices "
            "(models.make_mesh, `mesh`)"
        )


def check_rows(at: Placement | None, batch_size: int, name: str = "batch_size") -> None:
    """Checks that the rows of a batch can be spread evenly.

    Raises:
      ValueError: the axes of the rows have a number of devices that does not divide the batch.
    """
    if at is None:
        return
    if batch_size % at.parts:
        axes = " x ".join(f"{a}={at.mesh.shape[a]}" for a in at.rows)
        raise ValueError(
            f"`{name}` is {batch_size}, but its rows are spread over {at.parts} devices ({axes}): "
            f"take a multiple of {at.parts}"
        )
