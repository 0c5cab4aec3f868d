"""dots.llm1, ERNIE 4.5, EXAONE MoE and Solar Open, DeepSeek-V3's kin without its attention; Youtu.

dots.llm1 and EXAONE MoE normalize queries and keys head by head; of EXAONE's blocks only those with
a window rotate. Youtu-LLM has DeepSeek-V3's attention and no experts.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    PART,
    Dialect,
    Routing,
    check_fixed,
    read_layer_types,
    read_partial_rope,
    write_windows,
)
from lora_jax.models.families.glm import ERNIE4_5
from lora_jax.models.families.grouped import (
    DEEPSEEK_V3,
    FIELDS,
    RANKS,
    read_grouped,
    read_latent,
    write_grouped,
    write_latent,
)
from lora_jax.models.families.olmo import EXAONE4

# Of ERNIE 4.5: the first and the last block with experts, and how many blocks each stands for.
_PLACES = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_EXAONE = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}


def _read_dots(raw: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("n_routed_experts", "n_shared_experts"):
        if raw.get(name) is None:
            raise ValueError(f"config: `{name}` is missing")
    if raw.get("scoring_func") == "noaux_tc":  # the public file's name of sigmoids with a bias
        raw = {**raw, "scoring_func": "sigmoid"}
    first = raw["max_window_layers"]
    slides = tuple(block >= first for block in range(raw["num_hidden_layers"]))
    return {
        **read_grouped(raw),
        "qk_norm": True,
        "o_bias": bool(raw["attention_bias"]),
        "sliding_window": raw["sliding_window"],
        "sliding_layers": read_layer_types(raw, slides),
    }


def _read_exaone(raw: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {ours: raw[theirs] for theirs, ours in _EXAONE.items()}
    # Its norms are before attention and MLP, unlike EXAONE 4's.
    own = {name: x for name, x in EXAONE4.read(raw).items() if name != "norms"}
    return {**read_grouped({**raw, **renamed, "attention_bias": False}), **own}


def _write_exaone(config: Any) -> dict[str, Any]:
    written = {**write_grouped(config), **write_windows(config)}
    back = {ours: theirs for theirs, ours in _EXAONE.items()}
    left = ("attention_bias", "first_k_dense_replace", "num_nextn_predict_layers")
    kinds = ["dense" if dense else "sparse" for dense in config.dense]
    kept = {back.get(name, name): x for name, x in written.items() if name not in left}
    return {**kept, "mlp_layer_types": kinds}


def _read_solar(raw: Mapping[str, Any]) -> dict[str, Any]:
    # It has no dense blocks, whose size would be `intermediate_size`.
    read = read_grouped({**raw, "first_k_dense_replace": 0})
    return {**read, "intermediate_size": raw["moe_intermediate_size"]}


def _write_solar(config: Any) -> dict[str, Any]:
    return {**write_grouped(config), PART: config.partial_rotary_factor}


def _read_youtu(raw: Mapping[str, Any]) -> dict[str, Any]:
    spread = raw.get("initializer_range") or 2 / (5 * raw["hidden_size"]) ** 0.5
    bias = bool(raw["attention_bias"])
    return {**read_latent(raw), "qkv_bias": bias, "initializer_range": spread}


def _read_ernie(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, {"use_bias": False, "moe_norm_min": 1e-12})
    blocks, (first, last, step) = raw["num_hidden_layers"], (raw[name] for name in _PLACES)
    last = blocks - 1 if last == -1 else last
    dense = tuple(not first <= i <= last or (i + 1) % step != 0 for i in range(blocks))
    if all(dense):
        raise ValueError(f"config: {', '.join(_PLACES)} leave no block with experts")
    size = raw["moe_intermediate_size"]
    return {
        "num_experts": raw["moe_num_experts"],
        "num_experts_per_tok": raw["moe_k"],
        "moe_intermediate_size": size,
        "dense_layers": dense if any(dense) else None,
        "routing": Routing(1, 1, 1.0, softmax=True, statics=True),
        "router_aux_loss_coef": float(raw["router_aux_loss_coef"]),
        "shared_expert_size": size * raw["moe_num_shared_experts"] or None,
        "rope_interleaved": True,
    }


def _write_ernie(config: Any) -> dict[str, Any]:
    sparse = [i for i, dense in enumerate(config.dense) if not dense]
    step = sparse[1] - sparse[0] if len(sparse) > 1 else sparse[0] + 1
    return {
        "moe_num_experts": config.num_experts,
        "moe_k": config.num_experts_per_tok,
        "moe_intermediate_size": config.expert_size,
        "moe_num_shared_experts": (config.shared_expert_size or 0) // config.expert_size,
        **dict(zip(_PLACES, (sparse[0], sparse[-1], step), strict=True)),
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


ERNIE4_5_MOE = Dialect(
    architecture="Ernie4_5_MoeForCausalLM",
    fields=(*_PLACES, "use_bias", "moe_norm_min", "moe_num_experts", "moe_k",
            "moe_num_shared_experts", "moe_intermediate_size", "output_router_logits",
            "router_aux_loss_coef"),
    read=_read_ernie,
    write=_write_ernie,
    names=names.ERNIE_MOE,
    defaults={
        **{name: x for name, x in ERNIE4_5.defaults.items() if name != "head_dim"},
        **dict(zip(_PLACES, (1, -1, 1), strict=True)),
        "num_key_value_heads": 4, "moe_intermediate_size": 1536, "moe_num_experts": 64, "moe_k": 6,
        "moe_num_shared_experts": 2, "router_aux_loss_coef": 0.001,
    },
)  # fmt: skip

DOTS1 = Dialect(
    architecture="Dots1ForCausalLM",
    fields=(*FIELDS, "layer_types", "max_window_layers", "sliding_window"),
    read=_read_dots,
    write=lambda config: {**write_grouped(config), **write_windows(config)},
    names=names.GROUPED,
    defaults={
        **_ONE_GROUP, "attention_bias": False, "moe_intermediate_size": 1408,
        "num_key_value_heads": 32, "first_k_dense_replace": 0, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "sliding_window": 4096, "max_window_layers": 62,
    },
)  # fmt: skip

EXAONE_MOE = Dialect(
    architecture="ExaoneMoeForCausalLM",
    fields=(*FIELDS, *EXAONE4.fields, *_EXAONE, "mlp_layer_types"),
    read=_read_exaone,
    write=_write_exaone,
    names=names.EXAONE_MOE,
    defaults={
        **EXAONE4.defaults, **_ONE_GROUP, "num_key_value_heads": 32, "first_k_dense_replace": 1,
        "moe_intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "bos_token_id": 1, "eos_token_id": 53, "pad_token_id": 0,
    },
)  # fmt: skip

SOLAR_OPEN = Dialect(
    architecture="SolarOpenForCausalLM",
    fields=(*FIELDS, PART),
    read=_read_solar,
    write=_write_solar,
    names=names.GROUPED,
    rope=lambda given: read_partial_rope(given, 1.0),
    defaults={
        **_ONE_GROUP, "attention_bias": False, "moe_intermediate_size": 1280, "head_dim": 128,
        "intermediate_size": 1280,
        "num_key_value_heads": 8, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_routed_experts": 128, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    },
)  # fmt: skip

YOUTU = Dialect(
    architecture="YoutuForCausalLM",
    fields=(*RANKS, "attention_bias", "embedding_initializer_range", "qk_head_dim",
            "rope_interleave"),
    read=_read_youtu,
    write=lambda config: {
        **write_latent(config), "attention_bias": config.qkv_bias,
        "rope_interleave": config.rope_interleaved,
    },
    defaults={
        **{name: DEEPSEEK_V3.defaults[name] for name in (*RANKS, "rope_interleave")},
        "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
)  # fmt: skip
