"""llama.cpp architectures that this package knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """An architecture of llama.cpp's.

    Attributes:
      model_type: ours.
      permuted: the rows of q and k are stored as ggml's RoPE pairs them.
    """

    model_type: str
    permuted: bool


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", permuted=False),
    "qwen3": Architecture("qwen3", permuted=False),
}


def architecture_of(metadata: Mapping[str, Any], path: Path) -> str:
    """The architecture, or an error if it is not known."""
    kind = str(metadata.get("general.architecture"))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture `{kind}` is not one of {known}")
    return kind
