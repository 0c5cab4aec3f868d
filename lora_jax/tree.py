"""Trees of LoRA leaves: make one, split it into what trains and what is frozen, count it."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import dora, paths
from lora_jax.array import (
    LoraArray,
    LoraStack,
    RowsArray,
    SavedArray,
    SavedStack,
    Window,
    base_rows,
    dense,
    is_leaf,
    is_lora,
    leaves_by_path,
    widened,
)
from lora_jax.dims import b_dims, stack_dims
from lora_jax.methods import start_function
from lora_jax.plan.leaf import LeafPlan, Plan
from lora_jax.sharding import place

_TRAINED = {
    LoraArray: ("a", "b", "m", "bias"),
    LoraStack: ("a", "b", "m", "bias"),
    SavedArray: ("value",),
    SavedStack: ("value",),
    RowsArray: ("rows",),
}
_FROZEN = {
    LoraArray: ("w", "scale"),
    LoraStack: ("w", "scale", "gain"),
    SavedArray: ("w",),
    SavedStack: ("w",),
    RowsArray: ("w",),
}


def init(key, plan: Plan, params, *, weights=None):
    """Puts adapters on the planned leaves: the identity at the start, `W + s·A·B = W`.

    `A` is uniform in ±1/√fan_in and `B` zero (for a lookup table `A` zero and `B` normal), in
    float32 also over a bfloat16 base; `config.init` names other starts. Works under `jit` and
    `eval_shape`.

    Args:
      key: PRNG key.
      plan: of these parameters.
      params: the tree that was planned.
      weights: with init="loftq" and a quantized base the numbers it stands for: the same tree in
        floats, or `f(path) -> array` to hold one of them at a time.

    Returns:
      The tree with `LoraArray`s and `SavedArray`s at the leaves that train.

    Raises:
      ValueError: the tree is not the planned one, or `weights` are missing, misshapen or of no
        use.

    Source: Hu et al. 2021, section 4.1; PEFT's `reset_lora_parameters`.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    planned = plan.by_path()
    spelled = [paths.spell(key_path) for key_path, _ in flat]
    _check_same(planned, dict(zip(spelled, (x for _, x in flat), strict=True)))
    full = _weights_of(plan, weights)
    leaves = [
        _init_leaf(key, plan, planned.get(name), leaf, full)
        for name, (_, leaf) in zip(spelled, flat, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def _weights_of(plan: Plan, weights) -> Callable:
    """What gives a planned leaf its numbers in floats, or None where none are given."""
    if weights is None:
        return lambda leaf: None
    if plan.config.init != "loftq":
        raise ValueError(
            f'`weights` are for init="loftq", got init="{plan.config.init}": leave them out'
        )
    held: Callable = weights if callable(weights) else leaves_by_path(weights).get

    def get(leaf: LeafPlan):
        w: Any = held(leaf.path)
        found = "none" if w is None else f"{w.dtype} of shape {tuple(w.shape)}"
        if w is None or is_leaf(w) or tuple(w.shape) != leaf.shape:
            raise ValueError(
                f"`weights` must have `{leaf.path}` in floats with shape {leaf.shape}, got {found}"
            )
        return w

    return get


def _check_same(planned: dict[str, LeafPlan], leaves: dict):
    for path, leaf in planned.items():
        if path not in leaves:
            raise ValueError(f"`params` has no leaf `{path}`, which was planned; plan again")
        if is_lora(leaves[path]):
            raise ValueError(f"`params` already has an adapter at `{path}`; pass the base")
        if tuple(leaves[path].shape) != leaf.shape:
            raise ValueError(
                f"`params` has `{path}` with shape {tuple(leaves[path].shape)}, planned was "
                f"{leaf.shape}; plan again"
            )


def _init_leaf(key, plan: Plan, leaf: LeafPlan | None, w, full: Callable):
    if leaf is None or leaf.kind == "frozen":
        return w
    if leaf.kind == "saved":
        return leaf_of(plan, leaf, w, value=jnp.array(dense(w), copy=True))
    if leaf.kind == "rows":
        rows = RowsArray(w, None, leaf.ids, leaf.axis)
        return dataclasses.replace(rows, rows=base_rows(rows).astype(widened(w.dtype)))

    own = jax.random.fold_in(key, zlib.crc32(leaf.path.encode()) & 0x7FFFFFFF)
    start = start_function(plan.config.init)
    given = () if (numbers := full(leaf)) is None else (numbers,)
    w, a, b = start(own, plan.config, leaf, w, *given)
    bias = {}
    if plan.config.lora_bias:
        bias["bias"] = jnp.zeros([leaf.shape[d] for d in b_dims(leaf.roles)], b.dtype)
    adapted = leaf_of(plan, leaf, w, a=a, b=b, **bias)
    assert isinstance(adapted, LoraArray)  # no other kind is left
    if plan.config.use_dora:
        adapted = dataclasses.replace(adapted, m=dora.magnitude(adapted))
    return place(adapted)


def leaf_of(plan: Plan, leaf: LeafPlan, w, **trained) -> LoraArray | SavedArray | RowsArray:
    """A planned leaf from its base weight and its trained arrays by field (`a`, `b`, `value`)."""
    if leaf.kind == "saved":
        return SavedArray(w, only=leaf.only, **trained)
    if leaf.kind == "rows":
        return RowsArray(w, ids=leaf.ids, axis=leaf.axis, **trained)
    scale = jnp.asarray(stack_values(leaf, leaf.scales), jnp.float32)
    return LoraArray(
        w,
        scale=scale,
        roles=leaf.roles,
        dropout=float(plan.config.dropout),
        window=_window(leaf),
        **trained,
    )


def _window(leaf: LeafPlan) -> Window | None:
    """What the uses of a leaf say of it as a convolution's kernel."""
    found = {use.window for use in leaf.uses if use.window is not None}
    return next(iter(found)) if len(found) == 1 else None


def trained_fields(x: LoraArray | SavedArray | RowsArray) -> tuple[str, ...]:
    """The names of a leaf's fields that train."""
    return _TRAINED[type(x)]


def stack_values(leaf: LeafPlan, values) -> np.ndarray:
    """One number a stack index, in the stack's shape."""
    return np.asarray(values).reshape([leaf.shape[d] for d in stack_dims(leaf.roles)])


def _is_none(x) -> bool:
    return x is None


def split(lora_params):
    """Divides a tree into what trains and what is frozen.

    Args:
      lora_params: a tree with LoRA leaves, or the gradient or state of one.

    Returns:
      `(trainable, frozen)`: two trees of the same structure, each with `None` in the other's
      places. `trainable` holds `a`, `b`, DoRA magnitudes and saved values only.
    """
    trainable = jax.tree.map(lambda x: _keep(x, _TRAINED), lora_params, is_leaf=is_lora)
    frozen = jax.tree.map(lambda x: _keep(x, _FROZEN), lora_params, is_leaf=is_lora)
    return trainable, frozen


def _keep(x, fields: dict):
    if not is_lora(x):
        return x if fields is _FROZEN else None
    lost = [name for group in (_TRAINED, _FROZEN) for name in group[type(x)]]
    return dataclasses.replace(x, **{name: None for name in lost if name not in fields[type(x)]})


def combine(trainable, frozen):
    """Puts the two halves of `split` together again: `combine(*split(x))` is `x`.

    Args:
      trainable, frozen: trees of one structure, `None` in each other's places.

    Raises:
      ValueError: the trees do not belong together.
    """
    try:
        return jax.tree.map(_join, trainable, frozen, is_leaf=lambda x: x is None or is_lora(x))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`trainable` and `frozen` are not two halves of one tree: {error}"
        ) from None


def _join(x, y):
    if not is_lora(x) and not is_lora(y):
        if x is not None and y is not None:
            raise ValueError("both trees hold the same leaf; pass the two results of `split`")
        return y if x is None else x
    if type(x) is not type(y):
        raise ValueError(f"{type(x).__name__} in one tree stands where {type(y).__name__} does")
    fields = {}
    for name in (*_TRAINED[type(x)], *_FROZEN[type(x)]):
        mine, other = getattr(x, name), getattr(y, name)
        fields[name] = other if mine is None else mine
    return dataclasses.replace(x, **fields)


class Count(NamedTuple):
    """How many numbers train, of how many there are in all (adapters included)."""

    trainable: int
    total: int


def count_parameters(lora_params) -> Count:
    """Counts parameters as PEFT does: `total` is the base and the adapters together.

    Padding of smaller ranks and of left-out layers counts as what it is, allocated. DoRA's and
    saved values count as trainable; the kept originals of saved leaves count too, as in PEFT.
    """
    trainable = total = 0
    for x in jax.tree.leaves(lora_params, is_leaf=is_leaf):
        if not is_lora(x):
            total += math.prod(getattr(x, "shape", ()))
            continue
        own = sum(
            math.prod(getattr(x, n).shape) for n in _TRAINED[type(x)] if getattr(x, n) is not None
        )
        trainable += own
        total += own + (math.prod(x.w.shape) if x.w is not None else 0)
    return Count(trainable, total)


def format_trainable_parameters(lora_params) -> str:
    """PEFT's line: `trainable params: 448 || all params: 6,416 || trainable%: 6.9825`."""
    trainable, total = count_parameters(lora_params)
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
