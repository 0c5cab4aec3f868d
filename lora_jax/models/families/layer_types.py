"""Hugging Face's `layer_types`: which blocks slide."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import LlamaConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def read_layer_types(raw: Mapping[str, Any], default: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each block whether it slides.

    Args:
      raw: the object in config.json.
      default: what holds where it does not say.

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


def write_layer_types(config: LlamaConfig) -> list[str]:
    """The reverse."""
    return [SLIDING if slides else FULL for slides in config.mixing.slides]
