"""Adapters of experts: one for an array of a block in PEFT's files, one for each tensor of a file.

    PEFT       gate_up_proj   A (E·r, in)   B (2·out, r·E)   expert slowest in A, fastest in B
    llama.cpp  ffn_gate_exps  lora_a (E, r, in)   lora_b (E, out, r)   and the same of ffn_up_exps

Gate and up, which are one array in Hugging Face's models, share the A there, unless they are one
tensor there too. Gemma 4's experts have a number each that multiplies what comes out. llama.cpp
multiplies before it adds an adapter, so that the file's B has the number in it.

Source: llama.cpp's `build_lora_mm_id`; `lora_jax.hf.peft.tensors` has PEFT's layout.
"""

import re
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lora_jax.array import leaves_by_path
from lora_jax.hf.checkpoint.names import stack_depth, tensor_of
from lora_jax.hf.gguf.architectures import FUSED, GgufArchitecture
from lora_jax.hf.peft.experts import by_expert
from lora_jax.hf.peft.tensors import SWAPPED

GATE_UP = "gate_up_proj"
# A module of experts -> llama.cpp's name.
EXPERTS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", GATE_UP: FUSED,
    "down_proj": "ffn_down_exps",
}  # fmt: skip
# In the order in which PEFT nests their adapters, the inner one first -> our modules.
_PARAMETERS = {GATE_UP: ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class FactorPair(NamedTuple):
    """The adapter of one module in PEFT's layout.

    Attributes:
      a: (r, in); of experts (e, r, in).
      b: (out, r); of experts (e, out, r).
      alpha: which llama.cpp divides by the rank, whatever config the adapter had.
      embedding: the module is a lookup table.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    embedding: bool = False


def expert_names(row: GgufArchitecture, block: int) -> dict[str, str]:
    """llama.cpp's names of the modules of a block's experts."""
    if row.experts is None:
        return {}
    start = f"{row.stack}.{block}.{row.experts}"
    apart = (GATE_UP,) if row.fused else _PARAMETERS[GATE_UP]
    return {f"{start}.{m}": f"blk.{block}.{EXPERTS[m]}" for m in (*apart, "down_proj")}


def apart(
    parameter: str, pair: FactorPair, rank: int, row: GgufArchitecture
) -> dict[str, FactorPair]:
    """The pairs of each module of experts, from PEFT's of their parameter.

    Raises:
      ValueError: the factors are not whole experts of that rank.
    """
    if pair.a.shape[0] % rank:
        raise ValueError(
            f"`{parameter}`: lora_A {pair.a.shape} is not whole experts of rank {rank}"
        )
    a, b = by_expert(pair.a, pair.b, rank, swapped=row.model_type in SWAPPED)
    module, _, last = parameter.rpartition(".")
    names = (last,) if row.fused else _PARAMETERS[last]
    parts = zip(names, np.split(b, len(names), axis=1), strict=True)
    return {f"{module}.{name}": pair._replace(a=a, b=part) for name, part in parts}


def together(pairs: Mapping[str, FactorPair]) -> dict[str, FactorPair]:
    """The pairs by module, gate and up of experts as one: the inverse of `apart`."""
    out = {}
    for name, pair in pairs.items():
        module, _, last = name.rpartition(".")
        if pair.a.ndim == 2 or last in ("down_proj", GATE_UP):
            out[name] = pair
            continue
        gate, up = (pairs.get(f"{module}.{n}") for n in _PARAMETERS[GATE_UP])
        nothing = pair._replace(b=np.zeros_like(pair.b))
        out[f"{module}.{GATE_UP}"] = side_by_side(gate or nothing, up or nothing)
    return out


def side_by_side(gate: FactorPair, up: FactorPair) -> FactorPair:
    """One pair of experts: of the same rank where the two share the A, else of both ranks."""
    if gate.alpha == up.alpha and np.array_equal(gate.a, up.a):
        return gate._replace(b=np.concatenate((gate.b, up.b), axis=1))
    count, middle, rank = gate.b.shape
    a = np.concatenate((gate.a, up.a), axis=1)
    b = np.zeros((count, middle + up.b.shape[1], a.shape[1]), gate.b.dtype)
    scale = gate.alpha / rank
    b[:, :middle, :rank] = gate.b
    b[:, middle:, rank:] = up.b * np.float32(up.alpha / up.b.shape[2] / scale)
    return FactorPair(a, b, scale * a.shape[1])


def multipliers(params: Any, row: GgufArchitecture) -> dict[str, np.ndarray]:
    """What the base multiplies an expert's result by, `(e,)`, by the module of a block's `down`."""
    if row.multiplier is None:
        return {}
    found = {}
    for path, leaf in leaves_by_path(params).items():
        if not path.endswith(f".{row.multiplier}"):
            continue
        depth = stack_depth(path)
        for index in product(*map(range, leaf.shape[:depth])):
            block = re.search(r"\.layers\.(\d+)\.", tensor_of(path, index).name)
            assert block is not None
            down = f"{row.stack}.{block[1]}.{row.experts}.down_proj"
            found[down] = np.asarray(leaf[index], np.float32)
    return found


def multiplied(
    pairs: Mapping[str, FactorPair],
    row: GgufArchitecture,
    by: Mapping[str, np.ndarray] | None,
    *,
    inverse: bool = False,
) -> dict[str, FactorPair]:
    """The pairs with the base's `multipliers` in their B, or with these taken out.

    Raises:
      ValueError: the base has such numbers, and `by` is None.
    """
    out = dict(pairs)
    for name, pair in pairs.items():
        if row.multiplier is None or not name.endswith(f".{row.experts}.down_proj"):
            continue
        if by is None:
            raise ValueError(
                f"an adapter of `{name}` is multiplied by numbers of the base's "
                f"`{row.multiplier}` for llama.cpp, so that the base's weights are needed: "
                "convert the adapter with the model (`lora-jax export`, or `hf.save_gguf_lora` "
                "and `hf.load_gguf_lora`)"
            )
        numbers = by[name][:, None, None]
        # An expert that is multiplied by zero is nothing, whatever its adapter.
        inverted = np.divide(1, numbers, out=np.zeros_like(numbers), where=numbers != 0)
        out[name] = pair._replace(b=pair.b * (inverted if inverse else numbers))
    return out
