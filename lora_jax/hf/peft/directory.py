"""A PEFT directory as files: read strictly, written whole or not at all."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.compat import is_finite
from lora_jax.config.arguments import check_path
from lora_jax.config.peft import check_type
from lora_jax.files import check_links, parse_json, replacing, sweep, sync, temporary_beside
from lora_jax.hf.checkpoint.safetensors import PICKLES, read_header
from lora_jax.hf.hub import is_hub_id, snapshot
from lora_jax.hf.peft.card import CARD_FILE, card, classes_of
from lora_jax.hf.peft.prefixes import plain_fields, plain_keys

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
FORM_FILE = "training_form.json"  # which `lora_jax.recipes.forms` writes beside the two
_BASE = "lora_jax.base"  # an entry of the tensor file's metadata, which PEFT does not read


# A config of PEFT has a few kilobytes; the limit keeps a wrong file from being read whole.
_MAX_CONFIG_BYTES = 16 * 2**20
_DTYPES = ("F32", "F16", "BF16")


def read_directory(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the JSON object and the tensors of a PEFT directory, or of a Hub repository.

    Components of names that wrappers of PyTorch left (`_orig_mod`) are taken out with a warning.

    Returns:
      The config's fields, and the tensors by PEFT's names in their stored dtype (float32, float16
      or bfloat16), all finite.

    Raises:
      FileNotFoundError: the directory, or a file that belongs in it, is missing.
      ConnectionError: a Hub id that is not cached, and the Hub cannot be reached.
      ValueError: the config is of another method than LoRA; or a file is damaged, is a link out
        of the directory, is a pickle, or holds tensors that cannot be an adapter's.
    """
    root = local(directory)
    if not root.exists():
        raise FileNotFoundError(f"{root}: there is no such directory")
    if not root.is_dir():
        raise ValueError(f"{root}: expected a directory with {CONFIG_FILE}, got a file")
    check_links(root)
    path = _existing(root, CONFIG_FILE)
    fields = _read_json(path)
    try:
        # Other methods have other tensors: what is wrong with those would not help anyone.
        check_type(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = read_tensors(_existing(root, TENSOR_FILE))
    return plain_fields(fields), plain_keys(tensors, str(root))


def trained_over(directory: str | os.PathLike) -> str | None:
    """How the base was quantized under the adapter of a directory that `read_directory` has read.

    Returns:
      What `write_directory` was given as `base`; None for floats, and for other writers' files.
    """
    with safe_open(str(local(directory) / TENSOR_FILE), framework="numpy") as file:
        return (file.metadata() or {}).get(_BASE)


def local(directory: str | os.PathLike) -> Path:
    """The directory itself, or that of a hub id in huggingface_hub's cache."""
    root = check_path("directory", directory)
    is_remote = not root.exists() and is_hub_id(str(directory))
    return snapshot(str(directory)) if is_remote else root


def _existing(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        pickles = sorted(p.name for p in root.glob("adapter_model.*") if p.suffix in PICKLES)
        if name == TENSOR_FILE and pickles:
            raise ValueError(
                f"{root / pickles[0]}: pickle files are refused, because reading one runs "
                "whatever code it holds; save the adapter again in PEFT, which writes "
                f"{TENSOR_FILE}"
            )
        there = sorted(p.name for p in root.iterdir())[:8]
        if {"adapter", "meta"} <= {*there} or "checkpoints" in there:
            raise FileNotFoundError(
                f"{root}: no PEFT adapter, but one of lora.checkpoint.save or a training run: read "
                "it with lora.checkpoint.restore"
            )
        raise FileNotFoundError(
            f"{root}: {name} is missing, so this is no whole PEFT adapter; the directory holds "
            f"{', '.join(there) or 'nothing'}"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a PEFT config")
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}{error}; PEFT writes no such file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter's file, all finite floats.

    Raises:
      ValueError: the file is damaged, or holds tensors that cannot be an adapter's.
    """
    # The header is checked against the file before anything is allocated.
    header = read_header(path)
    for name, entry in header.items():
        if entry.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: tensor `{name}` is {entry.dtype}, expected {', '.join(_DTYPES)}; convert "
                "it and save the adapter again"
            )
    try:
        with safe_open(str(path), framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in header}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    for name, value in tensors.items():
        check_tensor(name, value, path)
    return tensors


def check_tensor(name: str, value: np.ndarray, source: str | os.PathLike) -> None:
    """Refuses a tensor that is empty or not finite."""
    if value.size == 0:
        raise ValueError(f"{source}: tensor `{name}` is empty (shape {value.shape})")
    if not is_finite(value):
        raise ValueError(
            f"{source}: tensor `{name}` holds NaN or infinity, so every output would; "
            "take an earlier checkpoint of the adapter"
        )


def write_directory(
    directory: str | os.PathLike,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    auto_class: str | None = None,
    base: str | None = None,
) -> None:
    """Writes both files of a PEFT directory, byte for byte as PEFT does, and a model card.

    A README.md that is there stays, unless it is the card of the adapter that is replaced.

    Everything is written and synced under temporary names first, so that a full disk or an
    interruption changes nothing. A new directory appears whole, by one rename. In an existing one
    the old config is removed before the weights are replaced, and the new one is written last: a
    reader (or a crash) in between finds an adapter without a config, never one with another
    adapter's scale.

    Args:
      directory: where.
      fields: the config.
      tensors: by PEFT's names.
      auto_class: transformers' class for the base in the card, from `auto_class_of`; None is that
        of the config's task.
      base: how the base is quantized, for `trained_over`; None for floats.

    Raises:
      OSError: the directory cannot be written; nothing was changed.
    """
    root = Path(directory)
    text = card(fields, auto_class)
    # transformers refuses a file without this entry, and PEFT writes it.
    metadata = {"format": "pt"} if base is None else {"format": "pt", _BASE: base}
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: expected a directory to write the adapter to, got a file")
    try:
        if root.exists():
            # Temporary files are inside, because the directory may be a mounted disk of its own. An
            # export that was killed before the directory existed left its files beside it.
            sweep(root)
            with temporary_beside(root / CONFIG_FILE) as temporary:
                _write(temporary, fields, tensors, metadata=metadata, text=text)
                _replace(temporary, root)
                sync(root, deep=False)
        else:
            with replacing(root) as new:
                new.mkdir()
                _write(new, fields, tensors, metadata=metadata, text=text)
    except (OSError, SafetensorError) as error:
        raise OSError(
            _errno(error),
            f"{root}: the adapter could not be written: {getattr(error, 'strerror', None) or error}"
            "; make room or choose another directory",
        ) from error


def _write(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    metadata: dict[str, str],
    text: str,
) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True), "utf-8")
    # safetensors writes the bytes of an array as they lie in memory.
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(whole, folder / TENSOR_FILE, metadata=metadata)
    # safetensors writes the metadata, which come first, in a random order: files of equal content
    # get equal bytes.
    first = json.dumps({"__metadata__": metadata}, separators=(",", ":"))[:-1].encode()
    with (folder / TENSOR_FILE).open("r+b") as file:
        file.seek(8)  # the header's length
        assert sorted(file.read(len(first))) == sorted(first)
        file.seek(8)
        file.write(first)
    (folder / CARD_FILE).write_text(text, "utf-8")
    for name in (CONFIG_FILE, TENSOR_FILE, CARD_FILE):
        sync(folder / name)


def _errno(error: Exception) -> int:
    """The errno, which an error of safetensors holds in its text only."""
    in_text = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(in_text[1]) if in_text else errno.EIO)


def _replace(temporary: Path, root: Path) -> None:
    """Replaces the files; at no moment does a config lie beside another adapter's weights."""
    old, aside = root / CONFIG_FILE, temporary / "old.json"
    replace_card = _may_replace_card(root)
    if old.exists() and old.read_bytes() != (temporary / CONFIG_FILE).read_bytes():
        os.replace(old, aside)
    try:
        os.replace(temporary / TENSOR_FILE, root / TENSOR_FILE)
    except OSError:
        if aside.exists():
            os.replace(aside, old)
        raise
    os.replace(temporary / CONFIG_FILE, old)
    if replace_card:
        os.replace(temporary / CARD_FILE, root / CARD_FILE)


def _may_replace_card(root: Path) -> bool:
    """Whether there is no card, or an unchanged one of ours, written for the old config."""
    if not (root / CARD_FILE).exists():
        return True
    try:
        fields, text = _read_json(root / CONFIG_FILE), (root / CARD_FILE).read_text("utf-8")
        return bool(classes_of(text, fields))
    except (OSError, ValueError, TypeError, AttributeError):  # no config of ours, or no text
        return False
