"""What a path holds, in words: a PEFT adapter, a model, a safetensors file, a checkpoint.

Only headers and metadata are read, so a large file takes no longer than a small one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Fields of a PEFT config that say what the adapter is; the others only when they are set.
_PEFT_FIELDS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
_PEFT_DULL = ("peft_type", "inference_mode", "auto_mapping", "peft_version", "revision")

# name -> (dtype, shape)
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def describe(source: str, *, tensors: bool = False) -> str:
    """Describes what a path holds.

    Args:
      source: a path, a hub id whose files are cached, or "smollm2".
      tensors: list every tensor.

    Returns:
      Lines of text.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: it is nothing that is known here, or a file is damaged.
    """
    path = Path(source)
    if (path / "adapter_config.json").is_file():
        return _peft(path, tensors)
    if (path / "checkpoints").is_dir() or (path / "meta").is_dir():
        return _checkpoint(path)
    if path.suffix == ".safetensors":
        return "\n".join(["safetensors file", *_tensor_lines(_header(path), tensors)])
    return _model(source, tensors)


def _peft(path: Path, tensors: bool) -> str:
    from lora_jax.hf.peft_files import CONFIG_FILE, TENSOR_FILE
    from lora_jax.hf.safetensors import read_json

    fields = read_json(path / CONFIG_FILE)
    others = [
        name
        for name, value in fields.items()
        if name not in (*_PEFT_FIELDS, *_PEFT_DULL) and value not in (None, False, 0, {}, [], "")
    ]
    lines = [f"PEFT adapter ({fields.get('peft_type', 'of no type')})"]
    lines += [_row(name, fields.get(name)) for name in (*_PEFT_FIELDS, *sorted(others))]
    return "\n".join([*lines, *_tensor_lines(_header(path / TENSOR_FILE), tensors)])


def _checkpoint(path: Path) -> str:
    from lora_jax import checkpoint

    found = checkpoint.find(path)
    lines = ["Orbax checkpoint", _row("in", found.directory)]
    lines += [_row(name, found.config.get(name)) for name in _PEFT_FIELDS[1:]]
    lines.append(_row("base", f"{len(found.base)} weights"))
    if (metrics := path / "metrics.jsonl").is_file():
        from lora_jax.train.metrics import read_metrics

        records = [r for r in read_metrics(metrics) if r.get("kind") == "train"]
        lines += [_row(f"loss of step {r['step']}", f"{r['loss']:.4f}") for r in records[:1]]
        lines += [_row(f"loss of step {r['step']}", f"{r['loss']:.4f}") for r in records[1:][-1:]]
    return "\n".join(lines)


def _model(source: str, tensors: bool) -> str:
    from lora_jax import models

    path = Path(models.find_smollm2() if source == "smollm2" else source)
    if path.suffix == ".gguf":
        kind, config, found = _gguf(path)
    else:
        kind, config, found = _directory(path, source)
    lines = [kind, *(_row(name, config[name]) for name in config)]
    return "\n".join([*lines, *_tensor_lines(found, tensors)])


def _gguf(path: Path) -> tuple[str, dict[str, Any], Tensors]:
    from gguf import GGMLQuantizationType

    from lora_jax.hf.gguf import open_gguf

    file = open_gguf(path)
    found = {
        name: (GGMLQuantizationType(record.kind).name, record.shape)
        for name, record in file.tensors.items()
    }
    config = {
        name: value
        for name, value in file.metadata.items()
        if not name.startswith("tokenizer.") and isinstance(value, (str, int, float))
    }
    return f"model in a GGUF file, {path}", config, found


def _directory(path: Path, source: str) -> tuple[str, dict[str, Any], Tensors]:
    from lora_jax.hf.hub import snapshot
    from lora_jax.hf.safetensors import open_directory, read_json

    if not path.exists():
        path = snapshot(source)
    elif not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: holds no adapter_config.json, no config.json and no checkpoints, and is no "
            ".gguf or .safetensors file; give the path of an adapter, a model or a run"
        )
    config = {
        name: value
        for name, value in read_json(path / "config.json").items()
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
    }
    weights = open_directory(path)
    files = {weights.where(name) for name in weights.shapes}
    found = {name: value for file in sorted(files) for name, value in _header(path / file).items()}
    return f"model in a Hugging Face directory, {path}", config, found


def _header(path: Path) -> Tensors:
    from lora_jax.hf.safetensors import read_header

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
