"""Rules for products that give another weight: with a constant, and of two weights.

A product with features is in `rules_consume`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.transform.base_weight import base_array, product
from lora_jax.transform.implicit import (
    Implicit,
    Unsupported,
    folded,
    is_matrix,
    owned,
    vector_as_array,
    wide_dtype,
)
from lora_jax.transform.labels import RANK, contract, expand_to, labels, reorder

Numbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def check_rank(ranks: Sequence[int], roles: str, shape: Sequence[int]) -> None:
    """Refuses a sum of changes whose ranks add up to more than a matrix of that shape can have."""
    # Beyond that the factors are larger than the weight, and materializing it costs less.
    sides = [math.prod(n for r, n in zip(roles, shape, strict=True) if r == role) for role in "io"]
    if sum(ranks) > min(sides):
        raise Unsupported(f"the ranks add up to {sum(ranks)}, more than a dim of {min(sides)}")


def with_constant(
    v: Implicit,
    x: Any,
    bind: Callable,
    *,
    weight_left: bool,
    dimension_numbers: Numbers,
    precision: Any,
    **params: Any,
) -> Implicit | None:
    """A constant matrix times a weight: `C·(W + A·B) = C·W + (C·A)·B`.

    Args:
      v: the weight.
      x: the constant.
      bind: binds the original primitive to dense operands.
      weight_left: whether the weight is the left operand.
      dimension_numbers, precision: of the primitive.
      **params: the primitive's other parameters.

    Returns:
      The weight that results, None where it is none: a vector, or mixed over both factors.
    """
    side = 0 if weight_left else 1
    contracted, batch = (pair[side] for pair in dimension_numbers)
    role = _owner(v, contracted)
    if role is None or v.bias is not None or not v.rank:
        return None
    v = folded(owned(v, _unowned(v, [*contracted, *batch]), role))
    x_labels, out = _constant_labels(v, x, dimension_numbers, weight_left=weight_left)
    # The constant's own dims replace those it sums over, in the same factor. A batch dim that the
    # other factor has is, after the product, a dim of both.
    roles = "".join(
        role if isinstance(d, tuple) else "s" if d in batch and v.roles[d] != role else v.roles[d]
        for d in out
    )
    # The base's own product, in the model's precision.
    w = product(
        v,
        x,
        bind,
        weight_left=weight_left,
        dimension_numbers=dimension_numbers,
        precision=precision,
        **params,
    )
    part, other = ("a", "b") if role == "i" else ("b", "a")
    # C·A (or B·C) in float32 or wider: it is a factor, kept and used like one.
    wide = wide_dtype(x.dtype, v.a.dtype)
    factor, have = contract(
        x.astype(wide),
        x_labels,
        getattr(v, part).astype(wide),
        labels(v.roles, part),
        keep={*out, RANK},
        precision=lax.Precision.HIGHEST,
    )
    sides = {part: (factor, have), other: (getattr(v, other), labels(v.roles, other))}
    result = assembled(v, w, roles, {p: (x, _places(have, out)) for p, (x, have) in sides.items()})
    return dataclasses.replace(result, derived=True) if is_matrix(result) else None


def _constant_labels(
    v: Implicit, x: Any, dimension_numbers: Numbers, *, weight_left: bool
) -> tuple[list, list]:
    """Labels of the constant's axes and of the product's: dims of the weight, or `("x", axis)`."""
    order = 1 if weight_left else -1
    (contracted, x_contracted), (batch, x_batch) = (pair[::order] for pair in dimension_numbers)
    x_labels: list = [("x", d) for d in range(x.ndim)]
    for d, x_dim in zip([*contracted, *batch], [*x_contracted, *x_batch], strict=True):
        x_labels[x_dim] = d
    free = [d for d in range(v.ndim) if d not in contracted and d not in batch]
    x_free = [label for label in x_labels if isinstance(label, tuple)]
    return x_labels, [*batch, *(free + x_free if weight_left else x_free + free)]


def assembled(
    like: Implicit, w: Any, roles: str, factors: Mapping[str, tuple[Array, list]]
) -> Implicit:
    """A weight of new dims, with scale 1, no gain and no bias.

    Args:
      like: gives dropout and key, which each index of the stack gets.
      w, roles: of the new weight.
      factors: for "a" and "b" an array and its labels, among them all dims of its role; it gets
        copies along the stack dims that it lacks.
    """
    parts = {}
    for part, (array, have) in factors.items():
        parts[part] = _copied(array, have, labels(roles, part), w.shape)
    stack = [w.shape[d] for d in labels(roles, "scale")]
    key = like.key
    if key is not None:
        key = jnp.broadcast_to(key.reshape(-1)[0], stack)
    # The factors were folded: the scale is in them.
    scale = jnp.ones(stack, like.scale.dtype)
    return dataclasses.replace(
        like, w=w, roles=roles, scale=scale, key=key, gain=None, bias=None, **parts
    )


def _owner(v: Implicit, dims: Sequence[int]) -> str | None:
    """The one role that dims have, None where it is not one; unit dims and copies go with it."""
    roles = {v.roles[d] for d in dims} - {"u"}
    return roles.pop() if roles in ({"i"}, {"o"}) else None


def _unowned(v: Implicit, dims: Sequence[int]) -> list[int]:
    return [d for d in dims if v.roles[d] == "u"]


def _places(have: Sequence, out: Sequence, rank: Any = RANK) -> list:
    """Labels of a factor's axes as dims of the new weight, and the rank's own label."""
    return [RANK if label == rank else out.index(label) for label in have]


def _copied(array: Array, have: list, want: list, shape: Sequence[int]) -> Array:
    """A factor with copies along the dims that it lacks, its axes ordered as `want`."""
    new = [d for d in want if d not in have]
    array = jnp.broadcast_to(array, [*(shape[d] for d in new), *array.shape])
    return reorder(array, [*new, *have], want)


Named = tuple[Array, list]  # an array and a label for each of its axes


def of_weights(left: Implicit, right: Implicit, bind: Callable, numbers: Numbers) -> Any:
    """The product of two weights, of the rank `r1 + r2`.

        (W1 + A1·B1)·(W2 + A2·B2) = W1·W2 + A1·(B1·W2 + (B1·A2)·B2) + (W1·A2)·B2

    where B1 and A2 stand for the factors that have the contracted dims, whichever they are.

    Args:
      left, right: the weights.
      bind: binds the original primitive to dense operands.
      numbers: which dims of the two are contracted, and which are batched.

    Returns:
      The weight that results; an array where it is a vector.
    """
    if left.bias is not None or right.bias is not None:
        raise Unsupported("product of weights whose adapters have a bias")
    if left.dropout != right.dropout or (left.key is None) != (right.key is None):
        raise Unsupported("product of weights with different dropout")
    w1, inner1, outer1 = _named(left, 0, numbers)
    w2, inner2, outer2 = _named(right, 1, numbers)
    out = [s for s in w1[1] if s[0] == "batch"]
    out += [s for s in [*w1[1], *w2[1]] if s[0] == "own"]
    keep = {*out, _RANKS[0], _RANKS[1]}

    # B1·W2: (r1, …, free dims of the second weight).
    thin, have = _thin(inner1, w2, keep)
    # (B1·A2)·B2, the (r1, r2) product first: nothing larger than a factor is formed.
    more, more_have = _thin(_thin(inner1, inner2, keep), outer2, keep - {_RANKS[1]})
    first = outer1, (thin + expand_to(more, more_have, have), have)
    second = _thin(w1, inner2, keep), outer2
    # A dim that both factors of the result have is one of its stack.
    on_a, on_b = ({*first[k][1], *second[k][1]} for k in (0, 1))
    roles = "".join("s" if s in on_a & on_b else "i" if s in on_a else "o" for s in out)
    w = bind(w1[0], w2[0])
    # A vector or a number is returned as an array: its rank does not matter.
    if {"i", "o"} <= set(roles):
        check_rank([left.rank, right.rank], roles, w.shape)
    factors = {}
    for k, part in enumerate(("a", "b")):
        want = labels(roles, part)
        pairs = zip((first[k], second[k]), _RANKS, strict=True)
        pieces = [
            _copied(array, _places(have, out, rank), want, w.shape) for (array, have), rank in pairs
        ]
        factors[part] = jnp.concatenate(pieces, want.index(RANK)), want
    derived = left.derived and right.derived
    return vector_as_array(dataclasses.replace(assembled(left, w, roles, factors), derived=derived))


# The ranks of the two weights, which must not meet.
_RANKS = (("rank", 0), ("rank", 1))


def _named(v: Implicit, side: int, numbers: Numbers) -> tuple[Named, Named, Named]:
    """Base, contracted factor and other factor of one of two weights, with labels."""
    contracted, batch = numbers[0][side], numbers[1][side]
    role = _owner(v, contracted)
    if role is None:
        raise Unsupported("product of two weights over dims of both factors")
    v = folded(owned(v, _unowned(v, [*contracted, *batch]), role))
    # Dims that meet get one name: the n-th contracted of either side is ("sum", n).
    names: list = [("own", side, d) for d in range(v.ndim)]
    for kind, dims in (("sum", contracted), ("batch", batch)):
        for n, d in enumerate(dims):
            names[d] = (kind, n)

    def named(part: str) -> Named:
        have = labels(v.roles, part)
        return getattr(v, part), [_RANKS[side] if d == RANK else names[d] for d in have]

    inner, outer = ("a", "b") if role == "i" else ("b", "a")
    return (base_array(v, "dot_general"), names), named(inner), named(outer)


def _thin(x: Named, y: Named, keep: Collection) -> Named:
    """A contraction of which one operand, at least, has the size of a factor."""
    wide = wide_dtype(x[0].dtype, y[0].dtype)
    precision = lax.Precision.HIGHEST
    return contract(
        x[0].astype(wide), x[1], y[0].astype(wide), y[1], keep=keep, precision=precision
    )
