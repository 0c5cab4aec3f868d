"""Flax NNX: a module as a pure function of its parameters, and a module with adapters inside.

There is no arithmetic here.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray, PyTree

from lora_jax import paths
from lora_jax.array import is_lora
from lora_jax.config.arguments import check_argument
from lora_jax.config.lora import LoraConfig
from lora_jax.merge import merge as merge_tree
from lora_jax.plan.decide import plan as make_plan
from lora_jax.plan.leaf import LeafPlan, Plan
from lora_jax.transform import lorafy
from lora_jax.tree import init as init_tree
from lora_jax.tree import make_leaf, trained_fields

__all__ = ["Adapted", "Functional", "LoraParam", "adapt", "functional", "merged"]


def __dir__() -> list[str]:
    return __all__


class LoraParam(nnx.Param):
    """A variable that an adapter trains: `nnx.Optimizer(model, tx, wrt=lora.nnx.LoraParam)`."""


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
    graph, params, held = nnx.split(module, nnx.Param, ...)
    return Functional(_function(graph, held, method), params, held)


def _function(graph: Any, held: PyTree, method: str) -> Callable:
    """A module's method as a function of its parameters; `held` are its other variables."""

    def fn(params: PyTree, *args, state: PyTree | None = None, **kwargs) -> Any:
        # Copied, because a call may write to the variables of its module.
        module = nnx.merge(graph, params, held if state is None else state, copy=True)
        out = operator.attrgetter(method)(module)(*args, **kwargs)
        _, _, after = nnx.split(module, nnx.Param, ...)
        if state is not None:
            return out, after
        if changed := _changed(held, after):
            raise ValueError(
                f"the call changes {', '.join(f'`{c}`' for c in changed)}, which would be lost: "
                "pass `state=state`, and keep the state that is returned"
            )
        return out

    return fn


def _changed(before: PyTree, after: PyTree) -> list[str]:
    """The paths of the variables that a call has changed."""
    old = jax.tree_util.tree_leaves_with_path(before)
    new = jax.tree_util.tree_leaves_with_path(after)
    if len(old) != len(new):
        return ["the set of variables"]
    # By identity: a variable that is not written keeps its array object, also under a trace.
    return [paths.spell(p) for (p, x), (_, y) in zip(old, new, strict=True) if x is not y]


_OWN = ("base", "adapters", "plan")  # the attributes of `Adapted`


class Adapted(nnx.Module):
    """An NNX module with adapters inside, called like the module it was made from.

    The base's attributes are read and set through it: `model.blocks` is `model.base.blocks`. Its
    methods run with the adapters, as by `call`. A layer is the base's own, and computes without
    them: `model.call("blocks.encode", x)` is a layer's method with its adapters.

    The trained variables are `LoraParam`s. The base's own variables are unchanged, and state that a
    call changes (batch statistics, caches, random streams) is updated, as in the base.

    Attributes:
      base: the module that was adapted (its structure; its arrays are shared, not copied).
      adapters: the trained arrays, `{leaf path with /: {"a": LoraParam, "b": LoraParam, ...}}`.
      plan: which leaves are adapted.
    """

    def __init__(self, base: nnx.Module, lora_params: PyTree, plan: Plan) -> None:
        # A plan holds no arrays: it belongs to the module's structure, not to its state.
        self.plan = nnx.static(plan)
        parts, bare = {}, []
        flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_lora)
        for path, leaf in flat:
            bare.append(leaf.w if is_lora(leaf) else leaf)
            if is_lora(leaf):
                trained = {name: getattr(leaf, name) for name in trained_fields(leaf)}
                parts[_name(path)] = nnx.Dict(
                    {name: LoraParam(x) for name, x in trained.items() if x is not None}
                )
        graph, _, held = nnx.split(base, nnx.Param, ...)
        self.base = nnx.merge(graph, jax.tree.unflatten(tree, bare), held, copy=True)
        self.adapters = nnx.Dict(parts)

    def __getattr__(self, name: str) -> Any:
        # Python comes here only for names that the wrapper lacks. It has no `base` before
        # `__init__` is done; Python and JAX probe for names with underscores, NNX for `set_view`,
        # and what they find they would use on the wrapper.
        if "base" not in vars(self) or name.startswith("__") or name == "set_view":
            raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`", name=name)
        try:
            found = getattr(self.base, name)
        except AttributeError:
            raise AttributeError(
                f"neither the adapted module nor its base, a `{type(self.base).__name__}`, has an "
                f"attribute `{name}`",
                name=name,
            ) from None
        bound = inspect.ismethod(found) and found.__self__ is self.base
        return functools.partial(self.call, name) if bound else found

    def __setattr__(self, name: str, value: Any) -> None:
        # What is read from the base is set there: `eval()` sets `deterministic` wherever it is.
        inside = "base" in vars(self) and name not in _OWN and hasattr(self.base, name)
        nnx.Module.__setattr__(self.base if inside else self, name, value)

    def lora_params(self) -> PyTree:
        """The tree for `lora.lorafy`, `lora.merge` and the functions that save adapters."""
        _, params, _ = nnx.split(self.base, nnx.Param, ...)
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        planned = self.plan.by_path()
        leaves = [self._leaf(planned[paths.spell(path)], path, w) for path, w in flat]
        return jax.tree.unflatten(tree, leaves)

    def _leaf(self, planned: LeafPlan, path: Sequence, w: Any) -> Any:
        if planned.kind == "frozen":
            return w
        trained = {name: x.get_value() for name, x in self.adapters[_name(path)].items()}
        return make_leaf(self.plan, planned, w, **trained)

    def __call__(self, *args, **kwargs) -> Any:
        return self.call("__call__", *args, **kwargs)

    def call(self, method: str, *args, lora_key: PRNGKeyArray | None = None, **kwargs) -> Any:
        """Calls any method of the base with the adapters on.

        Args:
          method: its name, or that of a layer's method, "encoder.pool".
          *args, **kwargs: its arguments.
          lora_key: PRNG key for the adapters' dropout, None for none.
        """
        graph, _, held = nnx.split(self.base, nnx.Param, ...)
        fn = lorafy(_function(graph, held, method))
        out, state = fn(self.lora_params(), *args, state=held, lora_key=lora_key, **kwargs)
        nnx.update(self.base, state)
        return out


def _name(path: Sequence) -> str:
    return paths.spell(path).replace(".", "/")


def adapt(
    module: nnx.Module,
    config: LoraConfig,
    *args,
    key: PRNGKeyArray,
    method: str = "__call__",
    **kwargs,
) -> Adapted:
    """Puts adapters into an NNX module; the result is called as the module was.

    Args:
      module: the base; it is not changed, and its arrays are shared.
      config: what to adapt.
      *args, **kwargs: example arguments of the method, from which roles are inferred.
      key: PRNG key of the adapters.
      method: the method that is traced to find how the weights are used.

    Returns:
      A module whose `LoraParam`s train.

    Example:
      model = lora.nnx.adapt(model, lora.LoraConfig(target_modules=("query",)), x, key=key)
      optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=lora.nnx.LoraParam)
    """
    check_argument("nnx.adapt(module, config, *args, key=key)", "module", module, nnx.Module)
    fn, params, state = functional(module, method=method)
    plan = make_plan(config, fn, params, *args, state=state, **kwargs)
    return Adapted(module, init_tree(key, plan, params), plan)


def merged(model: Adapted) -> nnx.Module:
    """A copy of the base module with the adapters merged into its parameters."""
    graph, _, held = nnx.split(model.base, nnx.Param, ...)
    return nnx.merge(graph, merge_tree(model.lora_params()), held, copy=True)
