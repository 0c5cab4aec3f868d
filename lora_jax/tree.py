"""Trees of LoRA leaves: made, split into a trained and a frozen half, joined, counted."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from lora_jax import paths
from lora_jax.array import (
    FROZEN_FIELDS,
    TRAINED_FIELDS,
    LoraArray,
    RowsArray,
    SavedArray,
    Window,
    base_rows,
    dense,
    is_leaf,
    is_lora,
    leaves_by_path,
    register_leaves,
    widened,
)
from lora_jax.config.arguments import check_argument, check_key, check_tree
from lora_jax.dims import b_dims, stack_dims
from lora_jax.methods import start_function
from lora_jax.plan.leaf import LeafPlan, Plan
from lora_jax.sharding import place_factors
from lora_jax.transform import dora


def init(key: PRNGKeyArray, plan: Plan, params: PyTree, *, weights: Any = None) -> PyTree:
    """Puts adapters on the planned leaves: the identity at the start, `W + s·A·B = W`.

    `A` is uniform in ±1/√fan_in and `B` zero (for a lookup table `A` zero and `B` normal), in
    float32 also over a bfloat16 base; `config.init` names other starts. Works under `jit` and
    `eval_shape`.

    Args:
      key: PRNG key.
      plan: of these parameters.
      params: the parameters that were planned.
      weights: with init="loftq" and a quantized base, the floats it was quantized from: the same
        tree, or `f(path) -> array` to hold one leaf at a time.

    Returns:
      The tree with `LoraArray`s and `SavedArray`s at the leaves that train.

    Raises:
      ValueError: the tree is not the planned one, or `weights` are missing, have other shapes, or
        are not used.

    Source: Hu et al. 2021, section 4.1; PEFT's `reset_lora_parameters`.
    """
    check_argument("init(key, plan, params)", "plan", plan, Plan)
    check_key("key", key)
    check_tree("params", params)
    register_leaves()
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    planned = plan.by_path()
    named = [(paths.spell(key_path), leaf) for key_path, leaf in flat]
    _check_same(planned, dict(named))
    floats_of = _floats_of(plan, weights)
    leaves = [
        _init_leaf(key, plan, planned.get(name), leaf, floats_of=floats_of) for name, leaf in named
    ]
    return jax.tree.unflatten(tree, leaves)


def _floats_of(plan: Plan, weights: Any) -> Callable[[LeafPlan], Any]:
    """`f(leaf)` that returns the floats a leaf was quantized from, or None without `weights`."""
    if weights is None:
        return lambda leaf: None
    if plan.config.init != "loftq":
        raise ValueError(
            f'`weights` are for init="loftq", got init="{plan.config.init}": leave them out'
        )
    held: Callable = weights if callable(weights) else leaves_by_path(weights).get

    def get(leaf: LeafPlan) -> Any:
        w: Any = held(leaf.path)
        found = "none" if w is None else f"{w.dtype} of shape {tuple(w.shape)}"
        if w is None or is_leaf(w) or tuple(w.shape) != leaf.shape:
            raise ValueError(
                f"`weights` must have `{leaf.path}` in floats with shape {leaf.shape}, got "
                f"{found}: pass the parameters that were quantized"
            )
        return w

    return get


def _check_same(planned: dict[str, LeafPlan], leaves: dict) -> None:
    """Checks that leaves are the planned ones, in shape and dtype."""
    for path, leaf in planned.items():
        if path not in leaves:
            raise ValueError(
                f"`params` has no leaf `{path}`, which was planned: pass the planned parameters, "
                "or plan again"
            )
        if is_lora(leaves[path]):
            raise ValueError(f"`params` already has an adapter at `{path}`: pass the base")
        if tuple(leaves[path].shape) != leaf.shape:
            raise ValueError(
                f"`params` has `{path}` with shape {tuple(leaves[path].shape)}, planned was "
                f"{leaf.shape}: plan again"
            )
        if str(leaves[path].dtype) != leaf.dtype:
            raise ValueError(
                f"`params` has `{path}` in {leaves[path].dtype}, planned was {leaf.dtype}: plan "
                "again"
            )


def _init_leaf(
    key: PRNGKeyArray, plan: Plan, leaf: LeafPlan | None, w: Any, *, floats_of: Callable
) -> Any:
    """A leaf with an adapter, as one that trains whole or in some rows, or unchanged."""
    if leaf is None or leaf.kind == "frozen":
        return w
    if leaf.kind == "saved":
        # A copy: a training step that donates the trained half must not take `w` with it.
        return make_leaf(plan, leaf, w, value=jnp.array(dense(w), copy=True))
    if leaf.kind == "rows":
        rows = RowsArray(w, None, leaf.ids, leaf.axis)
        return dataclasses.replace(rows, rows=base_rows(rows).astype(widened(w.dtype)))

    # The key depends on the path, so that adapting one more leaf does not change the others.
    own = paths.fold_path(key, leaf.path)
    start = start_function(plan.config.init)
    # Only LoftQ has an argument for them.
    floats = () if (found := floats_of(leaf)) is None else (found,)
    w, a, b = start(own, plan.config, leaf, w, *floats)
    bias = {}
    if plan.config.lora_bias:
        bias["bias"] = jnp.zeros([leaf.shape[d] for d in b_dims(leaf.roles)], b.dtype)
    adapted = make_leaf(plan, leaf, w, a=a, b=b, **bias)
    assert isinstance(adapted, LoraArray)  # no other kind is left
    if plan.config.use_dora:
        # Last, because the magnitude is the norm of W + s·A·B.
        adapted = dataclasses.replace(adapted, m=dora.magnitude(adapted))
    return place_factors(adapted)


def make_leaf(plan: Plan, leaf: LeafPlan, w: Any, **trained) -> LoraArray | SavedArray | RowsArray:
    """A planned leaf from its base weight and its trained arrays by field (`a`, `b`, `value`)."""
    if leaf.kind == "saved":
        return SavedArray(w, only=leaf.only, tied=leaf.tied, **trained)
    if leaf.kind == "rows":
        return RowsArray(w, ids=leaf.ids, axis=leaf.axis, **trained)
    scale = jnp.asarray(stack_values(leaf, leaf.scales), jnp.float32)
    return LoraArray(
        w,
        scale=scale,
        roles=leaf.roles,
        dropout=float(plan.config.dropout),
        window=_window(leaf),
        tied=leaf.tied,
        **trained,
    )


def _window(leaf: LeafPlan) -> Window | None:
    """The window of a convolution's kernel, or None where its convolutions differ in it."""
    # A kernel without a window is handled as a plain matrix.
    found = {use.window for use in leaf.uses if use.window is not None}
    return next(iter(found)) if len(found) == 1 else None


def trained_fields(x: LoraArray | SavedArray | RowsArray) -> tuple[str, ...]:
    """The names of a leaf's fields that train."""
    return TRAINED_FIELDS[type(x)]


def stack_values(leaf: LeafPlan, values: Sequence[float]) -> np.ndarray:
    """One number for each stack index, in the stack's shape."""
    return np.asarray(values).reshape([leaf.shape[d] for d in stack_dims(leaf.roles)])


def split(lora_params: PyTree) -> tuple[PyTree, PyTree]:
    """Divides a tree into a trainable and a frozen half.

    Args:
      lora_params: a tree with LoRA leaves, or the gradient or state of one.

    Returns:
      `(trainable, frozen)`: two trees of the same structure, each with `None` in the other's
      places. `trainable` holds `a`, `b`, DoRA magnitudes and saved values only. It is empty, with
      a warning, where `lora_params` has no LoRA leaf.
    """
    check_tree("lora_params", lora_params, state=True)
    leaves = jax.tree.leaves(lora_params, is_leaf=is_lora)
    if leaves and not any(map(is_lora, leaves)):
        warnings.warn(
            "`lora_params` has no adapter, so the trainable half is empty: pass the tree that "
            "`lora.init(key, plan, params)` returns",
            stacklevel=2,
        )
    return trained_and_frozen(lora_params)


def trained_and_frozen(tree: PyTree) -> tuple[PyTree, PyTree]:
    """`split` of a tree that may have no LoRA leaf."""
    trainable = jax.tree.map(lambda x: _keep(x, TRAINED_FIELDS), tree, is_leaf=is_lora)
    frozen = jax.tree.map(lambda x: _keep(x, FROZEN_FIELDS), tree, is_leaf=is_lora)
    return trainable, frozen


def _keep(x: Any, fields: dict[type, tuple[str, ...]]) -> Any:
    if not is_lora(x):
        return x if fields is FROZEN_FIELDS else None
    every = (*TRAINED_FIELDS[type(x)], *FROZEN_FIELDS[type(x)])
    return dataclasses.replace(x, **{name: None for name in every if name not in fields[type(x)]})


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Joins the two halves of `split`: `combine(*split(x))` is `x`.

    Args:
      trainable, frozen: trees of one structure, `None` in each other's places.

    Raises:
      ValueError: the trees do not belong together.
    """
    try:
        return jax.tree_util.tree_map_with_path(
            _join, trainable, frozen, is_leaf=lambda x: x is None or is_lora(x)
        )
    except (ValueError, TypeError) as error:
        reason = str(error)
        # JAX's own text, which takes many lines, is of another structure.
        if not reason.startswith("at `"):
            reason = f"they differ at {paths.where_trees_differ(trainable, frozen, is_leaf)}"
        raise ValueError(
            "`trainable` and `frozen` are not two halves of one tree: pass the two results of "
            f"`lora.split` ({reason})"
        ) from None


def _join(path: Sequence, x: Any, y: Any) -> Any:
    """One leaf of a tree, from those of its two halves."""
    if not is_lora(x) and not is_lora(y):
        if x is not None and y is not None:
            raise ValueError(f"at `{paths.spell(path)}` both have a value")
        # A leaf without an adapter is whole in one half and None in the other.
        return y if x is None else x
    if type(x) is not type(y):
        raise ValueError(
            f"at `{paths.spell(path)}` one has a `{type(x).__name__}`, the other a "
            f"`{type(y).__name__}`"
        )
    fields = {}
    for name in (*TRAINED_FIELDS[type(x)], *FROZEN_FIELDS[type(x)]):
        mine, other = getattr(x, name), getattr(y, name)
        if mine is not None and other is not None:
            raise ValueError(f"at `{paths.spell(path)}` both have a value of `{name}`")
        fields[name] = other if mine is None else mine
    return dataclasses.replace(x, **fields)


class Count(NamedTuple):
    """How many parameters train, and how many there are in all, adapters included."""

    trainable: int
    total: int


def count_parameters(lora_params: PyTree) -> Count:
    """Counts parameters as PEFT does: `total` is the base and the adapters together.

    The padding of smaller ranks and of left-out layers is allocated, so it counts. DoRA's
    magnitudes and saved values are trainable; the originals of saved leaves count too, as in PEFT.
    """
    check_tree("lora_params", lora_params, state=True)
    trainable = total = 0
    for x in jax.tree.leaves(lora_params, is_leaf=is_leaf):
        if not is_lora(x):
            total += math.prod(getattr(x, "shape", ()))
            continue
        fields = [getattr(x, name) for name in TRAINED_FIELDS[type(x)]]
        own = sum(math.prod(field.shape) for field in fields if field is not None)
        trainable += own
        # The trainable half of `split` has no base to count.
        total += own + (math.prod(x.w.shape) if x.w is not None else 0)
    return Count(trainable, total)


def format_trainable_parameters(lora_params: PyTree) -> str:
    """PEFT's line: `trainable params: 448 || all params: 6,416 || trainable%: 6.9825`."""
    return format_count(count_parameters(lora_params))


def format_count(count: Count) -> str:
    """PEFT's line for a count."""
    trainable, total = count
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
