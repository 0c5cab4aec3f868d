"""Adapters of MLX's language models (mlx-lm), which have one rank and one scale.

directory/adapters.safetensors   NAME.lora_a (in, r) and NAME.lora_b (r, out)
directory/adapter_config.json    num_layers, and lora_parameters: rank, scale, dropout, keys

    y = x W + scale · (x lora_a) lora_b

Source: `mlx_lm/tuner/utils.py` and `mlx_lm/tuner/lora.py` of mlx-lm 0.32.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax import processes
from lora_jax.array import check_whole, leaves_by_path
from lora_jax.config.arguments import check_argument, check_count, check_function
from lora_jax.config.lora import LoraConfig
from lora_jax.files import check_links, check_new, read_object, replacing
from lora_jax.hf.name_maps.peft import in_their_names
from lora_jax.hf.name_maps.rules import NameMap, recognise
from lora_jax.hf.peft.api import attach
from lora_jax.hf.peft.base_names import BASE_NAME, with_name
from lora_jax.hf.peft.directory import CONFIG_FILE, local, read_tensors
from lora_jax.hf.peft.index import PREFIX
from lora_jax.hf.peft.save import with_task
from lora_jax.hf.peft.vllm import check_servable, for_vllm, in_layer
from lora_jax.multi.single import check_single
from lora_jax.plan.decide import plan

MLX_FILE = "adapters.safetensors"
# MLX's end of a tensor's name -> PEFT's of a linear layer, and of an embedding.
_ENDS = {
    ".lora_a": (".lora_A.weight", ".lora_embedding_A"),
    ".lora_b": (".lora_B.weight", ".lora_embedding_B"),
}
_TABLES = ("embed_tokens", "wte", "embed_in")


def save_mlx(
    directory: str | os.PathLike,
    lora_params: Any,
    config: LoraConfig,
    *,
    name_map: NameMap | None = None,
    base_model_name: str | os.PathLike | None = None,
) -> None:
    """Writes an adapter for MLX (`mlx_lm.generate --adapter-path`), whole or not at all.

    MLX has one rank and one scale: other scales are multiplied into B, and ranks filled up with
    zeros. Of several processes all have to call it, and the first one writes.

    Args:
      directory: to be made; nothing may be there yet.
      lora_params: tree with the adapter.
      config: the config the adapter was made with.
      name_map: as for `save_peft`.
      base_model_name: Hub id or path of the base model, for `model`.

    Raises:
      FileExistsError: the directory exists.
      ValueError: MLX has no place for a part of the adapter, such as DoRA or whole modules; the
        tree and the config disagree; or a number is not finite.

    Example:
      lora.hf.save_mlx("adapter-mlx", lora_params, config)
    """
    order = "hf.save_mlx(directory, lora_params, config)"
    check_argument(order, "directory", directory, (str, os.PathLike))
    check_argument(order, "config", config, LoraConfig)
    check_whole(lora_params)
    check_single(lora_params)
    check_servable(config, {}, "MLX")
    leaves, config = in_their_names(leaves_by_path(lora_params), config, name_map)
    fields, tensors = with_task(leaves, config, None)
    found = with_name(LoraConfig.from_peft(fields), base_model_name)
    processes.by_first(lambda: write_mlx(directory, found, tensors))


def load_mlx(
    directory: str | os.PathLike,
    fn: Callable,
    params: Any,
    *args: Any,
    name_map: NameMap | None = None,
    roles: Mapping[str, str] | None = None,
    base_model_name: str | os.PathLike | None = None,
    **kwargs: Any,
) -> tuple[Any, LoraConfig]:
    """Loads an adapter of mlx-lm onto a model: as `load_peft`, from MLX's two files.

    Args:
      directory: as for `read_mlx`.
      fn: the model, a function of its parameters.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      name_map: as for `load_peft`.
      roles: as for `load_peft`.
      base_model_name: as for `load_peft`.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and the config.

    Raises:
      FileNotFoundError, ValueError: as `read_mlx`; also when the adapter is of another model: one
        message names all that is missing, left over or misshapen.

    Warns:
      UserWarning: the adapter names another base than `base_model_name`.
    """
    check_function("hf.load_mlx(directory, fn, params, *args)", fn)
    config, tensors = read_mlx(directory)
    return attach(
        config,
        tensors,
        lambda c: plan(replace(c, roles=roles or {}), fn, params, *args, **kwargs),
        params,
        source=str(directory),
        name_map=name_map or recognise(leaves_by_path(params)),
        base_model_name=base_model_name,
        names_tables=False,
    )


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
    names = {in_layer(key.rpartition(".")[0]) for key in out}
    lora = {"rank": rank, "scale": scale, "dropout": config.dropout, "keys": sorted(names)}
    content = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    if name := config.extra.get(BASE_NAME):
        content["model"] = name
    with replacing(directory) as new:
        new.mkdir()
        save_file(out, new / MLX_FILE)
        (new / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_mlx(directory: str | os.PathLike) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads an adapter of mlx-lm without a model.

    Args:
      directory: holds `adapter_config.json` and `adapters.safetensors`; a Hub id (`owner/name`) is
        looked for in the cache, then fetched.

    Returns:
      The config, whose targets are the whole names of the modules, and PEFT's tensors by name.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the adapter is no LoRA (`fine_tune_type`).
    """
    root = local(directory)
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
    return with_name(config, fields.get("model")), tensors


def _parameters(path: Path, found: Any) -> tuple[int, float, float]:
    given = found if isinstance(found, dict) else {}
    try:
        rank = check_count("rank", given.get("rank"))
        return rank, float(given["scale"]), float(given.get("dropout", 0.0))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: lora_parameters must have a rank and a scale, got {found!r}"
        ) from None
