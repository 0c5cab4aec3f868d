"""Rules for operations on several weights at once: sums, concatenations, stacks.

The factors of the result hold those of all: its rank is the sum of their ranks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.quant import ops
from lora_jax.transform.base_weight import base_array, rearranged
from lora_jax.transform.implicit import (
    Implicit,
    Unsupported,
    folded,
    has_many,
    owned,
    rebuild,
    wide_dtype,
    without_gain,
)
from lora_jax.transform.labels import RANK, labels, reorder
from lora_jax.transform.rules_product import check_rank


def with_same_roles(values: Sequence) -> list[Implicit]:
    """Weights, or arrays in their place, as weights of the same roles, with scale 1 and no gain.

    Args:
      values: of as many dims each; one or more is a weight.

    Raises:
      Unsupported: their factors have different dims, or their dropout differs.
    """
    known = [v for v in values if isinstance(v, Implicit)]
    # A weight whose roles are the other way round is used transposed: its factors swap.
    roles = known[0].roles
    for v in known[1:]:
        roles = _common(roles, v.roles) or _common(roles, _flipped_roles(v.roles)) or ""
        if not roles:
            raise Unsupported("weights whose dims have different roles")
    if len({(v.dropout, v.key is None) for v in known}) > 1:
        raise Unsupported("weights with different dropout")
    return [
        _as(roles, v) if isinstance(v, Implicit) else _zero_like(v, _as(roles, known[0]))
        for v in values
    ]


def _common(one: str, other: str) -> str | None:
    """Roles that both can take, by giving dims that no factor has to the other's owner."""
    if any(a != b and "u" not in (a, b) for a, b in zip(one, other, strict=True)):
        return None
    return "".join(b if a == "u" else a for a, b in zip(one, other, strict=True))


def _flipped_roles(roles: str) -> str:
    return roles.translate(str.maketrans("io", "oi"))


def _as(roles: str, v: Implicit) -> Implicit:
    """A weight with these roles, folded."""
    v = folded(v)
    if _common(roles, v.roles) is None:
        v = _flipped(v)
    for role in "sio":
        v = owned(v, [d for d, r in enumerate(v.roles) if r == "u" and roles[d] == role], role)
    return v


def _flipped(v: Implicit) -> Implicit:
    """The same weight with A and B in each other's place: `(A·B)ᵀ = Bᵀ·Aᵀ`."""
    if v.bias is not None:
        raise Unsupported("one of them is transposed, and its adapter has a bias")
    roles = _flipped_roles(v.roles)
    a = reorder(v.b, labels(v.roles, "b"), labels(roles, "a"))
    b = reorder(v.a, labels(v.roles, "a"), labels(roles, "b"))
    return dataclasses.replace(v, a=a, b=b, roles=roles)


def common_form(values: Sequence) -> Implicit:
    """The form in which one variable can hold any of these weights, or arrays in their place.

    Returns:
      A weight of the form: of the roles, the dtypes and the largest rank; its numbers mean nothing.
    """
    if any(map(has_many, values)):
        raise Unsupported("it holds many adapters")
    parts = with_same_roles(values)
    if parts[0].key is not None and not all(isinstance(v, Implicit) for v in values):
        raise Unsupported("one of them has no adapter, and the other's has dropout")
    rank, form = max(v.rank for v in parts), parts[0]
    factors = {}
    for part in ("a", "b"):
        dtype = wide_dtype(*(getattr(v, part).dtype for v in parts))
        dims = labels(form.roles, part)
        factors[part] = _padded(getattr(form, part), dims, 0, rank - form.rank).astype(dtype)
    derived = all(v.derived for v in parts)
    bias = next((jnp.zeros_like(v.bias) for v in parts if v.bias is not None), None)
    w = base_array(form, "a variable")
    return dataclasses.replace(form, w=w, bias=bias, derived=derived, places=None, **factors)


def in_form(x: Any, form: Implicit) -> Implicit:
    """A weight, or an array, in a form that `common_form` found for it and others."""
    v = _as(form.roles, x) if isinstance(x, Implicit) else _zero_like(x, form)
    # A smaller rank is filled up with zeros, which change no product.
    parts: dict[str, Any] = {}
    for part in ("a", "b"):
        dims, like = labels(form.roles, part), getattr(form, part)
        parts[part] = _padded(getattr(v, part), dims, 0, form.rank - v.rank).astype(like.dtype)
    bias = v.bias
    if bias is None and form.bias is not None:
        bias = jnp.zeros(form.bias.shape, form.bias.dtype)
    parts |= {"w": base_array(v, "a variable"), "bias": bias, "places": None}
    return dataclasses.replace(v, derived=form.derived, **parts)


def add(values: Sequence, bind: Callable) -> Implicit:
    """The sum of weights: `(W1 + A1·B1) + (W2 + A2·B2) = (W1 + W2) + [A1, A2]·[B1; B2]`."""
    parts = with_same_roles(values)
    check_rank([v.rank for v in parts], parts[0].roles, parts[0].shape)
    w = bind(*(base_array(v, "add") for v in parts))
    return dataclasses.replace(parts[0], w=w, bias=_added([v.bias for v in parts]), **_ranks(parts))


def _ranks(parts: Sequence[Implicit]) -> dict[str, Array]:
    """The factors of several weights of one shape, side by side along the rank."""
    # Σ_k A_k·B_k = [A_1, A_2, …]·[B_1; B_2; …].
    joined = {}
    for part in ("a", "b"):
        arrays = [getattr(v, part) for v in parts]
        wide = wide_dtype(*(x.dtype for x in arrays))
        axis = labels(parts[0].roles, part).index(RANK)
        joined[part] = lax.concatenate([x.astype(wide) for x in arrays], axis)
    return joined


def _added(biases: Sequence[Array | None]) -> Array | None:
    there = [x for x in biases if x is not None]
    return sum(there[1:], there[0]) if there else None


def add_constant(v: Implicit, constant: Any, bind: Callable) -> Implicit:
    """`(W + A·B) + C = (W + C) + A·B`."""
    v = without_gain(v)
    return dataclasses.replace(v, w=bind(base_array(v, "add"), constant))


def complex_(values: Sequence, bind: Callable) -> Implicit:
    """Real and imaginary part, one of them perhaps no weight: `[Ar, i·Ai]·[Br; Bi]`."""
    real, imaginary = with_same_roles(values)
    check_rank([real.rank, imaginary.rank], real.roles, real.shape)
    w = bind(base_array(real, "complex"), base_array(imaginary, "complex"))
    # i·(A·B) = (i·A)·B.
    turned = dataclasses.replace(imaginary, a=imaginary.a * jnp.asarray(1j, w.dtype))
    if real.bias is not None or imaginary.bias is not None:
        raise Unsupported("a complex weight whose adapter has a bias")
    return dataclasses.replace(real, w=w, **_ranks([real, turned]))


def real_part(v: Implicit, bind: Callable, *, imaginary: bool) -> Implicit:
    """`Re(A·B) = [Re A, -Im A]·[Re B; Im B]`, `Im(A·B) = [Re A, Im A]·[Im B; Re B]`."""
    # The rank doubles: the product of two complex numbers has two real terms in each part.
    v = folded(v)
    check_rank([2 * v.rank], v.roles, v.shape)
    (ar, ai), (br, bi) = ((jnp.real(x), jnp.imag(x)) for x in (v.a, v.b))
    pairs = [(ar, bi), (ai, br)] if imaginary else [(ar, br), (-ai, bi)]
    parts = [dataclasses.replace(v, a=a, b=b) for a, b in pairs]
    return dataclasses.replace(v, w=bind(v.w), **_ranks(parts))


def conjugate(v: Implicit, bind: Callable) -> Implicit:
    """`conj(W + A·B) = conj(W) + conj(A)·conj(B)`, of a real weight too."""
    # Scale and gain are real.
    return dataclasses.replace(v, w=bind(v.w), a=jnp.conj(v.a), b=jnp.conj(v.b))


def concatenate(values: Sequence, axis: int) -> Implicit:
    """Concatenates weights, adapted or not, into one whose rank is the sum of the ranks.

    Along a stack dim the factors are padded to one rank and concatenated; along an in or an out
    dim they become block-diagonal: `[W1 + A1·B1, W2 + A2·B2] = [W1, W2] + [A1, A2]·diag(B1, B2)`.
    """
    parts = with_same_roles([_unit_as_stack(v, axis) for v in values])
    roles, ranks = parts[0].roles, [v.rank for v in parts]
    # The factor with the dim is block-diagonal: each part's block has zeros beside it along the
    # rank. The other factor, `whole` here, only gets a longer rank.
    whole = {"s": (), "i": ("b",), "o": ("a",)}[roles[axis]]
    joined = {}
    for part in ("a", "b"):
        dims = labels(roles, part)
        arrays, along = [], RANK if part in whole else axis
        for k, v in enumerate(parts):
            array = getattr(v, part)
            if part in whole:
                arrays.append(array)
                continue
            # Each part's rank has its own place among all.
            before, after = sum(ranks[:k]), sum(ranks[k + 1 :])
            # Along a stack the ranks do not add up: shorter ones get zeros.
            if roles[axis] == "s":
                before, after = 0, max(ranks) - ranks[k]
            arrays.append(_padded(array, dims, before, after))
        joined[part] = lax.concatenate(arrays, dims.index(along))
    w = lax.concatenate([base_array(v, "concatenate") for v in parts], axis)
    return dataclasses.replace(
        parts[0],
        w=w,
        a=joined["a"],
        b=joined["b"],
        scale=jnp.ones([w.shape[d] for d in labels(roles, "scale")], parts[0].scale.dtype),
        key=_joined_keys(parts, roles, axis),
        bias=_joined_bias(parts, roles, axis),
    )


def _padded(array: Array, dims: Sequence, before: int, after: int) -> Array:
    """A factor whose rank is longer by zeros."""
    widths = [(before, after, 0) if d == RANK else (0, 0, 0) for d in dims]
    return lax.pad(array, jnp.zeros((), array.dtype), widths)


def _joined_bias(parts: Sequence[Implicit], roles: str, axis: int) -> Array | None:
    """The biases of a concatenation: side by side, or added up along an in dim."""
    if all(v.bias is None for v in parts) or roles[axis] == "i":
        return _added([v.bias for v in parts])
    dims = labels(roles, "bias")
    dtype = next(v.bias.dtype for v in parts if v.bias is not None)
    each = [
        jnp.zeros([v.shape[d] for d in dims], dtype) if v.bias is None else v.bias for v in parts
    ]
    return lax.concatenate(each, dims.index(axis))


def _joined_keys(parts: Sequence[Implicit], roles: str, axis: int) -> Any:
    """Keys of a concatenation: of each along a stack, else the first one's for the whole."""
    # Along an in or an out dim the result is one weight, whose input has one mask.
    if parts[0].key is None or roles[axis] != "s":
        return parts[0].key
    return jnp.concatenate([v.key for v in parts], labels(roles, "key").index(axis))


def stack(values: Sequence, axis: int) -> Implicit:
    """Weights stacked along a new dim, which is a stack dim."""
    return concatenate(
        [
            _with_stack_axis(v, axis) if isinstance(v, Implicit) else lax.expand_dims(v, [axis])
            for v in values
        ],
        axis,
    )


def _with_stack_axis(v: Implicit, axis: int) -> Implicit:
    """A weight with a new stack dim of size 1."""
    roles = v.roles[:axis] + "s" + v.roles[axis:]

    def add(array: Array, dims: list) -> tuple[Array, list]:
        moved = [d if d == RANK or d < axis else d + 1 for d in dims]
        return array.reshape(1, *array.shape), [axis, *moved]

    shape = (*v.shape[:axis], 1, *v.shape[axis:])
    w = rearranged(
        v,
        lax.broadcast_in_dim,
        ops.broadcast_in_dim,
        (shape, [d for d in range(v.ndim + 1) if d != axis]),
    )
    return rebuild(v, w, roles, add)


def _unit_as_stack(v: Any, axis: int) -> Any:
    return owned(v, [axis], "s") if isinstance(v, Implicit) and v.roles[axis] == "u" else v


def _zero_like(w: Any, like: Implicit) -> Implicit:
    """An array as a weight with an adapter of rank 0."""

    def empty(part: str) -> Array:
        sizes = [0 if d == RANK else w.shape[d] for d in labels(like.roles, part)]
        return jnp.zeros(sizes, getattr(like, part).dtype)

    shape = [w.shape[d] for d in labels(like.roles, "scale")]
    key = None if like.key is None else jnp.broadcast_to(like.key.reshape(-1)[0], shape)
    return dataclasses.replace(
        like,
        w=w,
        a=empty("a"),
        b=empty("b"),
        scale=jnp.ones(shape, like.scale.dtype),
        key=key,
        bias=None,
    )
