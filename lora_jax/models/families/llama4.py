"""Llama 4: experts whose inputs are scaled, one for every token, and texts cut into pieces.

Three of four blocks rotate, normalize queries and keys after that (Scout), and attend within pieces
of a text; the others do neither, attend to everything, and let queries grow with the text. All
blocks have experts (Scout) or every second one (Maverick).

Source: transformers' `Llama4ForCausalLM`; there is no report.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import CHUNKED, FULL, Dialect, Modules, check_fixed
from lora_jax.models.families.experts import FIELDS, UNSHAKEN, read_experts, write_experts
from lora_jax.models.families.llama import read_rotating, write_rotating

_TUNED = "attn_temperature_tuning"
_CHUNK = 8192


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, UNSHAKEN)
    # An empty list is none, and a list may be longer than the model.
    listed = raw.get("no_rope_layers") or None
    rotates = read_rotating({**raw, "no_rope_layers": listed})[: raw["num_hidden_layers"]]
    bias, inner = bool(raw["attention_bias"]), raw["intermediate_size"]
    return {
        **read_experts(raw, 16),
        **_read_dense(raw),
        **_read_pieces(raw, rotates),
        "intermediate_size": raw["intermediate_size_mlp"],
        "moe_intermediate_size": inner,
        "shared_expert_size": inner,
        "expert_inputs_scaled": True,
        "modules": Modules(mlp="feed_forward", router="router", shared="shared_expert"),
        "rope_interleaved": True,
        "rope_layers": rotates,
        "qk_norm_plain": bool(raw["use_qk_norm"]),
        # Files of before transformers 5 have 4 for true.
        "floor_scale": raw["floor_scale"] if raw[_TUNED] else None,
        "attn_scale": float(raw["attn_scale"]),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _read_dense(raw: Mapping[str, Any]) -> dict[str, Any]:
    blocks, step = raw["num_hidden_layers"], raw["interleave_moe_layer_step"]
    listed = raw.get("moe_layers")
    sparse = range(step - 1, blocks, step) if listed is None else listed
    dense = tuple(block not in sparse for block in range(blocks))
    if all(dense):
        raise ValueError(
            "config: `moe_layers` and `interleave_moe_layer_step` leave no block with experts"
        )
    return {"dense_layers": dense if any(dense) else None}


def _read_pieces(raw: Mapping[str, Any], rotates: tuple[bool, ...]) -> dict[str, Any]:
    kinds = raw.get("layer_types") or [CHUNKED if each else FULL for each in rotates]
    if unknown := set(kinds) - {CHUNKED, FULL}:
        raise ValueError(
            f"config: `layer_types` has `{min(unknown)}`, which is neither `{CHUNKED}` nor `{FULL}`"
        )
    cut = tuple(kind == CHUNKED for kind in kinds)
    return {"chunked": True, "sliding_window": raw["attention_chunk_size"], "sliding_layers": cut}


def _write(config: Any) -> dict[str, Any]:
    blocks = range(config.num_hidden_layers)
    cut = (config.sliding_layers or (True,) * len(blocks)) if config.sliding_window else ()
    return {
        **write_experts(config, "num_local_experts"),
        **write_rotating(config),
        "moe_layers": [i for i in blocks if not config.dense[i]],
        "intermediate_size": config.expert_size,
        "intermediate_size_mlp": config.intermediate_size,
        "use_qk_norm": config.qk_norm_plain,
        # transformers needs the number even where no text is cut.
        "attention_chunk_size": config.sliding_window or _CHUNK,
        "layer_types": [CHUNKED if i < len(cut) and cut[i] else FULL for i in blocks],
        _TUNED: config.floor_scale is not None,
        "floor_scale": config.floor_scale or _CHUNK,
        "attn_scale": config.attn_scale,
        "attention_bias": config.qkv_bias,
    }


LLAMA4 = Dialect(
    architecture="Llama4ForCausalLM",
    fields=(
        *FIELDS, *UNSHAKEN, _TUNED, "attention_bias", "attention_chunk_size", "attn_scale",
        "floor_scale", "for_llm_compressor", "interleave_moe_layer_step", "intermediate_size_mlp",
        "layer_types", "moe_layers", "no_rope_layer_interval", "no_rope_layers", "use_qk_norm",
    ),
    read=_read,
    write=_write,
    names=names.LLAMA4,
    defaults={
        "attention_bias": False, "attention_chunk_size": _CHUNK, "attn_scale": 0.1, _TUNED: True,
        "floor_scale": _CHUNK, "head_dim": 128, "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 16384, "no_rope_layer_interval": 4, "num_experts_per_tok": 1,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "router_aux_loss_coef": 0.001, "use_qk_norm": True, "bos_token_id": 1, "eos_token_id": 2,
    },
)  # fmt: skip
