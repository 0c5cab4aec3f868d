"""Describes a path in text: an adapter, a model, a safetensors file, a checkpoint.

Of a model only headers and metadata are read, so a large file takes no longer than a small one.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import models
from lora_jax.checkpoint.params import described
from lora_jax.compat import require
from lora_jax.config.arguments import check_argument
from lora_jax.files import read_json
from lora_jax.hf.checkpoint.safetensors import open_directory, read_header
from lora_jax.hf.gguf.file import kind_of_file, open_gguf
from lora_jax.hf.hub import is_hub_id, snapshot
from lora_jax.recipes import inspect_adapter as report
from lora_jax.train.metrics import read_metrics

# name -> (dtype, shape)
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def inspect(source: str, *, tensors: bool = False, check: bool = False) -> str:
    """Describes the content of a path.

    Args:
      source: a path, a hub id, or "smollm2". Of a hub id an adapter is looked for first.
      tensors: list every tensor.
      check: raise the problems of an adapter, instead of listing them.

    Returns:
      Lines of text.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: it is none of these, a file is damaged, or a check failed.
    """
    check_argument("recipes.inspect.inspect(source)", "source", source, (str, os.PathLike))
    path = _fetched(source)
    if _is_adapter(path):
        return _adapter(path, tensors, check)
    if (path / "params").is_dir() and (path / "meta").is_dir():
        return _params(path, tensors)
    if path.suffix == ".safetensors":
        return "\n".join(["safetensors file", *_tensor_lines(_header(path), tensors)])
    return _model(source, tensors)


def _fetched(source: str) -> Path:
    """The path, or that of the files of an adapter on the hub."""
    path = Path(source)
    if path.exists() or not is_hub_id(source):
        return path
    found = snapshot(source, patterns=("*config.json", "adapter*.safetensors"))
    return found if _is_adapter(found) else path


def _is_adapter(path: Path) -> bool:
    if path.suffix == ".gguf" and path.is_file():
        return kind_of_file(path) == "adapter"
    parts = ("adapter_config.json", "checkpoints", "adapter")
    return any((path / part).exists() for part in parts)


def _adapter(path: Path, tensors: bool, check: bool) -> str:
    # Read without a model: an adapter that cannot be loaded is what one wants to look at.
    found = report.read(path)
    wrong = report.problems(found)
    if check and wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    lines = [found.kind, *(_row(name, value) for name, value in report.facts(found).items())]
    listed = {f"{m.name} lora_{end}": (str(x.dtype), x.shape)
              for m in found.modules for end, x in zip("AB", (m.a, m.b), strict=True)
              if x is not None}  # fmt: skip
    listed |= {name: (str(x.dtype), x.shape) for name, x in found.others.items()}
    lines += [*_tensor_lines(listed, tensors), *_losses(path)]
    lines += ["  change of each weight, ‖s·B·A‖", *(f"    {t}" for t in report.norm_table(found))]
    found_wrong = [_row("looks wrong", text) for text in wrong] or [_row("problems", "none")]
    return "\n".join([*lines, *found_wrong])


def _losses(run: Path) -> list[str]:
    """The first and the last loss, if the path is the folder of a run."""
    if not (metrics := run / "metrics.jsonl").is_file():
        return []
    records = [r for r in read_metrics(metrics) if r.get("kind") == "train"]
    # A run of one step has one.
    ends = records[:1] + records[1:][-1:]
    return [_row(f"loss of step {r['step']}", f"{r['loss']:.4f}") for r in ends]


def _params(path: Path, tensors: bool) -> str:
    found = {name: (kind, shape) for name, (kind, shape) in described(path).items()}
    return "\n".join(["plain parameters (Orbax)", *_tensor_lines(found, tensors)])


def _model(source: str, tensors: bool) -> str:
    path = Path(models.find_smollm2() if source == "smollm2" else source)
    if path.suffix == ".gguf":
        kind, config, found = _gguf(path)
    else:
        kind, config, found = _directory(path, source)
    lines = [kind, *(_row(name, config[name]) for name in config)]
    return "\n".join([*lines, *_tensor_lines(found, tensors)])


def _gguf(path: Path) -> tuple[str, dict[str, Any], Tensors]:
    kinds = require("gguf").GGMLQuantizationType
    file = open_gguf(path)
    found = {name: (kinds(record.kind).name, record.shape) for name, record in file.tensors.items()}
    # Without the vocabulary, which is metadata too.
    config = {
        name: value
        for name, value in file.metadata.items()
        if not name.startswith("tokenizer.") and isinstance(value, (str, int, float))
    }
    return f"model in a GGUF file, {path}", config, found


def _directory(path: Path, source: str) -> tuple[str, dict[str, Any], Tensors]:
    # What is no path is a hub id.
    if not path.exists():
        path = snapshot(source)
    elif not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: holds no adapter_config.json, no config.json and no checkpoints, and is no "
            ".gguf or .safetensors file; give the path of an adapter, a model or a run"
        )
    # Numbers and names only: lists and objects would fill the screen.
    config = {
        name: value
        for name, value in read_json(path / "config.json").items()
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
    }
    # The index is checked, and then every header is read, as an index has no dtypes.
    weights = open_directory(path)
    files = {weights.where(name) for name in weights.shapes}
    found = {name: value for file in sorted(files) for name, value in _header(path / file).items()}
    return f"model in a Hugging Face directory, {path}", config, found


def _header(path: Path) -> Tensors:
    return {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}


def _tensor_lines(found: Tensors, all_of_them: bool) -> list[str]:
    kinds = {kind for kind, _ in found.values()}
    sizes = {
        kind: sum(math.prod(shape) for k, shape in found.values() if k == kind) for kind in kinds
    }
    spelled = ", ".join(f"{size:,} {kind}" for kind, size in sorted(sizes.items()))
    lines = [_row("tensors", f"{len(found)}"), _row("parameters", f"{sum(sizes.values()):,}")]
    lines.append(_row("of type", spelled or "none"))
    if all_of_them:
        width = max(map(len, found), default=0)
        lines += [
            f"    {name:<{width}}  {kind:<5} {'×'.join(map(str, shape))}"
            for name, (kind, shape) in sorted(found.items())
        ]
    return lines


def _row(name: str, value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"  {name:<24} {text}"
