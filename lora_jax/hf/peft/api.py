"""PEFT adapters: directories with `adapter_config.json` and `adapter_model.safetensors`.

    ours   y = x·W + s·(x·A)·B      A (in, r)    B (r, out)
    PEFT   y = x·Wᵀ + s·x·AᵀBᵀ      A (r, in)    B (out, r)

A tree's stacked layers become one pair of tensors a layer, heads are flattened, everything is
float32 as PEFT keeps it. A missing, left over or misshapen tensor is an error.

Source: PEFT 0.21, `save_and_load.py`; the format was checked by loading both ways.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from lora_jax import processes
from lora_jax.array import check_whole, leaves_by_path
from lora_jax.config.arguments import check_argument, check_function
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.name_maps import leaves as translated
from lora_jax.hf.name_maps.peft import Saved, in_our_names, in_their_names, with_saved
from lora_jax.hf.name_maps.rules import NameMap, Placed, places_of, recognise
from lora_jax.hf.peft.base import (
    as_read,
    check_names,
    model_type_of,
    quantization_of,
    warn_of_base,
)
from lora_jax.hf.peft.base_names import BASE_NAME, warn_of_name
from lora_jax.hf.peft.card import auto_class_of
from lora_jax.hf.peft.copies import check_vocabulary, tables_of, with_tables, without_copies
from lora_jax.hf.peft.directory import (
    CONFIG_FILE,
    read_directory,
    trained_over,
    write_directory,
)
from lora_jax.hf.peft.experts import fused, without_untouched
from lora_jax.hf.peft.load import check_task, fill
from lora_jax.hf.peft.prefixes import respelled, without_module
from lora_jax.hf.peft.save import AUTO, with_task
from lora_jax.hf.peft.settle import plannable
from lora_jax.hf.peft.tensors import SWAPPED
from lora_jax.hf.peft.tying import HEAD, TYING, check_tying, tied_by_file
from lora_jax.hf.peft.vllm import for_vllm
from lora_jax.multi.single import check_single
from lora_jax.paths import bare, module_of
from lora_jax.plan.decide import plan as make_plan
from lora_jax.plan.leaf import Plan
from lora_jax.tree import init

TARGETS = ("peft", "vllm")

_LOAD = "hf.load_peft(directory, fn, params, *args)"


def read_peft(
    directory: str | os.PathLike, *, model_type: str | None = None
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a PEFT directory without a model.

    Args:
      directory: holds `adapter_config.json` and `adapter_model.safetensors`; a Hub id
        (`owner/name`) is looked for in the cache, then fetched.
      model_type: Hugging Face's name of the model family, for a config that leaves
        target_modules out: PEFT's default depends on it. By default that of the base that the
        config names, where it is a directory.

    Returns:
      The config, and PEFT's tensors by their names, in their stored dtype.

    Raises:
      FileNotFoundError: the directory or one of the files is missing.
      ValueError: a file is damaged, a pickle, a link out of the directory, or holds NaN; or the
        config has what is not supported.
    """
    fields, tensors = read_directory(directory)
    try:
        model_type = model_type or model_type_of(fields.get(BASE_NAME))
        config = LoraConfig.from_peft(fields, model_type=model_type)
    except (TypeError, ValueError) as error:
        path = os.path.join(directory, CONFIG_FILE)
        raise ValueError(f"{path}: {error}") from None
    return config, tensors


def load_peft(
    directory: str | os.PathLike,
    fn: Callable,
    params: Any,
    *args: Any,
    model_type: str | None = None,
    name_map: NameMap | None = None,
    roles: Mapping[str, str] | None = None,
    base_model_name: str | os.PathLike | None = None,
    **kwargs: Any,
) -> tuple[Any, LoraConfig]:
    """Loads a PEFT adapter onto a model.

    Args:
      directory: as for `read_peft`.
      fn: the model, a function of its parameters.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      model_type: as for `read_peft`, or that of `base_model_name`; it also decides how square
        experts lie in the file.
      name_map: Hugging Face's names of the model's parameters, from `lora_jax.hf.name_map`; None
        where their paths are these names, or those of transformers' Flax models.
      roles: as `LoraConfig.roles`, by the paths of `params`: for weights whose dims the plan reads
        in another way than the adapter was trained.
      base_model_name: directory, file or hub id of the base, such as `model.checkpoint`: an adapter
        that names another base is warned of.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and the config.

    Raises:
      FileNotFoundError, ValueError: as `read_peft`; also when the adapter is of another model:
        one message names all that is missing, left over or misshapen.

    Warns:
      UserWarning: `save_peft` wrote the adapter over a base that was quantized in another way; or
        the adapter names another base than `base_model_name`.

    Example:
      lora_params, config = load_peft("adapter", model.apply, model.params, tokens)
    """
    check_argument(_LOAD, "directory", directory, (str, os.PathLike))
    check_function(_LOAD, fn)
    if name_map is not None:
        check_argument(_LOAD, "name_map", name_map, NameMap)
    model_type = model_type or model_type_of(base_model_name)
    config, tensors = read_peft(directory, model_type=model_type)
    loaded = attach(
        config,
        tensors,
        lambda wanted: make_plan(
            dataclasses.replace(wanted, roles=roles or {}), fn, params, *args, **kwargs
        ),
        params,
        source=str(directory),
        name_map=name_map or recognise(leaves_by_path(params)),
        model_type=model_type or model_type_of(config.extra.get(BASE_NAME)),
        base_model_name=base_model_name,
    )
    warn_of_base(trained_over(directory), loaded[0], str(directory))
    return loaded


def attach(
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    plan_of: Callable[[LoraConfig], Plan],
    params: Any,
    *,
    source: str,
    name_map: NameMap | None = None,
    model_type: str | None = None,
    base_model_name: str | os.PathLike | None = None,
    names_tables: bool = True,
) -> tuple[Any, LoraConfig]:
    """Puts the content of an adapter's file onto a model.

    Args:
      config: the adapter's config, in Hugging Face's names.
      tensors: PEFT's tensors by name.
      plan_of: plans a config on the model.
      params: the base parameters.
      source: what messages call the adapter.
      name_map: Hugging Face's names of the parameters, where their paths are not these names.
      model_type: as for `load_peft`.
      base_model_name: as for `load_peft`.
      names_tables: the file has PEFT's names: those of an embedding's factors are others than those
        of a matrix, and a tied head has factors of its own.

    Returns:
      `params` with LoRA leaves, and the config.

    Raises:
      ValueError: as `load_peft`, or the map cannot translate what the config adapts.
    """
    config = tied_by_file(config, tensors)
    leaves = leaves_by_path(params)
    tensors = without_module(tensors, leaves, source)
    config, tensors = respelled(config, tensors, map(bare, leaves))
    config, tensors = fused(
        config, tensors, map(bare, leaves), source, swapped=model_type in SWAPPED
    )
    config = without_untouched(config, tensors, leaves)
    places = None if name_map is None else places_of(leaves, name_map)
    planned = partial(
        _plan, leaves=leaves, places=places, plan_of=plan_of, source=source, name_map=name_map
    )
    plan, saved = planned(config)
    if not names_tables:
        tensors = with_tables(tensors, plan, places)
    check_task(
        config,
        tensors,
        [*leaves, *(p.path for placed in (places or {}).values() for p in placed.parts)],
        source,
    )
    tables = tables_of(leaves, plan, places)
    check_vocabulary(tensors, tables, source)
    settled, tensors = without_copies(config, tensors, tables, source)
    if settled != config:
        # The file holds tables of its own, which train whole.
        config = settled
        plan, saved = planned(config)
    if names_tables:  # elsewhere a tied table is one module, and so is its adapter
        check_tying(config, tensors, plan, source)
    blank = _blank(plan, params, source)
    if places is None:
        filled = fill(blank, config, tensors, source=source, model_type=model_type)
    else:
        blank = with_saved(blank, saved, plan)
        theirs = translated.to_theirs(leaves_by_path(blank), places, config=config)
        theirs = fill(theirs, config, tensors, source=source)
        filled = translated.to_ours(theirs, blank, places)
    warn_of_name(config.extra.get(BASE_NAME), base_model_name, source)
    return filled, config


def _plan(
    config: LoraConfig,
    *,
    leaves: Mapping[str, Any],
    places: Mapping[str, Placed] | None,
    plan_of: Callable[[LoraConfig], Plan],
    source: str,
    name_map: NameMap | None,
) -> tuple[Plan, Saved]:
    """The plan of a config in Hugging Face's names, and under a name map what trains whole."""
    if places is None or name_map is None:
        wanted = plannable(config, leaves, source)
        try:
            return plan_of(wanted), {}
        except ValueError as error:
            raise ValueError(_with_map(error, wanted, leaves, source)) from None
    # Plan and init see our names, config and file Hugging Face's.
    wanted = plannable(config, translated.to_theirs(leaves, places), source)
    wanted, saved = in_our_names(wanted, places, source=source, name_map=name_map)
    return plan_of(wanted), saved


def _with_map(error: ValueError, config: LoraConfig, leaves: Mapping[str, Any], source: str) -> str:
    """The text of a plan's error, which names the map where the model has none of the modules."""
    targets = config.target_modules
    last = {module_of(path).rpartition(".")[2] for path in leaves}
    names = () if isinstance(targets, str) else targets
    if not names or any(name.rpartition(".")[2] in last for name in names):
        return f"{source}: {error}"
    if {name.rpartition(".")[2] for name in names} == {HEAD}:
        return (
            f"{source}: the adapter changes the output head only (`{HEAD}`), and the model has no "
            f"head beside its embedding; train it in PEFT with {TYING}=True, or load a model whose "
            "head is not tied"
        )
    return (
        f"{source}: {error}. The model has none of the adapter's modules: give Hugging Face's "
        "names of its parameters by `name_map` (lora.hf.name_map)"
    )


def _blank(plan: Plan, params: Any, source: str) -> Any:
    """The tree with the new adapters of a plan."""
    # The key has no effect: every factor drawn with it is replaced.
    return init(jax.random.key(0), as_read(plan, params, source=source), params)


def save_peft(
    directory: str | os.PathLike,
    lora_params: Any,
    config: LoraConfig,
    *,
    base_model_name: str | None = None,
    task_type: str | None = AUTO,
    target: str = "peft",
    name_map: NameMap | None = None,
    model_type: str | None = None,
) -> None:
    """Writes an adapter as a PEFT directory, whole or not at all.

    Of several processes all have to call it, and the first one writes.

    An optimizer of the whole tree moves the base, which is not written, and the scales. Moved
    scales are refused; the tree holds nothing else to compare the base with. They have no gradient
    while B is zero, so that a first step is not found, nor a few of SGD at a small rate.

    Args:
      directory: created if it does not exist; other files in it stay. A model card (README.md)
        is written where there is none.
      lora_params: tree with the adapter.
      config: the config the adapter was made with.
      base_model_name: Hub id or path of the base model, for `base_model_name_or_path`.
      task_type: PEFT's task type, or None. "auto" keeps that of a config that came from PEFT;
        without one it is CAUSAL_LM for a decoder and FEATURE_EXTRACTION or SEQ_CLS for an encoder,
        each under Hugging Face's names, and None for a model of one's own.
      target: "peft", or "vllm" for an adapter that vLLM serves at the right scale. vLLM reads one
        rank and one alpha, so other scales are multiplied into B and ranks filled up with zeros.
      name_map: as for `load_peft`.
      model_type: Hugging Face's name of the model family, which decides how square experts lie in
        the file; by default that of `base_model_name`, where it is a directory.

    Raises:
      ValueError: the tree and the config disagree, a number is not finite, a classifier's head
        that PEFT would look for is not trained, vLLM could not serve the adapter, or it names
        modules that the base's directory does not have.
      OSError: the directory cannot be written; nothing was changed.

    Example:
      save_peft("adapter", lora_params, config, base_model_name="HuggingFaceTB/SmolLM2-135M")
    """
    order = "hf.save_peft(directory, lora_params, config)"
    check_argument(order, "directory", directory, (str, os.PathLike))
    check_argument(order, "config", config, LoraConfig)
    if name_map is not None:
        check_argument(order, "name_map", name_map, NameMap)
    if base_model_name is not None:
        check_argument(order, "base_model_name", base_model_name, (str, os.PathLike))
    check_whole(lora_params)
    check_single(lora_params)
    if target not in TARGETS:
        raise ValueError(f'target must be one of "peft", "vllm", got {target!r}')
    leaves, config = in_their_names(leaves_by_path(lora_params), config, name_map)
    model_type = model_type or model_type_of(base_model_name)
    fields, tensors = with_task(leaves, config, task_type, model_type=model_type)
    if target == "vllm":
        fields, tensors = for_vllm(fields, tensors, config, model_type=model_type)
    if base_model_name is not None:
        check_names(tensors, base_model_name)
        fields[BASE_NAME] = base_model_name

    def write() -> None:
        auto_class = auto_class_of(leaves, fields["task_type"])
        # LoftQ's adapters have their base in PEFT's config.
        base = None if config.init == "loftq" else quantization_of(lora_params)
        write_directory(directory, fields, tensors, auto_class=auto_class, base=base)

    processes.by_first(write)
