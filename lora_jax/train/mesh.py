"""The mesh of a run: where its state and its batches lie, and what its processes agree on."""

import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import processes
from lora_jax.models.mesh import Placement, gathered_of, on_mesh
from lora_jax.train.loss import TOGETHER, Rows
from lora_jax.train.step import TrainState


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
    return on_mesh(state, at.mesh)


def results(state: Any, at: Placement | None) -> Any:
    """The shardings of a step's results, so that the next step can take them; None off a mesh."""
    if at is None:
        return None
    # XLA would choose others than the arguments', and a compiled step refuses those.
    whole = NamedSharding(at.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x.sharding, state), whole


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
    # A training step's tokens begin with the number of the microbatch.
    first = [None] * (batch.tokens.ndim - 2)
    every = at.rows if at.tokens is None else (*at.rows, at.tokens)
    # Positions are apart where each part of the batch has its own, see `Rows`.
    others = PartitionSpec(*first, every) if rows_of(at).count > 1 else PartitionSpec()
    # Every device compares its tokens' texts with those of all keys of a row.
    by_row = {
        "tokens": PartitionSpec(*first, at.rows, at.tokens),
        "segments": PartitionSpec(*first, at.rows),
        "reads": PartitionSpec(*first, at.rows),
        "images": PartitionSpec(*first, at.rows),
    }
    fields = {name: x for name, x in batch._asdict().items() if x is not None}
    return batch._replace(
        **{
            name: processes.put(x, NamedSharding(at.mesh, by_row.get(name, others)))
            for name, x in fields.items()
        }
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
    weights = () if params is None else gathered_of(params, at)
    return Rows(at.rows, at.parts, weights, at.tokens, at.spans)


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
