"""The memory of a step as the compiler plans it: the step is compiled, nothing is allocated."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.analysis.memory import mesh
from lora_jax.analysis.memory.liveness import Alive
from lora_jax.analysis.memory.step import AbstractStep, Spread, StepSettings


def compiled(
    step: AbstractStep,
    places: Spread,
    settings: StepSettings,
    *,
    devices: Sequence[Any] | None = None,
    platform: str | None = None,
) -> Alive:
    """What a compiler plans for a step, beside its arguments.

    Args:
      step: it; on a mesh, made with `rows=memory_mesh.ROWS`.
      places: where its arguments lie on the mesh.
      settings: its settings.
      devices: to compile for, such as those of a topology that is not there; by default the local
        ones.
      platform: of these devices, as jax's `lowering_platforms` names it.

    Raises:
      ValueError: a mesh of more devices than there are, or a compiler that does not say.
    """
    args = (step.state, step.frozen, step.batch)
    if devices is None and math.prod(settings.mesh.values()) == 1:
        return _asked(step, args, platform)
    grid = _grid(settings, jax.devices() if devices is None else devices)
    specs = mesh.leaves((places.state, places.frozen, places.batch))
    flat, tree = jax.tree.flatten(args)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(grid, spec))
        for x, spec in zip(flat, specs, strict=True)
    ]
    with jax.set_mesh(grid):
        return _asked(step, jax.tree.unflatten(tree, placed), platform)


def _asked(step: AbstractStep, args: Any, platform: str | None) -> Alive:
    traced = jax.jit(step.fn, donate_argnums=(0,)).trace(*args)
    lowered = traced.lower(lowering_platforms=None if platform is None else (platform,))
    said = lowered.compile().memory_analysis()
    if said is None:
        raise ValueError("`exact`: this backend's compiler does not say; leave it out")
    new = said.output_size_in_bytes - said.alias_size_in_bytes
    return Alive(said.temp_size_in_bytes + max(new, 0), 0, ())


def _grid(settings: StepSettings, devices: Sequence[Any]) -> Mesh:
    names, sizes = tuple(settings.mesh), tuple(settings.mesh.values())
    count = math.prod(sizes)
    if len(devices) < count:
        raise ValueError(
            f"`exact`: the mesh has {count} devices, this machine {len(devices)}; leave `exact` out"
        )
    taken = np.array(devices[:count]).reshape(sizes)
    return Mesh(taken, names, axis_types=(AxisType.Auto,) * len(names))
