"""Rearrangements of a quantized weight that leave its codes alone.

Each function answers with a `QuantArray`, or None where the operation would mix what the codes
keep apart; the caller then decodes. Relabelling dims is free; a stack dim can also be sliced.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.array import stack_dims
from lora_jax.quant.array import QuantArray


def _relabelled(q: QuantArray, shape: Sequence[int], roles: str) -> QuantArray:
    """The same matrices as a weight of another shape."""
    stack = tuple(shape[d] for d in stack_dims(roles))
    old = len(stack_dims(q.roles))

    def fold(x):
        return x if x.shape[:old] == stack else x.reshape(*stack, *x.shape[old:])

    return dataclasses.replace(jax.tree.map(fold, q), shape=tuple(shape), roles=roles)


def transpose(q: QuantArray, permutation: Sequence[int]) -> QuantArray | None:
    for role in "bio":
        order = [d for d in permutation if q.roles[d] == role]
        if order != sorted(order):
            return None
    shape = [q.shape[d] for d in permutation]
    return _relabelled(q, shape, "".join(q.roles[d] for d in permutation))


def reshape(q: QuantArray, shape: Sequence[int]) -> QuantArray | None:
    from lora_jax.transform.rules_rearrange import reshape_roles

    made = reshape_roles(q.shape, q.roles, shape)
    if any(len(roles) > 1 for roles in made):
        return None
    return _relabelled(q, shape, "".join(next(iter(roles), "u") for roles in made))


def squeeze(q: QuantArray, dims: Sequence[int]) -> QuantArray:
    kept = [d for d in range(q.ndim) if d not in dims]
    return _relabelled(q, [q.shape[d] for d in kept], "".join(q.roles[d] for d in kept))


def broadcast_in_dim(q: QuantArray, shape: Sequence[int], dims: Sequence[int]) -> QuantArray | None:
    """New unit dims only."""
    roles = ["u"] * len(shape)
    for old, new in enumerate(dims):
        roles[new] = q.roles[old]
    if any(shape[new] != (1 if new not in dims else q.shape[list(dims).index(new)])
           for new in range(len(shape))):  # fmt: skip
        return None
    return _relabelled(q, shape, "".join(roles))


def _along_stack(q: QuantArray, sizes: Sequence[int], cut: Callable) -> QuantArray | None:
    """Cuts the stack dims of every array; None if another dim would be cut.

    Args:
      q: the weight.
      sizes: of the result.
      cut: `f(array, number of leading stack dims) -> array`.
    """
    stack = stack_dims(q.roles)
    if any(sizes[d] != q.shape[d] for d in range(q.ndim) if d not in stack):
        return None
    cuts = jax.tree.map(lambda x: cut(x, stack), q)
    return dataclasses.replace(cuts, shape=tuple(sizes))


def slice(q: QuantArray, starts, limits, strides) -> QuantArray | None:  # noqa: A001
    steps = strides or (1,) * q.ndim
    sizes = [-(-(b - a) // s) for a, b, s in zip(starts, limits, steps, strict=True)]

    def cut(x, stack):
        rest = x.shape[len(stack) :]
        return lax.slice(
            x,
            [*(starts[d] for d in stack), *(0 for _ in rest)],
            [*(limits[d] for d in stack), *rest],
            [*(steps[d] for d in stack), *(1 for _ in rest)],
        )

    return _along_stack(q, sizes, cut)


def dynamic_slice(q: QuantArray, starts, sizes) -> QuantArray | None:
    def cut(x, stack):
        if not stack:
            return x
        rest = x.shape[len(stack) :]
        zero = jnp.zeros_like(starts[0])
        where = [starts[d].astype(zero.dtype) for d in stack]
        return lax.dynamic_slice(
            x, [*where, *(zero for _ in rest)], [*(sizes[d] for d in stack), *rest]
        )

    return _along_stack(q, sizes, cut)


def first_index(q: QuantArray) -> QuantArray:
    """What one step of a scan over the first dim, a stack dim, sees; its arrays are sliced."""
    return dataclasses.replace(q, shape=q.shape[1:], roles=q.roles[1:])


def with_stack(q: QuantArray, count: int) -> QuantArray:
    """The inverse of `first_index`: the arrays have got a leading dim."""
    return dataclasses.replace(q, shape=(count, *q.shape), roles="b" + q.roles)
