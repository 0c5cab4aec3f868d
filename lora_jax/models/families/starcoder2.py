"""StarCoder2 and StableLM: decoders with GPT-2's norms.

StarCoder2 has Mistral's attention, with biases, and GPT-2's MLP; StableLM has Llama's MLP, and
rotates a part of each head.

Sources: arXiv:2402.19173, arXiv:2402.17834.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    BEFORE,
    PART,
    SHARED,
    Dialect,
    Modules,
    check_fixed,
    layer_norms,
    read_partial_rope,
)

# Of the code it was trained with: how it computes, and second names of fields below.
_WITHOUT_EFFECT = (
    "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon",
    "scale_attention_softmax_in_fp32",
)  # fmt: skip
# For training from the start; an adapter has its own dropout.
_DROPOUT = ("embedding_dropout", "residual_dropout")
# With the one value that the forward has.
_FIXED = {"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True}


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _FIXED)
    bias = bool(raw["use_bias"])
    return {
        "modules": Modules(up="c_fc", down="c_proj"),
        "sliding_window": raw.get("sliding_window"),
        **layer_norms(raw["norm_epsilon"]),
        "gated_mlp": False,
        "mlp_bias": bias,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _write(config: Any) -> dict[str, Any]:
    return {
        "norm_epsilon": config.rms_norm_eps,
        "sliding_window": config.sliding_window,
        "use_bias": config.qkv_bias,
    }


STARCODER2 = Dialect(
    architecture="Starcoder2ForCausalLM",
    fields=(
        *_DROPOUT, *_FIXED, *_WITHOUT_EFFECT, "norm_epsilon", "sliding_window", "use_bias",
    ),
    read=_read,
    write=_write,
    defaults={
        "norm_epsilon": 1e-5,
        "initializer_range": 0.018042,
        "use_bias": True,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    act="gelu_pytorch_tanh",
    names=names.STARCODER2,
)  # fmt: skip


def _read_stablelm(raw: Mapping[str, Any]) -> dict[str, Any]:
    parallel, normed = bool(raw["use_parallel_residual"]), bool(raw["qk_layernorm"])
    return {
        "modules": Modules(q_norm="q_layernorm", k_norm="k_layernorm", head_norms_numbered=True),
        "qk_norm": normed,
        "qk_norm_by_head": normed,
        **layer_norms(raw["layer_norm_eps"]),
        "parallel_mlp": parallel,
        "norms": SHARED if parallel else BEFORE,
        "qkv_bias": bool(raw["use_qkv_bias"]),
    }


def _write_stablelm(config: Any) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.rms_norm_eps,
        "qk_layernorm": config.qk_norm,
        "use_parallel_residual": config.parallel_mlp,
        "use_qkv_bias": config.qkv_bias,
        PART: config.partial_rotary_factor,
    }


STABLELM = Dialect(
    architecture="StableLmForCausalLM",
    fields=(
        "hidden_dropout", "layer_norm_eps", PART, "qk_layernorm",
        "use_parallel_residual", "use_qkv_bias",
    ),
    read=_read_stablelm,
    write=_write_stablelm,
    defaults={
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
        "num_key_value_heads": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    rope=partial(read_partial_rope, share=0.25),
    names=names.STABLELM,
)  # fmt: skip
