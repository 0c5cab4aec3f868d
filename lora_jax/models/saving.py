"""Writing a model as a Hugging Face directory that transformers loads.

directory/config.json, generation_config.json
directory/model.safetensors                 every weight under Hugging Face's name, or
directory/model-00001-of-0000N.safetensors  shards of them, with model.safetensors.index.json
directory/tokenizer.json, tokenizer_config.json, chat_template.jinja   if there is a tokenizer
directory/preprocessor_config.json          if there is a processor of images

What the base's config.json, generation_config.json and tokenizer files hold is written back whole,
but for the dtype and how weights were quantized. A decoder inside a vision-language model is
written among that model's tensors and files.

Weights are merged, cast and written one block of one module at a time.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.array import LoraArray, SavedArray, check_plain, check_whole, dense, is_leaf, is_lora
from lora_jax.config.arguments import check_argument
from lora_jax.files import check_new, read_object, replacing
from lora_jax.hf import images
from lora_jax.hf.checkpoint.names import Family, as_held, module_name, stack_depth, tensors_of
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.checkpoint.shards import NewTensor, cast, dtype_of, size_of, write_shards
from lora_jax.hf.checkpoint.weights import shape_there
from lora_jax.hf.tokenizer.directory import SETTINGS, TEMPLATE, template_of
from lora_jax.merge import merge
from lora_jax.models.dialect import IGNORED
from lora_jax.models.model import Model
from lora_jax.models.registry import (
    CAUSAL_LM,
    ENCODER_DECODER,
    config_from_hf,
    kind_of_model,
    names_of,
)
from lora_jax.models.wrapped import as_written, rest_of
from lora_jax.paths import spell

MAX_SHARD_SIZE = "5GB"
# The numbers of layers that predict tokens beyond the next.
_PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers")

# Module -> its parameters.
Modules = Mapping[str, Mapping[str, Any]]


class Block(NamedTuple):
    """One block of a module, by the indices of its stack dims."""

    module: str
    index: tuple[int, ...]


def save_model(
    directory: str | Path,
    model: Any,
    params: Any,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a model's configuration, weights and tokenizer.

    Everything is written to a temporary directory first, which is then renamed, so that a failure
    leaves nothing half-written.

    Args:
      directory: to be made; nothing may be there yet.
      model: gives the configuration and the tokenizer, from `lora_jax.models.load`.
      params: its plain parameters; for adapters there is `save_merged`.
      dtype: "float32", "bfloat16" or "float16".
      max_shard_size: bytes in one file, or as Hugging Face writes it: "5GB".

    Raises:
      FileExistsError: the directory exists already.
      ValueError: `params` holds adapters, or numbers that the dtype cannot hold.
      OSError: the directory cannot be written.
    """
    check_plain(params, also=", or let `save_merged` do it")
    save_merged(directory, model, params, dtype=dtype, max_shard_size=max_shard_size)


def save_merged(
    directory: str | Path,
    model: Any,
    lora_params: Any,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Merges adapters into a model and writes it, without ever holding the merged model.

    The numbers are those of `lora_jax.merge`, rounded to `dtype`. Of several processes all have to
    call it, and the first one writes.

    Args:
      directory: to be made; nothing may be there yet.
      model: gives the configuration and the tokenizer, from `lora_jax.models.load`.
      lora_params: its parameters with adapters, or without.
      dtype: "float32", "bfloat16" or "float16".
      max_shard_size: bytes in one file, or as Hugging Face writes it: "5GB".

    Raises:
      FileExistsError: the directory exists already.
      ValueError: parameters of another model, a sum that is not finite, or numbers that the dtype
        cannot hold.
      OSError: the directory cannot be written.
    """
    order = "models.save_merged(directory, model, lora_params)"
    check_argument(order, "directory", directory, (str, os.PathLike))
    check_argument(order, "model", model, Model)
    directory = Path(directory)
    processes.together(lambda: check_new(directory), FileExistsError)
    numbers = dtype_of(dtype)
    most, family = size_of(max_shard_size), _names_of(model)
    modules = modules_of(lora_params)
    blocks = blocks_of(modules, family)
    entries = [x for block in blocks for x in entries_of(block, modules, family, numbers)]
    check_entries(entries, model, family)
    values = (x for block in blocks for x in values_of(block, modules, family, numbers))
    texts, files = texts_of(model, dtype), {}
    if getattr(model.config, "wrapper", None):
        decoder = {x.name for x in entries} | _names_read(model, modules)
        rest = rest_of(model.checkpoint, family, decoder, dtype)
        entries = [entry._replace(name=rest.names.get(entry.name, entry.name)) for entry in entries]
        entries, values = [*entries, *rest.entries], chain(values, rest.values())
        texts["config.json"] = _json(rest.config)
        files = {name: path for name, path in rest.files.items() if name not in texts}

    def write(values: Iterator[np.ndarray]) -> None:
        with replacing(directory) as new:
            new.mkdir()
            write_shards(new, entries, values, max_shard_size=most)
            write_texts(new, texts)
            for name, path in files.items():
                shutil.copyfile(path, new / name)

    processes.write_in_first(values, write)


def _names_of(model: Any) -> Family:
    """The names that its tensors are written under, as transformers reads them.

    In a copy of a checkpoint whose experts are one tensor of a block they stay so.
    """
    family, wrapper = names_of(model.config), getattr(model.config, "wrapper", None)
    if wrapper is None:
        return family
    if model.checkpoint is None:
        raise ValueError(
            f"`model` is the decoder inside a `{wrapper}`, whose other tensors are not known: "
            "take the model that `lora.models.load` returns, with its `checkpoint`"
        )
    return as_held(family, open_directory(model.checkpoint).shapes) if family.moved else family


def _names_read(model: Any, modules: Modules) -> set[str]:
    """The names that its tensors were read under."""
    family = as_held(names_of(model.config), open_directory(model.checkpoint).shapes)
    blocks = blocks_of(modules, family)
    return {x.name for b in blocks for x in entries_of(b, modules, family, np.dtype("float32"))}


def modules_of(params: Any) -> Modules:
    """The leaves of every module together: an adapter's bias is merged into its module's."""
    check_whole(params)
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        module, _, name = spell(path).rpartition(".")
        modules.setdefault(module, {})[name] = leaf
    return modules


def blocks_of(modules: Modules, family: Family) -> list[Block]:
    """Every block of every module, layer after layer, whether the tree stacks them or not."""
    blocks = []
    for module, leaves in modules.items():
        name, leaf = next(iter(leaves.items()))
        depth = stack_depth(f"{module}.{name}", family=family)
        blocks += [Block(module, i) for i in product(*(range(n) for n in leaf.shape[:depth]))]

    # By number, so that block 10 follows block 9; modules beside the blocks come last.
    def place(block: Block) -> list[tuple[int, int, str]]:
        # With the place of a parameter: experts are numbered before it.
        parts = module_name(f"{block.module}._", block.index, family=family).split(".")
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]

    return sorted(blocks, key=place)


def entries_of(
    block: Block, modules: Modules, family: Family, dtype: np.dtype
) -> Iterator[NewTensor]:
    """Names and shapes of a block's tensors."""
    for parameter, leaf in modules[block.module].items():
        parts = tensors_of(f"{block.module}.{parameter}", block.index, family=family)
        shape = leaf.shape[len(block.index) :]
        shape = (*shape[:-1], *(size // len(parts) for size in shape[-1:]))
        for name, axes in parts:
            yield NewTensor(name, shape_there(shape, axes), dtype)


def check_entries(entries: list[NewTensor], model: Any, family: Family) -> None:
    """Refuses the tensors of another model; blocks may be stacked or not."""
    modules = modules_of(model.forward.shapes())
    every = (
        entries_of(block, modules, family, np.dtype("float32"))
        for block in blocks_of(modules, family)
    )
    wanted = {entry.name: entry.shape for entry in chain.from_iterable(every)}
    given = {entry.name: entry.shape for entry in entries}
    for name in (*wanted, *given):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"`lora_params` gives `{name}` the shape {given.get(name)}, expected "
                f"{wanted.get(name)}: these are no parameters of this model"
            )


def values_of(
    block: Block, modules: Modules, family: Family, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Their numbers, in Hugging Face's order of dimensions."""
    leaves, index = modules[block.module], block.index
    parts = {name: x if _is_low_rank(x) else part_of(x, index) for name, x in leaves.items()}
    if any(map(is_lora, parts.values())):
        # The label is a static argument: without numbers, all layers share one compiled program.
        label = ".".join("*" if part.isdigit() else part for part in block.module.split("."))
        parts = _merged(label, parts, index)
    for parameter, part in parts.items():
        tensors = tensors_of(f"{block.module}.{parameter}", index, family=family)
        whole = np.asarray(processes.whole(dense(part)))
        # A single number has no axis to split.
        each = np.split(whole, len(tensors), axis=-1) if whole.ndim else [whole]
        for (name, axes), there in zip(tensors, each, strict=True):
            yield cast(there if axes is None else there.transpose(np.argsort(axes)), dtype, name)


@partial(jax.jit, static_argnums=0)
def _merged(label: str, leaves: dict[str, Any], index: tuple[int, ...]) -> dict[str, Any]:
    """One block of a module merged; compiled once for all blocks of its shape."""
    cut = {name: part_of(x, index) if _is_low_rank(x) else x for name, x in leaves.items()}
    return merge({label: cut})[label]


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, LoraArray)


def part_of(leaf: Any, index: tuple[int, ...]) -> Any:
    """One block of a leaf, as a leaf of its own."""
    if not index:
        return leaf
    if isinstance(leaf, SavedArray):
        return (leaf.value if leaf.only is None or index in leaf.only else dense(leaf.w))[index]
    if _is_low_rank(leaf):
        whole = dataclasses.replace(leaf, w=None)
        cut = jax.tree.map(lambda x: x[index], whole)
        return dataclasses.replace(cut, w=part_of(leaf.w, index), roles=leaf.roles[len(index) :])
    if hasattr(leaf, "dequantize"):
        cut = jax.tree.map(lambda x: x[index], leaf)
        return dataclasses.replace(
            cut, shape=leaf.shape[len(index) :], roles=leaf.roles[len(index) :]
        )
    return leaf[index]


def write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Writes configuration and tokenizer, by the names of their files."""
    for name, text in texts.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def texts_of(model: Any, dtype: str) -> dict[str, str]:
    config = _config_of(model, dtype)
    tokens = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if (start := config.get("decoder_start_token_id")) is not None:
        tokens["decoder_start_token_id"] = start
    texts = {"config.json": _json(config)}
    # The base's own file wins: its end tokens may be more than config.json has.
    if model.generation or kind_of_model(model) in (CAUSAL_LM, ENCODER_DECODER):
        texts["generation_config.json"] = _json({**tokens, **model.generation})
    if model.tokenizer is not None:
        texts |= _tokenizer_texts(model.tokenizer, model.config.max_position_embeddings)
    if model.processor is not None:
        texts[images.FILE] = _json(model.processor.to_hf())
    return texts


def _config_of(model: Any, dtype: str) -> dict[str, Any]:
    """The checkpoint's config.json with what the model has otherwise: a fresh head's classes.

    Without a checkpoint, or where its fields do not say the same, our own; fields that change no
    results stay.
    """
    own, source = model.config.to_hf(), model.checkpoint
    raw = {}
    if source is not None and source.is_dir():
        raw = read_object(source / "config.json", optional=True)
    if raw:
        # The class is that of the tensors that are written.
        raw["architectures"] = own["architectures"]
        stated = config_from_hf(raw).to_hf()
        both = {**raw, **{name: x for name, x in own.items() if stated.get(name) != x}}
        same = config_from_hf(both).to_hf() == own
        own = both if same else {**{name: raw[name] for name in raw if name in IGNORED}, **own}
    if any(raw.get(name) for name in _PREDICTING):
        warnings.warn(
            f"{source}: its layers beyond the last one, which predict further tokens, are not "
            "loaded: what is written has none, and its config.json says so",
            stacklevel=2,
        )
    own |= {name: 0 for name in _PREDICTING if own.get(name)}
    own |= {} if "dtype" in own else {"torch_dtype": dtype}
    return as_written(own, dtype)


def _tokenizer_texts(tokenizer: Any, length: int) -> dict[str, str]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special,
    }
    texts = {SETTINGS: _json(settings), **tokenizer.files}
    texts["tokenizer.json"] = tokenizer.backend.to_str(pretty=True)
    if tokenizer.chat_template is not None and tokenizer.chat_template != template_of(texts):
        texts[TEMPLATE] = tokenizer.chat_template
    return texts


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
