"""Exchange with files of others: PEFT, safetensors, llama.cpp, bitsandbytes, name maps.

Each name is imported when it is first asked for, so that `import lora_jax` stays light.
"""

import importlib
from typing import Any

# Public name -> the module of this package that defines it.
_NAMES = {
    "FLAX": "flax_names",
    "base_of": "gguf_names",
    "from_hugging_face": "own_names",
    "load_gguf_lora": "gguf_lora_read",
    "load_peft": "peft",
    "name_map": "own_names",
    "read_base": "gguf_names",
    "read_gguf_lora": "gguf_lora_read",
    "read_peft": "peft",
    "save_gguf_lora": "gguf_lora",
    "save_merged": "save_model",
    "save_peft": "peft",
    "to_hugging_face": "own_names",
    "to_peft": "peft",
}
_MODULES = (
    "bnb", "gguf", "hub", "names", "peft", "safetensors", "save_model", "tokenizer", "weights",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted((*_NAMES, *_MODULES))
