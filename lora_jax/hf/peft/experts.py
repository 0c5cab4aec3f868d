"""Adapters of each expert's linear layers, from before transformers 5 and for vLLM.

transformers 5 has the experts of a block in two arrays, gate beside up, which `target_parameters`
names. An expert's adapters of gate and up, of rank r each, become one of rank 2r: both A's below
each other, both B's on a diagonal. PEFT reads such files in the same way.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.hf.checkpoint.names import renamed
from lora_jax.hf.peft.index import BASE, FUSED, PREFIX, every_module
from lora_jax.paths import bare

_EXPERTS = ".experts."  # in the names of what is inside of them
_Layer = Literal["gate", "up", "down"]
# Mixtral's names, and those of all others.
_LAYERS: Mapping[str, _Layer] = {
    "w1": "gate", "w3": "up", "w2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
_KEY = re.compile(
    r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<layer>\w+)\.lora_(?P<part>[AB])\.weight"
)
# (module of a block's experts, layer, "A" or "B") -> the tensors of its experts, by number
_Found = dict[tuple[str, _Layer, str], dict[int, np.ndarray]]


def fused(
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    paths: Iterable[str],
    source: str,
    *,
    swapped: bool = False,
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter as transformers 5 has its modules, where the model has fused experts.

    Args:
      config: the adapter's config.
      tensors: PEFT's tensors by name.
      paths: of the model's leaves.
      source: what messages call the adapter.
      swapped: PEFT takes the outputs of the model's experts for their inputs.

    Raises:
      ValueError: some experts lack an adapter, ranks differ, or a pattern names single experts.
    """
    found: _Found = {}
    rest = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["layer"] not in _LAYERS:
            rest[renamed(key)] = tensor
            continue
        module = match["module"]
        if match["layer"].startswith("w"):  # Mixtral's before transformers 5
            module = module.replace(".block_sparse_moe.", ".mlp.")
        place = (module, _LAYERS[match["layer"]], match["part"])
        found.setdefault(place, {})[int(match["expert"])] = tensor
    if not found or not any(path.endswith(FUSED) for path in paths):
        return config, dict(tensors)
    _check_patterns(config, source)
    entries, ranks = [], set()
    for module in dict.fromkeys(module for module, _, _ in found):
        layers: set[_Layer] = {layer for place, layer, _ in found if place == module}
        if len(layers & {"gate", "up"}) == 1:
            raise ValueError(
                f"{source}: of the experts in `{module}` only one of gate and up has an adapter; "
                "they are one array in this model, and both need one"
            )
        # PEFT nests the adapters of a module's parameters: the first one is the inner one.
        inner = BASE if {"gate", "down"} <= layers else ""
        pairs = {layer: _stacked(found, module, layer, source) for layer in layers}
        if "gate" in pairs:
            ranks.add(pairs["gate"][0].shape[1])
            both = _side_by_side(pairs["gate"], pairs["up"], source)
            rest |= in_one(f"{module}{inner}", *both, swapped=swapped)
            entries.append(f"{module}.gate_up_proj".removeprefix(PREFIX))
        if "down" in pairs:
            rest |= in_one(module, *pairs["down"], swapped=swapped)
            entries.append(f"{module}.down_proj".removeprefix(PREFIX))
    if len(ranks) > 1:
        raise ValueError(f"{source}: experts of different blocks have ranks {sorted(ranks)}")
    return _renamed(config, rest, entries, ranks.pop() if ranks else None), rest


def without_untouched(
    config: LoraConfig, tensors: Iterable[str], leaves: Mapping[str, Any]
) -> LoraConfig:
    """The config without fused experts of which the file has no adapter.

    In transformers they are no modules, so that PEFT passes by what names of `target_modules` would
    match here: with experts beside an MLP, `down_proj` is that of the MLP alone.

    Args:
      config: the adapter's config.
      tensors: names of PEFT's tensors.
      leaves: the model's leaves by path.
    """
    if not any(bare(path).endswith(FUSED) for path in leaves) or any(
        _EXPERTS in x for x in tensors
    ):
        return config
    inside = (name for name in every_module(leaves, config) if _EXPERTS in name)
    every = config.target_modules == ALL_LINEAR
    if not every and not any(matching.is_target(config, name) for name in inside):
        return config
    given = config.exclude_modules
    rest = (given,) if isinstance(given, str) else (rf"(.*\.)?{re.escape(x)}" for x in given)
    return dataclasses.replace(
        config, exclude_modules="|".join((rf".*{re.escape(_EXPERTS)}.*", *rest))
    )


def _check_patterns(config: LoraConfig, source: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(config, field):
            raise ValueError(
                f"{source}: `{field}` {getattr(config, field)!r} with an adapter for each expert's "
                "layers is not supported; load and save the adapter with PEFT first"
            )


def _stacked(
    found: _Found, module: str, layer: _Layer, source: str
) -> tuple[Float[np.ndarray, "e r in"], Float[np.ndarray, "e out r"]]:
    """A and B of all experts."""
    stacks = []
    for part in ("A", "B"):
        experts = found.get((module, layer, part), {})
        if sorted(experts) != list(range(len(experts))) or not experts:
            raise ValueError(
                f"{source}: in `{module}` the experts {sorted(experts)} have a lora_{part} of "
                f"{layer}; all of them, from 0 on, need one"
            )
        shapes = {x.shape for x in experts.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"{source}: the experts' lora_{part} of {layer} in `{module}` have the shapes "
                f"{sorted(shapes)}; all need one rank"
            )
        stacks.append(np.stack([experts[i] for i in range(len(experts))]))
    return stacks[0], stacks[1]


def _side_by_side(
    gate: tuple[np.ndarray, np.ndarray], up: tuple[np.ndarray, np.ndarray], source: str
) -> tuple[Float[np.ndarray, "e ranks in"], Float[np.ndarray, "e outs ranks"]]:
    if gate[0].shape != up[0].shape or gate[1].shape != up[1].shape:
        raise ValueError(
            f"{source}: the adapters of gate {gate[0].shape} and up {up[0].shape} differ in shape"
        )
    zeros = np.zeros_like(gate[1])
    rows = (np.concatenate((gate[1], zeros), 2), np.concatenate((zeros, up[1]), 2))
    return np.concatenate((gate[0], up[0]), 1), np.concatenate(rows, 1)


def by_expert(
    a: Float[np.ndarray, "er in"],
    b: Float[np.ndarray, "out re"],
    rank: int,
    *,
    swapped: bool = False,
) -> tuple[Float[np.ndarray, "e r in"], Float[np.ndarray, "e out r"]]:
    """The factors of each expert from PEFT's tensors of a parameter: the inverse of `in_one`."""
    own_a = a.reshape(-1, rank, a.shape[1])
    own_b = b.reshape(len(b), rank, -1).transpose(2, 0, 1)
    # Where PEFT takes outputs for inputs, its A is our Bᵀ.
    return (own_b.swapaxes(1, 2), own_a.swapaxes(1, 2)) if swapped else (own_a, own_b)


def in_one(
    module: str,
    a: Float[np.ndarray, "e r in"],
    b: Float[np.ndarray, "e out r"],
    *,
    swapped: bool = False,
) -> dict[str, np.ndarray]:
    """PEFT's tensors of a parameter: (E·r, in) and (out, r·E), or (E·r, out) and (in, r·E)."""
    a, b = (b.swapaxes(1, 2), a.swapaxes(1, 2)) if swapped else (a, b)
    return {
        f"{module}.lora_A.weight": a.reshape(-1, a.shape[2]),
        f"{module}.lora_B.weight": b.transpose(1, 2, 0).reshape(b.shape[1], -1),
    }


def _renamed(
    config: LoraConfig, rest: Iterable[str], entries: list[str], rank: int | None
) -> LoraConfig:
    """The config of the fused adapter, of whose modules each has a tensor in `rest`."""
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in rest if ".lora_" in key}
    modules = {module for module in modules if not module.endswith((".experts", BASE))}
    changed: dict[str, Any] = {
        "target_modules": tuple(sorted(modules)),
        "target_parameters": tuple(entries),
    }
    if rank is not None:
        # Twice the rank at the same scale: alpha / r, or alpha / √r with rsLoRA.
        alpha = config.alpha * (2**0.5 if config.use_rslora else 2)
        changed["rank_pattern"] = {r".*\.gate_up_proj": 2 * rank}
        changed["alpha_pattern"] = {r".*\.gate_up_proj": alpha}
    return dataclasses.replace(config, **changed)
