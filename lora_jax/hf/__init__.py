"""Exchange with files of others: PEFT, safetensors, llama.cpp, bitsandbytes, name maps.

Each name is imported when it is first asked for, so that `import lora_jax` stays light.
"""

import importlib
from typing import Any

# Public name -> the module of this package that defines it.
_NAMES = {
    "FLAX": "name_maps.rules",
    "base_of": "lora_jax.models.gguf",
    "from_hugging_face": "name_maps.rules",
    "load_gguf_lora": "gguf.lora_read",
    "load_peft": "peft.api",
    "name_map": "name_maps.rules",
    "read_base": "gguf.names",
    "read_gguf_lora": "gguf.lora_read",
    "read_peft": "peft.api",
    "save_gguf_lora": "gguf.lora_write",
    "save_merged": "lora_jax.models.saving",
    "save_peft": "peft.api",
    "to_hugging_face": "name_maps.rules",
    "to_peft": "peft.save",
}
_MODULES = {
    "bnb": "checkpoint.bnb",
    "gguf": "gguf",
    "hub": "hub",
    "names": "checkpoint.names",
    "peft": "peft",
    "safetensors": "checkpoint.safetensors",
    "save_model": "lora_jax.models.saving",
    "tokenizer": "tokenizer",
    "weights": "checkpoint.weights",
}


def _module(name: str):
    return importlib.import_module(name if name.startswith("lora_jax") else f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(_module(_NAMES[name]), name)
    if name in _MODULES:
        return _module(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted((*_NAMES, *_MODULES))
