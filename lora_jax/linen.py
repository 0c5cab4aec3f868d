"""Glue for Flax linen: a module and its variables as a pure function of parameters, and back.

There is no arithmetic here. linen modules are pure already; these functions only separate the other
collections (batch statistics, caches) from the parameters, and join them again.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import PyTree

__all__ = ["Functional", "functional", "variables"]


def __dir__() -> list[str]:
    return __all__


class Functional(NamedTuple):
    """A linen module as a function and its variables.

    Attributes:
      fn: `fn(params, *args, state=None, rngs=None, **kwargs) -> output`, or
        `(output, new_state)` when `state` is given: then its collections are mutable.
      params: the "params" collection.
      state: the other collections, `{}` if there are none.
    """

    fn: Callable
    params: Any
    state: dict[str, Any]


def functional(
    module: Any, variables: Mapping[str, Any], *, method: str | Callable | None = None
) -> Functional:
    """Splits a linen module and its variables into a pure function and its parameters.

    Args:
      module: a `flax.linen.Module`.
      variables: the result of `module.init`, boxed or not.
      method: the method to call, as in `Module.apply`; `__call__` by default.

    Returns:
      `(fn, params, state)`. `fn(params, x)` reads the other collections as they were in
      `variables`; `fn(params, x, state=state)` reads them from `state` and returns them updated.

    Raises:
      TypeError: no linen module, or no collections.
      ValueError: `variables` has no "params".

    Example:
      fn, params, state = lora.linen.functional(module, module.init(key, x))
      lora_params = lora.init(key, lora.plan(config, fn, params, x), params)
      y = lora.lorafy(fn)(lora_params, x)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"`module` must be a `flax.linen.Module`, got `{type(module).__name__}`: call "
            "`lora.linen.functional(module, variables)`; NNX modules are for `lora.nnx`"
        )
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"`variables` must be a dict of collections, got `{type(variables).__name__}`: pass "
            "the result of `module.init`"
        )
    if "params" not in variables:
        raise ValueError(
            f'`variables` has no "params" collection, only {sorted(variables)}: pass the result of '
            "`module.init`"
        )
    held = {name: value for name, value in variables.items() if name != "params"}

    def fn(
        params: PyTree,
        *args,
        state: Mapping[str, Any] | None = None,
        rngs: Any = None,
        **kwargs,
    ) -> Any:
        if "mutable" in kwargs:
            raise TypeError(
                "`mutable` follows `state`: the collections in it are mutable. For what the model "
                'sows, pass `state={**state, "intermediates": {}}`'
            )
        if "params" in params and "params" not in variables["params"]:
            raise ValueError(
                "`params` must be the parameters alone, got the collections of `module.init`: pass "
                "the second result of `lora.linen.functional`"
            )
        collections = {"params": params, **(held if state is None else state)}
        # Without `mutable`, linen raises where a call changes a collection: no update is lost.
        mutable = False if state is None else list(state)
        return module.apply(collections, *args, rngs=rngs, method=method, mutable=mutable, **kwargs)

    return Functional(fn, variables["params"], held)


def variables(params: PyTree, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The argument of `module.apply`: parameters (merged or base) and the other collections."""
    return {"params": params, **(state or {})}
