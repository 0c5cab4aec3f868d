"""An NNX module with adapters inside."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray, PyTree

from lora_jax import compat, paths
from lora_jax.array import LoraArray, RowsArray, SavedArray, is_lora
from lora_jax.config import matching
from lora_jax.config.arguments import check_argument, check_key
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.merge import merge as merge_tree
from lora_jax.multi.single import check_single
from lora_jax.nnx.functional import check_module, function_of, functional, written_by
from lora_jax.plan.decide import LeftOutWarning
from lora_jax.plan.decide import plan as make_plan
from lora_jax.plan.leaf import LeafPlan, Plan
from lora_jax.transform import lorafy
from lora_jax.tree import init as init_tree
from lora_jax.tree import make_leaf, trained_fields


class LoraParam(nnx.LoRAParam):
    """A variable that an adapter trains: `nnx.Optimizer(model, tx, wrt=lora.nnx.LoraParam)`.

    It is a `nnx.LoRAParam`, by which trainers for NNX find what to train.
    """


class FrozenParam(nnx.Variable):
    """A parameter of the base inside an `Adapted`, which no filter for `nnx.Param` selects.

    Its metadata are the parameter's, and `held`, the parameter's type.
    """


class _Adapter(NamedTuple):
    """What every `LoraParam` says of its leaf's adapter: metadata, which `nnx.update` brings along.

    Attributes:
      rank, scales: of the leaf; 0 and () where it trains whole or in some rows.
      parts: the names of its trained arrays.
    """

    rank: int
    scales: tuple[float, ...]
    parts: tuple[str, ...]


_OWN = ("base", "adapters", "plan")  # the attributes of `Adapted`


class Adapted(nnx.Module):
    """An NNX module with adapters inside, called like the module it was made from.

    The base's attributes are read and set through it: `model.blocks` is `model.base.blocks`. Its
    methods run with the adapters, as by `call`. A layer is the base's own, and computes without
    them: `model.call("blocks.encode", x)` is a layer's method with its adapters.

    The trained variables are `LoraParam`s, and the only ones that `nnx.Param` selects: the base's
    parameters are `FrozenParam`s. State that a call changes (batch statistics, caches, random
    streams) is updated, as in the base.

    Attributes:
      base: the module that was adapted (its structure; its arrays are shared, not copied).
      adapters: the trained arrays, `{leaf path with /: {"a": LoraParam, "b": LoraParam, ...}}`.
      plan: which leaves are adapted.
    """

    def __init__(self, base: nnx.Module, lora_params: PyTree, plan: Plan) -> None:
        """Puts a tree's adapters into a module.

        Args:
          base: the module.
          lora_params: the adapted tree of its parameters, from `lora.init` or read from a file.
          plan: the plan that the tree was made with.

        Raises:
          ValueError: the tree is not the planned one.
        """
        check_module("base", base)
        check_argument("nnx.Adapted(base, lora_params, plan)", "plan", plan, Plan)
        check_single(lora_params)
        # A plan holds no arrays: it belongs to the module's structure, not to its state.
        self.plan = nnx.static(plan)
        parts, bare = {}, []
        flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_lora)
        planned = plan.by_path()
        for path, leaf in flat:
            bare.append(leaf.w if is_lora(leaf) else leaf)
            if is_lora(leaf):
                name = paths.spell(path)
                _check_planned(name, leaf, planned.get(name), plan)
                fields = {name: getattr(leaf, name) for name in trained_fields(leaf)}
                trained = {name: x for name, x in fields.items() if x is not None}
                own = _adapter(planned[name], trained)
                parts[_name(path)] = nnx.Dict(
                    {name: LoraParam(x, adapter=own) for name, x in trained.items()}
                )
        graph, _, held = nnx.split(base, nnx.Param, ...)
        params = _frozen(jax.tree.unflatten(tree, bare))
        self.base = nnx.merge(graph, params, held, copy=True)
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
        return self._method(name, found) if bound else found

    def _method(self, name: str, found: Callable) -> Callable:
        """A method of the base with the adapters on; trainers look at its signature."""
        method = functools.partial(self.call, name)
        method.__signature__ = inspect.signature(found)  # pyright: ignore[reportAttributeAccessIssue]
        return method

    def __setattr__(self, name: str, value: Any) -> None:
        # What is read from the base is set there: `eval()` sets `deterministic` wherever it is.
        inside = "base" in vars(self) and name not in _OWN and hasattr(self.base, name)
        nnx.Module.__setattr__(self.base if inside else self, name, value)

    def lora_params(self) -> PyTree:
        """The tree for `lora.lorafy`, `lora.merge` and the functions that save adapters."""
        return self._adapted(_split(self.base)[1])

    def _adapted(self, params: PyTree) -> PyTree:
        """The base's parameters with the adapters on them."""
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        planned = self.plan.by_path()
        leaves = [self._leaf(planned[paths.spell(path)], path, w) for path, w in flat]
        return jax.tree.unflatten(tree, leaves)

    def _leaf(self, planned: LeafPlan, path: Sequence, w: Any) -> Any:
        if planned.kind == "frozen":
            return w
        parts = dict(self.adapters[_name(path)].items())
        trained = {name: x.get_value() for name, x in parts.items()}
        # Of another adapter, if `nnx.update` has put it in, with a scale of its own.
        default = _adapter(planned, parts)
        own, *others = {x.get_metadata("adapter", default) for x in parts.values()}
        leaf = make_leaf(self.plan, dataclasses.replace(planned, scales=own.scales), w, **trained)
        of_rank = not isinstance(leaf, LoraArray) or leaf.rank == own.rank
        if others or not of_rank:
            raise ValueError(
                f"`{planned.path}` has parts of two adapters, which an update has mixed: update "
                "from the whole `nnx.state(other, lora.nnx.LoraParam)`, or make "
                "`lora.nnx.Adapted(base, other.lora_params(), other.plan)`"
            )
        return leaf

    @property
    def __call__(self) -> Callable:
        """The base's call with the adapters on: a property, as each base has its own signature."""
        return self._method("__call__", self.base.__call__)

    def call(self, method: str, *args, lora_key: PRNGKeyArray | None = None, **kwargs) -> Any:
        """Calls any method of the base with the adapters on.

        Args:
          method: its name, or that of a layer's method, "encoder.pool".
          *args, **kwargs: its arguments.
          lora_key: PRNG key for the adapters' dropout, None for none.
        """
        graph, params, held = _split(self.base)
        fn = lorafy(function_of(graph, held, method))
        out, state = fn(self._adapted(params), *args, state=held, lora_key=lora_key, **kwargs)
        # NNX forbids to update a module that is no argument of the transformation it runs in.
        if written := written_by(held, state):
            nnx.update(self.base, nnx.from_flat_state(written))
        return out


def _adapter(planned: LeafPlan, parts: Mapping) -> _Adapter:
    return _Adapter(planned.rank, planned.scales, tuple(sorted(parts)))


def _check_planned(path: str, leaf: Any, planned: LeafPlan | None, plan: Plan) -> None:
    """Checks that a leaf is the planned one: `lora_params` makes it anew from the plan."""
    if planned is None or _KINDS.get(planned.kind) is not type(leaf):
        kind = "no leaf there" if planned is None else f'kind "{planned.kind}" there'
        raise ValueError(
            f"`{path}` is a `{type(leaf).__name__}` in `lora_params`, and `plan` has {kind}: pass "
            "the plan that the tree was made with"
        )
    if not isinstance(leaf, LoraArray):
        return
    pairs = [
        ("roles", leaf.roles, planned.roles),
        ("rank", leaf.rank, planned.rank),
        ("dropout", leaf.dropout, float(plan.config.dropout)),
    ]
    if compat.is_concrete(leaf.scale):
        scales = np.asarray(planned.scales, np.float32).tolist()
        pairs.append(("scale", np.ravel(leaf.scale).tolist(), scales))
    for name, has, expected in pairs:
        if has != expected:
            raise ValueError(
                f"`{path}` has {name} {has} in `lora_params`, and {expected} in `plan`: pass the "
                "plan that the tree was made with"
            )


_KINDS = {"lora": LoraArray, "saved": SavedArray, "rows": RowsArray}


def _frozen(params: PyTree) -> PyTree:
    """A state of parameters as one of `FrozenParam`s; `nnx.merge` takes the types of the state."""

    def freeze(variable: nnx.Variable) -> nnx.Variable:
        if not _is_variable(variable):
            raise TypeError(
                "`lora_params` must be the adapted parameters of the module, whose base is "
                "`lora.nnx.functional(module).params`, got a tree of plain arrays"
            )
        metadata = {**variable.get_metadata(), "held": type(variable)}
        return FrozenParam.from_metadata(variable.get_raw_value(), metadata)

    return jax.tree.map(freeze, params, is_leaf=_is_variable)


def _split(base: nnx.Module) -> tuple[Any, PyTree, PyTree]:
    """An adapted module's base as `nnx.split` gives it, with the types its parameters had."""

    def thaw(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        return metadata.pop("held").from_metadata(variable.get_raw_value(), metadata)

    graph, params, held = nnx.split(base, FrozenParam, ...)
    return graph, jax.tree.map(thaw, params, is_leaf=_is_variable), held


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _name(path: Sequence) -> str:
    return paths.spell(path).replace(".", "/")


def adapt(
    module: nnx.Module,
    config: LoraConfig,
    *args,
    key: PRNGKeyArray = None,  # pyright: ignore[reportArgumentType] (refused below)
    method: str = "__call__",
    **kwargs,
) -> Adapted:
    """Puts adapters into an NNX module; the result is called as the module was.

    Args:
      module: the base; it is not changed, and its arrays are shared.
      config: what to adapt.
      *args, **kwargs: example arguments of the method, from which roles are inferred.
      key: PRNG key of the adapters; there is no default.
      method: the method that is traced to find how the weights are used.

    Returns:
      A module whose `LoraParam`s train.

    Raises:
      TypeError: no NNX module, or no key.
      ValueError: the module has adapters already.

    Example:
      model = lora.nnx.adapt(model, lora.LoraConfig(target_modules=("query",)), x, key=key)
      optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=lora.nnx.LoraParam)
    """
    check_module("module", module)
    if isinstance(module, Adapted):
        raise ValueError(
            "`module` has adapters already: train it as it is, or adapt the module that it was "
            "made from, or `lora.nnx.merged(module)`"
        )
    check_argument("nnx.adapt(module, config, *args, key=key)", "config", config, LoraConfig)
    check_key("key", key)
    fn, params, state = functional(module, method=method)
    plan = make_plan(config, fn, params, *args, state=state, **kwargs)
    _warn_of_other_names(module, config, plan)
    return Adapted(module, init_tree(key, plan, params), plan)


def _warn_of_other_names(module: nnx.Module, config: LoraConfig, plan: Plan) -> None:
    """Warns where the config names a layer by a path that NNX does not use, and it is frozen."""
    if config.target_modules == ALL_LINEAR:
        return
    frozen = [leaf.path for leaf in plan.leaves if leaf.kind == "frozen" and len(leaf.shape) > 1]
    for other, first in _other_names(module, (), {}):
        for path in frozen:
            name = f"{other}{path.removeprefix(first)}"
            within = f"{path}.".startswith(f"{first}.")
            if within and matching.is_target(config, paths.module_of(name)):
                warnings.warn(
                    f"`{paths.module_of(name)}`, which `target_modules` names, is "
                    f"`{paths.module_of(path)}` too, and NNX knows it by that name: it is not "
                    "adapted; target that name",
                    LeftOutWarning,
                    stacklevel=3,
                )


def _other_names(
    module: nnx.Module, path: tuple, seen: dict[int, str]
) -> Iterator[tuple[str, str]]:
    """Further paths of layers that lie in a module several times, each with the first path."""
    for name, child in nnx.iter_children(module):
        own = (*path, name)
        spelled = ".".join(map(str, own))
        if id(child) in seen:
            yield spelled, seen[id(child)]
            continue
        seen[id(child)] = spelled
        if not isinstance(child, nnx.Variable):
            yield from _other_names(child, own, seen)


def merged(model: Adapted) -> nnx.Module:
    """A copy of the base module with the adapters merged into its parameters."""
    check_argument("nnx.merged(model)", "model", model, Adapted)
    graph, params, held = _split(model.base)
    return nnx.merge(graph, merge_tree(model._adapted(params)), held, copy=True)
