"""Gemma, Gemma 2 and the text model of Gemma 3.

All: norms scale by `1 + scale`, embeddings times the root of the width, a gelu in the gated MLP, a
tied head. Gemma 2 adds norms after attention and MLP, soft-capped logits, and a window in every
other block. Gemma 3 replaces the caps by norms on queries and keys, has five blocks with a window
for each one without, and a separate rotary base in the blocks with a window.

Sources: arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import (
    BOTH,
    SLIDING,
    Dialect,
    Norms,
    check_fixed,
    read_two_ropes,
    read_windows,
    write_windows,
)

# Every second (Gemma 2) or sixth (Gemma 3) block has no window.
_PERIOD_2, _PERIOD_3 = 2, 6
# VaultGemma has Gemma 2's norms without those after attention and MLP.
_VAULT_NORMS = Norms("input_layernorm", None, "pre_feedforward_layernorm", None)
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _read_gemma(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"norm_offset": True, "scale_embeddings": True, "qkv_bias": bias, "o_bias": bias}


def _read_gemma1(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, {"hidden_activation": TANH})
    return _read_gemma(raw)


def _write_gemma(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "hidden_act": config.hidden_activation}


def _read_gemma2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_read_gemma(raw),
        **{name: raw[name] for name in (*_CAPS, "query_pre_attn_scalar")},
        "norms": BOTH,
        **read_windows(raw, _PERIOD_2),
    }


def _read_gemma3(raw: Mapping[str, Any]) -> dict[str, Any]:
    # transformers has the field, and leaves it out of its attention.
    check_fixed(raw, {"attn_logit_softcapping": None})
    windows = read_windows(raw, raw["sliding_window_pattern"])
    if windows["sliding_window"] is None and any(windows["sliding_layers"]):
        # They would attend to all tokens, but with the rotary base of the sliding blocks.
        raise ValueError(f"config: `{SLIDING}` blocks without a `sliding_window` are not supported")
    return {**_read_gemma2(raw), "qk_norm": True, **windows}


def _write_gemma2(config: Any) -> dict[str, Any]:
    return {
        **_write_gemma(config),
        **{name: getattr(config, name) for name in (*_CAPS, "query_pre_attn_scalar")},
        **write_windows(config),
    }


def _write_gemma3(config: Any) -> dict[str, Any]:
    return {**_write_gemma2(config), "rope_local_base_freq": config.rope_local_base_freq}


# The first Gemma checkpoints have "gelu" in config.json but are trained with the tanh
# approximation; transformers corrects it in the same way.
TANH = "gelu_pytorch_tanh"
_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_FIELDS_2 = (
    "attention_bias", "hidden_act", "layer_types", "query_pre_attn_scalar", "sliding_window",
    *_CAPS,
)  # fmt: skip
_DEFAULTS_2 = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA = Dialect(
    architecture="GemmaForCausalLM",
    fields=("attention_bias", "hidden_activation"),
    read=_read_gemma1,
    write=_write_gemma,
    defaults={**_DEFAULTS, "num_key_value_heads": 16},
    act=TANH,
    renamed_acts={"gelu": TANH},
)
GEMMA2 = Dialect(
    architecture="Gemma2ForCausalLM",
    fields=_FIELDS_2,
    read=_read_gemma2,
    write=_write_gemma2,
    defaults={**_DEFAULTS_2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    activation="hidden_activation",
    act=TANH,
)
VAULTGEMMA = GEMMA2._replace(
    architecture="VaultGemmaForCausalLM",
    read=lambda raw: {**_read_gemma2(raw), "norms": _VAULT_NORMS},
)
GEMMA3 = Dialect(
    architecture="Gemma3ForCausalLM",
    fields=(*_FIELDS_2, "rope_local_base_freq", "sliding_window_pattern"),
    read=_read_gemma3,
    write=_write_gemma3,
    defaults={
        **_DEFAULTS_2,
        **dict.fromkeys(_CAPS),
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": _PERIOD_3,
    },
    activation="hidden_activation",
    act=TANH,
    rope=read_two_ropes,
)
