"""Tables of the base that PEFT repeats in an adapter's file, settled before the adapter is read.

    embed_tokens.weight                             save_embedding_layers, or a resized vocabulary
    embed_tokens.base_layer.weight                  the same, of an adapted table
    embed_tokens.token_adapter.base_layer.weight    the same, of one whose rows train
    lm_head.original_module.weight                  the same, of one that trains whole
    lm_head.token_adapter.trainable_tokens_delta    a tied head, of a model resized in memory

PEFT writes embedding and head with `save_embedding_layers`, or where the vocabulary was resized,
and loads them over the base's. A copy that equals the base's table is left out; one that differs
trains whole, with the file's numbers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lora_jax.array import dense
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.name_maps.rules import Part, Placed, block_there, shape_there
from lora_jax.hf.peft.index import PREFIX, is_embedding, modules_of
from lora_jax.hf.peft.tensors import TOKEN_ROWS
from lora_jax.hf.peft.tying import HEAD, TYING, ties
from lora_jax.paths import bare, module_of
from lora_jax.plan.leaf import Plan

_HEADS = (HEAD, "embed_out")

# PEFT's names of the factors of a matrix, and of a table.
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")

# Ends of the names of copies of the base.
_ORIGINAL = "original_module.weight"
_BASE = ("base_layer.weight", "token_adapter.base_layer.weight", _ORIGINAL)


class Table(NamedTuple):
    """A table of the base: an embedding, or a head.

    Attributes:
      leaf: path of its leaf in the model.
      rows: one for each token.
      read: gives its numbers (rows, features).
    """

    leaf: str
    rows: int
    read: Callable[[], np.ndarray]


def tables_of(
    leaves: Mapping[str, Any], plan: Plan, places: Mapping[str, Placed] | None = None
) -> dict[str, Table]:
    """The tables of a base, by PEFT's names of their modules.

    Args:
      leaves: the base's leaves by path.
      plan: of any config on the base; it shows which table is the head too.
      places: of the leaves, where they are under a name map.
    """
    found: dict[str, Table] = {}
    for path, leaf in leaves.items():
        if places is not None and path not in places:  # a name map has no rule for it
            continue
        placed = None if places is None else places[path]
        for part in placed.parts if placed else (None,):
            there = bare(path) if part is None else part.path
            module, embeds = module_of(there), is_embedding(there)
            shape = shape_there(placed, part) if placed and part else leaf.shape
            if len(shape) == 2 and (embeds or module.rpartition(".")[2] in _HEADS):
                read = partial(_read, leaf, placed, part, turned=not embeds)
                found[module] = Table(path, shape[0 if embeds else 1], read)
    tied = {leaf.path for leaf in plan.leaves if leaf.tied}
    heads = [table for table in found.values() if table.leaf in tied]
    # Head and embedding are one leaf here, and two modules for PEFT.
    return found if not heads or HEAD in found else {**found, HEAD: heads[0]}


def _read(leaf: Any, placed: Placed | None, part: Part | None, *, turned: bool) -> np.ndarray:
    array = np.asarray(dense(leaf))
    if placed is not None and part is not None:
        array = np.asarray(block_there(array, placed, part))
    return array.T if turned else array


def with_tables(
    tensors: Mapping[str, np.ndarray], plan: Plan, places: Mapping[str, Placed] | None = None
) -> dict[str, np.ndarray]:
    """Names the factors of tables and of matrices as PEFT does, for a file that names both alike.

    Args:
      tensors: by name, as PEFT has them but for that.
      plan: of the adapter's config, which shows the tables: leaves whose rows are looked up.
      places: of the leaves, where they are under a name map.
    """
    tables: set[str] = set()
    for leaf in plan.leaves:
        placed = (places or {}).get(leaf.path)
        if leaf.lookup and placed:
            tables |= {module_of(part.path) for part in placed.parts}
        elif leaf.lookup and places is None:
            tables |= {name for _, name in modules_of(leaf.path, leaf)}
    out = {}
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            module, part = match.groups()
            is_table = module.removeprefix(PREFIX) in tables
            key = f"{module}.lora_embedding_{part}" if is_table else f"{module}.lora_{part}.weight"
        out[key] = tensor
    return out


def check_vocabulary(
    tensors: Mapping[str, np.ndarray], tables: Mapping[str, Table], source: str
) -> None:
    """Refuses an adapter for another number of tokens than the base has.

    Raises:
      ValueError: one of its tensors shows that.
    """
    for key, tensor in tensors.items():
        module, ending = _split(key, tables)
        if module is None or tensor.ndim != 2 or ending == TOKEN_ROWS:
            continue
        if ending == "lora_embedding_A":
            rows = tensor.shape[1]
        elif ending == "lora_B.weight" or (ending.endswith("weight") and "lora_" not in ending):
            rows = tensor.shape[0]
        else:
            continue
        if rows != tables[module].rows:
            raise ValueError(
                f"{source}: `{key}` is for a vocabulary of {rows}, and this model's "
                f"`{tables[module].leaf}` has {tables[module].rows} rows: the adapter was trained "
                "after the vocabulary was resized, or on another model; resize the base as then "
                "(resize_token_embeddings in transformers), save it and load that one"
            )


def without_copies(
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    tables: Mapping[str, Table],
    source: str,
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Takes the base's tables out of an adapter's tensors.

    Returns:
      The config, with tables that differ from the base's among its modules_to_save, and the
      tensors that are the adapter's own.

    Raises:
      ValueError: a copy shows that the adapter was made on another base, or it differs from what
        it repeats.
    """
    kept, changed = dict(tensors), []
    twin = _twin(tables)
    # Of a tied table that trains, PEFT writes both names, and the reader compares the two.
    tied = [HEAD] if twin and ties(config) and matching.is_saved(config, twin) else []
    for key, tensor in tensors.items():
        module, ending = _split(key, tables)
        if module is None:
            continue
        whole = f"{PREFIX}{module}.weight"
        if ending in _BASE:
            # An original is not compared: the trained table beside it replaces it in any case. Nor
            # is what PiSSA or OLoRA left of a head, which depends on rounding. The file of an
            # adapter in fewer bits holds the base's table rounded.
            left = ending == _ORIGINAL or base_change(config.init) != "none"
            if not left and not _rounds(tables[module].read(), tensor):
                raise ValueError(
                    f"{source}: `{key}` is not this model's base weight; the adapter was made on "
                    "another model, or on one whose vocabulary was resized: load that one"
                )
            del kept[key]
        elif ending == "modules_to_save.weight" and whole in tensors:
            _check_same(key, whole, tensors, source)
            del kept[key]
        elif ending == TOKEN_ROWS and module == HEAD and twin:
            _check_same(key, f"{PREFIX}{twin}.{TOKEN_ROWS}", tensors, source)
            del kept[key]
        elif ending == "weight" and not matching.is_saved(config, module) and module not in tied:
            if _equal(tables[module].read(), tensor):
                del kept[key]
            else:
                changed.append(module)
    if not changed:
        return config, kept
    if twin and {twin, HEAD} & set(changed):
        return _tied_and_changed(config, kept, twin, changed=changed, source=source)
    return _saving(config, changed), kept


def _tied_and_changed(
    config: LoraConfig, kept: dict[str, np.ndarray], twin: str, *, changed: list[str], source: str
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Head and embedding are one leaf: the file has to give both the same numbers."""
    halves = [module for module in (twin, HEAD) if module in changed]
    ours, other = (f"{PREFIX}{module}.weight" for module in (halves[0], halves[-1]))
    for module in {twin, HEAD} - set(halves):
        if f"{PREFIX}{module}.weight" not in kept:
            kept[f"{PREFIX}{module}.weight"] = kept[ours]
    _check_same(ours, other, kept, source)
    config = _saving(config, [*changed, twin, HEAD])
    return dataclasses.replace(config, extra={**config.extra, TYING: True}), kept


def _saving(config: LoraConfig, modules: list[str]) -> LoraConfig:
    saved = dict.fromkeys((*config.modules_to_save, *modules))
    return dataclasses.replace(config, modules_to_save=tuple(saved))


def _split(key: str, tables: Mapping[str, Table]) -> tuple[str | None, str]:
    """The table that a tensor belongs to, and the rest of its name."""
    name = key.removeprefix(PREFIX)
    found = [module for module in tables if name.startswith(f"{module}.")]
    module = max(found, key=len, default=None)
    return module, name if module is None else name.removeprefix(f"{module}.")


def _twin(tables: Mapping[str, Table]) -> str | None:
    """The embedding that is the head too."""
    head = tables.get(HEAD)
    same = (m for m, table in tables.items() if m != HEAD and head and table.leaf == head.leaf)
    return next(same, None)


def _check_same(key: str, other: str, tensors: Mapping[str, np.ndarray], source: str) -> None:
    if other not in tensors or not np.array_equal(tensors[key], tensors[other]):
        raise ValueError(
            f"{source}: `{key}` and `{other}` differ, and in this model they are one (its head and "
            f"embedding are tied); tie them in PEFT ({TYING}=True), or load a model whose head is "
            "not tied"
        )


def _rounds(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return _equal(ours, theirs) or _equal(theirs, ours)


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    # The base may be held in another dtype than the file.
    return ours.shape == theirs.shape and np.array_equal(ours, theirs.astype(ours.dtype))
