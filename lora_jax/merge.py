"""Merging adapters into their weights, and subtracting them again."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from lora_jax import compat, paths
from lora_jax.array import (
    LoraArray,
    RowsArray,
    SavedArray,
    check_whole,
    delta,
    dense,
    effective,
    is_leaf,
    is_lora,
    is_stack,
    spread_outputs,
    widened,
    with_rows,
)
from lora_jax.dims import AnyArray, b_dims
from lora_jax.transform import dora


def merged(x: LoraArray) -> Array:
    """`gain · (W + s·A·B)` of one leaf: computed in float32 (or wider), cast once to `W`'s dtype.

    A quantized base gives a float weight; it is never quantized again.
    """
    w = dense(x.w)
    wide = widened(w.dtype)
    # The sum in `W`'s own 16 bits would lose changes smaller than half of its last digit.
    full = w.astype(wide) + delta(x).astype(wide)
    if x.m is not None:
        full = full * spread_outputs(dora.gain(x), x).astype(wide)
    return full.astype(compat.held(w.dtype))


def merge(lora_params: PyTree) -> PyTree:
    """Plain parameters: every adapter added to its weight, every saved value in place.

    Quantized weights become arrays, with or without an adapter; they are not quantized again.
    Computed in float32 whatever the base's dtype, and cast once at the end.

    Args:
      lora_params: a tree with LoRA leaves.

    Returns:
      The tree the base function takes, `lorafy(fn)(lora_params) == fn(merge(lora_params))`.

    Raises:
      ValueError: a merged weight is not finite; the leaves are named. (Not under `jit`, where
        values are unknown: check there with `jnp.isfinite`.) Or an adapter has a bias
        (`lora_bias`) and its module has none to take it.
    """
    check_whole(lora_params)
    flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_leaf)
    leaves = [_merge_leaf(x) for _, x in flat]
    for place, change in _bias_changes(flat).items():
        wide = widened(leaves[place].dtype)
        # A bias that trains too is merged already: the change is added to what it became.
        leaves[place] = (leaves[place].astype(wide) + change.astype(wide)).astype(
            leaves[place].dtype
        )
    # Only leaves that merging made: the base's own numbers are not checked.
    bad = [
        paths.spell(path)
        for (path, old), new in zip(flat, leaves, strict=True)
        if new is not old and not isinstance(new, jax.core.Tracer) and not _finite(new)
    ]
    if bad:
        raise ValueError(
            f"merged weights are not finite (NaN or infinity) at {', '.join(f'`{p}`' for p in bad)}"
            "; the adapter has diverged or is damaged: train it again, or load an earlier one"
        )
    return jax.tree.unflatten(tree, leaves)


def _merge_leaf(x: Any) -> Any:
    if is_stack(x):
        raise ValueError(
            "`lora_params` is a stack of adapters: merge one of them, "
            "`lora.merge(lora.multi.adapter(stacked, index))`"
        )
    if isinstance(x, SavedArray):
        return effective(x)
    if isinstance(x, RowsArray):
        return with_rows(x)
    return merged(x) if isinstance(x, LoraArray) else dense(x)


def _bias_changes(flat: Sequence) -> dict[int, jax.Array]:
    """The changes of the base's biases: `scale · bias` of each adapter that has a bias.

    Args:
      flat: pairs of key path and leaf.

    Returns:
      Index of the module's bias in `flat` to the change.

    Raises:
      ValueError: a module has no bias that could take it, as in PEFT.
    """
    places = {paths.spell(path): i for i, (path, _) in enumerate(flat)}
    changes = {}
    for path, x in flat:
        if not isinstance(x, LoraArray) or x.bias is None:
            continue
        weight = paths.spell(path)
        name = f"{paths.module_of(weight)}.bias"
        outs = tuple(x.shape[d] for d in b_dims(x.roles))
        there = flat[places[name]][1] if name in places else None
        if there is None or tuple(there.shape) != outs:
            found = "there is none" if there is None else f"that has shape {tuple(there.shape)}"
            raise ValueError(
                f"`{weight}` has an adapter with a bias (`lora_bias=True`) of shape {outs}, which "
                f"can only be merged into a bias `{name}` of the base, but {found}: use the "
                "adapter unmerged, or train without `lora_bias`"
            )
        # The scale is (stack...), the bias (stack..., out...).
        scale = x.scale.reshape(*x.scale.shape, *[1] * (x.bias.ndim - x.scale.ndim))
        changes[places[name]] = x.bias * scale.astype(x.bias.dtype)
    return changes


@jax.jit
def _finite(x: AnyArray) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(x))


def unmerge(params: PyTree, lora_params: PyTree) -> PyTree:
    """Subtracts the adapters from merged parameters, which gives the base.

    Where `params` is the merge of `lora_params`, the result is the base bit for bit. From a leaf
    that was trained further since, the same change is subtracted in float32.

    Args:
      params: merged parameters, as from `merge(lora_params)`.
      lora_params: the tree whose adapters are in `params`.

    Returns:
      Plain base parameters.

    Raises:
      ValueError: the trees have different structures or shapes.
    """
    check_whole(lora_params)
    flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_leaf)
    plain, plain_tree = jax.tree.flatten(params)
    # Compared with whole LoRA leaves as leaves: the merge has an array in each one's place.
    if plain_tree != tree:
        raise ValueError(
            "`params` and `lora_params` have different structures, at "
            f"{paths.where_trees_differ(params, lora_params, is_leaf)}: pass parameters that "
            "`lora.merge(lora_params)` gave"
        )
    leaves = [_unmerge_leaf(paths.spell(p), x, y) for (p, x), y in zip(flat, plain, strict=True)]
    for place, change in _bias_changes(flat).items():
        # A bias that trains whole is back at its original value already.
        if not is_lora(x := flat[place][1]):
            leaves[place] = _without_change(x, plain[place], change)
    return jax.tree.unflatten(tree, leaves)


def _without_change(x: AnyArray, y: AnyArray, change: Array) -> Array:
    """A merged bias without the adapter's; exactly the base's where nothing else changed it."""
    wide = widened(x.dtype)
    merged = (x.astype(wide) + change.astype(wide)).astype(x.dtype)
    # As in `_unmerge_leaf`, number by number: exact where the merge is unchanged.
    return jnp.where(y == merged, x, (y.astype(wide) - change.astype(wide)).astype(y.dtype))


def _unmerge_leaf(path: str, x: Any, y: Any) -> Any:
    if not is_lora(x):
        return y
    if tuple(x.shape) != tuple(y.shape):
        raise ValueError(
            f"`{path}` has shape {tuple(y.shape)} in `params`, expected {x.shape} as in "
            "`lora_params`: pass parameters that `lora.merge(lora_params)` gave"
        )
    if isinstance(x, SavedArray | RowsArray):
        return x.w
    w = dense(x.w)
    wide = widened(w.dtype)
    full = y.astype(wide)
    if x.m is not None:
        full = full / spread_outputs(dora.gain(x), x).astype(wide)
    # Subtraction rounds: where `y` is exactly the merge, the base's own numbers are better.
    own = compat.held(y.dtype)
    back = (full - delta(x).astype(wide)).astype(own)
    return jnp.where(y == merged(x), w.astype(own), back)
