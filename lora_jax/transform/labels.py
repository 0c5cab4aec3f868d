"""Contraction of two arrays whose axes carry labels."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import compat
from lora_jax.dims import in_dims, out_dims, stack_dims


def contract(
    x: Any,
    x_labels: Sequence,
    y: Any,
    y_labels: Sequence,
    *,
    keep: Collection,
    precision: Any = None,
    preferred: Any = None,
    specs: dict | None = None,
) -> tuple[Array, list]:
    """Contracts every label that both arrays have and that is not kept.

    A shared label that is kept is a batch dimension; a label only one of them has is summed away
    unless it is kept.

    Args:
      x, y: arrays; `x_labels`, `y_labels`: a label for each axis.
      keep: labels the result keeps.
      precision: as in `lax.dot_general`.
      preferred: dtype of the result, None for the operands' own.
      specs: label to mesh axes of the result, under explicit sharding.

    Returns:
      The result and its labels: batch, then `x`'s own, then `y`'s own.
    """
    # Summing first makes the contraction smaller.
    x, x_labels = _sum_away(x, x_labels, y_labels, keep)
    y, y_labels = _sum_away(y, y_labels, x_labels, keep)
    shared = [label for label in x_labels if label in y_labels]
    batch = [label for label in shared if label in keep]
    summed = [label for label in shared if label not in keep]
    dimension_numbers = (
        ([x_labels.index(s) for s in summed], [y_labels.index(s) for s in summed]),
        ([x_labels.index(s) for s in batch], [y_labels.index(s) for s in batch]),
    )
    # lax.dot_general's order: batch, then each operand's own axes.
    rest = [s for s in x_labels if s not in shared] + [s for s in y_labels if s not in shared]
    out = batch + rest
    result = lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred,
        out_sharding=result_spec(
            x, x_labels, y, y_labels=y_labels, summed=summed, out=out, specs=specs
        ),
    )
    return result, out


def _sum_away(array: Array, own: Sequence, other: Sequence, keep: Collection) -> tuple[Any, list]:
    # Labels that are neither wanted nor shared with the other operand.
    lost = [i for i, label in enumerate(own) if label not in keep and label not in other]
    if lost:
        array = jnp.sum(array, axis=tuple(lost))
    return array, [label for label in own if label in keep or label in other]


def result_spec(
    x: Any,
    x_labels: Sequence,
    y: Any,
    y_labels: Sequence,
    summed: Sequence,
    out: Sequence,
    specs: dict | None,
) -> NamedSharding | None:
    """The `out_sharding` a labelled contraction must state, None where JAX infers it.

    A contraction over a sharded dim is ambiguous under an explicit mesh; its result is then
    replicated along that axis, as the base's own would be.
    """
    sx, sy = compat.spec_of(x), compat.spec_of(y)
    if sx is None and sy is None:
        return None
    # Where both operands have a label, the left one's axes count.
    known = dict(zip(y_labels, sy or (), strict=False))
    known |= dict(zip(x_labels, sx or (), strict=False))
    if specs is None and all(known.get(label) is None for label in summed):
        return None
    # With its mesh: the base function may run without `jax.set_mesh`.
    mesh = jax.typeof(x if sx is not None else y).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*((specs or known).get(label) for label in out)))


def part_spec(spec: PartitionSpec, roles: str, part: str) -> PartitionSpec:
    """The spec of a factor from the weight's spec: the same axes on its dims, none on the rank.

    Args:
      spec: of the weight.
      roles: one letter a dim of the weight.
      part: "a", "b", "scale", "gain" or "key".
    """
    # A spec may be shorter than the array: the rest is replicated.
    full = tuple(spec) + (None,) * (len(roles) - len(spec))
    return PartitionSpec(*(full[d] if isinstance(d, int) else None for d in labels(roles, part)))


def part_sharding(sharding: NamedSharding, roles: str, part: str) -> NamedSharding:
    """`part_spec` on the weight's own mesh."""
    return NamedSharding(sharding.mesh, part_spec(sharding.spec, roles, part))


# A label names one axis of a factor: a dimension number of the weight, or RANK.
RANK = "r"


def labels(roles: str, part: str) -> list:
    """The axes of one part of an implicit array, as labels in order."""
    stack = stack_dims(roles)
    ins, outs = in_dims(roles), out_dims(roles)
    return {
        "w": list(range(len(roles))),
        # Both factors have the stack first; the rank is A's last axis and B's first behind it.
        "a": [*stack, *ins, RANK],
        "b": [*stack, RANK, *outs],
        "scale": stack,
        "gain": [*stack, *outs],
        "bias": [*stack, *outs],
        "key": stack,
    }[part]


PARTS = ("a", "b", "scale", "gain", "key", "bias")


def reorder(array: Array, have: Sequence, want: Sequence) -> Array:
    """Transposes an array from one order of labels to another (the same labels)."""
    if list(have) == list(want):
        return array
    return lax.transpose(array, [list(have).index(label) for label in want])


def expand_to(array: Array, have: Sequence, want: Sequence) -> Array:
    """Broadcast-ready view of `array` (axes `have`) against axes `want`: missing ones are 1."""
    order = [label for label in want if label in have]
    array = reorder(array, list(have), order)
    shape = dict(zip(order, array.shape, strict=True))
    return lax.reshape(array, [shape.get(label, 1) for label in want])
