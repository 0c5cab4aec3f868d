"""The fields of config.json that Llama-like decoders share, read.

A field that could change results is never ignored: an unknown one is an error unless its value is
the neutral one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_jax.models.classifier import read_classes
from lora_jax.models.dialect import Dialect, refuse_unsupported, tuple_of
from lora_jax.models.ranges import check_raw

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
PLAIN = (
    "model_type", *_SIZES, "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id",
    "pad_token_id", "initializer_range",
)  # fmt: skip
# The dropout is for training from the start; an adapter has its own.
_READ = (*PLAIN, "rope_scaling", "rope_parameters", "eos_token_id", "attention_dropout")


# Fields where null means "none", not "the default".
_MAYBE_NONE = ("bos_token_id", "pad_token_id", "eos_token_id")
_MAY_LACK = (
    *_MAYBE_NONE, "attn_logit_softcapping", "clip_qkv", "final_logit_softcapping",
    "hidden_size_per_layer_input", "q_lora_rank", "sliding_window",
)  # fmt: skip
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


def read_fields(raw: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The fields of a `LlamaConfig`, from the object in config.json.

    Raises:
      ValueError: a missing size, or a field whose value changes results and is not supported.
    """
    known = (*_READ, *dialect.fields, dialect.activation)
    refuse_unsupported(raw, known)
    check_raw(raw, known)
    # Some of a family's own fields are null on purpose (no window, no cap).
    set_ = {k: v for k, v in raw.items() if v is not None or k in _MAY_LACK}
    with_nulls = {**dialect.defaults, **set_}
    given = {**dialect.defaults, **{k: v for k, v in raw.items() if v is not None}}
    given.update({name: with_nulls[name] for name in _MAYBE_NONE if name in with_nulls})
    if missing := [name for name in _REQUIRED if name not in given]:
        raise ValueError(f"config: config.json lacks {', '.join(f'`{m}`' for m in missing)}")
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    fields = {name: given[name] for name in PLAIN if name in given}
    act = given.get(dialect.activation, dialect.act)
    fields |= {"hidden_activation": dialect.renamed_acts.get(act, act)}
    fields |= {"eos_token_ids": tuple_of(given.get("eos_token_id"))}
    own = {**dialect.rope(given), **dialect.read(with_nulls), **read_classes(raw)}
    return {**fields, **own}


def with_plain_windows(config: Any) -> Any:
    """The same windows in one form, so that equal models have equal configurations."""
    if config.rope_layers is not None and all(config.rope_layers):
        config = replace(config, rope_layers=None)
    slides = config.mixing.slides
    if config.sliding_window is None or not any(slides):
        return replace(config, sliding_window=None, sliding_layers=None)
    if config.rope_layers not in (None, slides):
        raise ValueError(
            "config: where some blocks do not rotate, those with a window must be those that do"
        )
    return replace(config, sliding_layers=None if all(slides) else slides)
