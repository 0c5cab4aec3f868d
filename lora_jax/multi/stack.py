"""Adapters of one base as one tree: every factor with an axis that numbers the adapters.

    leaf n of the stack:   W + scale[n] · a[n]·b[n]        a (stack..., n, in..., R)

Smaller ranks are filled up with zeros, adapters that leave a leaf alone have scale 0 there, so
that any adapter can take any slot without a shape changing: what is compiled stays.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from lora_jax import paths
from lora_jax.array import (
    LoraArray,
    LoraStack,
    RowsArray,
    SavedArray,
    SavedStack,
    b_dims,
    effective,
    factor_shapes,
    is_lora,
    is_stack,
    rows_as_lora,
    stack_dims,
)
from lora_jax.quant.array import is_leaf

# What of an adapter stands at each slot of a leaf.
_OWN = {LoraStack: ("a", "b", "scale", "m", "gain", "bias"), SavedStack: ("value",)}


def stack(
    adapters: Sequence, *, slots: int | None = None, rank: int | None = None, train: bool = False
):
    """Stacks adapters of one base, of whatever ranks, alphas and targets, into one tree.

    Args:
      adapters: trees with LoRA leaves over the same base, numbered from 0.
      slots: how many adapters there is room for, at least as many as there are; slots without
        one are the plain base.
      rank: the rank that all are filled up to, at least the largest; the largest by default.
      train: whether the stack is to be trained: DoRA's magnitudes then train too. Otherwise
        their gains `m / ‖W + s·A·B‖` are computed once, here.

    Returns:
      The tree, for `lorafy(fn)(stacked, ..., adapter_ids=ids)`.

    Raises:
      ValueError: no adapter, trees of different structure or different bases, a rank or a number
        of slots that is too small, or leaves that cannot stand beside each other.

    Example:
      stacked = lora.stack([ann, bob])
      y = jax.jit(lora.lorafy(model.apply))(stacked, tokens, adapter_ids=jnp.array([0, 1, -1]))
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("`adapters` is empty: give at least one tree with LoRA leaves")
    slots = len(adapters) if slots is None else slots
    if slots < len(adapters):
        raise ValueError(f"`slots` is {slots}, but there are {len(adapters)} adapters")
    columns, tree, names = columns_of(adapters)
    if not any(is_lora(x) for column in columns for x in column):
        raise ValueError("no adapter in `adapters` has a LoRA leaf: pass trees from `lora.init`")
    leaves = [
        _stack_leaf(name, column, slots, rank, train)
        for name, column in zip(names, columns, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def columns_of(adapters: Sequence):
    """The leaves of all adapters side by side, checked to be of one base.

    Returns:
      For each leaf the adapters' own, the tree, and the leaves' paths.

    Raises:
      ValueError: trees of different structure, or other bases.
    """
    flat = [jax.tree_util.tree_flatten_with_path(x, is_leaf=is_leaf) for x in adapters]
    names = [paths.spell(path) for path, _ in flat[0][0]]
    for number, (leaves, tree) in enumerate(flat):
        if tree != flat[0][1]:
            other = {paths.spell(path) for path, _ in leaves}
            odd = sorted(other ^ set(names))[:3]
            raise ValueError(
                f"adapter {number} is a tree of another structure than adapter 0: they differ at "
                f"{', '.join(f'`{p}`' for p in odd) or 'their containers'}; stack adapters of one "
                "base"
            )
    columns = [list(column) for column in zip(*([x for _, x in leaves] for leaves, _ in flat),
                                              strict=True)]  # fmt: skip
    for name, column in zip(names, columns, strict=True):
        _check_same_base(name, [_base(x) for x in column])
    return columns, flat[0][1], names


def _base(x):
    return x.w if is_lora(x) else x


def _check_same_base(name: str, bases: Sequence):
    first = jax.tree.leaves(bases[0])
    for number, base in enumerate(bases[1:], start=1):
        other = jax.tree.leaves(base)
        same = len(first) == len(other) and all(
            x is y
            or (jnp.shape(x) == jnp.shape(y) and jnp.result_type(x) == jnp.result_type(y)
                and _equal(x, y))
            for x, y in zip(first, other, strict=True)
        )  # fmt: skip
        if not same:
            raise ValueError(
                f"`{name}`: the bases of adapter 0 and of adapter {number} differ; adapters can be "
                "stacked on one base only (one that changes the base, such as PiSSA, has its own: "
                "make it a plain LoRA first)"
            )


def _equal(x, y) -> bool:
    if isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer):
        return True  # unknown while tracing
    return bool(jnp.array_equal(x, y))


def _stack_leaf(name: str, column: list, slots: int, rank: int | None, train: bool):
    if not any(is_lora(x) for x in column):
        return column[0]
    if any(is_stack(x) for x in column):
        raise ValueError(f"`{name}` is a stack already: pass single adapters")
    if any(isinstance(x, SavedArray) for x in column):
        return _stack_saved(name, column, slots)
    column = [_as_lora(name, x, train) for x in column]
    like = next(x for x in column if isinstance(x, LoraArray))
    _check_alike(name, column, train)
    largest = max(x.rank for x in column if isinstance(x, LoraArray))
    rank = largest if rank is None else rank
    if rank < largest:
        raise ValueError(f"`rank` is {rank}, but an adapter has rank {largest} at `{name}`")
    blank = _blank(like, column, rank, train)
    filled = [_padded(x, blank) if isinstance(x, LoraArray) else blank for x in column]
    return _join(filled + [blank] * (slots - len(column)))


def _stack_saved(name: str, column: list, slots: int) -> SavedStack:
    for number, x in enumerate(column):
        if is_lora(x) and not isinstance(x, SavedArray):
            raise ValueError(
                f"`{name}` trains whole in one adapter and has factors in adapter {number}: such "
                "two cannot be stacked; merge one of them"
            )
    base = _base(column[0])
    values = [effective(x) if isinstance(x, SavedArray) else base for x in column]
    return SavedStack(base, jnp.stack([*values, *[base] * (slots - len(column))]))


def _as_lora(name: str, x, train: bool):
    if not isinstance(x, RowsArray):
        return x
    if train:
        raise ValueError(
            f"`{name}` has trained rows (`trainable_token_indices`), which do not train in a "
            "stack; train that adapter by itself, or stack without `train`"
        )
    return rows_as_lora(x)


def _check_alike(name: str, column: list, train: bool):
    known = [x for x in column if isinstance(x, LoraArray)]
    if len({x.roles for x in known}) > 1:
        raise ValueError(
            f"`{name}`: adapters read its dims as {sorted({x.roles for x in known})}; adapters of "
            "one stack must agree: plan them with the same `roles`"
        )
    if train and len({x.m is None for x in known}) > 1:
        raise ValueError(
            f"`{name}`: some adapters have DoRA's magnitude there and some have not, which cannot "
            "be trained together; stack without `train` to use them together"
        )
    if train and len({x.dropout for x in known}) > 1:
        raise ValueError(
            f"`{name}`: adapters have different dropout {sorted({x.dropout for x in known})}; "
            "adapters that train together must have one"
        )


def _blank(like: LoraArray, column: list, rank: int, train: bool) -> LoraStack:
    """One slot without an adapter, at axis `like.axis` of size 1: the plain base."""
    known = [x for x in column if isinstance(x, LoraArray)]
    a, b = factor_shapes(like.shape, like.roles, rank)
    depth = like.roles.count("b")
    outs = [like.shape[d] for d in b_dims(like.roles)]

    def full(shape, value, dtype):
        return jnp.full([*shape[:depth], 1, *shape[depth:]], value, dtype)

    dora = next((x for x in known if x.m is not None), None)
    bias = next((x for x in known if x.bias is not None), None)
    gain = m = None
    if dora is not None:
        from lora_jax.methods.dora import norm

        if train:
            m = jnp.expand_dims(norm(dataclasses.replace(dora, scale=dora.scale * 0)), depth)
        else:
            gain = full(outs, 1, jnp.float32)
    return LoraStack(
        like.w,
        full(a, 0, jnp.result_type(*(x.a.dtype for x in known))),
        full(b, 0, jnp.result_type(*(x.b.dtype for x in known))),
        full([like.shape[d] for d in stack_dims(like.roles)], 0, jnp.float32),
        m=m,
        gain=gain,
        bias=None if bias is None else full(outs, 0, bias.bias.dtype),
        roles=like.roles,
        dropout=like.dropout if train else 0.0,
        window=like.window,
    )


def _padded(x: LoraArray, blank: LoraStack) -> LoraStack:
    """An adapter as the one slot of a stack like `blank`."""
    axis, missing = blank.axis, blank.rank - x.rank
    put = {
        "a": _pad_axis(x.a, -1, missing),
        "b": _pad_axis(x.b, axis, missing),
        "scale": x.scale,
        "bias": x.bias,
    }
    if blank.m is not None:
        put["m"] = x.m
    if blank.gain is not None and x.m is not None:
        from lora_jax.methods.dora import gain

        put["gain"] = gain(x)
    slot = {
        name: jnp.expand_dims(value, axis).astype(getattr(blank, name).dtype)
        for name, value in put.items()
        if value is not None
    }
    return dataclasses.replace(blank, **slot)


def _pad_axis(x, axis: int, missing: int):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    return jnp.pad(x, pad) if missing else x


def _join(slots: Sequence[LoraStack]) -> LoraStack:
    axis = slots[0].axis
    joined = {
        name: jnp.concatenate([getattr(x, name) for x in slots], axis)
        for name in _OWN[LoraStack]
        if getattr(slots[0], name) is not None
    }
    return dataclasses.replace(slots[0], **joined)


def count(stacked) -> int:
    """How many slots a stack has.

    Raises:
      ValueError: the tree is no stack.
    """
    counts = {x.count for x in jax.tree.leaves(stacked, is_leaf=is_stack) if is_stack(x)}
    if len(counts) != 1:
        raise ValueError(
            "the tree holds no stack of adapters: make one with `lora.stack([...])`"
            if not counts
            else f"the leaves hold different numbers of adapters {sorted(counts)}"
        )
    return counts.pop()


def replace(stacked, slot: int, adapter):
    """Puts an adapter into a slot, in place of what was there; no shape changes.

    Args:
      stacked: from `stack`.
      slot: its number; a traced one is not checked.
      adapter: a tree with LoRA leaves over the same base, its rank at most the stack's; or the
        plain base, which empties the slot.

    Returns:
      A new tree; what was compiled for `stacked` serves it too.

    Raises:
      ValueError: no such slot, another base, a rank that is too large, or a leaf for which the
        stack has no room.
    """
    number = count(stacked)
    if not isinstance(slot, jax.core.Tracer) and not 0 <= int(slot) < number:
        raise ValueError(f"`slot` is {slot}, but the stack has slots 0 to {number - 1}")
    def put(x, one):
        if not is_stack(x):
            return x
        changed = {
            field: lax.dynamic_update_slice_in_dim(
                getattr(x, field), getattr(one, field).astype(getattr(x, field).dtype), slot, x.axis
            )
            for field in slot_fields(x)
        }
        return dataclasses.replace(x, **changed)

    return jax.tree.map(put, stacked, one_slot(stacked, adapter), is_leaf=is_leaf)


def one_slot(stacked, adapter):
    """An adapter as a stack of one slot, of the same form as `stacked`.

    Args:
      stacked: from `stack`.
      adapter: as for `replace`.

    Raises:
      ValueError: as `replace`.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=is_leaf)
    new, new_tree = jax.tree.flatten(adapter, is_leaf=is_leaf)
    if new_tree != tree:
        raise ValueError("`adapter` is a tree of another structure than the stack's base")
    leaves = [_slot_leaf(paths.spell(p), x, y) for (p, x), y in zip(flat, new, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def slot_fields(x: LoraStack | SavedStack) -> tuple[str, ...]:
    """The fields of a leaf that hold something for each adapter."""
    return tuple(name for name in _OWN[type(x)] if getattr(x, name) is not None)


def _slot_leaf(name: str, x, y):
    _check_same_base(name, [_base(x), _base(y)])
    if is_stack(x):
        return _slot_of(name, x, y)
    if is_lora(y):
        raise ValueError(
            f"`{name}` is adapted by the new adapter, but the stack has no room for it there; "
            "make the stack from adapters that together adapt every leaf"
        )
    return x


def _slot_of(name: str, x: LoraStack | SavedStack, y) -> LoraStack | SavedStack:
    """A leaf of a single adapter in the form of one slot."""
    train = isinstance(x, LoraStack) and x.m is not None
    if isinstance(x, SavedStack):
        return _stack_saved(name, [y], 1)
    y = _as_lora(name, y, train)
    if isinstance(y, SavedArray):
        raise ValueError(f"`{name}` trains whole in the new adapter and has factors in the stack")
    blank = dataclasses.replace(
        x,
        **{
            field: jnp.zeros_like(lax.slice_in_dim(getattr(x, field), 0, 1, axis=x.axis))
            for field in slot_fields(x)
        },
    )
    if x.gain is not None:
        blank = dataclasses.replace(blank, gain=jnp.ones_like(blank.gain))
    if not isinstance(y, LoraArray):
        return blank
    if y.roles != x.roles or y.rank > x.rank:
        raise ValueError(
            f"`{name}` has rank {y.rank} and roles `{y.roles}` in the new adapter; the stack holds "
            f"rank {x.rank} at most and roles `{x.roles}`: make the stack with a larger `rank`"
        )
    for field, why in (("m", "DoRA's magnitude"), ("bias", "a bias")):
        room = x.bias is not None if field == "bias" else (x.m is not None or x.gain is not None)
        if getattr(y, field) is not None and not room:
            raise ValueError(f"`{name}` has {why} in the new adapter, and the stack has none there")
    return _padded(y, blank)


def adapter(stacked, slot: int):
    """One adapter of a stack as a tree by itself, filled up to the stack's rank.

    Args:
      stacked: from `stack`, trained or not.
      slot: its number.

    Raises:
      ValueError: no such slot; or the stack holds DoRA's gains only (stack with `train=True`).
    """
    number = count(stacked)
    if not 0 <= slot < number:
        raise ValueError(f"`slot` is {slot}, but the stack has slots 0 to {number - 1}")
    flat, tree = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=is_leaf)
    return jax.tree.unflatten(tree, [_single(paths.spell(p), x, slot) for p, x in flat])


def _single(name: str, x, slot: int):
    if isinstance(x, SavedStack):
        return SavedArray(x.w, x.value[slot])
    if not isinstance(x, LoraStack):
        return x
    if x.gain is not None:
        raise ValueError(
            f"`{name}` holds DoRA's gains, not its magnitudes: stack the adapters with "
            "`train=True` to take single ones out again"
        )
    own = {
        field: lax.index_in_dim(getattr(x, field), slot, x.axis, keepdims=False)
        for field in ("a", "b", "scale", "m", "bias")
        if getattr(x, field) is not None
    }
    return LoraArray(x.w, roles=x.roles, dropout=x.dropout, window=x.window, **own)
