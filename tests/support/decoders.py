"""A small model of every family of decoders, and packed rows of tokens for it."""

import jax
import numpy as np

from lora_jax import models
from lora_jax.models import config_from_hf

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    initializer_range=0.3,
)  # fmt: skip
WINDOW = dict(sliding_window=3)
GEMMA2 = dict(
    WINDOW, head_dim=8, query_pre_attn_scalar=9, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0, hidden_activation="gelu_pytorch_tanh",
)  # fmt: skip
# Of the experts and the latent attention of DeepSeek's models and GLM-4.7 Flash.
LATENT = dict(
    n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=12,
    qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, num_key_value_heads=4,
)  # fmt: skip
# Of gated delta nets, one to each block with attention. Their norms enlarge the rounding of what
# they read, which large weights make small.
DELTA = dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=6, full_attention_interval=2, initializer_range=0.1,
)  # fmt: skip
SHARED = dict(
    moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
    shared_expert_intermediate_size=16,
)  # fmt: skip
# Fields that make a family differ from Llama as much as it can.
FAMILIES = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": dict(head_dim=8),
    "gemma": dict(head_dim=8),
    "gemma2": GEMMA2,
    "gemma3_text": dict(WINDOW, head_dim=8, query_pre_attn_scalar=9, sliding_window_pattern=2),
    "phi3": dict(partial_rotary_factor=0.5, sliding_window=3),
    "ministral": dict(WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(residual_multiplier=0.5, attention_multiplier=0.2),
    "seed_oss": dict(head_dim=8),
    "arcee": dict(hidden_act="relu2"),
    "olmo2": {},
    "olmo3": WINDOW,
    "exaone4": dict(WINDOW, sliding_window_pattern=2),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "ernie4_5": dict(head_dim=8),
    "helium": dict(head_dim=8),
    "stablelm": dict(partial_rotary_factor=0.5),
    "cohere": {},
    "cohere2": dict(WINDOW, sliding_window_pattern=2),
    "starcoder2": WINDOW,
    "gpt_neox": dict(rotary_pct=0.5, num_key_value_heads=4),
    "phi": {},
    "apertus": dict(head_dim=8),
    "olmo": dict(clip_qkv=0.5),
    "granite_swa": dict(
        WINDOW,
        layer_types=["full_attention", "sliding_attention"],
        layer_rope_theta=[300, 500],
        attention_multiplier=0.2,
    ),
    "granitemoe": dict(num_local_experts=4, residual_multiplier=0.5, attention_multiplier=0.2),
    "granitemoe_swa": dict(
        WINDOW,
        layer_types=["full_attention", "sliding_attention"],
        layer_rope_theta=[0, 500],
        num_local_experts=4,
        attention_multiplier=0.2,
    ),
    "mellum": dict(
        WINDOW,
        layer_types=["full_attention", "sliding_attention"],
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_layer_types=["dense", "sparse"],
    ),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=24),
    "cwm": dict(WINDOW, head_dim=8),
    "hyperclovax": dict(residual_multiplier=0.5),
    "internlm3": dict(head_dim=8),
    "iquestcoder": dict(head_dim=8),
    "jais2": {},
    "ministral3": dict(
        head_dim=8,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=500.0,
            factor=4.0,
            original_max_position_embeddings=4,
            llama_4_scaling_beta=0.4,
        ),
    ),
    "nemotron": dict(head_dim=8),
    "vaultgemma": dict(WINDOW, head_dim=8),
    "youtu": {name: x for name, x in LATENT.items() if "expert" not in name},
    "flex_olmo": dict(num_experts=3, num_experts_per_tok=2),
    "dots1": dict(
        WINDOW,
        head_dim=8,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        max_window_layers=1,
    ),
    "exaone_moe": dict(
        WINDOW,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        sliding_window_pattern=2,
    ),
    "solar_open": dict(
        head_dim=8, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2
    ),
    "mixtral": dict(num_local_experts=3),
    "qwen2_moe": dict(
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        shared_expert_intermediate_size=16,
    ),
    # Products of queries and keys are not scaled down, so that rounding grows with the weights.
    "gemma4_text": dict(
        WINDOW,
        initializer_range=0.1,
        head_dim=8,
        global_head_dim=16,
        num_hidden_layers=4,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=61,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=12,
    ),
    "llama4_text": dict(
        head_dim=8,
        intermediate_size_mlp=40,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=5,
        no_rope_layers=[1, 0],
        floor_scale=2,
    ),
    "glm4_moe": dict(
        head_dim=8,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
    ),
    "deepseek_v3": dict(
        LATENT, moe_intermediate_size=24, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "deepseek_v2": dict(LATENT, moe_intermediate_size=24, q_lora_rank=None),
    "glm4_moe_lite": dict(LATENT, moe_intermediate_size=24, v_head_dim=12),
    "qwen3_moe": dict(head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "qwen3_5_text": DELTA,
    "qwen3_next": dict(DELTA, **SHARED),
    "qwen3_5_moe_text": dict(DELTA, **SHARED),
    "gpt_oss": dict(WINDOW, head_dim=8, num_local_experts=3, num_experts_per_tok=2),
    "olmoe": dict(num_experts=3, num_experts_per_tok=2),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=16),
}
# These share what attends with others: only among all tests.
LATER = (
    "ministral", "granite", "seed_oss", "arcee", "olmo2", "olmo3", "glm4", "mixtral", "qwen3_moe",
    "qwen2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma4_text", "llama4_text",
    "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "olmoe", "cohere", "cohere2",
    "starcoder2", "phi", "gpt_neox", "gpt_oss", "glm", "ernie4_5", "helium", "stablelm",
    "olmo", "granite_swa", "granitemoe", "granitemoe_swa", "mellum", "ernie4_5_moe",
    "apertus", "cwm", "hyperclovax", "internlm3", "iquestcoder", "jais2", "ministral3", "nemotron",
    "vaultgemma", "youtu", "flex_olmo", "dots1", "exaone_moe", "solar_open",
)  # fmt: skip
LENGTHS = ((7, 1, 5, 9), (16, 6), (3, 3, 3, 3, 3))
LENGTH = 24


def family(kind, **options):
    sizes = {"vocab_size": 61, "initializer_range": 0.3} if kind == "gpt2" else SIZES
    config = config_from_hf({"model_type": kind, **sizes, **FAMILIES[kind]})
    return models.init(jax.random.key(0), config, **options)


def packed(seed=0, lengths=LENGTHS):
    """Tokens and segments of rows, and the texts in the order of the rows."""
    draw = np.random.default_rng(seed)
    tokens, segments, texts = [], [], []
    for row in lengths:
        own = [draw.integers(0, 61, n).astype(np.int32) for n in row]
        rest = LENGTH - sum(row)
        tokens.append(np.concatenate([*own, np.full(rest, 60, np.int32)]))
        segments.append(np.repeat([*range(1, len(row) + 1), 0], [*row, rest]).astype(np.int32))
        texts += own
    return np.stack(tokens), np.stack(segments), texts
