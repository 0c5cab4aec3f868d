"""Rules for operations that rearrange a weight: each acts on the factors that own the dim."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from lora_jax.dims import reshape_groups, reshape_roles
from lora_jax.quant import ops
from lora_jax.quant.array import QuantArray
from lora_jax.transform.base_weight import base_array, moved, rearranged, unchanged
from lora_jax.transform.implicit import (
    Implicit,
    Unsupported,
    folded,
    owned,
    rebuild,
    wide_dtype,
)
from lora_jax.transform.labels import PARTS, RANK, expand_to, labels, part_sharding


def transpose(v: Implicit, *, permutation: Sequence[int], **_) -> Implicit:
    where = {old: new for new, old in enumerate(permutation)}
    roles = "".join(v.roles[d] for d in permutation)
    return rebuild(
        v,
        rearranged(v, lax.transpose, ops.transpose, (permutation,)),
        roles,
        lambda array, dims: (array, [where.get(d, d) for d in dims]),
    )


def convert(v: Implicit, new_dtype: Any) -> Implicit:
    """Only the base changes its dtype: factors keep theirs and are cast where they are used."""
    # A cast to integers, or from complex to real, is not linear in the weight.
    real = not jnp.issubdtype(new_dtype, jnp.complexfloating)
    loses = real and jnp.issubdtype(v.dtype, jnp.complexfloating)
    if loses or not jnp.issubdtype(new_dtype, jnp.inexact):
        raise Unsupported(f"cast to {jnp.dtype(new_dtype).name}")
    return dataclasses.replace(v, w=v.w.astype(new_dtype))


def squeeze(v: Implicit, *, dimensions: Sequence[int], **_) -> Implicit:
    gone = {d % v.ndim for d in dimensions}
    kept = [d for d in range(v.ndim) if d not in gone]

    def drop(array: Array, dims: list) -> tuple[Array, list]:
        lost = [i for i, d in enumerate(dims) if d in gone]
        left = [kept.index(d) if d != RANK else d for d in dims if d not in gone]
        return jax.lax.squeeze(array, lost), left

    return rebuild(
        v, rearranged(v, lax.squeeze, ops.squeeze, (sorted(gone),)), _pick(v.roles, kept), drop
    )


def slice_(
    v: Implicit,
    *,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
    **_,
) -> Implicit:
    steps = strides or (1,) * v.ndim

    def cut(array: Array, dims: list) -> tuple[Array, list]:
        return lax.slice(
            array,
            [0 if d == RANK else start_indices[d] for d in dims],
            [v.rank if d == RANK else limit_indices[d] for d in dims],
            [1 if d == RANK else steps[d] for d in dims],
        ), dims

    # A strided slice of a factor's own dims; the other factor does not change.
    w = rearranged(v, lax.slice, ops.slice, (start_indices, limit_indices, strides))
    return rebuild(v, w, v.roles, cut)


def dynamic_slice(v: Implicit, *starts, slice_sizes: Sequence[int], **_) -> Implicit:
    def cut(array: Array, dims: list) -> tuple[Array, list]:
        # The scale of a weight without a stack has no dims.
        if not dims:
            return array, dims
        # All starts must be of one integer dtype.
        zero = jnp.zeros_like(starts[0])
        return lax.dynamic_slice(
            array,
            [zero if d == RANK else starts[d].astype(zero.dtype) for d in dims],
            [v.rank if d == RANK else slice_sizes[d] for d in dims],
        ), dims

    return rebuild(
        v, rearranged(v, lax.dynamic_slice, ops.dynamic_slice, (starts, slice_sizes)), v.roles, cut
    )


def reverse(v: Implicit, *, dimensions: Sequence[int], **_) -> Implicit:
    def turn(array: Array, dims: list) -> tuple[Array, list]:
        return lax.rev(array, [i for i, d in enumerate(dims) if d in dimensions]), dims

    return rebuild(v, lax.rev(base_array(v, "rev"), dimensions), v.roles, turn)


def pad(
    v: Implicit, value: Array, *, padding_config: Sequence[tuple[int, int, int]], **_
) -> Implicit:
    """Padding of the weight; the factors get zeros, so that the change is zero there."""
    changed = [d for d, widths in enumerate(padding_config) if any(widths)]
    if any(v.roles[d] == "s" and v.key is not None for d in changed):
        raise Unsupported("padding of a stack with dropout")
    # Along a dim of copies the padding is no copy, so a factor must have the dim.
    v = owned(v, [d for d in changed if v.roles[d] == "u"], "o")
    # The padding value must not be scaled by a gain.
    v = v if v.gain is None else folded(v)

    def extend(array: Array, dims: list) -> tuple[Array, list]:
        widths = [(0, 0, 0) if d == RANK else padding_config[d] for d in dims]
        if not any(map(any, widths)):  # keys cannot be padded
            return array, dims
        return lax.pad(array, jnp.zeros((), array.dtype), widths), dims

    return rebuild(v, lax.pad(base_array(v, "pad"), value, padding_config), v.roles, extend)


def split(v: Implicit, *, sizes: Sequence[int], axis: int, **_) -> list[Implicit]:
    pieces, start = [], 0
    for size in sizes:
        # Whole along the other axes.
        low = [0] * v.ndim
        high = list(v.shape)
        low[axis], high[axis] = start, start + int(size)
        start += int(size)
        pieces.append(slice_(v, start_indices=low, limit_indices=high, strides=None))
    return pieces


def unstack(v: Implicit, *, axis: int, **_) -> list[Implicit]:
    pieces = split(v, sizes=(1,) * v.shape[axis], axis=axis)
    return [squeeze(piece, dimensions=(axis,)) for piece in pieces]


def broadcast_in_dim(
    v: Implicit,
    *dynamic: Array,
    shape: Sequence[int],
    broadcast_dimensions: Sequence[int],
    **_: Any,
) -> Implicit:
    """Copies of a weight along new dims, which no factor gets, or along dims of size 1."""
    if dynamic:
        raise Unsupported("dynamic broadcast")
    roles = ["u"] * len(shape)
    for old, new in enumerate(broadcast_dimensions):
        roles[new] = v.roles[old]
    where = dict(enumerate(broadcast_dimensions))

    def spread(array: Array, dims: list) -> tuple[Array, list]:
        sizes = [
            n if d == RANK else shape[where[d]] for d, n in zip(dims, array.shape, strict=True)
        ]
        return jnp.broadcast_to(array, sizes), [where.get(d, d) for d in dims]

    w = rearranged(v, lax.broadcast_in_dim, ops.broadcast_in_dim, (shape, broadcast_dimensions))
    return rebuild(v, w, "".join(roles), spread)


def broadcast_to(v: Implicit, shape: Sequence[int]) -> Implicit:
    """A weight as an elementwise operation with a larger array sees it: dims of size 1 repeat."""
    if v.shape == tuple(shape):
        return v
    if v.ndim != len(shape):
        raise Unsupported("broadcast to another number of dims")
    return broadcast_in_dim(v, shape=shape, broadcast_dimensions=range(v.ndim))


def tile(v: Implicit, *, reps: Sequence[int], **_: Any) -> Implicit:
    """A weight put beside itself: copies along a new dim, which joins the old one."""
    # (reps[0], n0, reps[1], n1, …), each pair then joined.
    shape = [n for pair in zip(reps, v.shape, strict=True) for n in pair]
    copies = broadcast_in_dim(v, shape=shape, broadcast_dimensions=range(1, 2 * v.ndim, 2))
    return reshape(copies, new_sizes=[r * n for r, n in zip(reps, v.shape, strict=True)])


def reshape(
    v: Implicit, *dynamic, new_sizes: Sequence[int], dimensions: Any = None, **_
) -> Implicit:
    if dynamic or dimensions is not None or 0 in v.shape:
        raise Unsupported("dynamic or permuting reshape")
    v = _with_owners(v, new_sizes)
    # A new dim made of dims of one role has that role: A (or B) is reshaped alone.
    roles = []
    for mixed in reshape_roles(v.shape, v.roles, new_sizes):
        if len(mixed) > 1:
            raise Unsupported(
                f"reshape {v.shape} -> {tuple(new_sizes)} mixes dims of roles "
                f"{'/'.join(sorted(mixed))}"
            )
        roles.append(next(iter(mixed), "u"))
    roles = "".join(roles)

    def fold(part: str) -> Array | None:
        array, target = getattr(v, part), labels(roles, part)
        if array is None:
            return None
        return lax.reshape(array, [v.rank if d == RANK else new_sizes[d] for d in target])

    parts = {part: fold(part) for part in PARTS}
    # Dims of one role keep their order in the weight and in the factor, so both fold alike.
    return dataclasses.replace(
        v, w=rearranged(v, lax.reshape, ops.reshape, (new_sizes,)), roles=roles, **parts
    )


def _with_owners(v: Implicit, new_sizes: Sequence[int]) -> Implicit:
    """Gives copies that are joined with dims of a factor to that factor: repeated heads."""
    old = [d for d, n in enumerate(v.shape) if n != 1]
    new = [n for n in new_sizes if n != 1]
    for left, _ in reshape_groups([v.shape[d] for d in old], new):
        dims = [old[i] for i in left]
        unowned = [d for d in dims if v.roles[d] == "u"]
        owners = {v.roles[d] for d in dims} - {"u"}
        if unowned and len(owners) == 1:
            v = owned(v, unowned, owners.pop())
    return v


def scale_by(v: Implicit, factor: Any, *, divide: bool = False) -> Implicit:
    """Multiplication of a weight by a number, which the scale takes, or by gains, see `_gains`."""
    if jnp.size(factor) != 1:
        return _gains(v, factor, divide=divide)
    factor = jnp.reshape(jnp.asarray(factor), ())
    if jnp.issubdtype(factor.dtype, jnp.complexfloating):  # the scale is real
        factor = 1 / factor if divide else factor
        return dataclasses.replace(v, w=base_array(v, "mul") * factor, a=v.a * factor)
    if divide:
        w, scale = base_array(v, "div") / factor, v.scale / factor.astype(v.scale.dtype)
    else:
        w, scale = base_array(v, "mul") * factor, v.scale * factor.astype(v.scale.dtype)
    return dataclasses.replace(v, w=w, scale=scale)


def _gains(v: Implicit, factor: Array, *, divide: bool) -> Implicit:
    """Multiplication by an array that varies along dims of one factor only: that factor takes it.

    `(W + A·B) * g[None, :] = W * g[None, :] + A·(B * g)`.
    """
    varies = [d for d in range(factor.ndim) if factor.shape[d] != 1]
    roles = {v.roles[d] for d in varies} if factor.ndim == v.ndim else {"i", "o"}
    if {"i", "o"} <= roles:
        raise Unsupported("elementwise product with an array")
    if v.bias is not None:
        raise Unsupported("product of a weight with an array, where its adapter has a bias")
    # Gains over stack dims alone go to B, though A has them too: one factor must take them.
    part = "a" if "i" in roles else "b"
    v = owned(v, [d for d in varies if v.roles[d] == "u"], "i" if "i" in roles else "o")
    array = getattr(v, part)
    # Complex gains make a complex factor.
    kind = wide_dtype(array.dtype, factor.dtype)
    own = lax.reshape(factor, [factor.shape[d] for d in varies]).astype(kind)
    own = expand_to(own, varies, labels(v.roles, part))
    w = base_array(v, "div") / factor if divide else base_array(v, "mul") * factor
    return dataclasses.replace(v, w=w, **{part: array / own if divide else array * own})


def negate(v: Implicit, **_) -> Implicit:
    return dataclasses.replace(v, w=-base_array(v, "neg"), scale=-v.scale)


def sharding_constraint(v: Implicit, bind: Callable, *, sharding: Any, **_) -> Implicit:
    """Constrains the factors as the weight is: the same axes on the dims each owns."""
    # Any other kind of sharding (of one device, by a compiler's own rules) has no axes to divide.
    if not isinstance(sharding, NamedSharding):
        return dataclasses.replace(v, w=unchanged(v, bind))
    constrain = jax.lax.with_sharding_constraint
    return dataclasses.replace(
        v,
        w=moved(v, sharding, constrain),
        a=constrain(v.a, part_sharding(sharding, v.roles, "a")),
        b=constrain(v.b, part_sharding(sharding, v.roles, "b")),
    )


def device_put(v: Implicit, to: Any) -> Implicit:
    """Moves the weight and its factors: to a memory space or a device, or spread as the weight."""
    parts = {}
    for part in ("a", "b"):
        there = part_sharding(to, v.roles, part) if isinstance(to, NamedSharding) else to
        parts[part] = jax.device_put(getattr(v, part), there)
    return dataclasses.replace(v, w=moved(v, to, jax.device_put), **parts)


def leafwise(v: Implicit, bind: Callable) -> Implicit:
    """Operations that change no value: applied to the weight and to both factors."""
    return dataclasses.replace(v, w=unchanged(v, bind), a=bind(v.a), b=bind(v.b))


def base_only(v: Implicit, bind: Callable) -> Implicit:
    # The factors keep their precision, as in a cast.
    return dataclasses.replace(v, w=bind(base_array(v, "reduce_precision")))


def named(v: Implicit, bind: Callable) -> Implicit:
    """A name for rematerialization: a quantized weight is decoded anew wherever it is used."""
    # The factors get no name: a policy that saves the name saves the base, which exists already.
    return v if isinstance(v.w, QuantArray) else dataclasses.replace(v, w=bind(v.w))


def reshard(v: Implicit, *, dst_sharding: Any, **_) -> Implicit:
    """Explicit resharding: the factors take the same axes on the dims each owns."""
    # Outside an explicit mesh the primitive does not occur.
    change = jax.sharding.reshard
    parts = {}
    # Every part, the scale too: a reshard may change the mesh's kind of axes.
    for part in PARTS:
        if getattr(v, part) is not None:
            parts[part] = change(getattr(v, part), part_sharding(dst_sharding, v.roles, part))
    return dataclasses.replace(v, w=moved(v, dst_sharding, change), **parts)


def _pick(roles: str, dims: Sequence[int]) -> str:
    return "".join(roles[d] for d in dims)
