"""Adapters of MLX's language models (mlx-lm), which have one rank and one scale.

directory/adapters.safetensors   NAME.lora_a (in, r) and NAME.lora_b (r, out)
directory/adapter_config.json    num_layers, and lora_parameters: rank, scale, dropout, keys

    y = x W + scale · (x lora_a) lora_b

Source: `mlx_lm/tuner/utils.py` and `mlx_lm/tuner/lora.py` of mlx-lm 0.32.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax.config.arguments import check_count
from lora_jax.config.lora import LoraConfig
from lora_jax.files import check_links, check_new, read_object, replacing
from lora_jax.hf.peft.directory import CONFIG_FILE, read_tensors
from lora_jax.hf.peft.index import PREFIX
from lora_jax.hf.peft.vllm import for_vllm

MLX_FILE = "adapters.safetensors"
# MLX's end of a tensor's name -> PEFT's of a linear layer, and of an embedding.
_ENDS = {
    ".lora_a": (".lora_A.weight", ".lora_embedding_A"),
    ".lora_b": (".lora_B.weight", ".lora_embedding_B"),
}
_TABLES = ("embed_tokens", "wte", "embed_in")


def write_mlx(
    directory: str | os.PathLike, config: LoraConfig, tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes an adapter as mlx-lm's `load_adapters` and its `--adapter-path` read it.

    Other scales than the config's own are multiplied into B, and ranks filled up with zeros.

    Args:
      directory: to be made; nothing may be there yet.
      config: the adapter's.
      tensors: PEFT's by name.

    Raises:
      FileExistsError: the directory exists.
      ValueError: MLX has no place for a part of the adapter, such as DoRA or whole modules.
    """
    check_new(directory)
    fields, tensors = for_vllm(config.to_peft(), tensors, config, reader="MLX")
    ends = {theirs: ours for ours, both in _ENDS.items() for theirs in both}
    out: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        end = next(each for each in ends if key.endswith(each))
        if value.ndim != 2:
            raise ValueError(f"tensor `{key}` has the shape {value.shape}: MLX takes matrices only")
        name = key.removeprefix(PREFIX).removesuffix(end)
        out[name + ends[end]] = np.ascontiguousarray(value.T)
    rank = fields["r"]
    scale = fields["lora_alpha"] / (math.sqrt(rank) if fields["use_rslora"] else rank)
    # Modules of layers are named within their layer. A module that gets no tensors has B = 0.
    names = {re.sub(r"^[^0-9]*\.\d+\.", "", key.rpartition(".")[0]) for key in out}
    lora = {"rank": rank, "scale": scale, "dropout": config.dropout, "keys": sorted(names)}
    content = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    with replacing(directory) as new:
        new.mkdir()
        save_file(out, new / MLX_FILE)
        (new / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_mlx(directory: str | os.PathLike) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads an adapter of mlx-lm without a model.

    Returns:
      The config, whose targets are the whole names of the modules, and PEFT's tensors by name.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the adapter is no LoRA (`fine_tune_type`).
    """
    root = Path(directory)
    check_links(root)
    path = root / CONFIG_FILE
    fields = read_object(path)
    if (kind := fields.get("fine_tune_type", "lora")) != "lora":
        raise ValueError(f"{path}: fine_tune_type is {kind!r}; only adapters of 'lora' are read")
    rank, scale, dropout = _parameters(path, fields.get("lora_parameters"))
    tensors: dict[str, np.ndarray] = {}
    for key, value in read_tensors(root / MLX_FILE).items():
        name, dot, end = key.rpartition(".")
        ends, wanted = _ENDS.get(dot + end), 1 if end == "lora_a" else 0
        if ends is None or value.ndim != 2 or value.shape[wanted] != rank:
            raise ValueError(
                f"{root / MLX_FILE}: tensor `{key}` of the shape {value.shape} is no lora_a "
                f"(in, r) or lora_b (r, out) of rank {rank}"
            )
        is_table = name.rpartition(".")[2] in _TABLES
        tensors[PREFIX + name + ends[is_table]] = np.ascontiguousarray(value.T)
    names = sorted({key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in tensors})
    config = LoraConfig(rank=rank, alpha=scale * rank, dropout=dropout, target_modules=names)
    return config, tensors


def _parameters(path: Path, found: Any) -> tuple[int, float, float]:
    given = found if isinstance(found, dict) else {}
    try:
        rank = check_count("rank", given.get("rank"))
        return rank, float(given["scale"]), float(given.get("dropout", 0.0))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: lora_parameters must have a rank and a scale, got {found!r}"
        ) from None
