"""Qwen3-Next and Qwen3.5: three blocks with a gated delta net to one with attention.

The attention rotates a quarter of a head and has a gate; the factors of norms are 1 + scale, but
for the norm inside a delta net. Qwen3-Next and Qwen3.5-MoE have experts; the delta nets of Qwen3.5
have four projections for Qwen3-Next's two, and it is the decoder of a model of images and texts.

Sources: arXiv:2412.06464; arXiv:2505.06708; transformers' configurations.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.delta_rule import DeltaSizes
from lora_jax.models.dialect import (
    FULL,
    LINEAR,
    PART,
    ROPES,
    Dialect,
    all_but_every,
    check_fixed,
    read_partial_rope,
    without_mrope,
)
from lora_jax.models.families import experts

_SIZES = (
    "linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
FIELDS = (*_SIZES, "attention_bias", "full_attention_interval", "layer_types", PART)
DEFAULTS = {
    "linear_conv_kernel_dim": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "full_attention_interval": 4,
    "head_dim": 256, "num_key_value_heads": 2, "max_position_embeddings": 32768,
}  # fmt: skip


def read_delta(raw: Mapping[str, Any], *, fused: bool) -> dict[str, Any]:
    """The blocks with delta nets, their sizes, and the gated attention of the others."""
    sizes = DeltaSizes(*(raw[name] for name in _SIZES), fused=fused)
    if sizes.value_heads % sizes.key_heads:
        raise ValueError(
            f"config: `linear_num_value_heads` {sizes.value_heads} is not a multiple of "
            f"`linear_num_key_heads` {sizes.key_heads}"
        )
    linear = all_but_every(raw["full_attention_interval"], raw["num_hidden_layers"])
    if kinds := raw.get("layer_types"):
        if unknown := [kind for kind in kinds if kind not in (LINEAR, FULL)]:
            raise ValueError(
                f"config: `layer_types` has `{unknown[0]}`, which is neither `{LINEAR}` nor "
                f"`{FULL}`"
            )
        linear = tuple(kind == LINEAR for kind in kinds)
    bias = bool(raw.get("attention_bias", False))
    return {
        "linear_layers": linear if any(linear) else None,
        "delta": sizes if any(linear) else None,
        "attention_gate": True,
        "qk_norm": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "norm_offset": True,
    }


def write_delta(config: Any) -> dict[str, Any]:
    """The reverse of `read_delta`."""
    sizes = dict(zip(_SIZES, config.delta[: len(_SIZES)], strict=True)) if config.delta else {}
    return {
        **sizes,
        "layer_types": [LINEAR if linear else FULL for linear in config.linear],
        "attention_bias": config.qkv_bias,
        PART: config.partial_rotary_factor,
    }


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: without_mrope(raw[name]) for name in ROPES if raw.get(name)}
    return read_partial_rope({**raw, **given}, 0.25)


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**experts.read_shared(raw, 512), **read_delta(raw, fused=True)}


def _write(config: Any) -> dict[str, Any]:
    return {**experts.write_shared(config), **write_delta(config)}


QWEN3_NEXT = Dialect(
    architecture="Qwen3NextForCausalLM",
    fields=(*FIELDS, *experts.SHARED_FIELDS),
    read=_read,
    write=_write,
    rope=_rope,
    names=names.QWEN3_NEXT,
    defaults={
        **DEFAULTS,
        "intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
)

# What Qwen3.5's files have beside: options with one value, and layers that are not loaded.
_OTHERS = (
    "attn_output_gate", "mamba_ssm_dtype", "mlp_only_layers", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
)  # fmt: skip
_FIXED = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mlp_only_layers": []}


# Of its experts there are no such options; every block has them.
_SPARSE = {"decoder_sparse_step": 1, "norm_topk_prob": True}


def _read_text(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _FIXED)
    return read_delta(raw, fused=False)


def _read_moe(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _SPARSE)
    shared = experts.read_shared({**raw, **_SPARSE}, 256)
    return {**shared, **_read_text(raw), "intermediate_size": raw["moe_intermediate_size"]}


def _write_moe(config: Any) -> dict[str, Any]:
    written = {**experts.write_shared(config), **write_delta(config)}
    return {name: x for name, x in written.items() if name not in {**_SPARSE, **_FIXED}}


QWEN3_5 = Dialect(
    architecture="Qwen3_5ForCausalLM",
    fields=(*FIELDS, *_OTHERS),
    read=_read_text,
    write=write_delta,
    rope=_rope,
    names=names.QWEN3_5,
    defaults={**DEFAULTS, "intermediate_size": 12288, "num_key_value_heads": 4},
)

QWEN3_5_MOE = Dialect(
    architecture="Qwen3_5MoeForCausalLM",
    fields=(*dict.fromkeys((*FIELDS, *_OTHERS, *experts.SHARED_FIELDS)),),
    read=_read_moe,
    write=_write_moe,
    rope=_rope,
    names=names.QWEN3_NEXT,
    defaults={
        **DEFAULTS,
        **_SPARSE,
        "intermediate_size": 512,  # no block has an MLP of this width
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
)
