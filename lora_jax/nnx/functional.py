"""An NNX module as a pure function of its parameters."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from jaxtyping import PyTree


class Functional(NamedTuple):
    """An NNX module as a function and its variables.

    Attributes:
      fn: `fn(params, *args, state=None, **kwargs) -> output`, or `(output, new_state)` when
        `state` is given.
      params: the parameters, an `nnx.State` (a pytree).
      state: every other variable (batch statistics, caches, random streams), an `nnx.State`.
    """

    fn: Callable
    params: Any
    state: Any


def functional(module: nnx.Module, *, method: str = "__call__") -> Functional:
    """Splits an NNX module into a pure function and its parameters.

    Args:
      module: the module; it is not changed.
      method: name of the method that `fn` calls, or of a layer's, "encoder.pool".

    Returns:
      `(fn, params, state)`. `fn(params, x)` uses the other variables as they are now, and raises
      if the call changes them; `fn(params, x, state=state)` returns them updated.

    Example:
      fn, params, state = lora.nnx.functional(module)
      plan = lora.plan(lora.LoraConfig(target_modules=("query",)), fn, params, x)
    """
    check_module("module", module)
    graph, params, held = nnx.split(module, nnx.Param, ...)
    return Functional(function_of(graph, held, method), params, held)


def check_module(name: str, module: Any) -> None:
    """Raises `TypeError` for what is no NNX module; linen has modules too."""
    if not isinstance(module, nnx.Module):
        collections = isinstance(module, Mapping) and "params" in module
        way_out = "pass the module itself, not its state or a function"
        if collections or isinstance(module, flax.linen.Module):
            way_out = "`lora.linen.functional(module, variables)` is for Flax linen"
        raise TypeError(
            f"`{name}` must be an `nnx.Module`, got `{type(module).__name__}`: {way_out}"
        )


def function_of(graph: Any, held: PyTree, method: str) -> Callable:
    """A module's method as a function of its parameters; `held` are its other variables."""

    def fn(params: PyTree, *args, state: PyTree | None = None, **kwargs) -> Any:
        # Copied, because a call may write to the variables of its module.
        module = nnx.merge(graph, params, held if state is None else state, copy=True)
        out = operator.attrgetter(method)(module)(*args, **kwargs)
        _, _, after = nnx.split(module, nnx.Param, ...)
        if state is not None:
            return out, after
        if written := written_by(held, after):
            changed = ", ".join(f"`{'.'.join(map(str, path))}`" for path, _ in written)
            raise ValueError(
                f"the call changes {changed}, which would be lost: "
                "pass `state=state`, and keep the state that is returned"
            )
        return out

    return fn


def written_by(before: PyTree, after: PyTree) -> list[tuple[Any, nnx.Variable]]:
    """The variables that a call has changed, or made, with their paths."""
    old = dict(nnx.to_flat_state(before))
    return [(path, x) for path, x in nnx.to_flat_state(after) if not _is_same(old.get(path), x)]


def _is_same(before: Any, after: Any) -> bool:
    """By identity: a variable that is not written keeps its array object, also under a trace."""
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(old) == len(new) and all(x is y for x, y in zip(old, new, strict=True))
