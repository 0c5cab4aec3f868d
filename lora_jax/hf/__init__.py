"""Files of others: PEFT, safetensors, llama.cpp, MLX, bitsandbytes; name maps.

Each name is imported at its first use, so that `import lora_jax` stays light. `__init__.pyi` lists
the same names for type checkers and editors.
"""

import importlib
from typing import Any

# Public name -> the module that defines it.
_NAMES = {
    "FLAX": "lora_jax.hf.name_maps.rules",
    "base_of": "lora_jax.models.gguf",
    "from_hugging_face": "lora_jax.hf.name_maps.weights",
    "load_gguf_lora": "lora_jax.hf.gguf.lora_read",
    "load_keras_lora": "lora_jax.hf.keras",
    "load_mlx": "lora_jax.hf.mlx",
    "load_peft": "lora_jax.hf.peft.api",
    "name_map": "lora_jax.hf.name_maps.rules",
    "push": "lora_jax.hf.upload",
    "read_base": "lora_jax.hf.gguf.names",
    "read_gguf_lora": "lora_jax.hf.gguf.lora_read",
    "read_mlx": "lora_jax.hf.mlx",
    "read_peft": "lora_jax.hf.peft.api",
    "save_gguf_lora": "lora_jax.hf.gguf.lora_write",
    "save_keras_lora": "lora_jax.hf.keras",
    "save_merged": "lora_jax.models.saving",
    "save_mlx": "lora_jax.hf.mlx",
    "save_peft": "lora_jax.hf.peft.api",
    "save_requantized": "lora_jax.models.requantizing",
    "save_weights": "lora_jax.hf.name_maps.weights",
    "to_hugging_face": "lora_jax.hf.name_maps.rules",
    "to_peft": "lora_jax.hf.peft.save",
}
# Name -> module.
_MODULES = {
    "bnb": "lora_jax.hf.checkpoint.bnb",
    "gguf": "lora_jax.hf.gguf",
    "hub": "lora_jax.hf.hub",
    "names": "lora_jax.hf.checkpoint.names",
    "peft": "lora_jax.hf.peft",
    "safetensors": "lora_jax.hf.checkpoint.safetensors",
    "tokenizer": "lora_jax.hf.tokenizer",
    "weights": "lora_jax.hf.checkpoint.weights",
}
__all__ = sorted((*_NAMES, *_MODULES))  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
