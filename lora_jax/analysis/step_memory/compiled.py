"""The memory of a step as XLA plans it: the step is compiled, and no array is allocated."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.analysis.step_memory import mesh
from lora_jax.analysis.step_memory.liveness import Alive
from lora_jax.analysis.step_memory.step import AbstractStep, Spread, StepSettings


def compiled(
    step: AbstractStep,
    places: Spread,
    settings: StepSettings,
    *,
    devices: Sequence[Any] | None = None,
    platform: str | None = None,
) -> Alive:
    """The bytes that a compiled step needs beside its arguments, from XLA's own plan.

    Args:
      step: the step; for a mesh, made with `rows=lora_jax.models.sharding.ROWS`.
      places: the sharding of its arguments.
      settings: the settings it was made with.
      devices: the devices to compile for, which may be those of a topology that is not attached;
        the local ones by default.
      platform: the platform of `devices`, as jax's `lowering_platforms` names it.

    Raises:
      ValueError: a mesh of more devices than there are, or a compiler without memory statistics.
    """
    args = (step.state, step.frozen, step.batch)
    # Without devices of another kind, a step on one device needs no shardings.
    if devices is None and math.prod(settings.mesh.values()) == 1:
        return _temporaries(step, args, platform)
    grid = _grid(settings, jax.devices() if devices is None else devices)
    specs = mesh.leaves((places.state, places.frozen, places.batch))
    flat, tree = jax.tree.flatten(args)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(grid, spec))
        for x, spec in zip(flat, specs, strict=True)
    ]
    with jax.set_mesh(grid):
        return _temporaries(step, jax.tree.unflatten(tree, placed), platform)


def _temporaries(step: AbstractStep, args: Any, platform: str | None) -> Alive:
    traced = jax.jit(step.fn, donate_argnums=(0,)).trace(*args)
    lowered = traced.lower(lowering_platforms=None if platform is None else (platform,))
    stats = lowered.compile().memory_analysis()
    if stats is None:
        raise ValueError(
            "`exact` takes the compiler's figures, and this backend's compiler reports none: leave "
            "it out"
        )
    # Outputs that alias a donated argument need no memory of their own.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Alive(stats.temp_size_in_bytes + max(new, 0), 0, ())


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
