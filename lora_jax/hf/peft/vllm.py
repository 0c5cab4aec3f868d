"""Adapters that vLLM serves at the right scale: one rank, one alpha, nothing but A and B.

vLLM before 0.33 reads r, lora_alpha and use_rslora and silently ignores rank_pattern and
alpha_pattern, so a module with its own rank or alpha would be served at the wrong scale. Here each
module's scale is multiplied into its B, and A and B are filled up with zeros to one rank:

    s_m · B_m · A_m  =  1 · (s_m · B_m) · A_m

PEFT adapts all experts of a block in two arrays, gate beside up. vLLM takes them so for the models
in `TOGETHER`; for all others it looks for the adapters of each expert's gate, up and down.

Source: vLLM's `lora/peft_helper.py`, `lora/lora_model.py` and `lora/model_manager.py`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.peft.experts import by_expert, in_one
from lora_jax.hf.peft.index import BASE, PREFIX, parameter_of
from lora_jax.hf.peft.tensors import SWAPPED

_A = (".lora_A.weight", ".lora_embedding_A")
_B = (".lora_B.weight", ".lora_embedding_B")
_FUSED = (".experts.gate_up_proj", ".experts.down_proj")
# Models whose experts vLLM takes as PEFT has them (`is_3d_moe_weight`).
TOGETHER = ("gpt_oss", "qwen3_5_moe")
# A part of a module's name -> models of it, which neither vLLM nor MLX serves.
_ELSEWHERE = {"DenseReluDense": "T5", "SelfAttention": "T5", "EncDecAttention": "T5", "vit": "ViT"}
_INSTEAD = "merge the adapter into the model (`lora.merge`) and serve the merged model instead"


class _Pair(NamedTuple):
    """An adapter's factors.

    Attributes:
      module: its name in the file.
      a, b: (rank, in) and (out, rank), with a first dim where they are those of all experts.
      rank: of the adapter.
      scale: PEFT's factor of B·A.
      suffixes: of the two tensors' names.
    """

    module: str
    a: np.ndarray
    b: np.ndarray
    rank: int
    scale: float
    suffixes: tuple[str, str] = (_A[0], _B[0])


def for_vllm(
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    config: LoraConfig,
    *,
    reader: str = "vLLM",
    model_type: str | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Rewrites the content of a PEFT directory for vLLM; PEFT computes the same with it.

    Args:
      fields: the JSON object of PEFT's config.
      tensors: PEFT's tensors by name.
      config: our config with the same content.
      reader: for errors: MLX has one rank and one scale too, and takes no adapters of experts.
      model_type: as in the base's config.json, which decides how vLLM names experts; needed where
        the adapter has some.

    Returns:
      Fields and tensors. Where all modules share rank and alpha, B keeps its numbers.

    Raises:
      ValueError: the adapter has DoRA, trained biases or saved modules, its initialisation
        changed the base, or it adapts experts of a model whose type is not given.
    """
    # Experts that "all-linear" adapts are named in the fields alone.
    config = replace(
        config,
        target_parameters=fields["target_parameters"] or (),
        rank_pattern=fields["rank_pattern"],
        alpha_pattern=fields["alpha_pattern"],
    )
    check_servable(config, tensors, reader)
    pairs = [*_served(_pairs(tensors, config), config, model_type)]
    ranks, scales = {pair.rank for pair in pairs}, {pair.scale for pair in pairs}
    rank = max(ranks)
    # Then vLLM's own alpha / r is every module's scale, and B need not change.
    uniform = ranks == {config.rank} and scales == {matching.scale_of(config, rank, config.alpha)}
    out = {}
    for pair in pairs:
        # Rows of zeros in A and columns of zeros in B add nothing to the product.
        stack, more = [(0, 0)] * (pair.a.ndim - 2), (0, rank - pair.rank)
        a = np.pad(pair.a, [*stack, more, (0, 0)])
        b = np.pad(pair.b * np.float32(1 if uniform else pair.scale), [*stack, (0, 0), more])
        if stack:
            out |= in_one(pair.module, a, b)
        else:
            out |= {pair.module + pair.suffixes[0]: a, pair.module + pair.suffixes[1]: b}
    return _fields(fields, [pair.module for pair in pairs], None if uniform else rank), out


def _pairs(tensors: Mapping[str, np.ndarray], config: LoraConfig) -> Iterator[tuple[str, _Pair]]:
    """The factors as they are in the file, each with the name that PEFT's patterns match."""
    for key, a in tensors.items():
        for suffixes in zip(_A, _B, strict=True):
            if not key.endswith(suffixes[0]):
                continue
            module = key.removesuffix(suffixes[0])
            plain = module.replace(BASE, "")
            own = module.removeprefix(PREFIX)
            name = parameter_of(own, config) or own
            rank, alpha = matching.rank_of(config, name), matching.alpha_of(config, name)
            scale = matching.scale_of(config, rank, alpha)
            yield name, _Pair(plain, a, tensors[module + suffixes[1]], rank, scale, suffixes)


def _served(
    pairs: Iterable[tuple[str, _Pair]], config: LoraConfig, model_type: str | None
) -> Iterator[_Pair]:
    """The adapters under the names that vLLM's modules have."""
    blocks: dict[str, dict[str, _Pair]] = {}
    for name, pair in pairs:
        parameter = name.rpartition(".")[2]
        if f".{name}".endswith(_FUSED):
            blocks.setdefault(pair.module, {})[parameter] = pair
        elif matching.names_parameter(config, name) and parameter != "weight":
            raise ValueError(f"vLLM cannot serve an adapter of the parameter `{name}`; {_INSTEAD}")
        else:
            yield pair._replace(module=_renamed(pair.module, model_type))
    if blocks and model_type is None:
        raise ValueError(
            f"vLLM names the experts in `{next(iter(blocks)).removeprefix(PREFIX)}` by the model's "
            "type, which is not known here: export the adapter with its model (`lora-jax export`), "
            'or pass model_type="qwen3_moe" or what its config.json has to `save_peft`'
        )
    for module, found in blocks.items():
        yield from _experts(module, found, str(model_type))


def _experts(module: str, found: Mapping[str, _Pair], model_type: str) -> Iterator[_Pair]:
    """The adapters of a block's experts; what has none gets one of zeros, which vLLM requires."""
    given = {name: _apart(pair, swapped=model_type in SWAPPED) for name, pair in found.items()}
    both = given.get("gate_up_proj"), given.get("down_proj")
    one = both[0] or both[1]
    assert one is not None
    (count, rank, ins), outs = one.a.shape, one.b.shape[1]
    # The width of an expert is half of what gate and up give, and all that down takes.
    width, hidden = (outs // 2, ins) if both[0] else (ins, outs)
    gate_up = both[0] or _zeros(one, (count, rank, hidden), (count, 2 * width, rank))
    down = both[1] or _zeros(one, (count, rank, width), (count, hidden, rank))
    # A decoder inside a model of images and texts is what that model is.
    whole = model_type.removesuffix("_text") if ".language_model." in module else model_type
    if whole in TOGETHER:
        yield gate_up._replace(module=module + BASE)
        yield down
        return
    names = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    halves = gate_up.b[:, :width], gate_up.b[:, width:], down.b
    for expert in range(count):
        for name, pair, b in zip(names, (gate_up, gate_up, down), halves, strict=True):
            own = f"{_renamed(module, model_type)}.{expert}.{name}"
            yield pair._replace(module=own, a=pair.a[expert], b=b[expert])


def _zeros(pair: _Pair, a: tuple[int, ...], b: tuple[int, ...]) -> _Pair:
    return pair._replace(a=np.zeros(a, pair.a.dtype), b=np.zeros(b, pair.b.dtype))


def _apart(pair: _Pair, *, swapped: bool) -> _Pair:
    a, b = by_expert(pair.a, pair.b, pair.rank, swapped=swapped)
    return pair._replace(a=a, b=b)


def _renamed(module: str, model_type: str | None) -> str:
    """A module's name in vLLM's own model."""
    return module.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else module


def check_servable(config: LoraConfig, tensors: Mapping[str, Any], reader: str) -> None:
    """Refuses an adapter with parts that vLLM, or MLX, does not read.

    Args:
      config: the adapter's.
      tensors: PEFT's by name.
      reader: "vLLM" or "MLX".

    Raises:
      ValueError: it has such a part.
    """
    for on, what in (
        (config.use_dora, "DoRA (use_dora=True)"),
        (config.lora_bias, "biases of its own (lora_bias=True)"),
        (config.trainable_token_indices, "trained rows (trainable_token_indices)"),
        (config.target_parameters and reader == "MLX", "adapted parameters (target_parameters)"),
        (config.bias != "none", f'trained biases (bias="{config.bias}")'),
        (
            base_change(config.init) == "repeatable",
            f'a changed base weight (init="{config.init}"; see `lora.rebase`)',
        ),
        (config.modules_to_save, f"whole saved modules ({', '.join(config.modules_to_save)})"),
    ):
        if on:
            raise ValueError(f"{reader} cannot serve an adapter with {what}; {_INSTEAD}")
    for name, tensor in tensors.items():
        if tensor.ndim > 2:
            raise ValueError(
                f"{reader} cannot serve an adapter of a convolution, `{name}` of shape "
                f"{tensor.shape}; {_INSTEAD}"
            )
    for part, what in _ELSEWHERE.items():
        if any(f".{part}." in name for name in tensors):
            raise ValueError(
                f"{reader} serves no {what}: keep the adapter for PEFT, or merge it into the model "
                "(`lora.merge`) for transformers"
            )


def _fields(fields: Mapping[str, Any], modules: list[str], rank: int | None) -> dict[str, Any]:
    """The fields without patterns; with the scale 1 where the scales were multiplied into B."""
    out = dict(fields)
    if rank is not None:
        # alpha / r is 1, so the scale in B is the only one; rsLoRA would divide by √r again.
        out |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    out |= {"rank_pattern": {}, "alpha_pattern": {}}
    listed: list[str] | None = out["target_modules"]
    if not isinstance(listed, list) or out["layers_to_transform"] is not None:
        # vLLM reads neither regular expressions nor layer numbers.
        listed = None
        out |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if listed is None or out.get("target_parameters"):
        out |= _targets(listed, modules)
    return out


def _targets(listed: list[str] | None, modules: Iterable[str]) -> dict[str, list[str] | None]:
    """The entries for PEFT: those listed, and for every other module its name in its layer.

    With None the entries are full names. Experts that lie in one array are parameters.
    """
    names = [module.removeprefix(PREFIX) for module in modules]
    blocks = [name.removesuffix(BASE) for name in names if name.endswith(f".experts{BASE}")]
    single = [name for name in names if name.removesuffix(BASE) not in blocks]
    other = [name for name in single if not any(matching.ends_with(name, x) for x in listed or ())]
    parameters = [f"{block}.{last}" for block in blocks for last in ("gate_up_proj", "down_proj")]
    if listed is not None:
        other, parameters = ([in_layer(x) for x in each] for each in (other, parameters))
    return {
        "target_modules": [*(listed or ()), *sorted(set(other))],
        "target_parameters": [*dict.fromkeys(parameters)] or None,
    }


def in_layer(name: str) -> str:
    """A module's name within its layer."""
    return re.sub(r"^[^0-9]*\.\d+\.", "", name)
