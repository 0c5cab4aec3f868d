"""GLM-4 MoE and DeepSeek-V3: experts in groups, some for every token, behind dense blocks.

Their routers choose among the best groups by sigmoids. DeepSeek-V3 makes keys and values of a short
vector a token; GLM-4 MoE rotates half of a head.

Sources: arXiv:2412.19437; arXiv:2508.06471.
"""

import math
from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import PART, Dialect, Routing, check_fixed, read_partial_rope

_RANKS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Layers that are not loaded, how a model was trained and is served, and what has one value.
_OTHERS = (
    "ep_size", "moe_layer_freq", "num_mtp_layers", "num_nextn_predict_layers",
    "output_router_logits", "scoring_func", "topk_method", "aux_loss_alpha", "seq_aux",
)  # fmt: skip
FIELDS = (
    "attention_bias", "first_k_dense_replace", "moe_intermediate_size", "n_group",
    "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
    "num_local_experts", "routed_scaling_factor", "topk_group", *_OTHERS,
)  # fmt: skip
_FIXED = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _FIXED)
    count, blocks = raw["n_routed_experts"], raw["num_hidden_layers"]
    groups, chosen = raw["n_group"], raw["topk_group"]
    if count % groups or count < 2 * groups or chosen > groups:
        raise ValueError(
            f"config: `n_group` {groups} must divide `n_routed_experts` {count} into groups of at "
            f"least two, of which `topk_group` {chosen} are chosen"
        )
    dense = tuple(i < raw["first_k_dense_replace"] for i in range(blocks))
    if all(dense):
        raise ValueError("config: `first_k_dense_replace` leaves no block with experts")
    return {
        "num_experts": count,
        "num_experts_per_tok": raw["num_experts_per_tok"],
        "moe_intermediate_size": raw["moe_intermediate_size"],
        "norm_topk_prob": bool(raw["norm_topk_prob"]),
        "dense_layers": dense if any(dense) else None,
        "routing": Routing(groups, chosen, float(raw["routed_scaling_factor"])),
        "shared_expert_size": raw["moe_intermediate_size"] * raw["n_shared_experts"],
        "qkv_bias": bool(raw["attention_bias"]),
        "predicting_layers": raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers", 1)),
    }


def _write(config: Any) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "first_k_dense_replace": sum(config.dense),
        "moe_intermediate_size": config.expert_size,
        "n_group": config.routing.groups,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.shared_expert_size // config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_nextn_predict_layers": config.predicting_layers,
        "routed_scaling_factor": config.routing.scale,
        "topk_group": config.routing.chosen,
    }


def _read_glm(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**_read(raw), "qk_norm": bool(raw["use_qk_norm"])}


def _write_glm(config: Any) -> dict[str, Any]:
    return {**_write(config), "use_qk_norm": config.qk_norm, PART: config.partial_rotary_factor}


def _read_deepseek(raw: Mapping[str, Any]) -> dict[str, Any]:
    turned, plain, values = (raw[f"{n}_head_dim"] for n in ("qk_rope", "qk_nope", "v"))
    heads = raw["num_attention_heads"]
    if values > turned + plain:
        raise ValueError(f"config: `v_head_dim` {values} is above the size of a key")
    return {
        **_read(raw),
        "o_bias": bool(raw["attention_bias"]),
        "num_key_value_heads": heads,
        "head_dim": turned + plain,
        "attention_multiplier": (turned + plain) ** -0.5 * _temperature(raw) ** 2,
        "rope_interleaved": bool(raw["rope_interleave"]),
        **{name: raw[name] for name in _RANKS if name != "qk_nope_head_dim"},
    }


def _temperature(raw: Mapping[str, Any]) -> float:
    """What YaRN multiplies queries and keys by, apart from their rotation."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    factor, weight = rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _write_deepseek(config: Any) -> dict[str, Any]:
    return {
        **_write(config),
        **{name: getattr(config, name) for name in _RANKS if name != "qk_nope_head_dim"},
        "qk_nope_head_dim": config.head_dim - config.rotary_dim,
        "head_dim": config.rotary_dim,
        "rope_interleave": config.rope_interleaved,
    }


GLM4_MOE = Dialect(
    architecture="Glm4MoeForCausalLM",
    fields=(*FIELDS, PART, "use_qk_norm"),
    read=_read_glm,
    write=_write_glm,
    names=names.GROUPED,
    rope=lambda given: read_partial_rope(given, 0.5),
    defaults={
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "attention_bias": False,
        "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
    },
)  # fmt: skip
DEEPSEEK_V3 = Dialect(
    architecture="DeepseekV3ForCausalLM",
    fields=(*FIELDS, *_RANKS, "rope_interleave", "qk_head_dim"),
    read=_read_deepseek,
    write=_write_deepseek,
    names=names.GROUPED,
    defaults={
        "attention_bias": False, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "rope_interleave": True, "bos_token_id": 0, "eos_token_id": 1,
    },
)  # fmt: skip
