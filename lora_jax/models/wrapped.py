"""Decoders inside vision-language models: their configuration, and the rest of a checkpoint.

Only the decoder is loaded. A merge writes it back among the tensors and files that were not read,
so that the whole model can be loaded again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files import read_object
from lora_jax.hf.checkpoint.names import Family, unified
from lora_jax.hf.checkpoint.safetensors import INDEX, PICKLES, open_directory, open_exact
from lora_jax.hf.checkpoint.shards import DTYPES, NewTensor
from lora_jax.models.config import LlamaConfig
from lora_jax.models.dialect import ANY_OTHER, ROPES, without_mrope
from lora_jax.paths import nearest

# Vision-language model types -> the type of their text model, where `text_config` has none.
WRAPPERS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "internvl": "qwen2",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Their decoders have a model type of their own, and compute what the text model does: of a text
# without images the three positions of each token are equal (multimodal RoPE).
_OWN_TYPE = ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Why the decoders of others are not read.
_DIFFERS = {
    "paligemma": "it attends to its whole prompt in both directions",
    "mllama": "it has blocks that attend to images",
    "gemma3n": "its blocks carry several streams of hidden states",
}

# Fields that a multimodal config.json has beside its `text_config` but that the text model needs.
_OUTSIDE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "tie_word_embeddings",
)  # fmt: skip
_TIES = "tie_word_embeddings"
# What is left out of a merge's config.json: its weights are floats, and code is not copied.
_LEFT = ("quantization_config", "auto_map")
# Starts of the fields that a flat config.json (Qwen2-VL before 4.52) has for images.
_IMAGES = ("vision_", "image_", "video_")


def text_of(raw: Mapping[str, Any]) -> LlamaConfig:
    """The decoder inside a vision-language model.

    Raises:
      ValueError: `text_config` is missing or not supported.
    """
    kind = str(raw["model_type"])
    text = raw.get("text_config")
    if text is None and kind in ("qwen2_vl", "qwen2_5_vl"):
        text = {name: value for name, value in raw.items() if not name.startswith(_IMAGES)}
    if not isinstance(text, Mapping):
        raise ValueError(f"config: a `{kind}` needs a `text_config`, an object; there is none")
    # Multimodal checkpoints state these at the top level; values in `text_config` win.
    outside = {name: raw[name] for name in _OUTSIDE if name in raw}
    # Either place may tie head and embedding.
    ties = [part[_TIES] for part in (raw, text) if part.get(_TIES) is not None]
    outside |= {_TIES: any(ties)} if ties else {}
    text = {name: value for name, value in text.items() if name != _TIES}
    for field in ROPES:
        if isinstance(text.get(field), Mapping):
            text[field] = without_mrope(text[field])
    inner = WRAPPERS[kind] if kind in _OWN_TYPE else text.get("model_type", WRAPPERS[kind])
    return replace(LlamaConfig.from_hf({**outside, **text, "model_type": inner}), wrapper=kind)


def check_readable(raw: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses a vision-language model whose decoder cannot be read.

    Raises:
      ValueError: it is one.
    """
    kind = str(raw.get("model_type"))
    if kind not in known and ("text_config" in raw or kind in _DIFFERS):
        why = f": {_DIFFERS[kind]}" if kind in _DIFFERS else ""
        raise ValueError(
            f"config: the decoder inside a `{kind}` cannot be read{why}; of models of images and "
            f"texts those inside {', '.join(WRAPPERS)} can; nearest: {nearest(kind, WRAPPERS)}. "
            f"{ANY_OTHER}"
        )


class Rest(NamedTuple):
    """What a merge copies of a checkpoint.

    Attributes:
      names: our names of the tensors -> the checkpoint's.
      entries: the tensors that were not read.
      read: name -> one of them.
      files: the other files: name -> path.
      config: config.json.
    """

    names: Mapping[str, str]
    entries: list[NewTensor]
    read: Callable[[str], np.ndarray]
    files: Mapping[str, Path]
    config: dict[str, Any]

    def values(self) -> Iterator[np.ndarray]:
        """The tensors that were not read, one after the other."""
        return (self.read(entry.name) for entry in self.entries)


def rest_of(directory: Path, family: Family, decoder: Collection[str], dtype: str) -> Rest:
    """The tensors and files of a checkpoint that are not the decoder's.

    Args:
      directory: the checkpoint's.
      family: the table of names.
      decoder: names of the tensors that a merge writes.
      dtype: what a merge writes.

    Raises:
      FileNotFoundError: the checkpoint is no longer there.
      ValueError: it is broken.
    """
    weights = open_directory(directory)
    exact, read_exact = open_exact(directory)
    names = unified(weights.shapes, family)
    # A copy of a tied table would be the table from before the merge.
    dropped = {*decoder, *(family.tied[:1] if family.tied else ())}
    kept = [old for name, old in names.items() if name not in dropped]
    # Quantized, in bytes or in floats of any kind: dequantized, as the decoder is.
    packed = {
        n
        for n in kept
        if n not in exact
        or exact[n].dtype in ("U8", "I8", "F8_E4M3")
        or exact[n].shape != weights.shapes[n]
    }

    def read(name: str) -> np.ndarray:
        if name in packed:
            return weights.read(name).astype(DTYPES[dtype])
        return read_exact(name)

    dtypes = {n: DTYPES[dtype] if n in packed else exact[n].numpy for n in kept}
    entries = [NewTensor(n, weights.shapes[n], dtypes[n]) for n in kept]
    config = as_written(read_object(directory / "config.json"), dtype)
    return Rest(names, entries, read, files=_files(directory), config=config)


def as_written(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for tensors of another dtype that are not quantized."""
    config = {name: value for name, value in config.items() if name not in _LEFT}
    for field in ("dtype", "torch_dtype"):
        if field in config:
            config[field] = dtype
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = as_written(text, dtype)
    return config


def _files(directory: Path) -> dict[str, Path]:
    """Files beside the weights: the processor's, a licence."""
    weights = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix not in weights and path.name != INDEX
        and not path.name.startswith(".") and not path.name.endswith(".index.json")
    }  # fmt: skip
