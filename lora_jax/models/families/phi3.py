"""Phi-3 (and Phi-4 mini): fused projections, a partly rotated head, LongRoPE.

Source: arXiv:2404.14219. The extension factor of LongRoPE is the ratio of the two contexts,
whatever `factor` a config.json has, as in transformers.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.dialect import PART, Dialect, read_rope, take_part
from lora_jax.models.rope import RopeScaling, scaling_to_hf

_TRAINED = "original_max_position_embeddings"


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("resid_pdrop", "embd_pdrop"):
        if raw.get(name):
            raise ValueError(f"config: `{name}` = {raw[name]!r} is not supported")
    return {
        "fused_projections": True,
        "fused_mlp": True,
        "sliding_window": raw.get("sliding_window"),
    }


def _read_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """As Llama's, plus the rotated share of a head and the trained context at the top level."""
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    scaling = dict(given.get(name) or {})
    part = take_part(scaling, given, 1.0)
    kind = scaling.pop("type", None) or "default"
    kind = scaling.pop("rope_type", kind)
    if kind == "default":
        scaling.pop(_TRAINED, None)
    else:
        stated = scaling.setdefault(_TRAINED, given[_TRAINED])
        if stated != given[_TRAINED]:
            raise ValueError(f"config: `{_TRAINED}` is {given[_TRAINED]}, but {stated} in `{name}`")
        kind = "longrope"  # old files name it "su" or "yarn"
    scaling = {**scaling, "rope_type": kind}
    read = read_rope({**given, "rope_scaling": scaling, "rope_parameters": None})
    _check_planes(read["rope_scaling"], int(given["head_dim"] * part) // 2)
    return {**read, PART: part}


def _check_planes(scaling: RopeScaling | None, planes: int) -> None:
    if scaling is None:
        return
    for name in ("short_factor", "long_factor"):
        if len(getattr(scaling, name)) != planes:
            raise ValueError(
                f"config: `rope_scaling`: `{name}` lists {len(getattr(scaling, name))} numbers, "
                f"expected {planes}, half of a head's rotated dimensions"
            )


def _write(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {
        "sliding_window": config.sliding_window,
        PART: config.partial_rotary_factor,
    }
    if config.rope_scaling is None:
        return out
    # transformers before version 5 rejects any key but `type` and the two lists of factors.
    scaling = scaling_to_hf(config.rope_scaling) or {}
    trained = scaling.pop(_TRAINED)
    scaling["type"] = scaling.pop("rope_type")
    return {**out, "rope_scaling": scaling, _TRAINED: trained}


PHI3 = Dialect(
    architecture="Phi3ForCausalLM",
    fields=("embd_pdrop", PART, "resid_pdrop", "sliding_window", _TRAINED),
    read=_read,
    write=_write,
    defaults={
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        _TRAINED: 4096,
    },
    rope=_read_rope,
)
