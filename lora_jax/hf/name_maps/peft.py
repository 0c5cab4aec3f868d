"""PEFT configs of a model under a name map: their names translated, both ways."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.array import LoraArray, SavedArray, is_lora
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.name_maps.leaves import to_theirs
from lora_jax.hf.name_maps.rules import NameMap, Part, Placed, places_of, recognise
from lora_jax.hf.peft.index import adapts, make_index, named_targets
from lora_jax.paths import bare, expand, module_of, spell
from lora_jax.plan.leaf import Plan

# Leaves that train whole, with the layers that do (None: all).
Saved = Mapping[str, tuple[tuple[int, ...], ...] | None]


def in_our_names(
    config: LoraConfig, places: Mapping[str, Placed], *, source: str, name_map: NameMap
) -> tuple[LoraConfig, Saved]:
    """A config in Hugging Face's names, translated into ours.

    Args:
      config: the config.
      places: the place of every leaf of the model, by our path.
      source: what messages call the adapter.
      name_map: the map that gave the places.

    Returns:
      A config that adapts the same leaves, and the leaves that train whole.

    Raises:
      ValueError: the config has what cannot be translated.
    """
    # Repeating a start needs every layer's rank, and patterns do not translate into our names.
    refused = {
        # The file has the experts of a layer in one tensor, and a map's rule names each.
        "target_parameters": config.target_parameters,
        "rank_pattern": base_change(config.init) == "repeatable" and config.rank_pattern,
        "alpha_pattern": base_change(config.init) == "repeatable" and config.alpha_pattern,
    }
    for field, value in refused.items():
        if value:
            raise ValueError(
                f"{source}: `{field}` = {value!r} cannot be translated by name map "
                f"`{name_map.name}`; merge the adapter in PEFT and load the merged checkpoint "
                "(lora.hf.from_hugging_face), or give the tree Hugging Face's names"
            )
    parts = [part for placed in places.values() for part in placed.parts]
    adapted = {part.path for part in parts if _adapts(config, part)}
    modules = {module_of(path) for path in adapted}
    saved = {}
    for path, placed in places.items():
        train = tuple(p.index for p in placed.parts if _trains_whole(config, p, modules))
        if train:
            saved[path] = None if len(train) == len(placed.parts) else train
    targets = tuple(
        bare(path)
        for path, placed in places.items()
        if any(part.path in adapted for part in placed.parts)
    )
    if not targets and not saved and config.target_modules:
        ours = ", ".join(f"`{path}`" for path in list(places)[:3]) or "no leaf of the model"
        raise ValueError(
            f"{source}: name map `{name_map.name}` leads none of the adapter's modules "
            f"({config.target_modules!r}) to a leaf; it has rules for {ours}"
        )
    here = {module_of(p.path): module_of(path) for path, x in places.items() for p in x.parts}
    named = dataclasses.replace(
        config,
        target_modules=ALL_LINEAR if config.target_modules == ALL_LINEAR else targets,
        exclude_modules=(),
        modules_to_save=(),
        trainable_token_indices=_renamed_rows(config, here),
        bias="none",
        layers_to_transform=None,
        layers_pattern=None,
    )
    return named, saved


def _renamed_rows(config: LoraConfig, names: Mapping[str, str]) -> Any:
    """`trainable_token_indices` with other names of modules; a list means the input embedding."""
    rows = config.trainable_token_indices
    if not isinstance(rows, Mapping):
        return rows
    renamed = {}
    for entry, ids in rows.items():
        found = {new for old, new in names.items() if matching.ends_with(old, entry)}
        # Without one that fits, the error of `plan` lists the nearest names.
        renamed[found.pop() if len(found) == 1 else entry] = ids
    return renamed


def with_saved(lora_params: Any, saved: Saved, plan: Plan) -> Any:
    """The tree with the leaves that train whole as `SavedArray`s."""
    planned = plan.by_path()

    def mark(key_path: tuple, leaf: Any) -> Any:
        path = spell(key_path)
        if is_lora(leaf) or path not in saved:
            return leaf
        return SavedArray(w=leaf, value=leaf, only=saved[path], tied=planned[path].tied)

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
    leaves: Mapping[str, Any], config: LoraConfig, name_map: NameMap | None
) -> tuple[Mapping[str, Any], LoraConfig]:
    """Leaves and their config, both in Hugging Face's terms, as `lora_jax.hf.save_peft` takes them.

    Args:
      leaves: leaves by path, with the adapter.
      config: the config it was made with, in our names, or in Hugging Face's where it was loaded.
      name_map: the map; None where our paths are Hugging Face's names, or those of transformers'
        Flax models.

    Returns:
      The leaves by path, and a config that names exactly those that train.
    """
    if (using := name_map or recognise(leaves)) is None:
        return leaves, config
    # A config that was loaded has Hugging Face's names already; one of our own is translated.
    places = places_of(leaves, using)
    flat = to_theirs(leaves, places)
    there = {module_of(bare(path)): module_of(x.parts[0].path) for path, x in places.items()}
    if not any(matching.ends_with(name, e) for e in _named(config) for name in there.values()):
        config = dataclasses.replace(config, trainable_token_indices=_renamed_rows(config, there))
    if all(_adapts(config, _part(path)) == isinstance(x, LoraArray) for path, x in flat.items()):
        return flat, config
    ours = {
        part.path: _our_name(path, placed, number)
        for path, placed in places.items()
        for number, part in enumerate(placed.parts)
    }
    # Patterns of ours match our names: each module gets an exact pattern with what they gave it.
    adapted = {module_of(path): ours[path] for path, x in flat.items() if isinstance(x, LoraArray)}
    ranks = {_exact(n): matching.rank_of(config, name) for n, name in adapted.items()}
    alphas = {_exact(n): matching.alpha_of(config, name) for n, name in adapted.items()}
    saved = [module_of(path) for path, x in flat.items() if isinstance(x, SavedArray)]
    whole = [n for n in saved if n not in adapted] if config.bias == "none" else []
    named = dataclasses.replace(
        config,
        target_modules=tuple(adapted),
        target_parameters=(),
        exclude_modules=(),
        modules_to_save=tuple(dict.fromkeys(whole)),
        rank_pattern={n: r for n, r in ranks.items() if r != config.rank},
        alpha_pattern={n: a for n, a in alphas.items() if a != config.alpha},
        layers_to_transform=None,
        layers_pattern=None,
    )
    targets = named_targets(make_index(flat, named))
    return flat, dataclasses.replace(named, target_modules=tuple(targets))


def _named(config: LoraConfig) -> list[str]:
    """The modules that `trainable_token_indices` names."""
    rows = config.trainable_token_indices
    return list(rows) if isinstance(rows, Mapping) else []


def _part(path: str) -> Part:
    return Part(path, (), path, None)


def _our_name(path: str, placed: Placed, number: int) -> str:
    """The name of one layer of a leaf in our config, as in `lora_jax.plan`."""
    module = module_of(bare(path))
    stacked = placed.layout.stacks
    if len(stacked) == 1 and (names := expand(module, len(placed.parts))):
        return names[number]
    return module


def _exact(name: str) -> str:
    # PEFT puts `(.*\.)?` in front of a pattern, so without the anchor it matches ends of names too.
    return "^" + re.escape(name)
