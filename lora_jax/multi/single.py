"""One adapter of a stack: put into a slot, and taken out."""

import dataclasses
from typing import Any

import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from lora_jax import paths
from lora_jax.array import (
    LoraArray,
    LoraStack,
    SavedArray,
    SavedStack,
    count,
    is_leaf,
    is_lora,
    is_stack,
    leaves_by_path,
)
from lora_jax.config.arguments import integer, kind_of
from lora_jax.multi.stack import (
    adapter_fields,
    as_lora,
    check_finite,
    check_same_base,
    check_shapes,
    padded,
    stack_saved,
    without_adapter,
)


def replace(stacked: PyTree, index: int, adapter: PyTree) -> PyTree:
    """Puts an adapter into a slot of a stack; no shape changes.

    Args:
      stacked: from `stack`.
      index: of the slot; a traced one is not checked.
      adapter: a tree with LoRA leaves over the same base, its rank at most the stack's; or the
        plain base, which empties the slot.

    Returns:
      A new tree, for which nothing compiled for `stacked` is compiled again.

    Raises:
      ValueError: there is no such slot, the base differs, the rank is too large, the stack has no
        room for a leaf, or the adapter is not finite.
    """
    number = count(stacked)
    _check_slot(index, number)

    def put(x: Any, one: Any) -> Any:
        if not is_stack(x):
            return x
        changed = {}
        for field in adapter_fields(x):
            held, new = getattr(x, field), getattr(one, field)
            new = new.astype(held.dtype)
            # The index may be traced, so one compiled program serves every slot.
            changed[field] = lax.dynamic_update_slice_in_dim(held, new, index, x.axis)
        return dataclasses.replace(x, **changed)

    one = stack_of_one(stacked, adapter)
    check_finite(leaves_by_path(one))
    return jax.tree.map(put, stacked, one, is_leaf=is_leaf)


def _check_slot(index: Any, number: int) -> None:
    """Raises ValueError unless an index is a slot of a stack; a traced one is not checked."""
    if isinstance(index, jax.core.Tracer):
        return
    try:
        fits, shown = 0 <= integer(index) < number, f"{index}"
    except TypeError:
        fits, shown = False, kind_of(index)
    if not fits:
        raise ValueError(f"`index` is {shown}, but the stack has slots 0 to {number - 1}")


def stack_of_one(stacked: PyTree, adapter: PyTree) -> PyTree:
    """An adapter as a stack of one, with the shapes and fields of `stacked`.

    Args:
      stacked: from `stack`.
      adapter: as for `replace`.

    Raises:
      ValueError: as `replace`.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=is_leaf)
    new, new_tree = jax.tree.flatten(adapter, is_leaf=is_leaf)
    if new_tree != tree:
        raise ValueError(
            "`adapter` is a tree of another structure than the stack: they differ at "
            f"{paths.where_trees_differ(stacked, adapter, is_leaf)}; pass an adapter of that base"
        )
    leaves = [_one_leaf(paths.spell(p), x, y) for (p, x), y in zip(flat, new, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def _one_leaf(name: str, x: Any, y: Any) -> Any:
    check_same_base(name, [without_adapter(x), without_adapter(y)])
    if is_stack(x):
        return _one_stack(name, x, y)
    if is_lora(y):
        raise ValueError(
            f"`{name}` is adapted by the new adapter, but by none of the stack, which has no room "
            "for it: make the stack from adapters that together adapt every leaf, or a pool with a "
            "`template` that adapts it too"
        )
    return x


def _one_stack(name: str, x: LoraStack | SavedStack, y: Any) -> LoraStack | SavedStack:
    """A leaf of a single adapter as a stack of one."""
    # A stack that trains holds DoRA's magnitudes, another one its gains.
    train = isinstance(x, LoraStack) and x.m is not None
    if isinstance(x, SavedStack):
        return stack_saved(name, [y], 1)
    y = as_lora(name, y, train)
    if isinstance(y, SavedArray):
        raise ValueError(
            f"`{name}` trains whole in the new adapter and has factors in the stack: make a stack "
            "of adapters that train it in one way"
        )
    # Shapes and dtypes are the stack's, so that nothing is compiled again.
    blank = dataclasses.replace(
        x,
        **{
            field: jnp.zeros_like(lax.slice_in_dim(getattr(x, field), 0, 1, axis=x.axis))
            for field in adapter_fields(x)
        },
    )
    if x.gain is not None:
        # Without DoRA the gain is 1.
        blank = dataclasses.replace(blank, gain=jnp.ones_like(blank.gain))
    if not isinstance(y, LoraArray):
        return blank
    if y.roles != x.roles or y.rank > x.rank:
        raise ValueError(
            f"`{name}` has rank {y.rank} and roles `{y.roles}` in the new adapter; the stack holds "
            f"ranks up to {x.rank} and roles `{x.roles}`: make the stack with a larger `rank`, "
            "or the pool, or plan with the same `roles`"
        )
    # A smaller array would leave numbers of the slot's previous adapter in place.
    check_shapes(name, y)
    for field, why in (("m", "DoRA's magnitude"), ("bias", "a bias")):
        # A stack that is not trained holds gains in place of magnitudes.
        room = x.bias is not None if field == "bias" else (x.m is not None or x.gain is not None)
        if getattr(y, field) is not None and not room:
            raise ValueError(
                f"`{name}` has {why} in the new adapter, and the stack has no room for one: "
                "give `stack` such an adapter too, or the pool such a `template`"
            )
    return padded(y, blank)


def adapter(stacked: PyTree, index: int) -> PyTree:
    """Takes one adapter out of a stack, padded to the stack's rank.

    Args:
      stacked: from `stack`, trained or not.
      index: of the adapter.

    Raises:
      ValueError: there is no such slot; or the stack holds DoRA's gains only (stack with
        `train=True`).
    """
    number = count(stacked)
    _check_slot(index, number)
    flat, tree = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=is_leaf)
    return jax.tree.unflatten(tree, [_single(paths.spell(p), x, index) for p, x in flat])


def check_single(lora_params: PyTree) -> None:
    """Checks that a tree is no stack and has a name for each leaf, for what takes one adapter.

    Raises:
      ValueError: it is a stack, or two leaves have the same name.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_leaf)
    # One of the two would be lost.
    twice = paths.repeated([paths.spell(path) for path, _ in flat])
    if twice is not None:
        raise ValueError(f"two leaves of `lora_params` have the same name `{twice}`: rename one")
    if any(is_stack(x) for _, x in flat):
        raise ValueError(
            "`lora_params` is a stack of adapters: pass one of them, "
            "`lora.multi.adapter(stacked, index)`"
        )


def _single(name: str, x: Any, index: int) -> Any:
    if isinstance(x, SavedStack):
        # Which layers trained (`only`) is lost; those that did not hold the base's values.
        return SavedArray(x.w, x.value[index], tied=x.tied)
    if not isinstance(x, LoraStack):
        return x
    if x.gain is not None:
        raise ValueError(
            f"`{name}` holds DoRA's gains, not its magnitudes: stack the adapters with "
            "`train=True` to take single ones out again"
        )
    own: dict[str, Any] = {
        field: lax.index_in_dim(getattr(x, field), index, x.axis, keepdims=False)
        for field in ("a", "b", "scale", "m", "bias")
        if getattr(x, field) is not None
    }
    static = dict(roles=x.roles, dropout=x.dropout, window=x.window, tied=x.tied)
    return LoraArray(x.w, **static, **own)
