"""Granite with experts (GraniteMoE), with windows and sinks (Granite SWA), and with both.

Granite itself is in `llama` beside this file. GraniteMoE has its factors and Mixtral's experts,
gate and up in one array. Granite SWA states the base of each block's rotation; 0 is none.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    FULL,
    SLIDING,
    Dialect,
    Modules,
    check_fixed,
    read_layer_types,
    read_rope,
)
from lora_jax.models.families.experts import FIELDS, read_experts, write_experts
from lora_jax.models.families.llama import GRANITE

_WINDOWS = ("layer_types", "layer_rope_theta", "sliding_window")
_NO_SHARED = {"shared_intermediate_size": 0}
_SWA = {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "sliding_window": 128}


def _read_swa(raw: Mapping[str, Any]) -> dict[str, Any]:
    blocks = raw["num_hidden_layers"]
    slides = read_layer_types(raw, tuple(block % 4 != 0 for block in range(blocks)))
    return {
        **GRANITE.read(raw),
        **_read_bases(raw, slides),
        "attention_sinks": True,
        "sliding_window": raw["sliding_window"],
        "sliding_layers": slides,
    }


def _read_bases(raw: Mapping[str, Any], slides: tuple[bool, ...]) -> dict[str, Any]:
    """The rotations of blocks with a window and of others."""
    rope = read_rope(raw)
    bases = raw.get("layer_rope_theta") or [rope["rope_theta"]] * len(slides)
    if len(bases) != len(slides):
        raise ValueError(f"config: {len(bases)} `layer_rope_theta` for {len(slides)} blocks")
    full, local = (
        {float(base) for base, own in zip(bases, slides, strict=True) if own is kind}
        for kind in (False, True)
    )
    plain = rope["rope_scaling"] is None or len(full | local) == 1
    if max(len(full), len(local)) > 1 or not plain:
        raise ValueError(
            f"config: `layer_rope_theta` {bases} must be one number for blocks with a window and "
            "one for the others, the same where `rope_parameters` scale it"
        )
    turned = full | local - {0.0}
    if 0.0 in full | local:
        rotates = tuple(bool(base) for base in bases)
        return {"rope_layers": rotates, "rope_theta": max(turned) or rope["rope_theta"]}
    own = max(full or local)
    return {"rope_theta": own, "rope_local_base_freq": max(local) if local - {own} else None}


def _write_swa(config: Any) -> dict[str, Any]:
    slides = config.mixing.slides
    rotates = config.rope_layers or (True,) * len(slides)
    local = config.rope_local_base_freq or config.rope_theta
    each = zip(slides, rotates, strict=True)
    windows = config.sliding_window is not None
    return {
        **GRANITE.write(config),
        "sliding_window": config.sliding_window,
        "layer_types": [SLIDING if windows and own else FULL for own in slides],
        "layer_rope_theta": [
            (local if windows and own else config.rope_theta) if turns else 0 for own, turns in each
        ],
    }


def _read_moe(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _NO_SHARED)
    modules = Modules(mlp="block_sparse_moe", router="router")
    return {**GRANITE.read(raw), **read_experts(raw, 8), "modules": modules}


def _write_moe(config: Any) -> dict[str, Any]:
    experts = write_experts(config, "num_local_experts")
    return {**GRANITE.write(config), **experts, "intermediate_size": config.expert_size}


GRANITE_SWA = Dialect(
    architecture="GraniteSWAForCausalLM",
    fields=(*GRANITE.fields, *_WINDOWS),
    read=_read_swa,
    write=_write_swa,
    names=names.GRANITE,
    defaults={
        **GRANITE.defaults, **_SWA, "tie_word_embeddings": True, "bos_token_id": 100257,
        "eos_token_id": 100257,
    },
)  # fmt: skip

GRANITE_MOE = Dialect(
    architecture="GraniteMoeForCausalLM",
    fields=(*GRANITE.fields, *FIELDS, *_NO_SHARED),
    read=_read_moe,
    write=_write_moe,
    names=names.GRANITE,
    defaults={**GRANITE.defaults, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
)

GRANITE_MOE_SWA = GRANITE_MOE._replace(
    architecture="GraniteMoeSWAForCausalLM",
    fields=(*GRANITE_MOE.fields, *_WINDOWS),
    read=lambda raw: {**_read_swa(raw), **_read_moe(raw)},
    write=lambda config: {**_write_swa(config), **_write_moe(config)},
    names=names.GRANITE_MOE_SWA,
    defaults={**GRANITE_MOE.defaults, "sliding_window": 128},
)
