"""Rules for operations that rearrange a weight: each acts on the factors that own the dim."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from lora_jax.dims import reshape_roles
from lora_jax.quant import ops
from lora_jax.quant.array import QuantArray
from lora_jax.transform.base_weight import each, moved, opened, rearranged
from lora_jax.transform.implicit import Implicit, Unsupported, rebuild
from lora_jax.transform.labels import PARTS, RANK, expand_to, labels, part_sharding


def transpose(v: Implicit, *, permutation, **_):
    where = {old: new for new, old in enumerate(permutation)}
    roles = "".join(v.roles[d] for d in permutation)
    return rebuild(
        v,
        rearranged(v, lax.transpose, ops.transpose, permutation),
        roles,
        lambda array, dims: (array, [where.get(d, d) for d in dims]),
    )


def convert(v: Implicit, *, new_dtype, **_):
    """Only the base changes its dtype: factors keep theirs and are cast where they are used."""
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise Unsupported(f"cast to {jnp.dtype(new_dtype).name}")
    return dataclasses.replace(v, w=v.w.astype(new_dtype))


def squeeze(v: Implicit, *, dimensions, **_):
    gone = {d % v.ndim for d in dimensions}
    kept = [d for d in range(v.ndim) if d not in gone]

    def drop(array, dims):
        lost = [i for i, d in enumerate(dims) if d in gone]
        left = [kept.index(d) if d != RANK else d for d in dims if d not in gone]
        return jax.lax.squeeze(array, lost), left

    return rebuild(
        v, rearranged(v, lax.squeeze, ops.squeeze, sorted(gone)), _pick(v.roles, kept), drop
    )


def reduce_unit(v: Implicit, *, axes, **_):
    if any(v.shape[d] != 1 for d in axes):
        raise Unsupported("sum over a dimension of the weight")
    return squeeze(v, dimensions=axes)


def slice_(v: Implicit, *, start_indices, limit_indices, strides, **_):
    steps = strides or (1,) * v.ndim

    def cut(array, dims):
        return lax.slice(
            array,
            [0 if d == RANK else start_indices[d] for d in dims],
            [v.rank if d == RANK else limit_indices[d] for d in dims],
            [1 if d == RANK else steps[d] for d in dims],
        ), dims

    w = rearranged(v, lax.slice, ops.slice, start_indices, limit_indices, strides)
    return rebuild(v, w, v.roles, cut)


def dynamic_slice(v: Implicit, *starts, slice_sizes, **_):
    def cut(array, dims):
        if not dims:
            return array, dims
        zero = jnp.zeros_like(starts[0])
        return lax.dynamic_slice(
            array,
            [zero if d == RANK else starts[d].astype(zero.dtype) for d in dims],
            [v.rank if d == RANK else slice_sizes[d] for d in dims],
        ), dims

    return rebuild(
        v, rearranged(v, lax.dynamic_slice, ops.dynamic_slice, starts, slice_sizes), v.roles, cut
    )


def reverse(v: Implicit, *, dimensions, **_):
    def turn(array, dims):
        return lax.rev(array, [i for i, d in enumerate(dims) if d in dimensions]), dims

    return rebuild(v, lax.rev(opened(v, "rev"), dimensions), v.roles, turn)


def pad(
    v: Implicit, value: Array, *, padding_config: Sequence[tuple[int, int, int]], **_
) -> Implicit:
    """Padding of the weight; the factors get zeros, so that the change is zero there."""
    changed = [d for d, widths in enumerate(padding_config) if any(widths)]
    if v.gain is not None:
        raise Unsupported("DoRA's gain of a padded weight")
    if any(v.roles[d] == "u" or (v.roles[d] == "s" and v.key is not None) for d in changed):
        raise Unsupported("padding of a dim that no factor has, or of a stack with dropout")

    def extend(array: Array, dims: list) -> tuple[Array, list]:
        widths = [(0, 0, 0) if d == RANK else padding_config[d] for d in dims]
        if not any(map(any, widths)):  # keys cannot be padded
            return array, dims
        return lax.pad(array, jnp.zeros((), array.dtype), widths), dims

    return rebuild(v, lax.pad(opened(v, "pad"), value, padding_config), v.roles, extend)


def split(v: Implicit, *, sizes, axis, **_):
    pieces, start = [], 0
    for size in sizes:
        low = [0] * v.ndim
        high = list(v.shape)
        low[axis], high[axis] = start, start + int(size)
        start += int(size)
        pieces.append(slice_(v, start_indices=low, limit_indices=high, strides=None))
    return pieces


def unstack(v: Implicit, *, axis, **_):
    pieces = split(v, sizes=(1,) * v.shape[axis], axis=axis)
    return [squeeze(piece, dimensions=(axis,)) for piece in pieces]


def broadcast_in_dim(v: Implicit, *dynamic, shape, broadcast_dimensions, **_):
    """New dims of more than one index are a stack: every index has the same factors."""
    if dynamic:
        raise Unsupported("dynamic broadcast")
    roles = ["u" if n == 1 else "s" for n in shape]
    for old, new in enumerate(broadcast_dimensions):
        if shape[new] != v.shape[old]:
            raise Unsupported("broadcast of a dimension of the weight")
        roles[new] = v.roles[old]
    where = dict(enumerate(broadcast_dimensions))
    added = [d for d in range(len(shape)) if d not in broadcast_dimensions and shape[d] != 1]

    def spread(array, dims):
        dims = [where.get(d, d) for d in dims]
        return jnp.broadcast_to(array, [*(shape[d] for d in added), *array.shape]), added + dims

    w = rearranged(v, lax.broadcast_in_dim, ops.broadcast_in_dim, shape, broadcast_dimensions)
    return rebuild(v, w, "".join(roles), spread)


def reshape(v: Implicit, *dynamic, new_sizes, dimensions=None, **_):
    if dynamic or dimensions is not None or 0 in v.shape:
        raise Unsupported("dynamic or permuting reshape")
    roles = []
    for mixed in reshape_roles(v.shape, v.roles, new_sizes):
        if len(mixed) > 1:
            raise Unsupported(
                f"reshape {v.shape} -> {tuple(new_sizes)} mixes dims of roles "
                f"{'/'.join(sorted(mixed))}"
            )
        roles.append(next(iter(mixed), "u"))
    roles = "".join(roles)

    def fold(array, dims, part):
        target = labels(roles, part)
        return lax.reshape(array, [v.rank if d == RANK else new_sizes[d] for d in target])

    parts = {
        part: None if getattr(v, part) is None else fold(getattr(v, part), None, part)
        for part in PARTS
    }
    return dataclasses.replace(
        v, w=rearranged(v, lax.reshape, ops.reshape, new_sizes), roles=roles, **parts
    )


def concatenate(values: Sequence, axis: int) -> Implicit:
    """Concatenates weights, adapted or not, into one whose rank is the sum of the ranks.

    Along a stack dim the factors are padded to one rank and concatenated; along an in or an out
    dim they become block-diagonal: `[W1 + A1·B1, W2 + A2·B2] = [W1, W2] + [A1, A2]·diag(B1, B2)`.
    """
    values = [_unit_as_stack(v, axis) for v in values]
    known = [v for v in values if isinstance(v, Implicit)]
    roles = known[0].roles
    if any(v.roles != roles for v in known):
        raise Unsupported("concatenation of weights whose dims have different roles")
    if any(v.gain is not None for v in known):
        raise Unsupported("concatenation of DoRA weights")
    if len({(v.dropout, v.key is None) for v in known}) > 1:
        raise Unsupported("concatenation of weights with different dropout")
    parts = [v if isinstance(v, Implicit) else _zero_like(v, known[0]) for v in values]
    bias = _joined_bias(parts, roles, axis)
    parts = [_fold_scale(v) for v in parts]
    ranks = [v.rank for v in parts]
    owners = {"s": (), "i": ("b",), "o": ("a",)}[roles[axis]]
    joined = {}
    for part in ("a", "b"):
        dims = labels(roles, part)
        arrays, along = [], RANK if part in owners else axis
        for k, v in enumerate(parts):
            array = getattr(v, part)
            if part in owners:
                arrays.append(array)
                continue
            before, after = sum(ranks[:k]), sum(ranks[k + 1 :])
            if roles[axis] == "s":
                before, after = 0, max(ranks) - ranks[k]
            pad = [(before, after, 0) if d == RANK else (0, 0, 0) for d in dims]
            arrays.append(lax.pad(array, jnp.zeros((), array.dtype), pad))
        joined[part] = lax.concatenate(arrays, dims.index(along))
    stack = labels(roles, "scale")
    w = lax.concatenate([opened(v, "concatenate") for v in parts], axis)
    return dataclasses.replace(
        known[0],
        w=w,
        a=joined["a"],
        b=joined["b"],
        scale=jnp.ones([w.shape[d] for d in stack], known[0].scale.dtype),
        key=_joined_keys(parts, roles, axis),
        bias=bias,
    )


def _joined_bias(parts: Sequence[Implicit], roles: str, axis: int):
    """The biases of a concatenation, scaled: side by side, or added up along an in dim."""
    dims = labels(roles, "bias")
    dtype = next((v.bias.dtype for v in parts if v.bias is not None), None)
    if dtype is None:
        return None
    each = [
        v.bias * expand_to(v.scale.astype(dtype), labels(roles, "scale"), dims)
        if v.bias is not None
        else jnp.zeros([v.shape[d] for d in dims], dtype)
        for v in parts
    ]
    return sum(each[1:], each[0]) if roles[axis] == "i" else lax.concatenate(each, dims.index(axis))


def _joined_keys(parts: Sequence[Implicit], roles: str, axis: int):
    """Keys of a concatenation: of each along a stack, else the first one's for the whole."""
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
    roles = v.roles[:axis] + "s" + v.roles[axis:]

    def add(array, dims):
        moved = [d if d == RANK or d < axis else d + 1 for d in dims]
        return array.reshape(1, *array.shape), [axis, *moved]

    shape = (*v.shape[:axis], 1, *v.shape[axis:])
    w = rearranged(
        v,
        lax.broadcast_in_dim,
        ops.broadcast_in_dim,
        shape,
        [d for d in range(v.ndim + 1) if d != axis],
    )
    return rebuild(v, w, roles, add)


def _unit_as_stack(v, axis: int):
    if not isinstance(v, Implicit) or v.roles[axis] != "u":
        return v
    return _with_stack_axis(squeeze(v, dimensions=(axis,)), axis)


def _zero_like(w, like: Implicit) -> Implicit:
    def zeros(part, array):
        dims = labels(like.roles, part)
        return jnp.zeros([1 if d == RANK else w.shape[d] for d in dims], array.dtype)

    shape = [w.shape[d] for d in labels(like.roles, "scale")]
    key = None if like.key is None else jnp.broadcast_to(like.key.reshape(-1)[0], shape)
    return dataclasses.replace(
        like,
        w=w,
        a=zeros("a", like.a),
        b=zeros("b", like.b),
        scale=jnp.ones(shape, like.scale.dtype),
        key=key,
        bias=None,
    )


def _fold_scale(v: Implicit) -> Implicit:
    s = expand_to(v.scale, labels(v.roles, "scale"), labels(v.roles, "a"))
    return dataclasses.replace(v, a=v.a * s.astype(v.a.dtype))


def scale_by(v: Implicit, factor, *, divide: bool = False) -> Implicit:
    """Multiplication of a weight by a number, which the scale takes, or by gains, see `_gains`."""
    if jnp.size(factor) != 1:
        return _gains(v, factor, divide=divide)
    factor = jnp.reshape(jnp.asarray(factor), ())
    if divide:
        w, scale = opened(v, "div") / factor, v.scale / factor.astype(v.scale.dtype)
    else:
        w, scale = opened(v, "mul") * factor, v.scale * factor.astype(v.scale.dtype)
    return dataclasses.replace(v, w=w, scale=scale)


def _gains(v: Implicit, factor, *, divide: bool) -> Implicit:
    """Multiplication by an array that varies along dims of one factor only: that factor takes it.

    `(W + A·B) * g[None, :] = W * g[None, :] + A·(B * g)`.
    """
    varies = [d for d in range(factor.ndim) if factor.shape[d] != 1]
    roles = {v.roles[d] for d in varies} if factor.ndim == v.ndim else {"i", "o"}
    if {"i", "o"} <= roles:
        raise Unsupported("elementwise product with an array")
    if any(factor.shape[d] != v.shape[d] for d in varies):
        raise Unsupported("product with an array that repeats the weight")
    if v.bias is not None:
        raise Unsupported("product of a weight with an array, where its adapter has a bias")
    part = "a" if "i" in roles else "b"
    array = getattr(v, part)
    own = lax.reshape(factor, [factor.shape[d] for d in varies]).astype(array.dtype)
    own = expand_to(own, varies, labels(v.roles, part))
    w = opened(v, "div") / factor if divide else opened(v, "mul") * factor
    return dataclasses.replace(v, w=w, **{part: array / own if divide else array * own})


def negate(v: Implicit, **_):
    return dataclasses.replace(v, w=-opened(v, "neg"), scale=-v.scale)


def sharding_constraint(v: Implicit, bind, *, sharding, **_):
    """Constrains the factors as the weight is: the same axes on the dims each owns."""
    if not isinstance(sharding, NamedSharding):
        return dataclasses.replace(v, w=each(v, bind))
    constrain = jax.lax.with_sharding_constraint
    return dataclasses.replace(
        v,
        w=moved(v, sharding, constrain),
        a=constrain(v.a, part_sharding(sharding, v.roles, "a")),
        b=constrain(v.b, part_sharding(sharding, v.roles, "b")),
    )


def device_put(v: Implicit, to) -> Implicit:
    """Moves the weight and its factors: to a memory space or a device, or spread as the weight."""
    parts = {}
    for part in ("a", "b"):
        there = part_sharding(to, v.roles, part) if isinstance(to, NamedSharding) else to
        parts[part] = jax.device_put(getattr(v, part), there)
    return dataclasses.replace(v, w=moved(v, to, jax.device_put), **parts)


def leafwise(v: Implicit, bind) -> Implicit:
    """Operations that change no value: applied to the weight and to both factors."""
    return dataclasses.replace(v, w=each(v, bind), a=bind(v.a), b=bind(v.b))


def base_only(v: Implicit, bind) -> Implicit:
    return dataclasses.replace(v, w=bind(opened(v, "reduce_precision")))


def named(v: Implicit, bind) -> Implicit:
    """A name for rematerialization: a quantized weight is decoded anew wherever it is used."""
    return v if isinstance(v.w, QuantArray) else dataclasses.replace(v, w=bind(v.w))


def reshard(v: Implicit, *, dst_sharding, **_):
    """Explicit resharding: the factors take the same axes on the dims each owns."""
    change = jax.sharding.reshard
    parts = {}
    # Every part, the scale too: a reshard may change the mesh's kind of axes.
    for part in PARTS:
        if getattr(v, part) is not None:
            parts[part] = change(getattr(v, part), part_sharding(dst_sharding, v.roles, part))
    return dataclasses.replace(v, w=moved(v, dst_sharding, change), **parts)


def _pick(roles: str, dims: Sequence[int]) -> str:
    return "".join(roles[d] for d in dims)
