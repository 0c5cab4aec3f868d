"""Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and FlexOlmo: decoders whose MLPs are mixtures of experts.

Mixtral is Mistral with experts, Qwen3-MoE is Qwen3 with experts, and Qwen2-MoE Qwen2 with experts
and an MLP that every token uses; in both some blocks may have one MLP in their place. OLMoE
normalizes the queries, and the keys, of all heads together, and FlexOlmo has OLMo 2's norms else.

Sources: arXiv:2401.04088, arXiv:2505.09388, arXiv:2409.02060.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    AFTER,
    FULL,
    SLIDING,
    Dialect,
    Modules,
    check_fixed,
    read_layer_types,
    read_two_ropes,
    write_two_ropes,
    write_windows,
)
from lora_jax.models.families import llama, qwen

# `num_local_experts` is Mixtral's name, `num_experts` that of the others; transformers reads both.
_COUNTS = ("num_local_experts", "num_experts")
# Noise of a router in training, which is not supported.
UNSHAKEN = {"router_jitter_noise": 0.0}
# Mellum's; the layers that predict further tokens are not loaded.
_MELLUM = (
    "layer_types", "mlp_layer_types", "sliding_window", "num_mtp_layers", "mtp_layer_types",
    "mtp_mlp_layer_types", "num_nextn_predict_layers",
)  # fmt: skip
_MELLUM_ROPE = {
    FULL: {"rope_type": "default", "rope_theta": 5e5},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
FIELDS = (*_COUNTS, "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")


def read_experts(raw: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields of every mixture; `count` is the number of experts where none is stated."""
    counts = {raw[name] for name in _COUNTS if raw.get(name) is not None}
    if len(counts) > 1:
        raise ValueError(
            f"config: `num_local_experts` and `num_experts` are two numbers, {counts}: leave one "
            "out"
        )
    return {
        "num_experts": counts.pop() if counts else count,
        "num_experts_per_tok": experts_per_token(raw),
        "router_aux_loss_coef": float(raw["router_aux_loss_coef"]),
    }


def experts_per_token(raw: Mapping[str, Any]) -> int:
    """How many experts each token runs through; not every class has a default."""
    if raw.get("num_experts_per_tok") is None:
        raise ValueError("config: `num_experts_per_tok` is missing: experts for each token")
    return raw["num_experts_per_tok"]


def write_experts(config: Any, name: str) -> dict[str, Any]:
    return {
        name: config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def _read_mixtral(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, UNSHAKEN)
    return {"sliding_window": raw.get("sliding_window"), **read_experts(raw, 8)}


def _write_mixtral(config: Any) -> dict[str, Any]:
    return {
        **write_experts(config, "num_local_experts"),
        "sliding_window": config.sliding_window,
        # Beside experts there is no MLP, and no field for a width of its own.
        "intermediate_size": config.expert_size,
    }


def read_dense(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks that have one MLP: those listed, and all but each `decoder_sparse_step`-th."""
    step, listed = raw["decoder_sparse_step"], raw["mlp_only_layers"] or ()
    dense = tuple(i in listed or (i + 1) % step != 0 for i in range(raw["num_hidden_layers"]))
    if all(dense):
        raise ValueError(
            "config: `mlp_only_layers` and `decoder_sparse_step` leave no block with experts: take "
            "the model type without"
        )
    return {"dense_layers": dense if any(dense) else None}


def write_dense(config: Any) -> dict[str, Any]:
    """The reverse of `read_dense`."""
    listed = [i for i, dense in enumerate(config.dense) if dense]
    return {"decoder_sparse_step": 1, "mlp_only_layers": listed}


def read_shared(raw: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields of Qwen's experts beside an MLP with a gate, which every token uses."""
    return {
        **_read_qwen(raw, count),
        "modules": Modules(shared="shared_expert"),
        "shared_expert_size": raw["shared_expert_intermediate_size"],
        "shared_gate": True,
    }


def write_shared(config: Any) -> dict[str, Any]:
    """The reverse of `read_shared`."""
    return {
        **_write_qwen(config),
        "shared_expert_intermediate_size": config.shared_expert_size,
    }


def _read_qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Unlike the dense Qwen2: every second block, of those before `max_window_layers`.
    last = raw["max_window_layers"]
    blocks = tuple(i % 2 == 0 and i < last for i in range(raw["num_hidden_layers"]))
    return {
        **qwen.QWEN2.read(raw),
        **read_shared(raw, 60),
        "qkv_bias": bool(raw["qkv_bias"]),
        "sliding_layers": read_layer_types(raw, blocks),
    }


def _write_qwen2(config: Any) -> dict[str, Any]:
    return {
        **write_shared(config),
        **qwen.QWEN2.write(config),
        "qkv_bias": config.qkv_bias,
    }


def _read_qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Its windows are in every block, whatever a config.json says of layers.
    return {**qwen.QWEN3.read(raw), **_read_qwen(raw, 128), "sliding_layers": None}


def _write_qwen3(config: Any) -> dict[str, Any]:
    return {**qwen.QWEN3.write(config), **_write_qwen(config)}


def _read_qwen(raw: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        **read_experts(raw, count),
        **read_dense(raw),
        "moe_intermediate_size": raw["moe_intermediate_size"],
        "norm_topk_prob": bool(raw["norm_topk_prob"]),
    }


def _write_qwen(config: Any) -> dict[str, Any]:
    return {
        **write_experts(config, "num_experts"),
        **write_dense(config),
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _read_olmoe(raw: Mapping[str, Any], *, count: int) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {
        **read_experts(raw, count),
        "norm_topk_prob": bool(raw["norm_topk_prob"]),
        "clip_qkv": raw.get("clip_qkv"),
        "qk_norm": True,
        "qk_norm_whole": True,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _write_olmoe(config: Any) -> dict[str, Any]:
    return {
        **write_experts(config, "num_experts"),
        "intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
        "attention_bias": config.qkv_bias,
        **({} if config.clip_qkv is None else {"clip_qkv": config.clip_qkv}),
    }


def _read_mellum(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias, blocks = bool(raw.get("attention_bias", False)), raw["num_hidden_layers"]
    dense = tuple(kind == "dense" for kind in raw.get("mlp_layer_types") or ())
    if dense and all(dense):
        raise ValueError("config: `mlp_layer_types` leaves no block with experts")
    return {
        **read_experts(raw, 64),
        "qk_norm": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "dense_layers": dense if any(dense) else None,
        "moe_intermediate_size": raw["moe_intermediate_size"],
        "norm_topk_prob": bool(raw["norm_topk_prob"]),
        "sliding_window": raw["sliding_window"],
        "sliding_layers": read_layer_types(raw, (False,) * blocks),
    }


def _write_mellum(config: Any) -> dict[str, Any]:
    ropes = write_two_ropes(config)
    return {
        **write_experts(config, "num_experts"),
        **write_windows(config),
        **ropes,
        # The older name of the same field, which its class would take for it.
        "rope_scaling": ropes["rope_parameters"],
        "attention_bias": config.qkv_bias,
        "mlp_layer_types": ["dense" if dense else "sparse" for dense in config.dense],
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
    }


MIXTRAL = Dialect(
    architecture="MixtralForCausalLM",
    fields=(*FIELDS, *llama.MISTRAL.fields, *UNSHAKEN),
    read=_read_mixtral,
    write=_write_mixtral,
    names=names.MIXTRAL,
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
)

_QWEN = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob")
SHARED_FIELDS = (*FIELDS, *_QWEN, "shared_expert_intermediate_size")
_QWEN_DEFAULTS = {
    **qwen.DEFAULTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

QWEN2_MOE = Dialect(
    architecture="Qwen2MoeForCausalLM",
    fields=(*SHARED_FIELDS, *qwen.QWEN2.fields, "qkv_bias"),
    read=_read_qwen2,
    write=_write_qwen2,
    names=names.EXPERTS,
    defaults={
        **_QWEN_DEFAULTS,
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
)

QWEN3_MOE = Dialect(
    architecture="Qwen3MoeForCausalLM",
    fields=(*FIELDS, *qwen.QWEN3.fields, *_QWEN),
    read=_read_qwen3,
    write=_write_qwen3,
    names=names.EXPERTS,
    defaults={
        **_QWEN_DEFAULTS,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
)

OLMOE = Dialect(
    architecture="OlmoeForCausalLM",
    fields=(*FIELDS, "attention_bias", "clip_qkv", "norm_topk_prob"),
    read=partial(_read_olmoe, count=64),
    write=_write_olmoe,
    names=names.EXPERTS,
    defaults={
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "eos_token_id": 50279,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
)

MELLUM = Dialect(
    architecture="MellumForCausalLM",
    fields=(*FIELDS, *_MELLUM, "attention_bias", "moe_intermediate_size", "norm_topk_prob"),
    read=_read_mellum,
    write=_write_mellum,
    rope=lambda given: read_two_ropes({"rope_parameters": _MELLUM_ROPE, **given}),
    names=names.MELLUM,
    defaults={
        "num_key_value_heads": 4, "head_dim": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "moe_intermediate_size": 896, "router_aux_loss_coef": 0.001, "sliding_window": 1024,
    },
)  # fmt: skip

FLEX_OLMO = OLMOE._replace(
    architecture="FlexOlmoForCausalLM",
    fields=(*FIELDS, "attention_bias", "norm_topk_prob"),
    read=lambda raw: {**_read_olmoe(raw, count=7), "norms": AFTER},
    defaults={
        **OLMOE.defaults,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
        "num_experts_per_tok": 5,
    },
)
