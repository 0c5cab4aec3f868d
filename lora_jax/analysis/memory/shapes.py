"""Which model an estimate is of: a config.json, wherever it is, or a known model's, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.paths import nearest

_LLAMA_2: Mapping[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_3: Mapping[str, Any] = {
    **_LLAMA_2, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


def _sizes(width: int, inner: int, blocks: int, heads: int, pairs: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
    }


# What these models' config.json says, as far as it decides shapes.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {**_LLAMA_2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA_2, **_sizes(5120, 13824, 40, 40, 40)},
    "llama-2-70b": {**_LLAMA_2, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3-8b": {**_LLAMA_3, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3-70b": {**_LLAMA_3, **_sizes(8192, 28672, 80, 64, 8)},
    "mistral-7b": {
        **_LLAMA_2, **_sizes(4096, 14336, 32, 32, 8), "model_type": "mistral",
        "max_position_embeddings": 32768, "sliding_window": 4096,
    },
    "smollm2-135m": {
        **_LLAMA_2, **_sizes(576, 1536, 30, 9, 3), "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2"},
    "bert-base": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
}  # fmt: skip


def config_of(model: str | Path | Mapping[str, Any] | Any) -> tuple[str, Any]:
    """A name to show, and the configuration of a model.

    Args:
      model: a name of `SHAPES`, the path of a config.json or of its directory, the object in it,
        or a configuration (`lora_jax.models.LlamaConfig` and its like).

    Raises:
      FileNotFoundError: no such name, file or directory.
      ValueError: a model type or a field that is not known, or a file that is not JSON.
    """
    from lora_jax.models.registry import config_from_hf

    if isinstance(model, Mapping):
        return str(model.get("model_type")), config_from_hf(model)
    if not isinstance(model, str | Path):
        if not hasattr(model, "num_hidden_layers"):
            raise ValueError(
                f"`model` must be a name, a path, the object in a config.json or a configuration, "
                f"got {type(model).__name__}"
            )
        return str(model.model_type), model
    if str(model).lower() in SHAPES:
        return str(model).lower(), config_from_hf(SHAPES[str(model).lower()])
    return _from_path(Path(model))


def _from_path(path: Path) -> tuple[str, Any]:
    from lora_jax.hf.checkpoint.safetensors import read_json
    from lora_jax.models.registry import config_from_hf

    if not path.exists():
        raise FileNotFoundError(
            f"`model`: `{path}` is no file or directory, and no known shape (nearest: "
            f"{nearest(str(path).lower(), SHAPES)}); give the path of a config.json"
        )
    file = path / "config.json" if path.is_dir() else path
    if file.suffix != ".json":
        raise ValueError(f"{file}: not a config.json; give its path, or its directory's")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    try:
        return path.name if path.is_dir() else str(path), config_from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
