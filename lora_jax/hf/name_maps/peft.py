"""PEFT adapters of a model under a name map: the configs' names translated, both ways."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.array import LoraArray, SavedArray, is_lora
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.name_maps.leaves import to_ours, to_theirs
from lora_jax.hf.name_maps.rules import NameMap, Part, Placed, place
from lora_jax.hf.peft.base import as_read
from lora_jax.hf.peft.load import check_tying, fill, plannable, tied_by_file
from lora_jax.hf.peft.modules import adapts, bare, leaves_of
from lora_jax.hf.peft.save import named_targets
from lora_jax.paths import expand, module_of, spell
from lora_jax.tree import init


def attach(
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    plan_of: Callable[[LoraConfig], Any],
    params: Any,
    source: str,
    using: NameMap,
) -> tuple[Any, LoraConfig]:
    """`lora_jax.hf.peft.attach` for a model whose names are its own.

    Args:
      config: the adapter's config, in Hugging Face's names.
      tensors: PEFT's tensors by name.
      plan_of: plans a config on the model.
      params: the base parameters.
      source: what messages call the adapter.
      using: the map.

    Returns:
      `params` with LoRA leaves, and the config as it was.

    Raises:
      ValueError: as `lora_jax.hf.load_peft`, or the map cannot say what the config asks for.
    """
    config = tied_by_file(config, tensors)
    wanted = plannable(config, to_theirs(params, using), source)
    targets, saved = in_our_names(wanted, params, source, using)
    plan = plan_of(targets)
    check_tying(config, plan, source)
    plan = as_read(plan, params, source=source)
    blank = _with_saved(init(jax.random.key(0), plan, params), saved)
    filled = fill(to_theirs(blank, using, config=config), config, tensors, source=source)
    return to_ours(filled, blank, using), config


def in_our_names(
    config: LoraConfig, params: Any, source: str, using: NameMap
) -> tuple[LoraConfig, dict[str, tuple[tuple[int, ...], ...] | None]]:
    """What `config` means by Hugging Face's names, by our paths.

    Returns:
      A config that adapts the same leaves; and the leaves that train whole, with the indices of
      the layers that do (None: all).

    Raises:
      ValueError: the config has what cannot be translated.
    """
    refused = {
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
        "rank_pattern": base_change(config.init) == "repeatable" and config.rank_pattern,
        "alpha_pattern": base_change(config.init) == "repeatable" and config.alpha_pattern,
    }
    for field, value in refused.items():
        if value:
            raise ValueError(
                f"{source}: `{field}` = {value!r} cannot be translated by name map "
                f"`{using.name}`; merge the adapter in PEFT, or rename the tree"
            )
    places = [(p, place(p, leaf.shape, using)) for p, leaf in leaves_of(params).items()]
    adapted = {part.path for _, placed in places for part in placed.parts if _adapts(config, part)}
    modules = {module_of(path) for path in adapted}
    saved = {}
    for path, placed in places:
        train = tuple(p.index for p in placed.parts if _trains_whole(config, p, modules))
        if train:
            saved[path] = None if len(train) == len(placed.parts) else train
    targets: Any = tuple(
        bare(path) for path, placed in places if any(p.path in adapted for p in placed.parts)
    )
    named = dataclasses.replace(
        config,
        target_modules=ALL_LINEAR if config.target_modules == ALL_LINEAR else targets,
        exclude_modules=(),
        modules_to_save=(),
        bias="none",
        layers_to_transform=None,
        layers_pattern=None,
    )
    return named, saved


def _with_saved(lora_params: Any, saved: Mapping[str, tuple | None]) -> Any:
    """The tree with leaves that train whole."""

    def mark(key_path, leaf):
        path = spell(key_path)
        if is_lora(leaf) or path not in saved:
            return leaf
        return SavedArray(w=leaf, value=leaf, only=saved[path])

    return jax.tree_util.tree_map_with_path(mark, lora_params, is_leaf=is_lora)


def _adapts(config: LoraConfig, part: Part) -> bool:
    last = part.path.rpartition(".")[2]
    return last in ("kernel", "embedding") and adapts(config, part.path, module_of(part.path))


def _trains_whole(config: LoraConfig, part: Part, adapted: set[str]) -> bool:
    module = module_of(part.path)
    if matching.is_saved(config, module):
        return True
    return matching.trains_bias(config, part.tensor, adapted=module in adapted)


def in_their_names(
    lora_params: Any, config: LoraConfig, using: NameMap
) -> tuple[dict[str, Any], LoraConfig]:
    """A tree and its config, both in Hugging Face's terms, as `lora_jax.hf.save_peft` takes them.

    Args:
      lora_params: tree with the adapter.
      config: the config it was made with, in our names, or in Hugging Face's where it was loaded.
      using: the map.

    Returns:
      The leaves by path, and a config that means exactly those that train.
    """
    flat = to_theirs(lora_params, using)
    if all(_adapts(config, _part(path)) == isinstance(x, LoraArray) for path, x in flat.items()):
        return flat, config
    ours = {
        part.path: _our_name(path, placed, number)
        for path, leaf in leaves_of(lora_params).items()
        for placed in [place(path, leaf.shape, using)]
        for number, part in enumerate(placed.parts)
    }
    adapted = {module_of(path): ours[path] for path, x in flat.items() if isinstance(x, LoraArray)}
    ranks = {_exact(n): matching.rank_of(config, own) for n, own in adapted.items()}
    alphas = {_exact(n): matching.alpha_of(config, own) for n, own in adapted.items()}
    saved = [module_of(path) for path, x in flat.items() if isinstance(x, SavedArray)]
    whole = [n for n in saved if n not in adapted] if config.bias == "none" else []
    named = dataclasses.replace(
        config,
        target_modules=tuple(adapted),
        exclude_modules=(),
        modules_to_save=tuple(dict.fromkeys(whole)),
        rank_pattern={n: r for n, r in ranks.items() if r != config.rank},
        alpha_pattern={n: a for n, a in alphas.items() if a != config.alpha},
        layers_to_transform=None,
        layers_pattern=None,
    )
    return flat, dataclasses.replace(named, target_modules=tuple(named_targets(flat, named)))


def _part(path: str) -> Part:
    return Part(path, (), path, None)


def _our_name(path: str, placed: Placed, number: int) -> str:
    """The name our config calls one layer of a leaf by, as `lora_jax.plan` does."""
    module = module_of(bare(path))
    stacked = placed.layout.stacks
    if len(stacked) == 1 and (names := expand(module, len(placed.parts))):
        return names[number]
    return module


def _exact(name: str) -> str:
    return "^" + re.escape(name)
