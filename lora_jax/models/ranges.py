"""The kinds and ranges of config.json's fields, checked before anything is computed from them.

Ranges are wider than any public checkpoint: what is outside is a damaged file, which would end in
an error far from its cause, or fill the memory.
"""

from collections.abc import Collection, Mapping
from dataclasses import Field, fields
from typing import Any, NamedTuple

from lora_jax.config.arguments import kind_of


class Range(NamedTuple):
    """The numbers that a field may have, both ends included."""

    least: float
    most: float
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.least:g} to {self.most:g}"


_SIZE = Range(1, 2**31 - 1, whole=True)
# Counts of what a value is held for, which must not fill the memory.
COUNT = Range(1, 100_000, whole=True)
_EPSILON, _SHARE, _RATE = Range(0, 1), Range(1e-6, 1), Range(0, 1)
_FACTOR, _WEIGHT, _BASE = Range(1e-6, 1e6), Range(0, 1e6), Range(1, 1e15)

# By their names in config.json, of which GPT-2, DistilBERT and GPT-NeoX have some of their own.
RANGES: Mapping[str, Range] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim",
         "intermediate_size_mlp", "global_head_dim", "num_global_key_value_heads",
         "vocab_size_per_layer_input",
         "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
         "shared_expert_intermediate_size", "n_shared_experts", "linear_conv_kernel_dim",
         "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
         "linear_num_value_heads", "attention_chunk_size", "floor_scale",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
         "original_max_position_embeddings", "initial_context_length", "num_labels", "n_positions",
         "n_ctx", "n_embd", "n_head", "n_inner", "embedding_size", "dim", "hidden_dim", "n_heads"),
        _SIZE),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_experts", "num_local_experts",
         "num_experts_per_tok", "experts_per_token", "no_rope_layer_interval", "n_routed_experts",
         "n_group", "topk_group", "decoder_sparse_step", "full_attention_interval",
         "interleave_moe_layer_step", "top_k_experts"), COUNT),
    # 0: blocks are given nothing, or share nothing.
    "hidden_size_per_layer_input": Range(0, 2**31 - 1, whole=True),
    "num_kv_shared_layers": Range(0, COUNT.most, whole=True),
    "type_vocab_size": Range(0, 2**31 - 1, whole=True),  # 0: tokens have no types
    "first_k_dense_replace": Range(0, COUNT.most, whole=True),
    # 0 in EXAONE 4's files without windows.
    "sliding_window_pattern": Range(0, COUNT.most, whole=True),
    # 0 in files whose `use_sliding_window` is false.
    "sliding_window": Range(0, 2**31 - 1, whole=True),
    "max_window_layers": Range(0, 2**31 - 1, whole=True),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), _EPSILON),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rotary_emb_base"), _BASE),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _SHARE),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv",
         "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
         "attention_multiplier", "routed_scaling_factor", "swiglu_limit", "swiglu_alpha",
         "low_freq_factor", "high_freq_factor", "attention_factor"), _FACTOR),
    **dict.fromkeys(
        ("num_nextn_predict_layers", "num_mtp_layers"), Range(0, COUNT.most, whole=True)),
    "factor": Range(1, 1e6),
    **dict.fromkeys(
        ("initializer_range", "router_aux_loss_coef", "attn_scale", "beta_fast", "beta_slow",
         "mscale", "mscale_all_dim"), _WEIGHT),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "residual_dropout", "classifier_dropout",
         "embedding_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
         "embd_pdrop", "attn_pdrop", "dropout", "qa_dropout", "seq_classif_dropout"), _RATE),
    # -1 is written for "none".
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), Range(-1, 2**31 - 1, whole=True)),
}  # fmt: skip
# Numbers, each within the range.
_LISTS = {"short_factor": _FACTOR, "long_factor": _FACTOR}
_FLAGS = (
    "attention_bias", "attention_out_bias", "mlp_bias", "norm_topk_prob", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "truncate", "use_bias",
    "use_parallel_residual", "use_sliding_window", "qkv_bias", "rope_interleave", "use_qk_norm",
    "attention_k_eq_v", "qk_layernorm", "use_post_norm", "enable_moe_block", "use_double_wide_mlp",
)  # fmt: skip
_ROPES = ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention")
_OBJECTS = ("id2label", "per_layer_config", *_ROPES)
_LISTED = (
    "architectures",
    "layer_types",
    "mlp_layer_types",
    "mlp_only_layers",
    "moe_layers",
    "no_rope_layers",
    *_LISTS,
)


def check_range(name: str, value: Any, allowed: Range, prefix: str = "config: ") -> None:
    """Refuses a value outside a range.

    Raises:
      ValueError: it is outside, or no number.
    """
    # `type`, not `isinstance`: JSON's true is an `int` of Python. NaN fails both comparisons.
    number = type(value) is int or (type(value) is float and not allowed.whole)
    if not number or not allowed.least <= value <= allowed.most:
        raise ValueError(f"{prefix}`{name}` must be {allowed}, got {_short(value)}")


def check_object(raw: Any) -> None:
    """Checks that what a configuration is read from is config.json's object, and no path or text.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(raw, Mapping):
        raise TypeError(
            f"`raw` must be the object in config.json, got {kind_of(raw)}: pass "
            "`json.loads(path.read_text())`"
        )


def check_raw(
    raw: Mapping[str, Any], known: Collection[str] = (), prefix: str = "config: "
) -> None:
    """Checks the fields of an object of config.json, and of the objects inside; null is a default.

    Args:
      raw: the object.
      known: the fields that are read; all of them by default.
      prefix: the start of an error.

    Raises:
      ValueError: a number outside its range, or a value of another kind.
    """
    for name, value in raw.items():
        if value is None or (known and name not in known):
            continue
        for names, kind, expected in (
            (_FLAGS, bool, "true or false"),
            (_OBJECTS, Mapping, "an object"),
            (_LISTED, list | tuple, "a list"),
        ):
            if name in names and not isinstance(value, kind):
                raise ValueError(f"{prefix}`{name}` must be {expected}, got {_short(value)}")
        allowed = _LISTS.get(name) or RANGES.get(name)
        if name in _ROPES:
            check_raw(value, prefix=f"{prefix}`{name}`: ")
        # EXAONE 4 spells its pattern, "LLLG".
        elif allowed and not (name == "sliding_window_pattern" and isinstance(value, str)):
            several = name in (*_LISTS, "eos_token_id") and isinstance(value, list | tuple)
            for one in value if several else (value,):
                check_range(name, one, allowed, prefix)


def check_fields(config: Any, names: Mapping[str, str] | None = None) -> None:
    """Checks the fields of a configuration; None is valid where it is the default.

    Args:
      config: a dataclass.
      names: its fields that have other names in config.json.

    Raises:
      ValueError: a number outside its range, or a flag that is none.
    """
    for field in fields(config):
        value: Any = getattr(config, field.name)
        name = (names or {}).get(field.name, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ValueError(f"config: `{name}` must be true or false, got {_short(value)}")
        if field.name == "eos_token_ids":
            for one in config.eos_token_ids:
                check_range("eos_token_id", one, RANGES["eos_token_id"])
        # GPT-2's three rates are one field.
        elif name in RANGES and not isinstance(value, tuple) and not _is_default(value, field):
            check_range(name, value, RANGES[name])


def _is_default(value: Any, field: Field) -> bool:
    # BERT's padding has a default, and may be none all the same.
    return value is None and (field.default is None or field.name.endswith("_token_id"))


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def check_rotation(config: Any) -> None:
    """Checks that the rotated dims of a head are pairs."""
    dims, share = config.rotary_dim, config.partial_rotary_factor
    if dims and dims % 2 == 0:
        return
    expected = f"rotates {dims} dims of a head, expected an even number above 0"
    if config.qk_rope_head_dim:
        raise ValueError(f"config: `qk_rope_head_dim` {expected}")
    if share == 1.0:
        raise ValueError(
            f"config: `head_dim` {expected}; where it is not stated it is `hidden_size` / "
            "`num_attention_heads`"
        )
    near = max(2, dims + dims % 2) / config.head_dim
    raise ValueError(
        f"config: `partial_rotary_factor` (`rotary_pct`) {share:g} of `head_dim` {config.head_dim} "
        f"{expected}; {near:g} does"
    )
