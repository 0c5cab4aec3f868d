"""Llama (SmolLM2 and many others with it) and families that add a few fields to it.

Mistral adds a window, Ministral one in some blocks, SmolLM3 blocks that do not rotate queries and
keys, Granite factors, Seed-OSS a bias of its own on the output, Arcee an MLP without a gate.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import Dialect, all_but_every, read_layer_types, write_windows

FACTORS = (
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier",
)  # fmt: skip
_ROTATES = ("no_rope_layers", "no_rope_layer_interval")


def _read_llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _write_llama(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_ministral(raw: Mapping[str, Any]) -> dict[str, Any]:
    slides = read_layer_types(raw, (True,) * raw["num_hidden_layers"])
    return {"sliding_window": raw["sliding_window"], "sliding_layers": slides}


def _read_smollm3(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("use_sliding_window") or any(read_layer_types(raw, ())):
        raise ValueError("config: `use_sliding_window` is not supported for `smollm3`")
    return {**_read_llama(raw), "rope_layers": read_rotating(raw)}


def read_rotating(raw: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each block whether it rotates. Despite its name, `no_rope_layers` has 1 for those."""
    layers = raw.get("no_rope_layers")
    if layers is None:
        layers = all_but_every(raw["no_rope_layer_interval"], raw["num_hidden_layers"])
    if any(rotates not in (0, 1) for rotates in layers):
        raise ValueError(f"config: `no_rope_layers` must list 0 or 1, got {layers!r}")
    return tuple(bool(rotates) for rotates in layers)


def write_rotating(config: Any) -> dict[str, Any]:
    """The reverse of `read_rotating`."""
    rotates = config.rope_layers or (True,) * config.num_hidden_layers
    return {"no_rope_layers": [int(x) for x in rotates]}


def _write_smollm3(config: Any) -> dict[str, Any]:
    return {**_write_llama(config), **write_rotating(config)}


def _read_granite(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**_read_llama(raw), **{name: float(raw[name]) for name in FACTORS}}


def _write_granite(config: Any) -> dict[str, Any]:
    return {**_write_llama(config), **{name: getattr(config, name) for name in FACTORS}}


def _read_seed_oss(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**_read_llama(raw), "o_bias": bool(raw["attention_out_bias"])}


def _write_seed_oss(config: Any) -> dict[str, Any]:
    return {**_write_llama(config), "attention_out_bias": config.o_bias}


LLAMA = Dialect(
    architecture="LlamaForCausalLM",
    fields=("attention_bias", "mlp_bias"),
    read=_read_llama,
    write=_write_llama,
)

MISTRAL = Dialect(
    architecture="MistralForCausalLM",
    fields=("sliding_window",),
    read=lambda raw: {"sliding_window": raw["sliding_window"]},
    write=lambda config: {"sliding_window": config.sliding_window},
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)

MINISTRAL = Dialect(
    architecture="MinistralForCausalLM",
    fields=("layer_types", "sliding_window"),
    read=_read_ministral,
    write=write_windows,
    defaults=MISTRAL.defaults,
)

SMOLLM3 = Dialect(
    architecture="SmolLM3ForCausalLM",
    fields=(
        *LLAMA.fields,
        *_ROTATES,
        "layer_types",
        "max_window_layers",
        "sliding_window",
        "use_sliding_window",
    ),
    read=_read_smollm3,
    write=_write_smollm3,
    defaults={
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
)

GRANITE = Dialect(
    architecture="GraniteForCausalLM",
    fields=(*LLAMA.fields, *FACTORS),
    read=_read_granite,
    write=_write_granite,
    defaults={**dict.fromkeys(FACTORS, 1.0), "bos_token_id": 1, "eos_token_id": 2},
)

SEED_OSS = Dialect(
    architecture="SeedOssForCausalLM",
    fields=(*LLAMA.fields, "attention_out_bias", "residual_dropout"),
    read=_read_seed_oss,
    write=_write_seed_oss,
    defaults={
        "attention_bias": True,
        "attention_out_bias": False,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
)

ARCEE = Dialect(
    architecture="ArceeForCausalLM",
    fields=LLAMA.fields,
    read=lambda raw: {**_read_llama(raw), "gated_mlp": False},
    write=_write_llama,
    defaults={"rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128001},
    act="relu2",
)
