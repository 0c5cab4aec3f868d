"""Adapters of experts: one for an array of a block in PEFT's files, one for each tensor of a file.

    PEFT       gate_up_proj   A (E·r, in)   B (2·out, r·E)   expert slowest in A, fastest in B
    llama.cpp  ffn_gate_exps  lora_a (E, r, in)   lora_b (E, out, r)   and the same of ffn_up_exps

Gate and up, which are one array in Hugging Face's models, share the A there.

Source: llama.cpp's `build_lora_mm_id`; `lora_jax.hf.peft.tensors` has PEFT's layout.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.hf.peft.experts import by_expert

# A module of experts -> llama.cpp's name.
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
GATE_UP = "gate_up_proj"
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


def apart(parameter: str, pair: FactorPair, rank: int) -> dict[str, FactorPair]:
    """The pairs of each module of experts, from PEFT's of their parameter.

    Raises:
      ValueError: the factors are not whole experts of that rank.
    """
    if pair.a.shape[0] % rank:
        raise ValueError(
            f"`{parameter}`: lora_A {pair.a.shape} is not whole experts of rank {rank}"
        )
    a, b = by_expert(pair.a, pair.b, rank)
    module, _, last = parameter.rpartition(".")
    names = _PARAMETERS[last]
    parts = zip(names, np.split(b, len(names), axis=1), strict=True)
    return {f"{module}.{name}": pair._replace(a=a, b=part) for name, part in parts}


def together(pairs: Mapping[str, FactorPair]) -> dict[str, FactorPair]:
    """The pairs by module, gate and up of experts as one: the inverse of `apart`."""
    out = {}
    for name, pair in pairs.items():
        module, _, last = name.rpartition(".")
        if pair.a.ndim == 2 or last == "down_proj":
            out[name] = pair
            continue
        gate, up = (pairs.get(f"{module}.{n}") for n in _PARAMETERS[GATE_UP])
        nothing = pair._replace(b=np.zeros_like(pair.b))
        out[f"{module}.{GATE_UP}"] = _side_by_side(gate or nothing, up or nothing)
    return out


def _side_by_side(gate: FactorPair, up: FactorPair) -> FactorPair:
    """One pair: of the same rank where they share the A, else of both ranks."""
    if gate.alpha == up.alpha and np.array_equal(gate.a, up.a):
        return gate._replace(b=np.concatenate((gate.b, up.b), axis=1))
    count, middle, rank = gate.b.shape
    a = np.concatenate((gate.a, up.a), axis=1)
    b = np.zeros((count, middle + up.b.shape[1], a.shape[1]), gate.b.dtype)
    scale = gate.alpha / rank
    b[:, :middle, :rank] = gate.b
    b[:, middle:, rank:] = up.b * np.float32(up.alpha / up.b.shape[2] / scale)
    return FactorPair(a, b, scale * a.shape[1])
