"""How the weights of a model are spread over a mesh: rules as data, one function that applies them.

    data     rows of the batch; every weight is copied
    fsdp     rows of the batch, and one dim of every matrix and table: each device keeps a part of
             weights, adapters, gradients and optimizer state, and gathers a layer to use it
    tensor   heads, the hidden units of the MLP and the vocabulary, for decoders of the Llama family

    q, k, v, gate, up, head  (in, out)        P("fsdp", "tensor")
    o, down                  (in, out)        P("tensor", "fsdp")
    table                    (vocabulary, d)  P("tensor", "fsdp")
    norms, biases                             copied (biases of the first row: P("tensor"))

Adapters follow the weights they belong to, see `lora_jax.partition_specs`.

Sources: Rajbhandari et al. 2020, "ZeRO", section 5; Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.array import is_leaf
from lora_jax.quant.array import is_quant

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that the rows of a batch are spread over


@dataclasses.dataclass(frozen=True)
class LeafDims:
    """The logical dims of the leaves whose path a pattern matches.

    Attributes:
      pattern: a regular expression, searched for in the path.
      dims: names of the last dims; a dim before them is `layers`.
      order: the positions in `dims` in the order in which a mesh axis tries them.
    """

    pattern: str
    dims: tuple[str, ...]
    order: tuple[int, ...] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes shard which dims.

    Attributes:
      axes: a logical dim to the mesh axes that may shard it.
      leaves: the logical dims of every leaf; the first row that matches counts, and a leaf that
        none matches is copied to every device.
    """

    axes: Mapping[str, tuple[str, ...]]
    leaves: tuple[LeafDims, ...]


# Matrices prefer their inputs for `fsdp`: to gather outputs takes a transposed copy of every layer.
# The tables' rows are looked up, so their features come first.
RULES = Rules(
    axes={
        "vocabulary": ("tensor", "fsdp"),
        "heads": ("tensor", "fsdp"),
        "mlp": ("tensor", "fsdp"),
        "hidden": ("fsdp",),
        "other": ("fsdp",),
        "layers": (),
    },
    leaves=(
        LeafDims(r"(^|\.)embed_tokens\.embedding$", ("vocabulary", "hidden"), (1, 0)),
        LeafDims(r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj)\.kernel$", ("hidden", "heads")),
        LeafDims(r"(^|\.)(gate_proj|up_proj|gate_up_proj)\.kernel$", ("hidden", "mlp")),
        LeafDims(r"(^|\.)lm_head\.kernel$", ("hidden", "vocabulary")),
        LeafDims(r"(^|\.)o_proj\.kernel$", ("heads", "hidden")),
        LeafDims(r"(^|\.)down_proj\.kernel$", ("mlp", "hidden")),
        LeafDims(r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj)\.bias$", ("heads",), (0,)),
        LeafDims(r"(^|\.)(gate_proj|up_proj|gate_up_proj)\.bias$", ("mlp",), (0,)),
        LeafDims(r"(^|\.)lm_head\.bias$", ("vocabulary",), (0,)),
        LeafDims(r"(^|\.)embedding$", ("other", "hidden"), (1, 0)),
        LeafDims(r"(^|\.)kernel$", ("other", "other")),
    ),
)


def specs(shapes: Any, rules: Rules, mesh_shape: Mapping[str, int]) -> Any:
    """The `PartitionSpec` of every weight of a model.

    Args:
      shapes: the model's parameters, as arrays or `ShapeDtypeStruct`s; a quantized weight is one
        leaf.
      rules: which axes shard which dims, `RULES` or a changed copy of it.
      mesh_shape: mesh axis to number of devices; an axis that is missing has one.

    Returns:
      A tree like `shapes` with a `PartitionSpec` at each leaf.

    Raises:
      ValueError: an axis that divides none of the dims of a leaf that it may shard.

    Example:
      >>> import dataclasses, jax
      >>> shapes = {"lm_head": {"kernel": jax.ShapeDtypeStruct((64, 512), "float32")}}
      >>> specs(shapes, RULES, {"fsdp": 4, "tensor": 2})["lm_head"]["kernel"]
      PartitionSpec('fsdp', 'tensor')
      >>> whole = dataclasses.replace(RULES, axes={**RULES.axes, "vocabulary": ()})
      >>> specs(shapes, whole, {"fsdp": 4, "tensor": 2})["lm_head"]["kernel"]
      PartitionSpec('fsdp', None)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _leaf_spec(paths.spell(path), x, rules, mesh_shape),
        shapes,
        is_leaf=is_leaf,
    )


def _leaf_spec(path: str, x: Any, rules: Rules, mesh_shape: Mapping[str, int]) -> PartitionSpec:
    row = next((row for row in rules.leaves if re.search(row.pattern, path)), None)
    if row is None or x.ndim < len(row.dims):
        return PartitionSpec()
    first = x.ndim - len(row.dims)
    names = ("layers",) * first + row.dims
    order = [first + d for d in row.order]
    spec: list[str | None] = [None] * x.ndim
    # `tensor` first: it has one dim it can take, `fsdp` takes any that is left.
    for axis in ("tensor", "fsdp", "data"):
        # A vector is too small to be worth the gathering.
        if mesh_shape.get(axis, 1) == 1 or (axis == "fsdp" and len(row.dims) == 1):
            continue
        free = [d for d in order if spec[d] is None and axis in rules.axes.get(names[d], ())]
        if free:
            spec[_divided(path, x, free, axis, mesh_shape[axis])] = axis
    return PartitionSpec(*spec)


def _divided(path: str, x: Any, dims: list[int], axis: str, size: int) -> int:
    """The first of the dims that an axis of this size divides."""
    # A quantized matrix is stored in superblocks of inputs, which must stay whole: where there are
    # too few of them it is spread by its outputs.
    for whole, order in ((128, dims), (1, dims[::-1])) if is_quant(x) else ((1, dims),):
        for d in order:
            if x.shape[d] % (size * whole) == 0:
                return d
    raise ValueError(
        f"`mesh` axis `{axis}` = {size} divides no dim of `{path}` {tuple(x.shape)} that is "
        "free; take a divisor of the model's width"
    )
