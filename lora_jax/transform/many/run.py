"""The strategies for a batch whose rows, or tokens, have adapters of their own.

Gathered: each row's factors are copied out of the stack, once for the call, and meet the row's
activations in batched products. Grouped: the factors stay where they are, and the rows (or tokens)
are sorted by adapter (`many.grouped`, whose `choose_strategy` picks one of the two).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lora_jax import compat, paths
from lora_jax.array import LoraStack, SavedStack, count, is_leaf, is_lora, is_stack
from lora_jax.transform.many import grouped
from lora_jax.transform.many.rows import axes_of, checked, rowwise, select, select_leaf
from lora_jax.transform.many.rules import RowAdapters

STRATEGIES: tuple[grouped.Strategy, ...] = get_args(grouped.Strategy)


class Call(NamedTuple):
    """A call of a lorafied function with many adapters.

    Attributes:
      args, kwargs: of the function.
      key: dropout key, or None.
      row_axes, out_axes: as in `lorafy`.
    """

    args: tuple
    kwargs: dict
    key: Any
    row_axes: Any
    out_axes: Any


def gathered(one: Callable, chosen: Any, call: Call) -> Any:
    """Runs rows whose adapters have been chosen; `one` as in `run`."""
    first = next(x for x in jax.tree.leaves(chosen, is_leaf=is_lora) if is_stack(x))

    def row(number: Any, tree: Any, *, args: tuple, kwargs: dict, key: Any) -> Any:
        return one(tree, args=args, kwargs=kwargs, key=key)

    return _rows(row, chosen, jnp.arange(first.count), call)


def run(
    one: Callable,
    stacked: Any,
    ids: Any,
    call: Call,
    *,
    token_axes: Any,
    strategy: grouped.Strategy | None,
) -> Any:
    """Runs rows that choose from a stack.

    Args:
      one: the lorafied function for one batch, `one(tree, args=, kwargs=, key=, adapters=None)`;
        `adapters` are a row's `RowAdapters` where `tree` still holds stacks.
      stacked: from `lora.stack`.
      ids: int (rows,) or (rows, tokens).
      call: what to call it with.
      token_axes, strategy: as in `lorafy`.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(
            f"`adapter_strategy` must be one of {', '.join(STRATEGIES)} or None, got {strategy!r}"
        )
    ids = checked(stacked, ids)
    # One token a row, as in decoding: an adapter for the token is one for the row.
    by_token = ids.ndim == 2 and ids.shape[1] != 1
    if not by_token:
        ids = ids.reshape(ids.shape[0])
    number = count(stacked)
    # The leaf of the largest rank decides for all: the strategies differ little at the others.
    leaves = jax.tree.leaves(stacked, is_leaf=is_lora)
    stacks = [x for x in leaves if isinstance(x, LoraStack)]
    if strategy is None:
        rank = max((x.rank for x in stacks), default=0)
        positions = 1 if by_token else _positions(call, ids.shape[0])
        strategy = grouped.choose_strategy(ids.size, positions, number, rank)
        # Over explicit mesh axes, factors do not merge with the dims that sorting makes.
        if any(compat.spec_of(factor) is not None for x in stacks for factor in (x.a, x.b)):
            strategy = "gathered"
    # Each row's factors are copied once, outside the function.
    if strategy == "gathered" and not by_token:
        return gathered(one, select(stacked, ids), call)
    axes = _token_axes(token_axes, call, ids) if by_token else None
    groups = grouped.sort(ids.reshape(-1), number)

    def row(row_ids: Any, tree: Any, *, args: tuple, kwargs: dict, key: Any) -> Any:
        adapters = RowAdapters(row_ids, groups, strategy, axes)
        return one(tree, args=args, kwargs=kwargs, key=key, adapters=adapters)

    return _rows(row, _saved_chosen(stacked, ids), ids, call)


def _rows(row: Callable, tree: Any, ids: Any, call: Call) -> Any:
    try:
        return rowwise(
            row,
            tree,
            ids,
            args=call.args,
            kwargs=call.kwargs,
            key=call.key,
            row_axes=call.row_axes,
            out_axes=call.out_axes,
        )
    except NotImplementedError as error:
        raise NotImplementedError(
            "many adapters in one batch need `jax.vmap` of the function over its rows, and JAX has "
            f"none for an operation in it ({error}): call it once for each adapter, with the rows "
            "of that adapter and `lora.multi.adapter(stacked, index)`"
        ) from error


def _saved_chosen(stacked: Any, ids: Any) -> Any:
    """The stack with the leaves that train whole chosen for the rows."""
    flat, tree = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=is_leaf)
    for path, x in flat:
        if isinstance(x, SavedStack) and ids.ndim == 2:
            raise ValueError(
                f"`{paths.spell(path)}` trains whole in an adapter (`modules_to_save`, biases), "
                "and is one for a row: give `adapter_ids` one for each row, or stack adapters "
                "without it"
            )
    leaves = [select_leaf(x, ids) if isinstance(x, SavedStack) else x for _, x in flat]
    return jax.tree.unflatten(tree, leaves)


def _flat(call: Call) -> Any:
    return jax.tree.flatten((call.args, call.kwargs), is_leaf=lambda x: x is None)


def _positions(call: Call, rows: int) -> int:
    """About how many positions a row has: of its integer arguments, or all but their features."""
    flat, tree = _flat(call)
    tokens, features = [], [1]
    for x, axis in zip(flat, axes_of(call.row_axes, flat, tree, rows), strict=True):
        if axis is None:
            continue
        shape = [n for d, n in enumerate(x.shape) if d != axis]
        # Token ids (integers) have no features; other arrays have them last.
        if jnp.issubdtype(jnp.result_type(x), jnp.integer):
            tokens.append(math.prod(shape))
        else:
            features.append(math.prod(shape[:-1]))
    return max(tokens or features)


def _token_axes(token_axes: Any, call: Call, ids: Any) -> tuple:
    """For each of the flat arguments the axis that numbers the tokens, or None."""
    flat, tree = _flat(call)
    rows, tokens = ids.shape
    by_row = axes_of(call.row_axes, flat, tree, rows)
    full = jax.tree.unflatten(tree, flat)
    wanted = jax.tree.leaves(
        jax.tree.broadcast(token_axes, full, is_leaf=lambda x: x is None),
        is_leaf=lambda x: x is None,
    )
    found = []
    for x, axis, row_axis in zip(flat, wanted, by_row, strict=True):
        shape = getattr(x, "shape", ())
        # One number for all means arrays that fit; a tree of numbers must fit where it names one.
        fits = axis is not None and axis < len(shape) and shape[axis] == tokens
        if isinstance(token_axes, int):
            axis = axis if fits and row_axis not in (None, axis) else None
        elif axis is not None and not fits:
            raise ValueError(
                f"`adapter_ids` has {tokens} tokens a row, but an argument of shape {shape} does "
                f"not have that many along axis {axis}, which `token_axes` names"
            )
        found.append(axis)
    if all(axis is None for axis in found):
        raise ValueError(
            f"`adapter_ids` has shape {tuple(ids.shape)}, but no argument has {tokens} entries "
            "along the axis of its tokens: pass `token_axes` to state where arguments number "
            "their tokens (a prefix of (args, kwargs), None where they do not)"
        )
    return tuple(found)
