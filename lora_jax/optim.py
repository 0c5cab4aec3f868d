"""Gradients and optax state of the trainable half of a LoRA tree."""

import dataclasses
from collections.abc import Callable
from typing import Any, Never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax import paths
from lora_jax.array import FROZEN_FIELDS, TRAINED_FIELDS, is_lora
from lora_jax.compat import require
from lora_jax.config.arguments import check_alone, check_tree, kind_of
from lora_jax.tree import combine, trained_and_frozen


def value_and_grad(fn: Callable, *misplaced: Never, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` of a function of LoRA parameters, for the trainable half only.

    `jax.grad` computes the base's gradients too, and rejects a quantized base, whose codes are
    integers. Here the base is a constant: no gradient of it is computed or stored.

    Args:
      fn: `fn(lora_params, *args, **kwargs) -> scalar`, or `(scalar, aux)`.
      has_aux: whether `fn` returns something besides the scalar.

    Returns:
      `f(lora_params, *args, **kwargs) -> (value, gradients)`, value `(scalar, aux)` with
      `has_aux`. The gradients have the structure of `split(lora_params)[0]`: `None` in the base's
      places; `lora.masked(tx)` takes them with the whole tree.

    Raises:
      ValueError: nothing in `lora_params` trains.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = lora.quantize({"w": jnp.ones((64, 8))}, ["w"])
      >>> fn = lora.lorafy(lambda p, x: jnp.sum(x @ p["w"]))
      >>> x = jnp.ones((2, 64))
      >>> plan = lora.plan(lora.LoraConfig(rank=2, target_modules=("w",)), fn, base, x)
      >>> params = lora.init(jax.random.key(0), plan, base)
      >>> value, grads = jax.jit(lora.value_and_grad(fn))(params, x)
      >>> grads["w"].b.shape, grads["w"].w
      ((2, 8), None)
    """

    check_alone("value_and_grad(fn)(lora_params, ...)", misplaced)

    def run(lora_params: PyTree, *args, **kwargs) -> Any:
        trainable, frozen = trained_and_frozen(lora_params)
        check_trainable(trainable, "lora_params")

        # The frozen half is a constant of the function that is differentiated.
        def of_trainable(trainable: PyTree, *args, **kwargs) -> Any:
            return fn(combine(trainable, frozen), *args, **kwargs)

        return jax.value_and_grad(of_trainable, has_aux=has_aux)(trainable, *args, **kwargs)

    return run


def grad(fn: Callable, *misplaced: Never, has_aux: bool = False) -> Callable:
    """`value_and_grad` without the value: `f(...) -> gradients`, or `(gradients, aux)`."""
    check_alone("grad(fn)(lora_params, ...)", misplaced)
    both = value_and_grad(fn, has_aux=has_aux)

    def run(lora_params: PyTree, *args, **kwargs) -> Any:
        value, grads = both(lora_params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return run


def check_trainable(trainable: PyTree, name: str = "trainable") -> None:
    """Raises unless a tree has arrays, and all of them can be trained.

    Raises:
      ValueError: there is no array, or one of integers, such as a quantized base's codes.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(trainable)
    if not flat:
        raise ValueError(
            f"`{name}` holds nothing that trains: pass the tree that `lora.init` returned"
        )
    for path, x in flat:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"`{name}` holds {x.dtype} numbers at `{paths.spell(path)}`, which have no "
                "gradient (a quantized base's codes?): use `lora.value_and_grad`, or differentiate "
                "with respect to the first tree of `lora.split`"
            )


def check_optimizer(tx: Any) -> None:
    """Raises `TypeError` for what is no transformation of optax."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"`tx` must be an optimizer of optax, got {kind_of(tx)}: pass `optax.adam(1e-3)`"
        )


def trainable_mask(lora_params: PyTree) -> PyTree:
    """A tree of bools for `optax.masked`, True at every array that trains."""

    def mark(x: Any) -> Any:
        if not is_lora(x):
            return False
        # A mark for each field: the mask has the structure of the tree down to its arrays.
        marks = dict.fromkeys(TRAINED_FIELDS[type(x)], True)
        marks |= dict.fromkeys(FROZEN_FIELDS[type(x)], False)
        return dataclasses.replace(
            x, **{n: mark if getattr(x, n) is not None else None for n, mark in marks.items()}
        )

    check_tree("lora_params", lora_params, state=True)
    return jax.tree.map(mark, lora_params, is_leaf=is_lora)


def masked(tx: Any) -> Any:
    """An optax transformation for LoRA trees, with state for the trainable half only.

    Args:
      tx: an `optax.GradientTransformation`.

    Returns:
      A transformation whose `init` takes `lora_params`, or their trainable half. `update` takes
      gradients of either, and `params` in either form. Where one of them is a whole tree its
      updates are too, with a scalar zero at each frozen array, so that `optax.apply_updates`
      leaves the base as it is.

    Raises:
      TypeError: `tx` is no transformation.
      ValueError: from `init`, nothing in the tree trains.
    """
    optax = require("optax")
    check_optimizer(tx)

    def start(params: PyTree) -> Any:
        trainable, frozen = trained_and_frozen(params)
        # optax itself calls `init` with trees that hold no array at all: those pass.
        if jax.tree.leaves(frozen):
            check_trainable(trainable, "params")
        return tx.init(trainable)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        trainable, frozen = trained_and_frozen(updates)
        now, base = (None, None) if params is None else trained_and_frozen(params)
        # `tx` sees the trainable half in every argument, so weight decay never reaches the base.
        changes, state = tx.update(trainable, state, now)
        # One of the arguments may be a whole tree: the updates then have its structure.
        rest = frozen if jax.tree.leaves(frozen) else base
        if jax.tree.leaves(rest):
            changes = combine(changes, jax.tree.map(_no_change, rest))
        return changes, state

    return optax.GradientTransformation(start, update)


def _no_change(x: Any) -> np.ndarray:
    """A scalar zero: adding it leaves an array as it is."""
    # Integers (a quantized base's codes) have float0 gradients, and optax cannot add those.
    return np.zeros((), np.uint8 if x.dtype == jax.dtypes.float0 else x.dtype)
