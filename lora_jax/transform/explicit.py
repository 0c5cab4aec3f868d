"""Explicit sharding: the specs that follow from the weight's, and those a thin product needs."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.transform.implicit import labels


def spec_of(x) -> tuple | None:
    """The mesh axes of each dim of `x` under an explicit mesh, None under any other."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))


def result_spec(x, x_labels, y, y_labels, summed, out, specs: dict | None):
    """The `out_sharding` a labelled contraction must state, None where JAX infers it.

    A contraction over a sharded dim is ambiguous under an explicit mesh; its result is then
    replicated along that axis, as the base's own would be.
    """
    sx, sy = spec_of(x), spec_of(y)
    if sx is None and sy is None:
        return None
    known = dict(zip(y_labels, sy or (), strict=False))
    known |= dict(zip(x_labels, sx or (), strict=False))
    if specs is None and all(known.get(label) is None for label in summed):
        return None
    return PartitionSpec(*((specs or known).get(label) for label in out))


def part_spec(spec: PartitionSpec, roles: str, part: str) -> PartitionSpec:
    """The spec of a factor from the weight's spec: the same axes on its dims, none on the rank.

    Args:
      spec: of the weight.
      roles: one letter a dim of the weight.
      part: "a", "b", "scale", "gain" or "key".
    """
    full = tuple(spec) + (None,) * (len(roles) - len(spec))
    return PartitionSpec(*(full[d] if isinstance(d, int) else None for d in labels(roles, part)))


def part_sharding(sharding: NamedSharding, roles: str, part: str) -> NamedSharding:
    """`part_spec` on the weight's own mesh."""
    return NamedSharding(sharding.mesh, part_spec(sharding.spec, roles, part))
