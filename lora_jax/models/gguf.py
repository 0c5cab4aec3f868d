"""The configuration that a GGUF file's metadata states.

llama.cpp's architecture `llama` covers Llama, SmolLM2, Mistral and Mixtral. A key of the
architecture that is not known here is an error: it may change the numbers.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.hf.gguf.architectures import (
    GGUF_ARCHITECTURES,
    GgufArchitecture,
    gguf_architecture,
)
from lora_jax.hf.gguf.fields import SIGMOID, Stated, short
from lora_jax.hf.gguf.file import open_gguf, rope_divisors
from lora_jax.hf.gguf.names import ARCHITECTURE_OF, Base, base_from_hf, read_base
from lora_jax.hf.gguf.places import MOST_BLOCKS
from lora_jax.hf.gguf.weights import weights_of
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.config import LlamaConfig
from lora_jax.models.gpt2 import GPT2Config
from lora_jax.models.model import Model
from lora_jax.models.registry import config_from_hf
from lora_jax.models.rope import RopeScaling, scaling_to_hf, static_frequencies

# Keys of the architecture, without its prefix -> the fields of config.json.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_NUMBERS = (
    "rope.freq_base", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
_UNDERSTOOD = frozenset(
    {
        *_SIZES,
        *_NUMBERS,
        "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "rope.dimension_count", "rope.scaling.type", "rope.scaling.finetuned", "vocab_size",
        "expert_count", "expert_used_count", "expert_gating_func",
        # Converters write the one that config.json has, whichever the architecture reads.
        "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
    }
)  # fmt: skip
# What `expert_gating_func` has for the families with grouped experts (sigmoid), and for others.
_GATING: Mapping[str, int] = {"dots1": SIGMOID, "glm4_moe": SIGMOID}


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    path: Path,
    divisors: np.ndarray | None = None,
) -> LlamaConfig | GPT2Config | BertConfig:
    """The configuration of the model in a GGUF file.

    Args:
      metadata: the file's keys.
      shapes: its tensors' shapes under Hugging Face's names; they show biases, a tied head and
        the size of the vocabulary.
      path: the file, for messages.
      divisors: the tensor `rope_freqs`, if there: what llama3 divides each frequency by.

    Raises:
      ValueError: a size missing, or a key that may change the numbers.
    """
    kind = gguf_architecture(metadata, path)
    row = GGUF_ARCHITECTURES[kind]
    facts = {k[len(kind) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{kind}.")}
    model_type, keys = row.model_type, row.keys
    # llama.cpp has Mixtral as a Llama with experts.
    if kind == "llama" and facts.get("expert_count"):
        model_type = "mixtral"
        keys = {
            **keys,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        }
    _check(facts, keys, row, path)
    table = f"{row.outer[0]}.weight"
    if table not in shapes:
        raise ValueError(f"{path}: the tensor `token_embd.weight` is missing")
    heads, tokens = facts["attention.head_count"], metadata.get("tokenizer.ggml.eos_token_id")
    head_dim = facts.get("attention.key_length", facts["embedding_length"] // heads)
    rotary = facts.get("rope.dimension_count", head_dim)
    own = _otherwise(row, Stated(facts, shapes, divisors), path)
    if rotary != head_dim and row.rotary is None and "qk_rope_head_dim" not in own:
        raise ValueError(f"{path}: RoPE over a part of each head is not supported")
    theta = float(facts.get("rope.freq_base", 10000.0))
    # Llama 3's files hold the divisors of each frequency instead of keys that describe them.
    scaling = _scaling(facts, path)
    if divisors is not None and "rope_parameters" not in own:
        scaling = _llama3(divisors, head_dim, theta, path)
    read = {field: facts[key] for key, field in keys.items() if key in facts}
    if read.get("sliding_window") == 0:  # Phi-4 has none
        del read["sliding_window"]
    read = {field: short(x) if isinstance(x, float) else x for field, x in read.items()}
    if row.rotary is not None:
        read[row.rotary] = rotary / head_dim
    if row.whole_at is not None:
        whole = facts["block_count"] == row.whole_at
        read["query_pre_attn_scalar"] = facts["embedding_length"] // heads if whole else head_dim
    raw: dict[str, Any] = dict(
        model_type=model_type,
        **{ours: facts[key] for key, ours in _SIZES.items() if key in facts},
        vocab_size=shapes[table][0],
        num_key_value_heads=facts.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        eos_token_id=tokens,
        # No key states it: the tensors show it.
        tie_word_embeddings=f"{row.outer[1]}.weight" not in shapes,
        **{**row.fixed, **read},
    )
    if scaling is not None:
        raw["rope_scaling"] = scaling_to_hf(scaling)
    raw["num_hidden_layers"] -= read.get("num_nextn_predict_layers", 0)
    raw |= own
    raw = {name: x for field, x in raw.items() if (name := row.renamed.get(field, field))}
    try:
        config = config_from_hf(raw)
        if row.encoder:
            return dataclasses.replace(config, pooler=False)
        if not isinstance(config, LlamaConfig):
            return config
        return _with_tensors(config, shapes, row.stack)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_config(path: Path) -> LlamaConfig | GPT2Config | BertConfig:
    """The configuration of the model in a GGUF file, of which the header and `rope_freqs` are read.

    Raises:
      ValueError: as `open_gguf` and `config_of`.
    """
    file = open_gguf(path)
    shapes, divisors = weights_of(file).shapes, rope_divisors(file)
    return config_of(file.metadata, shapes, path=path, divisors=divisors)


def _otherwise(row: GgufArchitecture, stated: Stated, path: Path) -> dict[str, Any]:
    """The fields that the architecture's own function reads."""
    try:
        return row.read(stated) if row.read else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _with_tensors(config: LlamaConfig, shapes: Mapping[str, Any], stack: str) -> LlamaConfig:
    """What no key states, and tensors show: biases and norms of queries and keys."""
    names = config.modules

    def has(*modules: str) -> bool:
        blocks = range(config.num_hidden_layers)
        return any(f"{stack}.{i}.{module}" in shapes for i in blocks for module in modules)

    attention = names.attention
    return dataclasses.replace(
        config,
        qkv_bias=has(f"{attention}.q_proj.bias", f"{attention}.{names.fused}.bias"),
        qk_norm=has(f"{attention}.q_norm.weight"),
        o_bias=has(f"{attention}.{names.output}.bias"),
        mlp_bias=has(f"mlp.{names.up}.bias"),
    )


def _check(
    facts: Mapping[str, Any], keys: Mapping[str, str], row: GgufArchitecture, path: Path
) -> None:
    epsilon = next(key for key in keys if key.endswith("epsilon"))
    needed = [key for key in (*_SIZES, epsilon) if key not in row.own]
    if missing := [key for key in needed if key not in facts]:
        raise ValueError(f"{path}: metadata lacks {', '.join(f'`{m}`' for m in missing)}")
    for key in (*_SIZES, "attention.head_count_kv", "attention.key_length"):
        if type(facts.get(key, 1)) is not int and not isinstance(facts[key], list):
            raise ValueError(f"{path}: `{key}` must be a whole number, got {facts[key]!r}")
    if isinstance(blocks := facts.get("block_count"), int) and blocks > MOST_BLOCKS:
        raise ValueError(f"{path}: `block_count` is {blocks}, above {MOST_BLOCKS:,}: a broken file")
    for key in (*_NUMBERS, *keys):
        if not isinstance(facts.get(key, 1), int | float):
            raise ValueError(f"{path}: `{key}` must be a number, got {facts[key]!r}")
    for key, value in facts.items():
        if key not in _UNDERSTOOD and key not in keys and key not in row.own:
            raise ValueError(
                f"{path}: metadata key `{key}` = {str(value)[:60]} is not known and may change "
                "the model's numbers"
            )
        if isinstance(value, list) and key not in row.own:
            raise ValueError(f"{path}: `{key}` differs from block to block, which is not supported")
    if any(np.min(facts.get(f"attention.head_count{end}", 1)) < 1 for end in ("", "_kv")):
        raise ValueError(f"{path}: `attention.head_count` and `_kv` must be above 0")
    if facts.get("expert_count", 0) and "expert_count" not in (*keys, *row.own):
        raise ValueError(f"{path}: a mixture of {facts['expert_count']} experts is not supported")
    gating = facts.get("expert_gating_func")
    wanted = _GATING.get(row.model_type, 1)
    if "expert_gating_func" not in row.own and gating not in (None, wanted):
        raise ValueError(f"{path}: `expert_gating_func` is {gating}, only {wanted} is supported")
    value = None if "attention.value_length" in row.own else facts.get("attention.value_length")
    if value not in (None, facts.get("attention.key_length")):
        raise ValueError(f"{path}: keys and values of different sizes are not supported")


def _scaling(facts: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = facts.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = facts.get("rope.scaling.factor")
    if kind == "linear" and factor:
        return RopeScaling(rope_type="linear", factor=float(factor))
    # DeepSeek's two scales are equal; the converter writes a tenth of one.
    tenth = facts.get("rope.scaling.yarn_log_multiplier")
    length = None if tenth is None else short(short(tenth) * 10)
    if kind == "yarn" and factor and "rope.scaling.original_context_length" in facts:
        return RopeScaling(
            rope_type="yarn",
            factor=float(factor),
            original_max_position_embeddings=facts["rope.scaling.original_context_length"],
            beta_fast=facts.get("rope.scaling.yarn_beta_fast"),
            beta_slow=facts.get("rope.scaling.yarn_beta_slow"),
            mscale=length,
            mscale_all_dim=length,
        )
    raise ValueError(f"{path}: RoPE scaling of type `{kind}` is not supported")


def _llama3(divisors: np.ndarray, head_dim: int, theta: float, path: Path) -> RopeScaling:
    """The llama3 scaling with these divisors of the frequencies."""
    # The slowest plane has the whole factor. The edges are those of every release of Llama 3 and of
    # Llama 4; divisors from other ones are refused below.
    plain = static_frequencies(head_dim, theta, None)
    for edge in (4.0, 1.0) if divisors.shape == plain.shape else ():
        scaling = RopeScaling(
            rope_type="llama3",
            factor=float(divisors.max()),
            low_freq_factor=1.0,
            high_freq_factor=edge,
            original_max_position_embeddings=8192,
        )
        if np.allclose(plain / divisors, static_frequencies(head_dim, theta, scaling), rtol=1e-4):
            return scaling
    raise ValueError(
        f"{path}: the tensor `rope_freqs.weight` is not that of a Llama, not supported"
    )


def base_of(model: Any) -> Base:
    """The base of a model of `lora_jax.models`, or of a configuration.

    Only a model that came from a GGUF file shows whether its experts are one tensor there.
    """
    config = model.config if isinstance(model, Model) else model
    raw, wrapper = config.to_hf(), getattr(config, "wrapper", None)
    # llama.cpp has architectures of its own for some decoders of images and texts.
    base = base_from_hf({**raw, "model_type": wrapper} if wrapper in ARCHITECTURE_OF else raw)
    source = model.checkpoint if isinstance(model, Model) else None
    if source is None or source.suffix != ".gguf":
        return base
    there = read_base(source)
    return base._replace(fused=there.fused, fused_qkv=there.fused_qkv)
