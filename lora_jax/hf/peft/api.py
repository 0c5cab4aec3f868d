"""PEFT adapters: directories with `adapter_config.json` and `adapter_model.safetensors`.

    ours   y = x·W + s·(x·A)·B      A (in, r)    B (r, out)
    PEFT   y = x·Wᵀ + s·x·AᵀBᵀ      A (r, in)    B (out, r)

A tree's stacked layers become one pair of tensors a layer, heads are flattened, everything is
float32 as PEFT keeps it. Loading is whole or an error: no key missing, left over or misshapen.

Source: PEFT 0.21, `save_and_load.py`; the format was checked by loading both ways.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.config.lora import LoraConfig
from lora_jax.hf.name_maps import peft
from lora_jax.hf.name_maps.rules import NameMap, recognise
from lora_jax.hf.peft import directory as peft_files
from lora_jax.hf.peft.base import as_read
from lora_jax.hf.peft.load import check_tying, plannable, tied_by_file
from lora_jax.hf.peft.load import fill as fill
from lora_jax.hf.peft.modules import tied_config
from lora_jax.hf.peft.save import check_head, is_encoder, task_of
from lora_jax.hf.peft.save import named_targets as named_targets
from lora_jax.hf.peft.save import to_peft as to_peft
from lora_jax.hf.peft.vllm import for_vllm
from lora_jax.plan.decide import plan as make_plan
from lora_jax.tree import init

TARGETS = ("peft", "vllm")
AUTO = "auto"


def read_peft(
    directory: str | os.PathLike, *, model_type: str | None = None
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a PEFT directory without a model.

    Args:
      directory: holds `adapter_config.json` and `adapter_model.safetensors`; a Hub id
        (`owner/name`) is looked for in the cache, then fetched.
      model_type: Hugging Face's name of the model family, for a config that leaves
        target_modules to PEFT's default.

    Returns:
      The config, and PEFT's tensors by their names, in their stored dtype.

    Raises:
      FileNotFoundError: the directory or one of the files is missing.
      ValueError: a file is damaged, a pickle, a link out of the directory, or holds NaN; or the
        config asks for what is not supported.
    """
    fields, tensors = peft_files.read_directory(directory)
    try:
        config = LoraConfig.from_peft(fields, model_type=model_type)
    except (TypeError, ValueError) as error:
        path = os.path.join(directory, peft_files.CONFIG_FILE)
        raise type(error)(f"{path}: {error}") from None
    return config, tensors


def load_peft(
    directory: str | os.PathLike,
    fn: Callable,
    params,
    *args,
    model_type: str | None = None,
    name_map: NameMap | None = None,
    **kwargs,
) -> tuple[Any, LoraConfig]:
    """Loads a PEFT adapter onto a model.

    Args:
      directory: as for `read_peft`.
      fn: the model, a function of its parameters.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      model_type: as for `read_peft`.
      name_map: what Hugging Face calls the model's parameters, from `lora_jax.hf.name_map`; None
        where their paths are Hugging Face's names, or those of transformers' Flax models.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and the config.

    Raises:
      FileNotFoundError, ValueError: as `read_peft`; also when the adapter is of another model:
        one message names all that is missing, left over or misshapen.

    Example:
      lora_params, config = load_peft("adapter", model.apply, model.params, tokens)
    """
    config, tensors = read_peft(directory, model_type=model_type)
    if (using := name_map or recognise(params)) is not None:
        return peft.attach(
            config,
            tensors,
            lambda wanted: make_plan(wanted, fn, params, *args, **kwargs),
            params,
            str(directory),
            using,
        )
    return attach(
        config,
        tensors,
        lambda wanted: make_plan(wanted, fn, params, *args, **kwargs),
        params,
        str(directory),
    )


def attach(
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    plan_of: Callable[[LoraConfig], Any],
    params,
    source: str,
) -> tuple[Any, LoraConfig]:
    """Puts the content of an adapter's file onto a model.

    Args:
      config: the adapter's config.
      tensors: PEFT's tensors by name.
      plan_of: plans a config on the model.
      params: the base parameters.
      source: what messages call the adapter.

    Returns:
      `params` with LoRA leaves, and the config.

    Raises:
      ValueError: as `load_peft`.
    """
    config = tied_by_file(config, tensors)
    plan = plan_of(plannable(config, params, source))
    check_tying(config, plan, source)
    # The key is of no consequence: every factor drawn with it is replaced.
    blank = init(jax.random.key(0), as_read(plan, params, source=source), params)
    return fill(blank, config, tensors, source=source), config


def save_peft(
    directory: str | os.PathLike,
    lora_params,
    config: LoraConfig,
    *,
    base_model_name: str | None = None,
    task_type: str | None = AUTO,
    target: str = "peft",
    name_map: NameMap | None = None,
) -> None:
    """Writes an adapter as a PEFT directory, whole or not at all.

    Args:
      directory: made if it does not exist; other files in it stay. A model card (README.md) is
        written where there is none.
      lora_params: tree with the adapter.
      config: the config the adapter was made with.
      base_model_name: Hub id or path of the base model, for `base_model_name_or_path`.
      task_type: PEFT's task type, or None; "auto" keeps that of a config that came from PEFT, and
        tells a decoder (CAUSAL_LM), an encoder (FEATURE_EXTRACTION) and a classifier (SEQ_CLS)
        apart otherwise.
      target: "peft", or "vllm" for an adapter that vLLM serves at the right scale: vLLM knows one
        rank and one alpha, so other scales are multiplied into B and ranks filled up with zeros.
      name_map: as for `load_peft`.

    Raises:
      ValueError: the tree and the config disagree, a number is not finite, a classifier's head
        that PEFT would look for is not trained, or vLLM could not serve the adapter.
      OSError: the directory cannot be written; nothing was changed.

    Example:
      save_peft("adapter", lora_params, config, base_model_name="HuggingFaceTB/SmolLM2-135M")
    """
    if target not in TARGETS:
        raise ValueError(f'target must be one of "peft", "vllm", got {target!r}')
    if (using := name_map or recognise(lora_params)) is not None:
        lora_params, config = peft.in_their_names(lora_params, config, using)
    if task_type == AUTO and "task_type" in config.extra:
        task_type = config.extra["task_type"]
    if task_type == "CAUSAL_LM" or (task_type == AUTO and not is_encoder(lora_params)):
        config = tied_config(lora_params, config)
    fields, tensors = to_peft(lora_params, config)
    task_type = task_of(lora_params, tensors) if task_type == AUTO else task_type
    check_head(task_type, lora_params, tensors)
    if target == "vllm":
        fields, tensors = for_vllm(fields, tensors, config)
    fields["task_type"] = task_type
    if base_model_name is not None:
        fields["base_model_name_or_path"] = base_model_name
    peft_files.write_directory(directory, fields, tensors)
