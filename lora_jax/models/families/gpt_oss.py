"""gpt-oss: experts with biases and a limited gate, heads with sinks, a window in every other block.

Source: arXiv:2508.10925.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import Dialect, Modules, read_rope, read_windows, write_windows
from lora_jax.models.families.experts import FIELDS, read_experts, write_experts

_WINDOW = 128
_PERIOD = 2  # every second block has no window
_SWIGLU = ("swiglu_limit", "swiglu_alpha")
# What transformers assumes where config.json states no scaling.
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw["attention_bias"])
    return {
        **read_experts(raw, 128),
        **read_windows(raw, _PERIOD),
        **{name: float(raw[name]) for name in _SWIGLU},
        "modules": Modules(router="router"),
        "expert_bias": True,
        "norm_wide": True,
        "attention_sinks": True,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _write(config: Any) -> dict[str, Any]:
    # Without the field transformers would scale.
    plain = {} if config.rope_scaling else {"rope_scaling": {"rope_type": "default"}}
    return {
        **write_experts(config, "num_local_experts"),
        **write_windows(config),
        # transformers needs the number even where no block has a window.
        "sliding_window": config.sliding_window or _WINDOW,
        **{name: getattr(config, name) for name in _SWIGLU},
        **plain,
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
    }


def _read_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    stated = given.get("rope_scaling") or given.get("rope_parameters")
    return read_rope(given if stated else {**given, "rope_scaling": _YARN})


GPT_OSS = Dialect(
    architecture="GptOssForCausalLM",
    fields=(
        *FIELDS, *_SWIGLU, "attention_bias", "experts_per_token", "initial_context_length",
        "layer_types", "sliding_window",
    ),
    read=_read,
    write=_write,
    names=names.GPT_OSS,
    defaults={
        "attention_bias": True,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": _WINDOW,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    rope=_read_rope,
)  # fmt: skip
