"""Shardings: of weights from rules, of adapters from their weights, with the rank replicated.

W  (layers, in, out)   P(None, "data", "model")
A  (layers, in, r)     P(None, "data", None)
B  (layers, r, out)    P(None, None, "model")
"""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax import compat, paths, processes
from lora_jax.array import LoraArray, LoraStack, RowsArray, SavedArray, is_leaf
from lora_jax.config.arguments import check_argument, check_tree, kind_of, quoted
from lora_jax.config.sharding import LeafDims, Rules
from lora_jax.dims import in_dims, stack_dims
from lora_jax.quant import sharding as quant_sharding
from lora_jax.quant.array import QuantArray, is_quant, units
from lora_jax.transform.labels import part_spec

__all__ = ["LeafDims", "Rules", "partition_specs", "place", "shardings", "specs"]

Factors = TypeVar("Factors", bound=LoraArray | LoraStack)

AXES = ("data", "fsdp", "tensor", "expert", "context")
COPIED = ("data", "context")  # those along which every weight is copied

# Field of a `LoraArray` -> its name in `part_spec`; a magnitude has the dims of a gain.
_PARTS = {"a": "a", "b": "b", "scale": "scale", "m": "gain", "bias": "bias"}


def __dir__() -> list[str]:
    return __all__


def partition_specs(lora_params: PyTree, specs: PyTree) -> PyTree:
    """The `PartitionSpec` of every array of a LoRA tree, from those of the base parameters.

    Args:
      lora_params: a tree with LoRA leaves (arrays or `ShapeDtypeStruct`s).
      specs: a tree like the base parameters, with a `PartitionSpec` at each leaf.

    Returns:
      A tree like `lora_params` with a `PartitionSpec` at each array, for `jax.jit`'s shardings,
      `shard_map`'s specs, or to restore a checkpoint onto a mesh.

    Raises:
      ValueError: `specs` has another structure, or something else than a `PartitionSpec` at a leaf.

    Example:
      >>> import jax, lora_jax as lora
      >>> from jax.sharding import PartitionSpec as P
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
      >>> w = lora.LoraArray(shape(8, 6), shape(8, 2), shape(2, 6), shape())
      >>> lora.partition_specs({"w": w}, {"w": P("data", "model")})["w"].b
      PartitionSpec(None, 'model')
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_leaf)
    given, given_tree = jax.tree.flatten(specs)
    if given_tree != tree:
        raise ValueError(
            "`specs` must be a tree like the base parameters, with a `PartitionSpec` at each leaf; "
            f"it differs at {paths.where_trees_differ(lora_params, specs, is_leaf)}"
        )
    for (path, _), spec in zip(flat, given, strict=True):
        if not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"`specs` must have a `PartitionSpec` at `{paths.spell(path)}`, got "
                f"`{type(spec).__name__}`"
            )
    pairs = zip(flat, given, strict=True)
    return jax.tree.unflatten(tree, [_named_specs(path, x, spec) for (path, x), spec in pairs])


def _named_specs(path: Any, x: Any, spec: PartitionSpec) -> Any:
    """As `_leaf_specs`; an error names the leaf."""
    try:
        return _leaf_specs(x, spec)
    except ValueError as error:
        raise ValueError(f"`{paths.spell(path)}`: {error}") from None


def _base_specs(w: Any, spec: PartitionSpec) -> Any:
    return quant_sharding.array_specs(w, spec) if isinstance(w, QuantArray) else spec


def _leaf_specs(x: Any, spec: PartitionSpec) -> Any:
    if isinstance(x, SavedArray):
        return dataclasses.replace(x, w=_base_specs(x.w, spec), value=spec)
    if isinstance(x, RowsArray):
        # The rows are few: only their features are sharded. A spec may be shorter than its array.
        full = (*spec, None, None)
        rows = PartitionSpec(None, full[1 - x.axis])
        return dataclasses.replace(x, w=_base_specs(x.w, spec), rows=rows)
    if isinstance(x, LoraStack):
        return _stack_specs(x, spec)
    if not isinstance(x, LoraArray):
        return _base_specs(x, spec)
    parts = {
        name: None if getattr(x, name) is None else part_spec(spec, x.roles, part)
        for name, part in _PARTS.items()
    }
    return dataclasses.replace(x, w=_base_specs(x.w, spec), **parts)


def _stack_specs(x: LoraStack, spec: PartitionSpec) -> LoraStack:
    """As of one adapter; every device has its part of all adapters of a stack."""
    parts = {}
    for name, part in {**_PARTS, "gain": "gain"}.items():
        if getattr(x, name) is not None:
            own = tuple(part_spec(spec, x.roles, part))
            parts[name] = PartitionSpec(*own[: x.axis], None, *own[x.axis :])
    return dataclasses.replace(x, w=_base_specs(x.w, spec), **parts)


def follow(lora_params: PyTree) -> PyTree:
    """Moves all factors to the meshes of their weights; see `place_factors`."""
    return jax.tree.map(
        lambda x: place_factors(x) if isinstance(x, LoraArray | LoraStack) else x,
        lora_params,
        is_leaf=is_leaf,
    )


def place_factors(x: Factors) -> Factors:
    """Moves new factors to the weight's mesh, sharded like the weight.

    A weight on one device, or traced under automatic sharding, leaves the factors as they are.
    """
    if isinstance(x.w, jax.core.Tracer):
        # A tracer has a spec only where mesh axes are explicit; elsewhere the compiler chooses.
        spec = compat.spec_of(x.w)
        if spec is None or not any(spec):
            return x
        mesh = compat.explicit_mesh(x.w)  # `jax.set_mesh` need not have set it
        reshard = jax.sharding.reshard
        return _move(x, PartitionSpec(*spec), lambda y, s: reshard(y, NamedSharding(mesh, s)))
    sharding = getattr(x.w, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return x
    return _move(x, sharding.spec, lambda y, s: processes.put(y, NamedSharding(sharding.mesh, s)))


def _move(x: Factors, spec: PartitionSpec, put: Callable) -> Factors:
    specs = _leaf_specs(x, spec)
    names = [*_PARTS, *(["gain"] if isinstance(x, LoraStack) else [])]
    parts = {
        name: put(getattr(x, name), getattr(specs, name))
        for name in names
        if getattr(x, name) is not None
    }
    return dataclasses.replace(x, **parts)


def place(params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """Spreads a tree over a mesh: weights by the rules, adapters like their weights.

    Args:
      params: parameters, plain, quantized or adapted.
      mesh: the devices.
      rules: which axes shard which dims, such as `lora_jax.models.sharding.RULES`.

    Returns:
      The tree with every array on the mesh.

    Warns:
      UserWarning: leaves that every device holds whole, because an axis divides none of their dims,
        or because no rule names the axis or the leaf.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> mesh = lora.models.make_mesh(fsdp=-1)
      >>> rules = Rules({"hidden": ("fsdp",)}, (LeafDims(r"kernel$", ("hidden", "hidden")),))
      >>> placed = lora.sharding.place({"kernel": jnp.ones((64, 64))}, mesh, rules)
      >>> placed["kernel"].sharding.spec
      PartitionSpec('fsdp', None)
    """
    call = "sharding.place(params, mesh, rules)"
    check_tree("params", params, state=True)
    check_argument(call, "mesh", mesh, Mesh)
    check_argument(call, "rules", rules, Rules)
    placed = shardings(params, mesh, rules)
    return jax.tree.map(processes.put, params, placed)


def shardings(params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """The `NamedSharding` of every array of a tree that `place` would put on the mesh."""
    whole = _Whole([], [])
    found = jax.tree_util.tree_map_with_path(
        lambda path, x: _named_specs(
            path, x, _leaf_spec(paths.spell(path), x, rules, mesh.shape, whole=whole)
        ),
        params,
        is_leaf=is_leaf,
    )
    _warn_of_whole(whole, mesh.shape, rules, stacklevel=4)  # the caller of `place`
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), found)


@contextlib.contextmanager
def spreading(
    mesh: Mesh | None, rules: Rules
) -> Iterator[Callable[[str, Any], NamedSharding] | None]:
    """Yields (path, leaf) -> the sharding of a weight's own dims, or None without a mesh.

    A leaf that is a `QuantArray` needs no arrays.

    Raises:
      TypeError: the mesh is something else.

    Warns:
      UserWarning: at the end, of leaves that every device holds whole.
    """
    if mesh is None:
        yield None
        return
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`mesh` must be a `jax.sharding.Mesh`, got {kind_of(mesh)}: "
            "`lora.models.make_mesh(fsdp=-1)` makes one of all devices"
        )
    whole = _Whole([], [])
    yield lambda path, x: NamedSharding(mesh, _leaf_spec(path, x, rules, mesh.shape, whole=whole))
    _warn_of_whole(whole, mesh.shape, rules, stacklevel=5)  # the caller of the loader


class _Whole(NamedTuple):
    """The paths and shapes of leaves that devices hold whole."""

    undivided: list[str]  # an axis divides none of their dims
    unnamed: list[str]  # matrices that no row of the rules matches


def _warn_of_whole(
    whole: _Whole, mesh_shape: Mapping[str, int], rules: Rules, *, stacklevel: int
) -> None:
    """Warns of what devices along an axis hold whole, once for each cause."""
    shape, known = dict(mesh_shape), _axes(rules)
    texts = []
    if whole.undivided:
        texts.append(
            f"every device holds all of {_first(whole.undivided)}: the axis divides none of the "
            f"dims that it may shard, of the mesh {shape}"
        )
    if unknown := _unknown_axes(rules, shape):
        texts.append(
            f"every device holds all weights along {quoted(unknown)} of the mesh {shape}: the "
            f"rules name {quoted(known) or 'no axis'}; take a mesh of axes that they name "
            "(`lora.models.make_mesh`), or rules that name the mesh's"
        )
    if whole.unnamed and any(shape.get(a, 1) > 1 for a in known):
        texts.append(
            f"every device holds all of {_first(whole.unnamed)}: none of the rules' `leaves` "
            "matches; add a `LeafDims` with the dims, or one without dims where a copy is meant"
        )
    for text in texts:
        warnings.warn(text, stacklevel=stacklevel)


def _first(named: Sequence[str]) -> str:
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _axes(rules: Rules) -> list[str]:
    """The mesh axes that the rules name, those first that may shard the fewest dims."""
    named = [axis for axes in rules.axes.values() for axis in axes]
    return sorted(dict.fromkeys(named), key=named.count)


def _unknown_axes(rules: Rules, mesh_shape: Mapping[str, int]) -> list[str]:
    """The axes of several devices that no rule names, without those that copy weights."""
    known = (*COPIED, *_axes(rules))
    return [axis for axis, size in mesh_shape.items() if size > 1 and axis not in known]


def specs(shapes: Any, rules: Rules, mesh_shape: Mapping[str, int]) -> Any:
    """The `PartitionSpec` of every weight of a model.

    Args:
      shapes: the model's parameters, as arrays or `ShapeDtypeStruct`s; a quantized weight is one
        leaf.
      rules: which axes shard which dims, such as `lora_jax.models.sharding.RULES` or a copy of it.
      mesh_shape: mesh axis to number of devices; an axis that is missing has one.

    Returns:
      A tree like `shapes` with a `PartitionSpec` at each leaf.

    Raises:
      ValueError: an axis divides none of the dims of a leaf that it may shard, or no rule names it.

    Example:
      >>> import dataclasses, jax
      >>> shapes = {"lm_head": {"kernel": jax.ShapeDtypeStruct((64, 512), "float32")}}
      >>> specs(shapes, RULES, {"fsdp": 4, "tensor": 2})["lm_head"]["kernel"]
      PartitionSpec('fsdp', 'tensor')
      >>> whole = dataclasses.replace(RULES, axes={**RULES.axes, "vocabulary": ()})
      >>> specs(shapes, whole, {"fsdp": 4, "tensor": 2})["lm_head"]["kernel"]
      PartitionSpec('fsdp', None)
    """
    check_tree("shapes", shapes, state=True)
    check_argument("sharding.specs(shapes, rules, mesh_shape)", "rules", rules, Rules)
    if unknown := _unknown_axes(rules, mesh_shape):
        raise ValueError(
            f"`mesh_shape` has the axis {quoted(unknown)}, and the rules name "
            f"{quoted(_axes(rules))}: take their axes, or rules that name yours"
        )
    return _specs(shapes, rules, mesh_shape, whole=None)


def placed_specs(
    shapes: Any, rules: Rules, mesh_shape: Mapping[str, int], *, stacklevel: int | None = None
) -> Any:
    """As `specs`, of the weights as `place` spreads them: what no axis divides stays whole.

    Args:
      shapes, rules, mesh_shape: as of `specs`.
      stacklevel: of `place`'s warning of what stays whole; None does not warn.
    """
    whole = _Whole([], [])
    found = _specs(shapes, rules, mesh_shape, whole=whole)
    if stacklevel is not None:
        _warn_of_whole(whole, mesh_shape, rules, stacklevel=stacklevel + 1)
    return found


def _specs(
    shapes: Any, rules: Rules, mesh_shape: Mapping[str, int], *, whole: _Whole | None
) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _leaf_spec(paths.spell(path), x, rules, mesh_shape, whole=whole),
        shapes,
        is_leaf=is_leaf,
    )


def _leaf_spec(
    path: str, x: Any, rules: Rules, mesh_shape: Mapping[str, int], *, whole: _Whole | None
) -> PartitionSpec:
    x = getattr(x, "w", x)  # an adapted leaf is spread like its weight
    row = next((row for row in rules.leaves if re.search(row.pattern, path)), None)
    if row is None and x.ndim > 1 and whole is not None:
        whole.unnamed.append(f"`{path}` {tuple(x.shape)}")
    if row is None or not row.dims or x.ndim < len(row.dims):
        return PartitionSpec()
    # Scanned layers stand before the dims that a row names.
    first = x.ndim - len(row.dims)
    names = ("layers",) * first + row.dims
    order = [*(first + d for d in row.order), *range(first)]
    spec: list[tuple[str, ...]] = [()] * x.ndim
    # The axis with the fewest dims has its choice first: `tensor` before `fsdp`, which can shard
    # any dim, behind `tensor` on its dim too: outputs are gathered as a transposed copy of all
    # layers, inputs as they lie.
    for axis in _axes(rules):
        # Under fsdp a weight is gathered for each use, which does not pay for a vector.
        if mesh_shape.get(axis, 1) == 1 or (axis == "fsdp" and len(row.dims) == 1):
            continue
        allowed = [d for d in order if axis in rules.axes.get(names[d], ())]
        if not allowed:
            continue
        sizes = [math.prod(mesh_shape[a] for a in (*axes, axis)) for axes in spec]
        d = _divided(x, allowed, sizes)
        if d is not None:
            spec[d] += (axis,)
        elif whole is not None:
            # Other axes may still shard it.
            whole.undivided.append(f'`{path}` {tuple(x.shape)} along "{axis}"')
        else:
            raise ValueError(
                f'`mesh` axis "{axis}" = {mesh_shape[axis]} divides no dim of `{path}` '
                f"{tuple(x.shape)} that it may shard; choose a divisor of the model's width"
            )
    return PartitionSpec(*spec)


def _divided(x: Any, dims: list[int], sizes: Sequence[int]) -> int | None:
    """The first of the dims that can be cut into its number of parts, `sizes[d]`."""
    if not is_quant(x):
        return next((d for d in dims if x.shape[d] % sizes[d] == 0), None)
    # A quantized matrix is stored in superblocks of inputs, which must stay whole.
    inputs, stack, (rows, columns) = in_dims(x.roles), stack_dims(x.roles), units(x)
    unit = {d: rows if d in inputs else 1 if d in stack else columns for d in dims}
    return next((d for d in dims if x.shape[d] % (sizes[d] * unit[d]) == 0), None)
