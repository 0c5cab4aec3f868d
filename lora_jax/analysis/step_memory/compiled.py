"""A step compiled from shapes alone, and its memory as XLA plans it; no array is allocated."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from lora_jax.analysis.step_memory.mesh import placed
from lora_jax.analysis.step_memory.step import AbstractStep, Spread, StepSettings
from lora_jax.models.mesh import Placement, entered
from lora_jax.models.sharding import ROWS, TOKENS
from lora_jax.train.mesh import results


def compiled(
    step: AbstractStep, places: Spread, at: Placement | None, *, platform: str | None = None
) -> Any:
    """The step as `train.fit` runs it, compiled; `jax.stages.Compiled`.

    Args:
      step: the step, made with the same `at`.
      places: the shardings of its arguments.
      at: from `placement`.
      platform: the platform of the devices, as jax's `lowering_platforms` names it.
    """
    args, shardings = (step.state, step.frozen, step.batch), None
    if at is not None:
        args = placed(args, (places.state, places.frozen, places.batch), at.mesh)
        shardings = results(args[0], at)
    jitted = jax.jit(step.fn, donate_argnums=(0,), out_shardings=shardings)
    platforms = None if platform is None else (platform,)
    # Nothing runs under the mesh, whose devices need not be attached.
    with entered(at):
        return jitted.trace(*args).lower(lowering_platforms=platforms).compile()


def placement(settings: StepSettings, devices: Sequence[Any] | None = None) -> Placement | None:
    """The mesh that a step is compiled for; None for one device of this machine.

    Args:
      settings: the settings of the step.
      devices: the devices, which may be those of a topology that is not attached; the local ones
        by default.

    Raises:
      ValueError: a mesh of more devices than there are.
    """
    # Without devices of another kind, a step on one device needs no shardings.
    if devices is None and math.prod(settings.mesh.values()) == 1:
        return None
    mesh = _grid(settings, jax.devices() if devices is None else devices)
    return Placement(mesh, ROWS, mesh, TOKENS if settings.mesh[TOKENS] > 1 else None)


def temporaries(program: Any) -> int:
    """The bytes that a compiled step needs beside its arguments, from XLA's own plan.

    Raises:
      ValueError: a compiler without memory statistics.
    """
    stats = program.memory_analysis()
    if stats is None:
        raise ValueError(
            "`exact` takes the compiler's figures, and this backend's compiler reports none: leave "
            "it out"
        )
    if _for_tpu(program):
        # libtpu's `temp_size_in_bytes` is more than a program needs: one with 1.2 GiB of arguments
        # and 2.2 of these compiles for a device of 3.1 GiB. Its peak is what that limit is compared
        # with.
        return stats.peak_memory_in_bytes - stats.argument_size_in_bytes
    # Outputs that alias a donated argument need no memory of their own.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + max(new, 0)


def _for_tpu(program: Any) -> bool:
    """Whether a program is compiled for TPUs, attached or not."""
    return any(
        device.platform == "tpu"
        for sharding in jax.tree.leaves(program.input_shardings)
        for device in sharding.device_set
    )


def _grid(settings: StepSettings, devices: Sequence[Any]) -> Mesh:
    names, sizes = tuple(settings.mesh), tuple(settings.mesh.values())
    count = math.prod(sizes)
    if len(devices) < count:
        raise ValueError(
            f"`exact` compiles for the mesh's {count} devices, and this machine has "
            f"{len(devices)}: leave it out"
        )
    taken = np.array(devices[:count]).reshape(sizes)
    return Mesh(taken, names, axis_types=(AxisType.Auto,) * len(names))
