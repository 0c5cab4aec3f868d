"""Adapters of one base as one tree, whose factors have an axis for the adapters.

    leaf n of the stack:   W + scale[n] · a[n]·b[n]        a (stack..., n, in..., R)

Smaller ranks are padded with zeros, and an adapter that does not adapt a leaf has scale 0 there.
So any adapter fits any slot, and a compiled function keeps working when adapters change.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lora_jax import paths
from lora_jax.array import (
    LoraArray,
    LoraStack,
    RowsArray,
    SavedArray,
    SavedStack,
    check_whole,
    effective,
    is_leaf,
    is_lora,
    is_stack,
    rows_as_lora,
    widened,
)
from lora_jax.config.arguments import check_count
from lora_jax.dims import b_dims, factor_shapes, stack_dims
from lora_jax.transform.dora import gain, norm

# The fields that hold a part of each adapter.
_FIELDS = {LoraStack: ("a", "b", "scale", "m", "gain", "bias"), SavedStack: ("value",)}


def stack(
    adapters: Sequence, *, slots: int | None = None, rank: int | None = None, train: bool = False
) -> PyTree:
    """Stacks adapters of one base, of whatever ranks, alphas and targets, into one tree.

    Args:
      adapters: trees with LoRA leaves over the same base, numbered from 0.
      slots: number of slots, by default one for each adapter; an empty slot is the plain base.
      rank: the rank that all are padded to; by default the largest.
      train: whether the stack will be trained. If so, DoRA's magnitudes train too; if not, their
        gains `m / ‖W + s·A·B‖` are computed here, once.

    Returns:
      The tree, for `lorafy(fn)(stacked, ..., adapter_ids=ids)`.

    Raises:
      ValueError: there is no adapter; trees have different structures or bases; `rank` or `slots`
        is too small; the leaves of two adapters cannot be stacked; or an adapter is not finite.

    Example:
      stacked = lora.stack([ann, bob])
      y = jax.jit(lora.lorafy(model.apply))(stacked, tokens, adapter_ids=jnp.array([0, 1, -1]))
    """
    check_list(adapters)
    adapters = list(adapters)
    if not adapters:
        raise ValueError("`adapters` is empty: give at least one tree with LoRA leaves")
    slots = len(adapters) if slots is None else check_count("slots", slots)
    rank = None if rank is None else check_count("rank", rank)
    if slots < len(adapters):
        raise ValueError(
            f"`slots` is {slots}, but there are {len(adapters)} adapters: give as many at least"
        )
    columns, tree, names = columns_of(adapters)
    for number, leaves in enumerate(zip(*columns, strict=True)):
        if not any(map(is_lora, leaves)):
            raise ValueError(
                f"`adapters[{number}]` has no LoRA leaf: pass trees from `lora.init`; rows of the "
                "plain base have adapter id -1"
            )
    leaves = [
        _stack_leaf(name, column, slots=slots, rank=rank, train=train)
        for name, column in zip(names, columns, strict=True)
    ]
    check_finite(dict(zip(names, leaves, strict=True)))
    return jax.tree.unflatten(tree, leaves)


def check_finite(leaves: Mapping[str, Any]) -> None:
    """Checks that the adapters of a stack are numbers, unless they are traced.

    Args:
      leaves: the stack's leaves by path.

    Raises:
      ValueError: one holds NaN or infinity.
    """
    arrays = {
        (name, field): (x.axis, getattr(x, field))
        for name, x in leaves.items()
        if is_stack(x)
        for field in adapter_fields(x)
        if not isinstance(getattr(x, field), jax.core.Tracer)
    }
    # One program and one transfer for all of them: each would wait for the compiler and the device.
    axes = tuple(axis for axis, _ in arrays.values())
    found = jax.device_get(_finite(tuple(x for _, x in arrays.values()), axes))
    for (name, field), finite in zip(arrays, found, strict=True):
        if not finite.all():
            whose = f"adapter {finite.argmin()}" if len(finite) > 1 else "the adapter"
            raise ValueError(
                f"{whose} holds NaN or infinity in `{field}` of `{name}`, so "
                "every output would: take an earlier checkpoint of it"
            )


@partial(jax.jit, static_argnums=1)
def _finite(arrays: tuple[Array, ...], axes: tuple[int, ...]) -> list[Array]:
    """For each array, which indices along its axis hold finite numbers alone."""
    return [
        jnp.all(jnp.isfinite(jnp.moveaxis(x, axis, 0)), axis=range(1, x.ndim))
        for x, axis in zip(arrays, axes, strict=True)
    ]


def check_list(adapters: Any) -> None:
    """Raises `TypeError` for one tree in place of a list of trees.

    A dict would be read as the list of its keys.
    """
    if isinstance(adapters, str | Mapping) or not isinstance(adapters, Iterable):
        raise TypeError(
            f"`adapters` must be a list of trees, got `{type(adapters).__name__}`: pass "
            "`[adapter, ...]`"
        )


def columns_of(adapters: Sequence) -> tuple[list[list], jax.tree_util.PyTreeDef, list[str]]:
    """The leaves of several adapters, side by side.

    Returns:
      For each leaf a list of what every adapter has there; the tree; and the leaves' paths.

    Raises:
      ValueError: the trees have different structures, or their bases differ.
    """
    for x in adapters:
        check_whole(x)
    flat = [jax.tree_util.tree_flatten_with_path(x, is_leaf=is_leaf) for x in adapters]
    names = [paths.spell(path) for path, _ in flat[0][0]]
    for number, (_, tree) in enumerate(flat):
        if tree != flat[0][1]:
            where = paths.where_trees_differ(adapters[0], adapters[number], is_leaf)
            raise ValueError(
                f"adapter {number} is a tree of another structure than adapter 0: they differ at "
                f"{where}; pass adapters of one base"
            )
    columns = [list(column) for column in zip(*([x for _, x in leaves] for leaves, _ in flat),
                                              strict=True)]  # fmt: skip
    for name, column in zip(names, columns, strict=True):
        check_same_base(name, [without_adapter(x) for x in column])
    return columns, flat[0][1], names


def without_adapter(x: Any) -> Any:
    """A leaf without its adapter."""
    return x.w if is_lora(x) else x


def check_same_base(name: str, bases: Sequence) -> None:
    """Raises `ValueError` where the adapters' bases of a leaf differ, unless they are traced.

    Those on different meshes cannot be compared, nor stacked.
    """
    first = jax.tree.leaves(bases[0])
    for number, base in enumerate(bases[1:], start=1):
        other = jax.tree.leaves(base)
        same = len(first) == len(other) and all(
            # Usually the very same arrays, which costs no comparison.
            x is y
            or (jnp.shape(x) == jnp.shape(y) and jnp.result_type(x) == jnp.result_type(y)
                and _equal(name, x, y))
            for x, y in zip(first, other, strict=True)
        )  # fmt: skip
        if not same:
            raise ValueError(
                f"`{name}`: the bases of adapter 0 and of adapter {number} differ; adapters can be "
                "stacked on one base only; of one whose start changed the base, such as PiSSA, "
                "`lora.rebase` makes a plain adapter"
            )


def _equal(name: str, x: Any, y: Any) -> bool:
    if isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer):
        return True  # the numbers are unknown while tracing
    try:
        return bool(jnp.array_equal(x, y))
    except ValueError as error:  # of JAX: other devices, or explicit axes of another mesh
        raise ValueError(
            f"`{name}`: the adapters lie on different devices, {x.sharding} and {y.sharding}; "
            "bring all to one mesh first, `lora.sharding.place(adapter, mesh, rules)`"
        ) from error


def _stack_leaf(name: str, column: list, *, slots: int, rank: int | None, train: bool) -> Any:
    """One leaf of the stack, from that of each adapter."""
    if not any(is_lora(x) for x in column):
        return column[0]
    if any(is_stack(x) for x in column):
        raise ValueError(f"`{name}` is a stack already: pass single adapters")
    if any(isinstance(x, SavedArray) for x in column):
        return stack_saved(name, column, slots)
    column = [as_lora(name, x, train) for x in column]
    like = next(x for x in column if isinstance(x, LoraArray))
    _check_alike(name, column, train)
    largest = max(x.rank for x in column if isinstance(x, LoraArray))
    rank = largest if rank is None else rank
    if rank < largest:
        raise ValueError(
            f"`rank` is {rank}, but an adapter has rank {largest} at `{name}`: give at least that"
        )
    # An adapter that does not adapt this weight is an empty slot here.
    blank = _blank(like, column, rank, train)
    filled = [padded(x, blank) if isinstance(x, LoraArray) else blank for x in column]
    return _join(filled + [blank] * (slots - len(column)))


def check_shapes(name: str, x: LoraArray) -> None:
    """Raises `ValueError` where an adapter's arrays do not fit its weight."""
    a, b = factor_shapes(x.shape, x.roles, x.rank)
    stack = tuple(x.shape[d] for d in stack_dims(x.roles))
    outs = tuple(x.shape[d] for d in b_dims(x.roles))
    for field, expected in (("a", a), ("b", b), ("scale", stack), ("m", outs), ("bias", outs)):
        array = getattr(x, field)
        if array is not None and jnp.shape(array) != tuple(expected):
            raise ValueError(
                f"`{field}` of `{name}` has shape {jnp.shape(array)}, expected {tuple(expected)} "
                f"for a weight of shape {x.shape} with roles `{x.roles}` and rank {x.rank}"
            )


def stack_saved(name: str, column: list, slots: int) -> SavedStack:
    """A leaf that trains whole in some adapters."""
    for number, x in enumerate(column):
        if is_lora(x) and not isinstance(x, SavedArray):
            raise ValueError(
                f"`{name}` trains whole in one adapter and has factors in adapter {number}: the "
                "two cannot be stacked; merge one of them"
            )
    base = without_adapter(column[0])
    for x in column:
        if isinstance(x, SavedArray) and jnp.shape(x.value) != x.shape:
            raise ValueError(
                f"`{name}` trains whole with a value of shape {jnp.shape(x.value)}, expected the "
                f"base's {x.shape}"
            )
    # An adapter that does not train the leaf, like an empty slot, has the base's own values.
    values = [effective(x) if isinstance(x, SavedArray) else base for x in column]
    tied = next((x.tied for x in column if isinstance(x, SavedArray)), None)
    return SavedStack(base, jnp.stack([*values, *[base] * (slots - len(column))]), tied=tied)


def as_lora(name: str, x: Any, train: bool) -> Any:
    """A leaf with trained rows as factors; other leaves unchanged."""
    if not isinstance(x, RowsArray):
        return x
    if train:
        raise ValueError(
            f"`{name}` has trained rows (`trainable_token_indices`), which cannot train in a "
            "stack: train that adapter by itself, or stack without `train`"
        )
    return rows_as_lora(x)


def _check_alike(name: str, column: list, train: bool) -> None:
    """Raises `ValueError` where adapters of a weight differ in what a stack has once."""
    factored = [x for x in column if isinstance(x, LoraArray)]
    for x in factored:
        check_shapes(name, x)
    if len({x.roles for x in factored}) > 1:
        raise ValueError(
            f"`{name}` has roles {sorted({x.roles for x in factored})} in different adapters, "
            "expected the same in all: plan them with the same `roles`"
        )
    if train and len({x.m is None for x in factored}) > 1:
        raise ValueError(
            f"`{name}`: some adapters use DoRA there and some do not, and cannot train together: "
            "stack without `train` to use them together"
        )
    # Dropout is static: all adapters of a leaf share one program.
    if train and len({x.dropout for x in factored}) > 1:
        raise ValueError(
            f"`{name}`: adapters have dropout {sorted({x.dropout for x in factored})}, expected "
            "the same in all that train together"
        )


def _blank(like: LoraArray, column: list, rank: int, train: bool) -> LoraStack:
    """An empty slot, which is the plain base, as a stack of one."""
    factored = [x for x in column if isinstance(x, LoraArray)]
    a, b = factor_shapes(like.shape, like.roles, rank)
    depth = like.roles.count("s")
    outs = [like.shape[d] for d in b_dims(like.roles)]

    # With the adapters' axis, of size 1, behind the stack dims.
    def full(shape: Sequence[int], value: float, dtype: Any) -> Array:
        return jnp.full([*shape[:depth], 1, *shape[depth:]], value, dtype)

    dora = next((x for x in factored if x.m is not None), None)
    bias = next((x for x in factored if x.bias is not None), None)
    gain = m = None
    if dora is not None:
        if train:
            # With scale 0 this is the norm of W, so that the gain is 1: the plain base.
            m = jnp.expand_dims(norm(dataclasses.replace(dora, scale=dora.scale * 0)), depth)
        else:
            # An adapter without DoRA has gain 1.
            magnitudes = [x.m.dtype for x in factored if x.m is not None]
            gain = full(outs, 1, widened(*magnitudes))
    return LoraStack(
        like.w,
        # One dtype for all adapters, the widest, so that none is rounded.
        full(a, 0, jnp.result_type(*(x.a.dtype for x in factored))),
        full(b, 0, jnp.result_type(*(x.b.dtype for x in factored))),
        full([like.shape[d] for d in stack_dims(like.roles)], 0, jnp.float32),
        m=m,
        gain=gain,
        bias=None if bias is None else full(outs, 0, bias.bias.dtype),
        roles=like.roles,
        dropout=like.dropout if train else 0.0,
        window=like.window,
        tied=like.tied,
    )


def padded(x: LoraArray, blank: LoraStack) -> LoraStack:
    """An adapter as a stack of one, padded to the rank of `blank`."""
    axis, missing = blank.axis, blank.rank - x.rank
    put = {
        "a": _pad_axis(x.a, -1, missing),
        # The rank of a single adapter's B follows the stack dims, where the adapters' axis will be.
        "b": _pad_axis(x.b, axis, missing),
        "scale": x.scale,
        "bias": x.bias,
    }
    if blank.m is not None:
        put["m"] = x.m
    if blank.gain is not None and x.m is not None:
        put["gain"] = gain(x)
    slot = {
        name: jnp.expand_dims(value, axis).astype(getattr(blank, name).dtype)
        for name, value in put.items()
        if value is not None
    }
    return dataclasses.replace(blank, **slot)


def _pad_axis(x: Array, axis: int, missing: int) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    return jnp.pad(x, pad) if missing else x


def adapter_fields(x: LoraStack | SavedStack) -> tuple[str, ...]:
    """The fields of a leaf that hold a part of each adapter."""
    return tuple(name for name in _FIELDS[type(x)] if getattr(x, name) is not None)


def _join(slots: Sequence[LoraStack]) -> LoraStack:
    axis = slots[0].axis
    joined = {
        name: jnp.concatenate([getattr(x, name) for x in slots], axis)
        for name in adapter_fields(slots[0])
    }
    return dataclasses.replace(slots[0], **joined)
