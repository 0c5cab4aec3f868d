"""Gemma 4's text model: heads of two sizes, shared keys, vectors of each token for each block.

As in Gemma 3 most blocks have a window, and a rotary base of their own; the others have fewer and
larger heads, of which a quarter rotates, and in large models values that are their keys. In small
models the last blocks attend to the keys of earlier ones, and each block is given a vector of the
token; in mixtures experts lie beside each MLP.

Source: transformers' `Gemma4ForCausalLM`; there is no report.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    BOTH,
    FULL,
    SLIDING,
    Dialect,
    all_but_every,
    read_layer_types,
    read_two_ropes,
    write_two_ropes,
    write_windows,
)
from lora_jax.models.families.gemma import TANH

_PERIOD = 6  # by default every sixth block has no window
_WINDOW = 512
# Where config.json states no rotations.
_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_EACH = "per_layer_config"
_BOTH_WAYS = "use_bidirectional_attention"


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get(_BOTH_WAYS) not in (None, False, "vision"):  # of images, which are not read
        raise ValueError(f"config: `{_BOTH_WAYS}` = {raw[_BOTH_WAYS]!r} is not supported")
    blocks, bias = raw["num_hidden_layers"], bool(raw["attention_bias"])
    slides = read_layer_types(raw, all_but_every(_PERIOD, blocks))
    slides = (*slides[:-1], False)  # as transformers has the last one, whatever is listed
    first = blocks - raw["num_kv_shared_layers"]
    if set(slides[:first]) != set(slides):
        raise ValueError(
            f"config: `num_kv_shared_layers` {raw['num_kv_shared_layers']} leaves no keys to the "
            "last blocks: one of each kind in `layer_types` must come before them"
        )
    return {
        "norms": BOTH,
        "norm_wide": True,
        "scale_embeddings": True,
        "qk_norm": True,
        "v_norm": True,
        "attention_multiplier": 1.0,
        "layer_scalar": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "sliding_window": raw["sliding_window"],
        "sliding_layers": slides,
        "k_eq_v": bool(raw["attention_k_eq_v"]),
        "num_kv_shared_layers": raw["num_kv_shared_layers"],
        "wide_shared_mlp": bool(raw["use_double_wide_mlp"]),
        "per_layer_size": raw["hidden_size_per_layer_input"] or None,
        "per_layer_vocab": raw["vocab_size_per_layer_input"],
        "final_logit_softcapping": raw.get("final_logit_softcapping"),
        **_read_global_heads(raw, slides),
        **_read_experts(raw),
    }


def _read_global_heads(raw: Mapping[str, Any], slides: tuple[bool, ...]) -> dict[str, Any]:
    own = raw["num_key_value_heads"], raw["head_dim"]
    # Only where values are keys transformers reads the number of heads.
    heads = raw.get("num_global_key_value_heads") if raw["attention_k_eq_v"] else None
    found = {(heads or own[0], raw["global_head_dim"])}
    if raw.get(_EACH) is not None:  # as transformers writes it since 5.23
        each = {int(block): fields for block, fields in raw[_EACH].items()}
        given = [each.get(block, {}) for block in range(len(slides))]
        sizes = [(f.get("num_key_value_heads", own[0]), f.get("head_dim", own[1])) for f in given]
        found = {size for size, own_window in zip(sizes, slides, strict=True) if not own_window}
        others = {size for size, own_window in zip(sizes, slides, strict=True) if own_window}
        fields = {name for one in given for name in one} - {"head_dim", "num_key_value_heads"}
        if len(found) > 1 or others - {own} or fields:
            raise ValueError(
                f"config: `{_EACH}` is not supported, but for one `head_dim` and one "
                f"`num_key_value_heads` of all blocks of `{FULL}`"
            )
    heads, size = found.pop()
    return {
        "global_head_dim": size,
        "num_global_key_value_heads": None if heads == own[0] else heads,
    }


def _read_experts(raw: Mapping[str, Any]) -> dict[str, Any]:
    if not raw["enable_moe_block"]:
        return {}
    return {
        "experts_beside": True,
        "dense_layers": (True,) * raw["num_hidden_layers"],
        "num_experts": raw["num_experts"],
        "num_experts_per_tok": raw["top_k_experts"],
        "moe_intermediate_size": raw["moe_intermediate_size"],
    }


def _write(config: Any) -> dict[str, Any]:
    ropes = write_two_ropes(config)
    heads, size = config.heads_of(False)
    own = {"head_dim": size, "num_key_value_heads": heads}
    return {
        **write_windows(config),
        # transformers needs the number even where no block has a window.
        "sliding_window": config.sliding_window or _WINDOW,
        # Two names of one field in transformers.
        **ropes,
        "rope_scaling": ropes["rope_parameters"],
        # The two fields behind it are those of before transformers 5.23.
        _EACH: {str(i): own for i, slides in enumerate(config.mixing.slides) if not slides},
        "global_head_dim": size,
        "num_global_key_value_heads": config.num_global_key_value_heads,
        "attention_bias": config.qkv_bias,
        "attention_k_eq_v": config.k_eq_v,
        "enable_moe_block": config.experts_beside,
        "final_logit_softcapping": config.final_logit_softcapping,
        "hidden_size_per_layer_input": config.per_layer_size or 0,
        "vocab_size_per_layer_input": config.per_layer_vocab,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": config.wide_shared_mlp,
        "num_experts": config.num_experts,
        "top_k_experts": config.num_experts_per_tok if config.experts_beside else None,
        "moe_intermediate_size": config.expert_size if config.experts_beside else None,
    }


GEMMA4 = Dialect(
    architecture="Gemma4ForCausalLM",
    fields=(
        _BOTH_WAYS, _EACH, "attention_bias", "attention_k_eq_v", "enable_moe_block",
        "final_logit_softcapping", "global_head_dim", "hidden_size_per_layer_input", "layer_types",
        "moe_intermediate_size", "num_experts", "num_global_key_value_heads",
        "num_kv_shared_layers", "sliding_window", "top_k_experts", "use_double_wide_mlp",
        "vocab_size_per_layer_input",
    ),
    read=_read,
    write=_write,
    names=names.GEMMA4,
    defaults={
        "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "global_head_dim": 512, "max_position_embeddings": 131_072,
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False,
        "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
        "num_kv_shared_layers": 0, "sliding_window": _WINDOW, "use_double_wide_mlp": False,
    },
    activation="hidden_activation",
    act=TANH,
    rope=lambda given: read_two_ropes(
        {**given, "rope_parameters": given.get("rope_parameters") or _ROPES}
    ),
)  # fmt: skip
