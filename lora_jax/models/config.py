"""What a decoder of the Llama family is made of, from and to Hugging Face's config.json.

A field that could change numbers is never passed over: one that is not known here is an error
unless its value is the neutral one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_jax.models.rope import RopeScaling, scaling_from_hf, scaling_to_hf

# Fields that say how a model was saved, trained or is served; they do not change its numbers.
IGNORED = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_llama_config", "label2id",
        "max_length", "max_sequence_length", "min_length", "model_type", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "prefix", "problem_type", "remove_invalid_values",
        "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
        "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k",
        "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version",
        "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "do_sample",
        "early_stopping", "diversity_penalty", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "length_penalty", "pretraining_tp",
        "suppress_tokens",
    }
)  # fmt: skip

# Fields that would change numbers, with the values that do not.
NEUTRAL: Mapping[str, tuple] = {
    "add_cross_attention": (False,),
    "attention_dropout": (0, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder of the Llama family; named as Hugging Face names it where it has a name.

    Attributes:
      model_type: the family, a key of `lora_jax.models.families.FAMILIES`.
      vocab_size: tokens the embedding knows.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_hidden_layers: blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; each serves as many query heads.
      head_dim: size of one head.
      max_position_embeddings: the context, in tokens.
      rms_norm_eps: added to the mean square before the root.
      rope_theta: base wavelength of the rotary embedding.
      rope_scaling: how the rotary embedding reaches beyond its trained context, or None.
      tie_word_embeddings: the output head is the embedding table.
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      qk_norm: queries and keys are normalized head by head.
      sliding_window: tokens a token sees, itself included, or None for all before it.
      bos_token_id, pad_token_id: or None.
      eos_token_ids: the tokens that end a text.
      initializer_range: standard deviation of fresh weights.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in _SIZES:
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"config: `{name}` must be a whole number above 0, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: `num_attention_heads` ({self.num_attention_heads}) is not a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: `head_dim` must be even for RoPE, got {self.head_dim}")

    @property
    def context(self) -> int:
        """Tokens a text may have: dynamic and linear scaling stretch the stated context."""
        scaling = self.rope_scaling
        stretches = scaling is not None and scaling.rope_type in ("dynamic", "linear")
        return int(self.max_position_embeddings * (scaling.factor if stretches else 1))

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the object in config.json.

        Raises:
          ValueError: a family that is not known, a size that is missing, or a field that changes
            numbers in a way that is not supported.
        """
        from lora_jax.models.families import FAMILIES

        kind = str(raw.get("model_type"))
        if kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"config: model_type `{kind}` is not one of {known}")
        return _from_hf(raw, FAMILIES[kind])

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json; `from_hf` reads it back unchanged."""
        from lora_jax.models.families import FAMILIES

        out = {name: getattr(self, name) for name in _PLAIN}
        out["eos_token_id"] = _scalar_if_one(self.eos_token_ids)
        out["rope_scaling"] = scaling_to_hf(self.rope_scaling)
        family = FAMILIES[self.model_type]
        fixed = {"architectures": [family.architecture], "hidden_act": "silu"}
        return {**out, **fixed, **family.write(self)}


class Family(NamedTuple):
    """How one model type differs from Llama.

    Attributes:
      architecture: Hugging Face's class.
      fields: names in config.json that `read` understands beyond the plain ones.
      read: the raw object -> values for `LlamaConfig`.
      write: the config -> what config.json says beyond the plain fields.
      defaults: what transformers assumes for plain fields that config.json leaves out.
    """

    architecture: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[LlamaConfig], dict[str, Any]]
    defaults: Mapping[str, Any] = {}


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_PLAIN = (
    "model_type", *_SIZES, "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id",
    "pad_token_id", "initializer_range",
)  # fmt: skip
_READ = (*_PLAIN, "rope_scaling", "rope_parameters", "eos_token_id", "hidden_act")
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


def _from_hf(raw: Mapping[str, Any], family: Family) -> LlamaConfig:
    _refuse_unsupported(raw, family)
    given = {**family.defaults, **{k: v for k, v in raw.items() if v is not None}}
    if missing := [name for name in _REQUIRED if name not in given]:
        raise ValueError(f"config: config.json lacks {', '.join(f'`{m}`' for m in missing)}")
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    plain = {name: given[name] for name in _PLAIN if name in given}
    theta, scaling = _rope(given)
    return LlamaConfig(
        **{**plain, "rope_theta": theta, "rope_scaling": scaling},
        eos_token_ids=_tuple(given.get("eos_token_id")),
        **family.read(given),
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: Family) -> None:
    if raw.get("quantization_config"):
        kind = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"config: the weights are quantized (`quantization_config`, method `{kind}`), which "
            "cannot be read; load the unquantized model"
        )
    if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"config: `hidden_act` `{act}` is not supported, only `silu`")
    for name, value in raw.items():
        if name in IGNORED or name in _READ or name in family.fields or name.startswith("_"):
            continue
        if name not in NEUTRAL and value is not None and name != "quantization_config":
            raise ValueError(
                f"config: field `{name}` = {value!r} is not known for model_type "
                f"`{raw['model_type']}` and may change its numbers; remove it if it does not"
            )
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise ValueError(f"config: `{name}` = {value!r} is not supported")


def _rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from the old pair of fields or from transformers 5's one."""
    scaling = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or given.get("rope_theta") or 10000.0
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    context = given["max_position_embeddings"]
    return float(theta), scaling_from_hf(scaling, context=context)


def _tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _scalar_if_one(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)
