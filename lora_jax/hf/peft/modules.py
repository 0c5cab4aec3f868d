"""What PEFT calls the modules and parameters that the leaves of a tree are.

    model.layers.self_attn.q_proj.kernel   layer 3:  model.layers.3.self_attn.q_proj
    model.layers.mlp.experts.gate_up_proj  layer 3, as one of `target_parameters`:
                                                     model.layers.3.mlp.experts.gate_up_proj

Experts of a parameter that `target_parameters` does not name are numbered like layers.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lora_jax.array import LoraArray, is_lora
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.dims import sizes, stack_dims
from lora_jax.hf.checkpoint import names
from lora_jax.paths import bare, expand, module_of, spell

HEAD = "lm_head"

# Modules that PEFT takes for embeddings by their names, and its field that ties their adapters.
EMBEDDING_MODULES = ("embed_tokens", HEAD)
TYING = "ensure_weight_tying"

# The order in which models register the parameters of their experts, which decides how PEFT nests
# the adapters of several parameters of one module.
_REGISTERED = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


def leaves_of(lora_params) -> dict[str, Any]:
    """Every leaf of a tree by its path, leaves that train whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_lora)
    return {spell(path): leaf for path, leaf in flat}


def modules_of(
    path: str, leaf, config: LoraConfig | None = None
) -> Iterator[tuple[tuple[int, ...], str]]:
    """The full name of the module that each index of a leaf's stack belongs to.

    Args:
      path: the leaf's path.
      leaf: a leaf, whose stack dims are its roles' `s`; a plain array is stacked along as many
        leading dims as its path leaves numbers out.
      config: where its target_parameters mean the leaf, all experts go by the parameter's name.

    Raises:
      ValueError: the path does not say where the numbers of the leaf's layers belong.
    """
    sizes = stack_sizes(path, leaf)
    layers = parameters_of(path, leaf, config) if config is not None else {}
    for index in np.ndindex(*sizes):
        yield index, _parameter(index, layers) or _named(path, index, sizes)


def parameters_of(path: str, leaf, config: LoraConfig) -> dict[tuple[int, ...], str]:
    """The full name of the parameter in each layer, if target_parameters means it.

    Returns:
      Names by layer index; the experts' dim is no layer. Empty if it is not meant.
    """
    if not config.target_parameters:
        return {}
    module, _, parameter = bare(path).rpartition(".")
    depth = names.stack_depth(module) if module else 0
    found = {
        index: f"{names.module_name(module, index)}.{parameter}"
        for index in np.ndindex(*leaf.shape[:depth])
    }
    meant = any(matching.names_parameter(config, name) for name in found.values())
    return found if meant else {}


def _parameter(index: tuple[int, ...], layers: dict[tuple[int, ...], str]) -> str:
    depth = len(next(iter(layers), ()))
    return layers.get(index[:depth], "")


def nesting(config: LoraConfig, lora_params) -> dict[str, int]:
    """How many other adapters PEFT wraps around that of each parameter, by the parameter's name.

    PEFT wraps a module once for each of its parameters, in the order in which the model
    registers them; a JAX tree does not keep that order. Known names stand in transformers' order,
    others as `target_parameters` lists them: if that is wrong, the shapes do not fit.

    Raises:
      ValueError: the order is not known, and shapes could not tell that it is wrong.
    """
    modules: dict[str, list[str]] = {}
    sizes_by_name = {}
    for path, leaf in leaves_of(lora_params).items():
        if isinstance(leaf, LoraArray):
            for name in parameters_of(path, leaf, config).values():
                if matching.names_parameter(config, name):
                    modules.setdefault(name.rpartition(".")[0], []).append(name)
                    sizes_by_name[name] = sizes(leaf.shape, leaf.roles)[1:]
    for found in modules.values():
        _check_order(found, sizes_by_name)
    return {
        name: len(found) - 1 - place
        for found in modules.values()
        for place, name in enumerate(sorted(found, key=lambda n: _registered(config, n)))
    }


def _check_order(found: list[str], sizes_by_name: dict[str, tuple[int, int]]) -> None:
    unknown = [name for name in found if name.rpartition(".")[2] not in _REGISTERED]
    alike = len({sizes_by_name[name] for name in found}) < len(found)
    if unknown and len(found) > 1 and alike:
        raise ValueError(
            f"target_parameters: PEFT numbers the adapters of {', '.join(f'`{n}`' for n in found)} "
            "by the order in which its model registers them, which is not known here, and their "
            "shapes are alike: adapt one of them, or rename them as transformers does "
            f"({', '.join(_REGISTERED)})"
        )


def _registered(config: LoraConfig, name: str) -> tuple[int, int]:
    last = name.rpartition(".")[2]
    known = _REGISTERED.index(last) if last in _REGISTERED else len(_REGISTERED)
    listed = enumerate(config.target_parameters)
    return known, next((i for i, entry in listed if matching.ends_with(name, entry)), 0)


def stack_sizes(path: str, leaf) -> tuple[int, ...]:
    """Sizes of a leaf's stack dims."""
    if isinstance(leaf, LoraArray):
        return tuple(leaf.shape[d] for d in stack_dims(leaf.roles))
    return tuple(leaf.shape[: names.stack_depth(bare(path))])


def _named(path: str, index: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    module = module_of(bare(path))
    if len(index) == names.stack_depth(module):
        return names.module_name(module, index)
    if len(index) == 1 and (expanded := expand(module, sizes[0])):
        return expanded[index[0]]
    raise ValueError(
        f"leaf `{path}` stacks {len(index)} dimension(s) of layers, but its path does not say "
        "where their numbers belong in a PEFT name; rename the tree so that a component such as "
        "`layers` holds the stacked modules, or unstack it (experts stored as one array are "
        "written where target_parameters names them)"
    )


def adapts(config: LoraConfig, path: str, name: str) -> bool:
    """Whether a config means a layer of a leaf; with "all-linear", any that is not excluded.

    As in `lora_jax.plan`, a module also goes by its parameter's name and, where no layers are
    chosen, by its path without numbers.
    """
    if matching.names_parameter(config, name):
        return True
    plain = bare(path)
    spelled = [name, f"{name}.{plain.rpartition('.')[2]}"]
    if any(matching.is_excluded(config, n) for n in spelled):
        return False
    if config.target_modules == ALL_LINEAR:
        return True
    if config.layers_to_transform is None:
        spelled += [path, module_of(path), plain, module_of(plain)]
    return any(matching.is_target(config, n) for n in spelled)


def adapted_names(lora_params, config: LoraConfig) -> list[str]:
    """Full names of the modules that carry an adapter, in the tree's order; no parameters."""
    named = (
        (path, name)
        for path, leaf in leaves_of(lora_params).items()
        if isinstance(leaf, LoraArray) and not parameters_of(path, leaf, config)
        for _, name in modules_of(path, leaf)
    )
    return list(itertools.chain(name for path, name in named if adapts(config, path, name)))


def is_embedding(path: str) -> bool:
    """Whether a leaf is a lookup table, which PEFT names differently: Flax calls it so."""
    return path.rpartition(".")[2] == "embedding"


def ties(config: LoraConfig) -> bool:
    """Whether PEFT adapts a tied head and embedding alike: asked to, and one is named in full.

    PEFT looks for its own names of embeddings only; a table of another name (`wte`) is tied
    where the head is named.
    """
    if not config.extra.get(TYING):
        return False
    targets = config.target_modules
    named = [*config.modules_to_save, *(targets if isinstance(targets, tuple) else ())]
    if isinstance(targets, str) and any(re.fullmatch(targets, m) for m in EMBEDDING_MODULES):
        return True
    return any(name.rpartition(".")[2] in EMBEDDING_MODULES for name in named)


def tied_config(lora_params, config: LoraConfig) -> LoraConfig:
    """A config with which PEFT adapts the head as well where our table is both in one leaf."""
    tables = tied_tables(lora_params)
    if not tables:
        return config
    config = dataclasses.replace(config, extra={**config.extra, TYING: True})
    if ties(config):
        return config
    field = "target_modules"
    if not isinstance(leaves_of(lora_params)[tables[0]], LoraArray):
        field = "modules_to_save"
    entries = getattr(config, field)
    named = f"{entries}|{HEAD}" if isinstance(entries, str) else (*entries, HEAD)
    return dataclasses.replace(config, **{field: named})


def tied_tables(lora_params) -> list[str]:
    """Paths of trained embedding tables that are the output head as well: no head of its own.

    Tables of which only some rows train are not listed: PEFT ties those by itself.
    """
    leaves = leaves_of(lora_params)
    if any(module_of(path).rpartition(".")[2] == HEAD for path in leaves):
        return []
    return [
        path
        for path, leaf in leaves.items()
        if is_embedding(path) and is_lora(leaf) and not hasattr(leaf, "rows")
    ]
