"""StarCoder2: Mistral's attention, with biases, GPT-2's norms and GPT-2's MLP.

Source: arXiv:2402.19173.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import Dialect, Modules, check_fixed

# Of the code it was trained with: how it computes, and second names of fields below.
_WITHOUT_EFFECT = (
    "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon",
    "scale_attention_softmax_in_fp32",
)  # fmt: skip
# For training from the start; an adapter has its own dropout.
_DROPOUT = ("attention_dropout", "embedding_dropout", "residual_dropout")
# With the one value that the forward has.
_FIXED = {"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True}


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _FIXED)
    bias = bool(raw["use_bias"])
    return {
        "modules": Modules(up="c_fc", down="c_proj"),
        "sliding_window": raw.get("sliding_window"),
        "norm_centered": True,
        "norm_bias": True,
        "rms_norm_eps": raw["norm_epsilon"],
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
        "use_bias": True,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    activations={"gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "gelu_new": "gelu_new"},
    names=names.STARCODER2,
)  # fmt: skip
