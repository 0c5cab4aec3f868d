"""A step compiled from shapes alone, and its memory as XLA plans it; no array is allocated."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.analysis.step_memory import mesh
from lora_jax.analysis.step_memory.step import (
    AbstractStep,
    StepSettings,
    abstract_step,
    spread,
)
from lora_jax.models.sharding import ROWS
from lora_jax.train.mesh import Placement, entered, results


def compiled(
    config: Any,
    settings: StepSettings,
    *,
    devices: Sequence[Any] | None = None,
    platform: str | None = None,
) -> Any:
    """The step as `train.fit` runs it, compiled; `jax.stages.Compiled`.

    Args:
      config: the model's configuration.
      settings: the settings of the step.
      devices: the devices to compile for, which may be those of a topology that is not attached;
        the local ones by default.
      platform: the platform of `devices`, as jax's `lowering_platforms` names it.

    Raises:
      ValueError: a mesh of more devices than there are.
    """
    # Without devices of another kind, a step on one device needs no shardings.
    if devices is None and math.prod(settings.mesh.values()) == 1:
        step = abstract_step(config, settings, batch=settings.batch)
        return _compile(step, (step.state, step.frozen, step.batch), None, platform)
    at = Placement(_grid(settings, jax.devices() if devices is None else devices), ROWS)
    step = abstract_step(config, settings, batch=settings.batch, at=at)
    places = spread(step, settings)
    flat, tree = jax.tree.flatten((step.state, step.frozen, step.batch))
    specs = mesh.leaves((places.state, places.frozen, places.batch))
    args = jax.tree.unflatten(
        tree,
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(at.mesh, spec))
            for x, spec in zip(flat, specs, strict=True)
        ],
    )
    # Nothing runs under the mesh, whose devices need not be attached.
    with entered(at):
        return _compile(step, args, results(args[0], at), platform)


def _compile(step: AbstractStep, args: Any, results: Any, platform: str | None) -> Any:
    jitted = jax.jit(step.fn, donate_argnums=(0,), out_shardings=results)
    platforms = None if platform is None else (platform,)
    return jitted.trace(*args).lower(lowering_platforms=platforms).compile()


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
    # Outputs that alias a donated argument need no memory of their own.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + max(new, 0)


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
