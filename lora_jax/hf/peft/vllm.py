"""Adapters that vLLM serves at the right scale: one rank, one alpha, nothing but A and B.

vLLM reads r, lora_alpha and use_rslora and silently ignores rank_pattern and alpha_pattern, so a
module with its own rank or alpha would be served at the wrong scale. Here each module's scale is
multiplied into its B, and A and B are filled up with zeros to one rank:

    s_m · B_m · A_m  =  1 · (s_m · B_m) · A_m

Source: vLLM's `lora/peft_helper.py` and `lora/lora_model.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.peft.index import PREFIX

_A = (".lora_A.weight", ".lora_embedding_A")
_B = (".lora_B.weight", ".lora_embedding_B")


def for_vllm(
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    config: LoraConfig,
    *,
    reader: str = "vLLM",
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Rewrites the content of a PEFT directory for vLLM; PEFT computes the same with it.

    Args:
      fields: the JSON object of PEFT's config.
      tensors: PEFT's tensors by name.
      config: our config with the same content.
      reader: for errors: MLX has one rank and one scale too.

    Returns:
      Fields and tensors. Where all modules share rank and alpha, B keeps its numbers.

    Raises:
      ValueError: the adapter has DoRA, trained biases or saved modules, or its initialisation
        changed the base.
    """
    _check_servable(config, reader)
    modules = [k.removesuffix(s) for k in tensors for s in _A if k.endswith(s)]
    scales, ranks = {}, {}
    for module in modules:
        name = module.removeprefix(PREFIX)
        # The scales that PEFT would use: patterns, rank and rsLoRA applied.
        ranks[module] = matching.rank_of(config, name)
        alpha = matching.alpha_of(config, name)
        scales[module] = matching.scale_of(config, ranks[module], alpha)
    rank = max(ranks.values())
    # Then vLLM's own alpha / r is every module's scale, and B need not change.
    uniform = set(ranks.values()) == {config.rank} and len(set(scales.values())) == 1
    uniform = uniform and scales[modules[0]] == matching.scale_of(config, rank, config.alpha)
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(_A):
            # Rows of zeros in A and columns of zeros in B add nothing to the product.
            out[name] = np.pad(tensor, ((0, rank - tensor.shape[0]), (0, 0)))
        elif name.endswith(_B):
            module = name.rpartition(".lora_")[0]
            factor = np.float32(1 if uniform else scales[module])
            out[name] = np.pad(tensor * factor, ((0, 0), (0, rank - tensor.shape[1])))
    return _fields(fields, modules, None if uniform else rank), out


def _check_servable(config: LoraConfig, reader: str) -> None:
    for on, what in (
        (config.use_dora, "DoRA (use_dora=True)"),
        (config.lora_bias, "biases of its own (lora_bias=True)"),
        (config.trainable_token_indices, "trained rows (trainable_token_indices)"),
        (config.target_parameters, "adapted parameters (target_parameters)"),
        (config.bias != "none", f'trained biases (bias="{config.bias}")'),
        (base_change(config.init) == "repeatable", f'a changed base weight (init="{config.init}")'),
        (config.modules_to_save, f"whole saved modules ({', '.join(config.modules_to_save)})"),
    ):
        if on:
            raise ValueError(
                f"{reader} cannot serve an adapter with {what}; merge the adapter into the model "
                "(lora_jax.merge) and serve the merged model instead"
            )


def _fields(fields: Mapping[str, Any], modules: list[str], rank: int | None) -> dict[str, Any]:
    """The fields without patterns; with the scale 1 where the scales were multiplied into B."""
    out = dict(fields)
    if rank is not None:
        # alpha / r is 1, so the scale in B is the only one; rsLoRA would divide by √r again.
        out |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    out |= {"rank_pattern": {}, "alpha_pattern": {}}
    if not isinstance(out["target_modules"], list) or out["layers_to_transform"] is not None:
        # vLLM reads neither regular expressions nor layer numbers.
        out["target_modules"] = sorted(m.removeprefix(PREFIX) for m in modules)
        out |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return out
