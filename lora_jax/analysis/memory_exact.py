"""The memory of a step as the compiler plans it: the step is compiled, nothing is allocated."""

import math
from typing import Any

import jax

from lora_jax.analysis import memory_mesh
from lora_jax.analysis.memory_live import Alive
from lora_jax.analysis.memory_step import AbstractStep, Spread, StepSettings


def compiled(step: AbstractStep, places: Spread, settings: StepSettings) -> Alive:
    """What the default backend's compiler plans for a step, beside its arguments.

    Args:
      step: it.
      places: where its arguments lie on the mesh.
      settings: its settings.

    Raises:
      ValueError: a mesh of more devices than there are, or a compiler that does not say.
    """
    args = (step.state, step.frozen, step.batch)
    specs = (places.state, places.frozen, places.batch)
    if math.prod(settings.mesh.values()) > 1:
        args = _placed(args, specs, settings)
    said = jax.jit(step.fn, donate_argnums=(0,)).lower(*args).compile().memory_analysis()
    if said is None:
        raise ValueError("`exact`: this backend's compiler does not say; leave it out")
    new = said.output_size_in_bytes - said.alias_size_in_bytes
    return Alive(said.temp_size_in_bytes + max(new, 0), 0, ())


def _placed(args: Any, specs: Any, settings: StepSettings) -> Any:
    names, sizes = tuple(settings.mesh), tuple(settings.mesh.values())
    if len(jax.devices()) < math.prod(sizes):
        raise ValueError(
            f"`exact`: the mesh has {math.prod(sizes)} devices, this machine {len(jax.devices())}; "
            "leave `exact` out"
        )
    grid = jax.make_mesh(
        sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names),
        devices=jax.devices()[: math.prod(sizes)],
    )  # fmt: skip
    flat, tree = jax.tree.flatten(args)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(grid, spec))
        for x, spec in zip(flat, memory_mesh.leaves(specs), strict=True)
    ]
    return jax.tree.unflatten(tree, placed)
