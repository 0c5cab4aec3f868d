"""OLMo 1 to 3, and EXAONE 4: norms without parameters, or after attention and MLP.

OLMo 1 has the former. OLMo 2 normalizes the queries, and the keys, of all heads together; OLMo 3
adds a window in three of four blocks, whose rotations are not scaled. EXAONE 4 normalizes them head
by head, and in models with windows only blocks with one rotate.

Sources: arXiv:2402.00838, arXiv:2501.00656, arXiv:2507.11407.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import (
    AFTER,
    Dialect,
    check_fixed,
    read_two_ropes,
    read_windows,
    write_two_ropes,
    write_windows,
)

# Every fourth block has no window.
_PERIOD = 4
_THETA = 5e5  # OLMo 3's rotary base
_OLMO = {"norms": AFTER, "qk_norm": True, "qk_norm_whole": True}


_PLAIN = {"layer_norm_eps": 1e-5}  # of norms without parameters, a constant there


def _read_olmo(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, _PLAIN)
    bias = bool(raw.get("attention_bias", False))
    return {
        "norm_centered": True,
        "norm_plain": True,
        "rms_norm_eps": _PLAIN["layer_norm_eps"],
        "clip_qkv": raw.get("clip_qkv"),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _read_olmo2(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {**_OLMO, "qkv_bias": bias, "o_bias": bias}


def _write_olmo2(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _write_olmo3(config: Any) -> dict[str, Any]:
    out = {**_write_olmo2(config), **write_windows(config)}
    local, full = config.rope_local_base_freq, config.rope_theta
    if local in (None, _THETA) and full == _THETA:
        return out
    return {**out, **write_two_ropes(config)}


def _read_exaone4(raw: Mapping[str, Any]) -> dict[str, Any]:
    common = {"norms": AFTER, "qk_norm": True}
    if raw["sliding_window"] is None:
        return common
    pattern = raw["sliding_window_pattern"]
    if isinstance(pattern, str):  # "LLLG": one letter a block of a period, G without a window
        if not pattern or pattern != "L" * (len(pattern) - 1) + "G":
            raise ValueError(
                f"config: `sliding_window_pattern` = {pattern!r} is not supported, only a number "
                'or letters as in "LLLG"'
            )
        pattern = len(pattern)
    windows = read_windows(raw, pattern)
    return {**common, **windows, "rope_layers": windows["sliding_layers"]}


OLMO = Dialect(
    architecture="OlmoForCausalLM",
    fields=("attention_bias", "clip_qkv", *_PLAIN),
    read=_read_olmo,
    write=lambda config: {**_write_olmo2(config), "clip_qkv": config.clip_qkv},
    defaults={"pad_token_id": 1, "eos_token_id": 50279},
)

OLMO2 = Dialect(
    architecture="Olmo2ForCausalLM",
    fields=("attention_bias",),
    read=_read_olmo2,
    write=_write_olmo2,
    defaults={"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50279},
)

OLMO3 = Dialect(
    architecture="Olmo3ForCausalLM",
    fields=("attention_bias", "layer_types", "sliding_window"),
    read=lambda raw: {**_read_olmo2(raw), **read_windows(raw, _PERIOD)},
    write=_write_olmo3,
    defaults={**OLMO2.defaults, "rope_theta": _THETA, "sliding_window": 4096},
    rope=read_two_ropes,
)

EXAONE4 = Dialect(
    architecture="Exaone4ForCausalLM",
    fields=("layer_types", "sliding_window", "sliding_window_pattern"),
    read=_read_exaone4,
    write=write_windows,
    defaults={
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": _PERIOD,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
)
