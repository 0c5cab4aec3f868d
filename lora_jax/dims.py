"""Roles of dimensions (stack, in, out), their sizes, and the matrix form of a weight."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

AnyArray = Array | np.ndarray


def a_dims(roles: str) -> list[int]:
    """The dims of `w` that `a` has, in `a`'s order; the rank comes last."""
    return stack_dims(roles) + [d for d, role in enumerate(roles) if role == "i"]


def b_dims(roles: str) -> list[int]:
    """The dims of `w` that `b` has, in `b`'s order; the rank comes after the stack dims."""
    return stack_dims(roles) + out_dims(roles)


def stack_dims(roles: str) -> list[int]:
    return [d for d, role in enumerate(roles) if role == "s"]


def in_dims(roles: str) -> list[int]:
    return [d for d, role in enumerate(roles) if role == "i"]


def out_dims(roles: str) -> list[int]:
    return [d for d, role in enumerate(roles) if role == "o"]


def sizes(shape: tuple[int, ...], roles: str) -> tuple[tuple[int, ...], int, int]:
    """The stack's shape, and the products of the in and of the out dims."""
    stack = tuple(shape[d] for d in stack_dims(roles))
    return (
        stack,
        math.prod(shape[d] for d in in_dims(roles)),
        math.prod(shape[d] for d in out_dims(roles)),
    )


def factor_shapes(shape: tuple[int, ...], roles: str, rank: int) -> tuple[tuple, tuple]:
    """The shapes of `a` and of `b` for a weight of this shape, roles and rank."""
    stack = [shape[d] for d in stack_dims(roles)]
    a = [*stack, *(shape[d] for d in in_dims(roles)), rank]
    b = [*stack, rank, *(shape[d] for d in out_dims(roles))]
    return tuple(a), tuple(b)


def check_factors(name: str, leaf: Any) -> None:
    """Checks the factors and the scale of a `LoraArray`, which may have been made by hand.

    Raises:
      TypeError: one of them is no array.
      ValueError: one has another shape.
    """
    parts = {"a": leaf.a, "b": leaf.b, "scale": leaf.scale}
    for part, value in parts.items():
        if not hasattr(value, "shape"):
            raise TypeError(f"`{name}`: `{part}` must be an array, got {value!r}")
    rank = leaf.a.shape[-1] if leaf.a.ndim else 0
    a, b = factor_shapes(leaf.shape, leaf.roles, rank)
    stack = tuple(leaf.shape[d] for d in stack_dims(leaf.roles))
    for (part, value), wanted in zip(parts.items(), (a, b, stack), strict=True):
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"`{name}`: `{part}` has shape {tuple(value.shape)}, expected {wanted} for a "
                f"weight of shape {tuple(leaf.shape)}, roles {leaf.roles} and rank {rank}"
            )


def to_matrix(w: AnyArray, roles: str) -> Array:
    """A weight as `(stack..., in, out)`; unit dims, with role `u`, are dropped."""
    order = stack_dims(roles) + in_dims(roles) + out_dims(roles)
    # Size 1, so they may go last and vanish in the reshape.
    units = [d for d in range(len(roles)) if d not in order]
    stack, fan_in, fan_out = sizes(w.shape, roles)
    return jnp.transpose(w, [*order, *units]).reshape(*stack, fan_in, fan_out)


def from_matrix(matrix: AnyArray, shape: tuple[int, ...], roles: str) -> Array:
    """The weight of a `(stack..., in, out)` matrix, in its own shape and order of dims.

    Args:
      matrix: of `to_matrix`, perhaps with rows of padding after the last input.
      shape, roles: of the weight.
    """
    order = stack_dims(roles) + in_dims(roles) + out_dims(roles)
    _, fan_in, _ = sizes(shape, roles)
    if matrix.shape[-2] != fan_in:
        matrix = lax.slice_in_dim(matrix, 0, fan_in, axis=matrix.ndim - 2)
    # The matrix has the dims by role; `order.index` puts them back where the weight has them.
    full = matrix.reshape([shape[d] for d in order])
    return jnp.transpose(full, [order.index(d) for d in sorted(order)]).reshape(shape)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list, list]]:
    """Pairs runs of old dims with runs of new dims of the same number of elements."""
    # Both sides are read from the left; a run ends where the products agree.
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i], [j]
        a, b = old[i], new[j]
        while a != b:
            if a < b:
                i += 1
                left.append(i)
                a *= old[i]
            else:
                j += 1
                right.append(j)
                b *= new[j]
        groups.append((left, right))
        i, j = i + 1, j + 1
    return groups


def reshape_roles(shape: Sequence[int], roles: Sequence, new_shape: Sequence[int]) -> list:
    """The set of roles that each new dim is made of; empty for a unit dim.

    Args:
      shape, roles: of the weight before.
      new_shape: after.
    """
    # Unit dims can appear anywhere in a reshape, and mean nothing.
    old = [d for d, n in enumerate(shape) if n != 1]
    new = [d for d, n in enumerate(new_shape) if n != 1]
    result: list = [frozenset()] * len(new_shape)
    for left, right in reshape_groups([shape[d] for d in old], [new_shape[d] for d in new]):
        mixed = frozenset(roles[old[i]] for i in left)
        for j in right:
            result[new[j]] = mixed
    return result


def in_range(index: Array, size: int) -> Array:
    """Which indices are 0 to `size - 1`."""
    return (index >= 0) & (index < size)


def checked_index(index: Array, size: int) -> Array:
    """The indices, with `size` in place of those out of range.

    JAX counts negative indices from the end, so that -1 would read the last entry; `size` is out of
    range under every mode: a gather with `mode="fill"` fills there, a scatter with `mode="drop"`
    drops it.
    """
    return jnp.where(in_range(index, size), index, size)
