"""Shardings of adapters: those of the weight, with the rank replicated.

W  (layers, in, out)   P(None, "data", "model")
A  (layers, in, r)     P(None, "data", None)
B  (layers, r, out)    P(None, None, "model")
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax.array import LoraArray, RowsArray, SavedArray, is_leaf
from lora_jax.quant import sharding as quant_sharding
from lora_jax.quant.array import QuantArray
from lora_jax.transform.labels import part_spec, spec_of

# Field of a leaf -> its name in `part_spec`; a magnitude has the dims of a gain.
_PARTS = {"a": "a", "b": "b", "scale": "scale", "m": "gain", "bias": "bias"}


def partition_specs(lora_params: PyTree, specs: PyTree) -> PyTree:
    """The `PartitionSpec` of every array of a LoRA tree, from those of the base parameters.

    Args:
      lora_params: a tree with LoRA leaves (arrays or `ShapeDtypeStruct`s).
      specs: a tree like the base parameters, with a `PartitionSpec` at each leaf.

    Returns:
      A tree like `lora_params` with a `PartitionSpec` at each array, for `jax.jit`'s shardings,
      `shard_map`'s specs, or to restore a checkpoint onto a mesh.

    Example:
      >>> import jax, lora_jax as lora
      >>> from jax.sharding import PartitionSpec as P
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
      >>> w = lora.LoraArray(shape(8, 6), shape(8, 2), shape(2, 6), shape())
      >>> lora.partition_specs({"w": w}, {"w": P("data", "model")})["w"].b
      PartitionSpec(None, 'model')
    """
    return jax.tree.map(_leaf_specs, lora_params, specs, is_leaf=is_leaf)


def _base_specs(w: Any, spec: PartitionSpec) -> Any:
    return quant_sharding.array_specs(w, spec) if isinstance(w, QuantArray) else spec


def _leaf_specs(x: Any, spec: PartitionSpec) -> Any:
    if isinstance(x, SavedArray):
        return dataclasses.replace(x, w=_base_specs(x.w, spec), value=spec)
    if isinstance(x, RowsArray):  # few rows: whole on every device of the vocabulary's axis
        # A spec may be shorter than its array.
        full = (*spec, None, None)
        rows = PartitionSpec(None, full[1 - x.axis])
        return dataclasses.replace(x, w=_base_specs(x.w, spec), rows=rows)
    if not isinstance(x, LoraArray):
        return _base_specs(x, spec)
    parts = {
        name: None if getattr(x, name) is None else part_spec(spec, x.roles, part)
        for name, part in _PARTS.items()
    }
    return dataclasses.replace(x, w=_base_specs(x.w, spec), **parts)


def follow(lora_params: PyTree) -> PyTree:
    """Moves all factors to the mesh of their weights; see `place`."""
    return jax.tree.map(
        lambda x: place(x) if isinstance(x, LoraArray) else x, lora_params, is_leaf=is_leaf
    )


def place(x: LoraArray) -> LoraArray:
    """Moves new factors to the weight's mesh, sharded like the weight.

    A weight on one device, or traced under automatic sharding, leaves the factors as they are.
    """
    if isinstance(x.w, jax.core.Tracer):
        # A tracer has a spec only where mesh axes are explicit; elsewhere the compiler chooses.
        spec = spec_of(x.w)
        if spec is None or not any(spec):
            return x
        return _move(x, PartitionSpec(*spec), jax.sharding.reshard)
    sharding = getattr(x.w, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return x
    return _move(x, sharding.spec, lambda y, s: jax.device_put(y, NamedSharding(sharding.mesh, s)))


def _move(x: LoraArray, spec: PartitionSpec, put: Callable) -> LoraArray:
    parts = {
        name: put(getattr(x, name), part_spec(spec, x.roles, part))
        for name, part in _PARTS.items()
        if getattr(x, name) is not None
    }
    return dataclasses.replace(x, **parts)
