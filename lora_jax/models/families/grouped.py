"""GLM-4 MoE and DeepSeek-V2 and V3: experts in groups, some for every token, behind dense blocks.

Their routers choose among the best groups, by sigmoids or (DeepSeek-V2) by a softmax. DeepSeek's
models, and GLM-4.7 Flash, make keys and values of a short vector a token; GLM-4 MoE rotates half of
a head.

Sources: arXiv:2405.04434; arXiv:2412.19437; arXiv:2508.06471.
"""

import math
from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import PART, Dialect, Routing, check_fixed, read_partial_rope
from lora_jax.models.families.experts import experts_per_token

RANKS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
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


def read_grouped(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of experts that sigmoids choose."""
    check_fixed(raw, _FIXED)
    return _read_any(raw, Routing(raw["n_group"], raw["topk_group"], _scale(raw)))


def _scale(raw: Mapping[str, Any]) -> float:
    return float(raw["routed_scaling_factor"])


def _read_any(raw: Mapping[str, Any], routing: Routing) -> dict[str, Any]:
    count, least = raw["n_routed_experts"], 1 if routing.softmax else 2
    if count % routing.groups or count < least * routing.groups or routing.chosen > routing.groups:
        raise ValueError(
            f"config: `n_group` {routing.groups} must divide `n_routed_experts` {count} into "
            f"groups of at least {least}, of which `topk_group` {routing.chosen} are chosen"
        )
    first = raw.get("first_k_dense_replace", 1)
    kinds = raw.get("mlp_layer_types") or [
        "dense" if i < first else "sparse" for i in range(raw["num_hidden_layers"])
    ]
    dense = tuple(kind == "dense" for kind in kinds)
    if all(dense):
        raise ValueError("config: `first_k_dense_replace` leaves no block with experts")
    return {
        "num_experts": count,
        "num_experts_per_tok": experts_per_token(raw),
        "moe_intermediate_size": raw["moe_intermediate_size"],
        "norm_topk_prob": bool(raw["norm_topk_prob"]),
        "dense_layers": dense if any(dense) else None,
        "routing": routing,
        "shared_expert_size": raw["moe_intermediate_size"] * raw["n_shared_experts"],
        "qkv_bias": bool(raw["attention_bias"]),
        "predicting_layers": raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers", 1)),
    }


def write_grouped(config: Any) -> dict[str, Any]:
    """The reverse of `read_grouped`."""
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
    return {**read_grouped(raw), "qk_norm": bool(raw["use_qk_norm"])}


def _write_glm(config: Any) -> dict[str, Any]:
    return {
        **write_grouped(config),
        "use_qk_norm": config.qk_norm,
        PART: config.partial_rotary_factor,
    }


def read_latent(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of attention over latent vectors."""
    turned, plain, values = (raw[f"{n}_head_dim"] for n in ("qk_rope", "qk_nope", "v"))
    heads = raw["num_attention_heads"]
    if values > turned + plain:
        raise ValueError(f"config: `v_head_dim` {values} is above the size of a key")
    return {
        "o_bias": bool(raw["attention_bias"]),
        "num_key_value_heads": heads,
        "head_dim": turned + plain,
        "attention_multiplier": (turned + plain) ** -0.5 * _temperature(raw) ** 2,
        "rope_interleaved": bool(raw["rope_interleave"]),
        **{name: raw[name] for name in RANKS if name != "qk_nope_head_dim"},
    }


def _read_v2(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, {"moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax"})
    kinds = {"greedy": (1, 1), "group_limited_greedy": (raw["n_group"], raw["topk_group"])}
    if raw["topk_method"] not in kinds:
        raise ValueError(
            f"config: `topk_method` = {raw['topk_method']!r} is not one of {', '.join(kinds)}"
        )
    groups, chosen = kinds[raw["topk_method"]]
    routing = Routing(groups, chosen, _scale(raw), softmax=True)
    return {**_read_any(raw, routing), **read_latent({**raw, "rope_interleave": True})}


def _read_v3(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**read_latent(raw), **read_grouped(raw)}


def _temperature(raw: Mapping[str, Any]) -> float:
    """What YaRN multiplies queries and keys by, apart from their rotation."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    factor, weight = rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_latent(config: Any) -> dict[str, Any]:
    """The reverse of `read_latent`."""
    return {
        **{name: getattr(config, name) for name in RANKS if name != "qk_nope_head_dim"},
        "qk_nope_head_dim": config.head_dim - config.rotary_dim,
        "head_dim": config.rotary_dim,
    }


def _write_v2(config: Any) -> dict[str, Any]:
    grouped = config.routing.groups > 1
    written = {**write_grouped(config), **write_latent(config)}
    return {**written, "topk_method": "group_limited_greedy" if grouped else "greedy"}


def _write_v3(config: Any) -> dict[str, Any]:
    written = {**write_grouped(config), **write_latent(config)}
    return {**written, "rope_interleave": config.rope_interleaved}


def _write_lite(config: Any) -> dict[str, Any]:
    kinds = ["dense" if dense else "sparse" for dense in config.dense]
    written = {**_write_v3(config), "mlp_layer_types": kinds}
    return {name: x for name, x in written.items() if name != "first_k_dense_replace"}


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
DEEPSEEK_V2 = Dialect(
    architecture="DeepseekV2ForCausalLM",
    fields=(*FIELDS, *RANKS, "qk_head_dim"),
    read=_read_v2,
    write=_write_v2,
    names=names.EXPERTS,
    defaults={
        "attention_bias": False, "moe_intermediate_size": 1407, "n_shared_experts": 2,
        "n_routed_experts": 64, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "first_k_dense_replace": 0,
        "norm_topk_prob": False, "bos_token_id": 1, "eos_token_id": 2,
    },
)  # fmt: skip
GLM4_MOE_LITE = Dialect(
    architecture="Glm4MoeLiteForCausalLM",
    fields=(*FIELDS, *RANKS, PART, "mlp_layer_types", "qk_head_dim", "rope_interleave"),
    read=_read_v3,
    write=_write_lite,
    names=names.GROUPED,
    defaults={
        "attention_bias": False, "moe_intermediate_size": 1536, "n_shared_experts": 1,
        "n_routed_experts": 64, "routed_scaling_factor": 1.8, "kv_lora_rank": 512,
        "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 256, "qk_nope_head_dim": 192,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "rope_interleave": True, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
    },
)  # fmt: skip
DEEPSEEK_V3 = Dialect(
    architecture="DeepseekV3ForCausalLM",
    fields=(*FIELDS, *RANKS, "rope_interleave", "qk_head_dim"),
    read=_read_v3,
    write=_write_v3,
    names=names.GROUPED,
    defaults={
        "attention_bias": False, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "rope_interleave": True, "bos_token_id": 0, "eos_token_id": 1,
    },
)  # fmt: skip
