"""Small mixtures of experts, whose adapters are compared with PEFT's."""

from typing import Any

from tests.support.decoders import DELTA, LATENT
from tests.support.torch_models import ADAPTED_SIZES

SIZES = dict(ADAPTED_SIZES, num_experts_per_tok=2)
GROUPS = {**SIZES, **LATENT, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1}
EXPERTS: dict[str, Any] = {
    "mixtral": dict(SIZES, model_type="mixtral", num_local_experts=4),
    "qwen3_moe": dict(
        SIZES, model_type="qwen3_moe", head_dim=8, moe_intermediate_size=12, num_experts=3
    ),
    "gpt_oss": dict(
        SIZES,
        model_type="gpt_oss",
        head_dim=8,
        num_local_experts=3,
        sliding_window=4,
        swiglu_limit=1.0,
    ),
    "qwen2_moe": dict(
        SIZES,
        model_type="qwen2_moe",
        moe_intermediate_size=12,
        num_experts=3,
        shared_expert_intermediate_size=20,
        mlp_only_layers=[0],
    ),
    # Square experts, too: PEFT takes their outputs for their inputs.
    "llama4_text": dict(
        SIZES,
        model_type="llama4_text",
        head_dim=8,
        intermediate_size=16,
        intermediate_size_mlp=20,
        num_local_experts=3,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=4,
    ),
    "gemma4_text": dict(
        ADAPTED_SIZES,
        model_type="gemma4_text",
        head_dim=4,
        global_head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=3,
        top_k_experts=2,
        moe_intermediate_size=12,
    ),
    "glm4_moe": dict(
        SIZES,
        model_type="glm4_moe",
        head_dim=8,
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_group=2,
        first_k_dense_replace=1,
    ),
    "deepseek_v3": dict(GROUPS, model_type="deepseek_v3", first_k_dense_replace=1),
    "deepseek_v2": dict(
        GROUPS,
        model_type="deepseek_v2",
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
    ),
    "glm4_moe_lite": dict(GROUPS, model_type="glm4_moe_lite"),
    "dots1": dict(
        SIZES,
        model_type="dots1",
        head_dim=8,
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "exaone_moe": dict(
        SIZES,
        model_type="exaone_moe",
        head_dim=8,
        moe_intermediate_size=12,
        num_experts=4,
        sliding_window=4,
        sliding_window_pattern=2,
    ),
    "solar_open": dict(
        SIZES, model_type="solar_open", head_dim=8, moe_intermediate_size=12, n_routed_experts=4
    ),
    "granitemoe": dict(SIZES, model_type="granitemoe", num_local_experts=3),
    "mellum": dict(
        SIZES,
        model_type="mellum",
        head_dim=8,
        moe_intermediate_size=12,
        num_experts=3,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
    ),
    "ernie4_5_moe": dict(
        {name: x for name, x in SIZES.items() if name != "num_experts_per_tok"},
        model_type="ernie4_5_moe",
        moe_intermediate_size=12,
        moe_num_experts=3,
        moe_k=2,
    ),
    "flex_olmo": dict(SIZES, model_type="flex_olmo", num_experts=3),
    "qwen3_next": dict(
        {**SIZES, **DELTA},
        model_type="qwen3_next",
        moe_intermediate_size=12,
        num_experts=3,
        shared_expert_intermediate_size=20,
    ),
    "qwen3_5_moe_text": dict(
        {**SIZES, **DELTA},
        model_type="qwen3_5_moe_text",
        moe_intermediate_size=12,
        num_experts=3,
        shared_expert_intermediate_size=20,
    ),
    # Square experts: their shapes do not show the order of their dims.
    "olmoe": dict(SIZES, model_type="olmoe", num_experts=3, intermediate_size=16),
}
