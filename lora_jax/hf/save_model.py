"""Writing a model as a Hugging Face directory that transformers loads.

directory/config.json, generation_config.json
directory/model.safetensors                 every weight under Hugging Face's name
directory/tokenizer.json, tokenizer_config.json, chat_template.jinja   if there is a tokenizer
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from lora_jax.array import is_lora
from lora_jax.hf.names import Family, stack_depth, tensor_of
from lora_jax.paths import spell

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def save_model(directory: str | Path, model, params: Any, *, dtype: str = "float32") -> None:
    """Writes a model's configuration, weights and tokenizer.

    Everything is written beside its place first and appears by one rename, so that a failure
    leaves nothing half-written.

    Args:
      directory: to be made; nothing may be there yet.
      model: gives the configuration and the tokenizer, from `lora_jax.models.load`.
      params: its plain parameters; merge adapters first.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      FileExistsError: there is something already.
      ValueError: `params` holds adapters, or numbers that the dtype cannot hold.
      OSError: the directory cannot be written.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory}: there is something already; give another directory")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    from lora_jax.models.registry import architecture_of

    family = architecture_of(model.config.model_type).names
    tensors = dict(_tensors(params, DTYPES[dtype], family))
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        save_file(tensors, str(new / "model.safetensors"), metadata={"format": "pt"})
        for name, text in _texts(model, dtype).items():
            (new / name).write_text(text, encoding="utf-8")
        for path in new.iterdir():
            _sync(path)
        _share(new)
        os.rename(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _tensors(params: Any, dtype: np.dtype, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight under Hugging Face's name, in its order of dimensions."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lora)
    for key_path, leaf in leaves:
        path = spell(key_path)
        if is_lora(leaf):
            raise ValueError(f"`{path}` still has an adapter; merge first: lora.merge(params)")
        value = np.asarray(leaf)
        depth = stack_depth(path, family=family)
        for index in product(*(range(n) for n in value.shape[:depth])):
            name, axes = tensor_of(path, index, family=family)
            block = value[index]
            block = block if axes is None else block.transpose(np.argsort(axes))
            yield name, _cast(block, dtype, name)


def _cast(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # found below
        cast = np.ascontiguousarray(block.astype(dtype))
    if not np.isfinite(cast.astype(np.float32)).all():
        raise ValueError(
            f"`{name}` has a number that {dtype} cannot hold; take another dtype, or look at the "
            "adapter: it may have diverged"
        )
    return cast


def _texts(model, dtype: str) -> dict[str, str]:
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    tokens = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {"config.json": _json(config), "generation_config.json": _json(tokens)}
    if model.tokenizer is not None:
        texts |= _tokenizer_texts(model.tokenizer, model.config.max_position_embeddings)
    return texts


def _tokenizer_texts(tokenizer, length: int) -> dict[str, str]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special,
    }
    texts = {
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": _json(settings),
    }
    if tokenizer.chat_template is not None:
        texts["chat_template.jinja"] = tokenizer.chat_template
    return texts


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _share(directory: Path) -> None:
    """Gives a directory of mkdtemp, which is private, the rights of any other."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)
