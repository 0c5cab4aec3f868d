"""The llama.cpp architectures whose models can be loaded, and how their rows are stored.

llama.cpp pairs the two numbers that RoPE rotates side by side, Hugging Face half a head apart. The
converter of architecture `llama` reorders the rows of q and k for that; the others rotate halves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class GgufArchitecture(NamedTuple):
    """One architecture of llama.cpp.

    Attributes:
      model_type: Hugging Face's name of the family.
      permuted: the rows of q and k are reordered in the file.
    """

    model_type: str
    permuted: bool


# Only `llama` has its rows reordered by the converter.
GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", permuted=True),
    "qwen2": GgufArchitecture("qwen2", permuted=False),
    "qwen3": GgufArchitecture("qwen3", permuted=False),
}


def gguf_architecture(metadata: Mapping[str, Any], path: Path) -> str:
    """The architecture that a file's metadata names.

    Raises:
      ValueError: it is not one of `GGUF_ARCHITECTURES`.
    """
    kind = str(metadata.get("general.architecture"))
    if kind not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise ValueError(f"{path}: architecture `{kind}` is not one of {known}")
    return kind
