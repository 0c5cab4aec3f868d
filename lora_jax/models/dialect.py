"""Reading and writing config.json: the known fields, and the differences of each model type.

A field that could change results is never ignored: an unknown one is an error unless its value is
the neutral one. The fields `layer_types` and RoPE, which several families share, are read here.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lora_jax.hf.checkpoint import quantized
from lora_jax.hf.checkpoint.names import LLAMA, Family
from lora_jax.models.ranges import COUNT, check_range
from lora_jax.models.rope import scaling_from_hf, scaling_to_hf
from lora_jax.paths import nearest

ROPES = ("rope_scaling", "rope_parameters")  # the fields with an object of RoPE
PART = "partial_rotary_factor"  # the field of the rotated share of a head

# Fields about how a model was saved, trained or is served, which do not change its results.
IGNORED = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "bad_words_ids",
        "begin_suppress_tokens", "cache_implementation",
        "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_llama_config", "label2id",
        "max_length", "max_sequence_length", "min_length", "model_type", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
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


# Fields that can change results, with the values that do not.
NEUTRAL: Mapping[str, tuple] = {
    "add_cross_attention": (False,),
    "attention_bias": (False, None),
    "cross_attention_hidden_size": (None,),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False, None),
    "mlp_bias": (False, None),
    PART: (1.0, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}


SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
LINEAR = "linear_attention"


def read_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling, from the two fields before transformers 5 or its single one."""
    scaling = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"config: `rope_scaling` must be an object, got {scaling!r}")
    scaling = dict(scaling)
    # 0 is no default: it is refused with the other numbers.
    theta = next(
        (x for x in (scaling.pop("rope_theta", None), given.get("rope_theta")) if x is not None),
        10000.0,
    )
    # transformers 5 has it in `rope_parameters`; 1 is the whole head.
    if scaling.get(PART) == 1:
        del scaling[PART]
    context = given["max_position_embeddings"]
    theta = float(theta) if type(theta) is int else theta
    return {"rope_theta": theta, "rope_scaling": scaling_from_hf(scaling, context=context)}


def read_two_ropes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the rotary bases of full and of sliding blocks: flat fields, or one object for each.

    transformers 5 writes `rope_parameters` with an object for each kind of block.
    """
    nested = given.get("rope_parameters") or {}
    local_base = given.get("rope_local_base_freq")
    if not ({FULL, SLIDING} & set(nested)):
        full = read_rope(given)
        return {**full, "rope_local_base_freq": float(local_base or full["rope_theta"])}
    full = read_rope({**given, "rope_scaling": nested.get(FULL), "rope_parameters": None})
    local = read_rope(
        {
            **given,
            "rope_theta": local_base or given.get("rope_theta"),
            "rope_scaling": nested.get(SLIDING),
            "rope_parameters": None,
        }
    )
    if local["rope_scaling"] is not None:
        raise ValueError(
            "config: `rope_parameters` of type "
            f"`{local['rope_scaling'].rope_type}` in `{SLIDING}` are not supported"
        )
    return {**full, "rope_local_base_freq": local["rope_theta"]}


def write_two_ropes(config: Any) -> dict[str, Any]:
    """The reverse of `read_two_ropes`, as transformers 5 has them."""
    # Of the flat fields it takes the base for blocks without a window only.
    scaling = scaling_to_hf(config.rope_scaling) or {"rope_type": "default"}
    local = config.rope_local_base_freq or config.rope_theta
    ropes = {
        FULL: {**scaling, "rope_theta": config.rope_theta},
        SLIDING: {"rope_type": "default", "rope_theta": local},
    }
    return {"rope_parameters": ropes}


def without_mrope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RoPE that concern texts, of which the three positions of a token are equal."""
    images = ("mrope_section", "mrope_interleaved")
    plain = {name: value for name, value in rope.items() if name not in images}
    return {name: "default" if value == "mrope" else value for name, value in plain.items()}


def take_part(scaling: dict[str, Any], given: Mapping[str, Any], share: float) -> float:
    """Takes the rotated share of a head out of an object of RoPE; `share` where none is stated."""
    return scaling.pop(PART, None) or given.get(PART) or share


def read_partial_rope(given: Mapping[str, Any], share: float) -> dict[str, Any]:
    """As Llama's, plus the rotated share of a head, which is `share` where none is stated."""
    nested = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    part = take_part(nested, given, share)
    rest = {**given, "rope_parameters": nested, "rope_scaling": None}
    return {**read_rope(rest), PART: float(part)}


class Norms(NamedTuple):
    """The names of a block's norms, by their places; None is no norm there."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


# Llama's `post_attention_layernorm` precedes the MLP; Gemma 2's and OLMo 2's follow the attention.
BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
BOTH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)  # fmt: skip
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
# One norm for attention and MLP, which lie beside each other.
SHARED = Norms("input_layernorm", None, None, None)


def layer_norms(eps: float) -> dict[str, Any]:
    """The fields of norms that subtract the mean and add a bias, as GPT-2's."""
    return {"norm_centered": True, "norm_bias": True, "rms_norm_eps": eps}


class Kind(NamedTuple):
    """What sets the parameters of a block apart from those of another.

    Attributes:
      dense: its MLP is a dense one.
      linear: it has a gated delta net in place of attention.
      slides: it has a sliding window, where such blocks have heads of other sizes; else None.
      shares: it attends to the keys and values of an earlier block.
    """

    dense: bool
    linear: bool = False
    slides: bool | None = None
    shares: bool = False


class Modules(NamedTuple):
    """Hugging Face's names of modules that differ between families: by default Llama's."""

    decoder: str = "model"
    table: str = "embed_tokens"
    attention: str = "self_attn"
    mlp: str = "mlp"
    fused: str = "qkv_proj"
    output: str = "o_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    last_norm: str = "norm"
    shared: str = "shared_experts"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    head_norms_numbered: bool = False  # the norms of heads are modules of their own


class Routing(NamedTuple):
    """How experts are chosen in groups, see `lora_jax.models.experts.choose_grouped`.

    Attributes:
      groups: groups of experts of one size.
      chosen: groups that a token's experts come from.
      scale: factor of the weights.
      softmax: the weights are a softmax over all experts, in place of a sigmoid of each.
      statics: beside a softmax too there is a bias, of one row, which decides the choice alone.
    """

    groups: int
    chosen: int
    scale: float
    softmax: bool = False
    statics: bool = False

    @property
    def biased(self) -> bool:
        """Whether a bias decides the choice."""
        return self.statics or not self.softmax


class Dialect(NamedTuple):
    """How one model type's config.json differs from Llama's.

    Attributes:
      architecture: Hugging Face's class.
      fields: names in config.json that `read` understands beyond the plain ones.
      read: the raw object, with defaults -> values for `LlamaConfig`.
      write: the config -> the fields of config.json beyond the plain ones.
      defaults: what transformers assumes for fields that config.json leaves out.
      activation: the field that names the MLP's activation.
      act: what it is where config.json leaves it out.
      renamed_acts: activations that are another one here, by Hugging Face's name.
      rope: the raw object, with defaults -> the fields of `LlamaConfig` about RoPE.
      names: Hugging Face's names of the tensors.
    """

    architecture: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    defaults: Mapping[str, Any] = {}
    activation: str = "hidden_act"
    act: str = "silu"
    renamed_acts: Mapping[str, str] = {}
    rope: Callable[[Mapping[str, Any]], dict[str, Any]] = read_rope
    names: Family = LLAMA


ANY_OTHER = (
    "Any other model can be adapted as a function of its own parameters, with a name map for its "
    "checkpoint: see guides/name-map"
)


def unknown_type(kind: str, known: Collection[str]) -> ValueError:
    """The error of a model type that is not in a table."""
    return ValueError(
        f"config: model_type `{kind}` is not one of {', '.join(known)}; nearest: "
        f"{nearest(kind, known)}. {ANY_OTHER}"
    )


def refuse_unsupported(
    raw: Mapping[str, Any], known: Collection[str], neutral: Mapping[str, tuple] = NEUTRAL
) -> None:
    """Refuses what might change results and is not supported.

    Args:
      raw: the object in config.json.
      known: its fields that are read.
      neutral: fields that can change results, with the values that do not.

    Raises:
      ValueError: quantized weights of an unsupported kind, an unknown field, or another value of a
        neutral one.
    """
    if raw.get("quantization_config"):
        quantized.check_config(raw["quantization_config"])
    for name, value in raw.items():
        if name in IGNORED or name in known or name.startswith("_"):
            continue
        if name not in neutral and value is not None and name != "quantization_config":
            raise ValueError(
                f"config: field `{name}` = {value!r} is not known for model_type "
                f"`{raw['model_type']}` and may change its numbers; remove it if it does not"
            )
        if name in neutral and value not in neutral[name]:
            raise ValueError(f"config: `{name}` = {value!r} is not supported")


def check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuses fields that have another value than the one that the forward has.

    Raises:
      ValueError: one has; null is none.
    """
    for name, value in fixed.items():
        if raw.get(name, value) not in (value, None):
            raise ValueError(f"config: `{name}` = {raw[name]!r} is not supported, only {value!r}")


def tuple_of(ids: int | list[int] | None) -> tuple[int, ...]:
    """Token ids, from one, several or none."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def scalar_if_one(ids: tuple[int, ...]) -> int | list[int] | None:
    """The reverse of `tuple_of`."""
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def read_layer_types(raw: Mapping[str, Any], default: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each block whether it slides.

    Args:
      raw: the object in config.json.
      default: the value without a `layer_types`.

    Raises:
      ValueError: a kind of block that is neither sliding nor full.
    """
    if raw.get("layer_types") is None:
        return default
    for kind in raw["layer_types"]:
        if kind not in (SLIDING, FULL):
            raise ValueError(
                f"config: `layer_types` has `{kind}`, which is neither `{SLIDING}` nor `{FULL}`"
            )
    return tuple(kind == SLIDING for kind in raw["layer_types"])


def all_but_every(period: int, blocks: int) -> tuple[bool, ...]:
    """True but for every block whose number is a multiple of the period, counted from 1."""
    return tuple((block + 1) % period != 0 for block in range(blocks))


def read_windows(raw: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The window, and which blocks slide: as `layer_types` has them, or all but one of a period."""
    check_range("sliding_window_pattern", period, COUNT)
    default = all_but_every(period, raw["num_hidden_layers"])
    slides = read_layer_types(raw, default)
    return {"sliding_window": raw["sliding_window"], "sliding_layers": slides}


def write_windows(config: Any) -> dict[str, Any]:
    """The reverse of `read_windows`."""
    return {"sliding_window": config.sliding_window, "layer_types": write_layer_types(config)}


def write_layer_types(config: Any) -> list[str]:
    """The reverse of `read_layer_types`."""
    return [SLIDING if slides else FULL for slides in config.mixing.slides]
