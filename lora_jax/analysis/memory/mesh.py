"""How a training step is spread over a mesh: which array is sharded over what, which is copied.

    data     rows of the batch; everything else is copied
    fsdp     rows of the batch, and of every matrix and table one dim: each device keeps its part
             of weights, adapters, gradients and optimizer state, and gathers a layer to use it
    tensor   heads, the MLP's inside and the vocabulary (Megatron's way), for Llama's decoders

    q, k, v, gate, up, head  (in, out)      P("fsdp", "tensor")
    o, down                  (in, out)      P("tensor", "fsdp")
    table                    (tokens, d)    P("tensor", "fsdp")
    norms, biases                           copied (biases of the first row: P("tensor"))

Adapters follow their weights, see `lora_jax.partition_specs`.

Bytes that stay are exact under these shardings. What a step needs besides is counted for a program
that gathers one layer at a time and keeps the batch's rows where their tokens are. XLA's
partitioner finds it if it is told so: `Forward(rows=("data", "fsdp"))`, traced under
`jax.set_mesh`, as `exact=True` does. Left alone, it takes the residual stream's sharding from the
embedding table, so that all devices of an axis hold all its rows, and holds up to twice the
temporaries.

Against XLA's own figures the whole is within a tenth in `benchmarks/results/estimate.json`: 8 H200s
0.95 to 1.08, 8 CPU devices 0.91 to 1.06. No TPU's compiler was asked.

Sources: Rajbhandari et al. 2020, "ZeRO", section 5; Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.array import is_leaf
from lora_jax.models.config import LlamaConfig
from lora_jax.quant.array import is_quant

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of the batch are spread over

_OUTPUTS = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head"}
)
_INPUTS = frozenset({"o_proj", "down_proj"})
_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def check_mesh(mesh: Mapping[str, int], *, batch: int) -> dict[str, int]:
    """A mesh with all axes.

    Raises:
      ValueError: an axis that is not known, a size that is no whole number above 0, or rows that
        cannot be divided.
    """
    for name, size in mesh.items():
        if name not in AXES:
            raise ValueError(f"`mesh` axis `{name}` is not one of {', '.join(AXES)}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`mesh` axis `{name}` must be a whole number above 0, got {size!r}")
    full = {name: mesh.get(name, 1) for name in AXES}
    spread = math.prod(full[name] for name in ROWS)
    if batch % spread:
        raise ValueError(
            f"`batch` {batch} cannot be divided among the {spread} devices of the axes "
            f"{' and '.join(ROWS)}: take a multiple of {spread}"
        )
    return full


def one_device(config: Any, mesh: Mapping[str, int]) -> Any:
    """The configuration of what one device computes: its share of heads, MLP and vocabulary.

    Raises:
      ValueError: a family that `tensor` is not known for, or a size it does not divide.
    """
    count = mesh["tensor"]
    if count == 1:
        return config

    if not isinstance(config, LlamaConfig):
        raise ValueError(
            f"`mesh` axis `tensor` is not known for model_type `{config.model_type}`, only for "
            f"Llama's decoders; use data and fsdp"
        )
    for name in _SPLIT:
        if getattr(config, name) % count:
            raise ValueError(
                f"`mesh` axis `tensor` = {count} does not divide `{name}` = "
                f"{getattr(config, name)}; take a divisor of both"
            )
    own = {name: getattr(config, name) // count for name in _SPLIT}
    # Derived from the width otherwise, as the queries' scale is from it.
    return dataclasses.replace(config, head_dim=config.head_dim, **own)


def base_specs(params: Any, mesh: Mapping[str, int]) -> Any:
    """The `PartitionSpec` of every base leaf (a quantized one is one leaf).

    Raises:
      ValueError: a matrix neither of whose dims `fsdp` divides.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _spec(paths.spell(path), x, mesh), params, is_leaf=is_leaf
    )


def _spec(path: str, x: Any, mesh: Mapping[str, int]) -> PartitionSpec:
    *_, module, last = ["", *path.split(".")]
    first, second = x.ndim - 2, x.ndim - 1
    spec: list[str | None] = [None] * x.ndim
    if last == "embedding":
        split, free = (first if module == "embed_tokens" else None), [second, first]
    elif last == "kernel" and x.ndim > 1:
        split = second if module in _OUTPUTS else first if module in _INPUTS else None
        free = [first, second]
    elif last == "bias" and module in _OUTPUTS:
        split, free = second, []
    else:
        return PartitionSpec()
    if split is not None and mesh["tensor"] > 1:
        spec[split] = "tensor"
    if free and mesh["fsdp"] > 1:
        spec[_divided(path, x, [d for d in free if spec[d] is None], mesh)] = "fsdp"
    return PartitionSpec(*spec)


def _divided(path: str, x: Any, dims: list[int], mesh: Mapping[str, int]) -> int:
    # A quantized matrix is stored in superblocks of inputs, which must stay whole: where there are
    # too few it is spread by its outputs. Any other is spread by its inputs if it can be: gathering
    # outputs takes a transposed copy of every layer.
    for whole, order in ((128, dims), (1, dims[::-1])) if is_quant(x) else ((1, dims),):
        for d in order:
            if x.shape[d] % (mesh["fsdp"] * whole) == 0:
                return d
    raise ValueError(
        f"`mesh` axis `fsdp` = {mesh['fsdp']} divides no dim of `{path}` {tuple(x.shape)} that is "
        "free; take a divisor of the model's width"
    )


def said(backend: str) -> str:
    """What an estimate on a mesh takes for granted, in a line."""
    line = 'with Forward(rows=("data", "fsdp")); without, XLA holds up to twice the activations'
    return line + ("; not checked against a TPU's compiler" if backend == "tpu" else "")


def parts(spec: PartitionSpec, mesh: Mapping[str, int], *axes: str) -> int:
    """Among how many devices an array is spread, over these axes (all by default)."""
    named = [n for entry in spec for n in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(mesh[name] for name in named if not axes or name in axes)


def leaves(specs: Any) -> list[PartitionSpec]:
    """The specs of a tree's arrays, in the arrays' order."""
    return jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
