"""The mesh in the estimate of a training step; the rules are those of `lora_jax.models.sharding`.

Weights, adapters and optimizer state are exact under these shardings. The temporaries are those of
a program that gathers a weight where it is used and keeps the rows of the batch on the devices that
hold their tokens, as `train.fit` runs it and `exact=True` compiles it. In a loop of one's own
without `Forward(rows=..., gathered=...)` XLA takes the sharding of the residual stream from the
embedding table: all devices of an axis hold all rows, and up to twice the temporaries.

The totals over XLA's own figures are in `benchmarks/results/estimate.json` and `scale.json`. For a
CPU, with `fsdp` the temporaries of adapters are up to a third more than estimated. For an H200 the
totals of mixtures, of delta nets and of T5 in real sizes are 0.95 to 1.06 of XLA's, and their
temporaries within a sixth (Qwen3.5 on fsdp x tensor; the others within a tenth), with products in
Triton; cuBLAS converts no operand and no result by itself, which makes a vision transformer's total
0.92.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.models.config import LlamaConfig
from lora_jax.models.sharding import AXES, ROWS, TOKENS, check_axes, check_length
from lora_jax.models.t5_config import T5Config
from lora_jax.quant.sharding import axes_of

# The sizes of a configuration that the axis `tensor` divides; T5 has no heads of keys of their own.
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def check_mesh(mesh: Mapping[str, int], *, batch: int, length: int) -> dict[str, int]:
    """The mesh with all axes; those that are left out have one device.

    Raises:
      ValueError: an unknown axis, a size that is not a whole number above 0, or a batch or a row
        that the devices do not divide.
    """
    check_axes(mesh, rest=False)
    full = {name: mesh.get(name, 1) for name in AXES}
    spread = math.prod(full[name] for name in ROWS)
    if batch % spread:
        raise ValueError(
            f"`batch` {batch} cannot be divided among the {spread} devices of the axes "
            f"{' and '.join(ROWS)}: take a multiple of {spread}"
        )
    check_length("length", length, full[TOKENS])
    return full


def one_device(config: Any, mesh: Mapping[str, int]) -> Any:
    """The configuration of a device's part of the model: its share of heads, MLP and vocabulary.

    Raises:
      ValueError: a family of which `tensor` is not estimated, or a size that it does not divide.
    """
    count = mesh["tensor"]
    if count == 1:
        return config

    # Of others the size of a head is the width over their number, which is a device's own here.
    if not isinstance(config, LlamaConfig | T5Config):
        raise ValueError(
            f"`mesh` axis 'tensor' is not estimated for model_type `{config.model_type}`, only for "
            f"T5 and Llama's decoders; use data and fsdp"
        )
    own = {field.name for field in dataclasses.fields(config)}
    divided = [name for name in _DIVIDED if name in own]
    for name in divided:
        if getattr(config, name) % count:
            raise ValueError(
                f"`mesh` axis 'tensor' = {count} does not divide `{name}` = "
                f"{getattr(config, name)}; take a divisor of both"
            )
    share = {name: getattr(config, name) // count for name in divided}
    return dataclasses.replace(config, **share)


# The assumptions behind an estimate on a mesh, in a line.
MESH_NOTE = (
    "as `train.fit` and `lora-jax train --mesh` run it; in a loop of your own without "
    'Forward(rows=("data", "fsdp")) XLA holds up to twice the activations'
)


def parts(spec: PartitionSpec, mesh: Mapping[str, int], *axes: str) -> int:
    """How many parts an array is divided into along these axes (all by default)."""
    named = [name for entry in spec for name in axes_of(entry)]
    return math.prod(mesh[name] for name in named if not axes or name in axes)


def leaves(specs: Any) -> list[PartitionSpec]:
    """The specs of a tree's arrays, in the arrays' order."""
    return jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def placed(shapes: Any, specs: Any, mesh: Mesh) -> Any:
    """A tree of `ShapeDtypeStruct`s with the shardings of a tree of specs."""
    flat, tree = jax.tree.flatten(shapes)
    places = [NamedSharding(mesh, spec) for spec in leaves(specs)]
    found = zip(flat, places, strict=True)
    return tree.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x, at in found)
