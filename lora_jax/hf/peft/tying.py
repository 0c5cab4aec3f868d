"""A table that is both the embedding and the output head: how PEFT adapts it, and what it writes.

PEFT has two modules, `embed_tokens` and `lm_head`, and changes both only where its config sets
`ensure_weight_tying`. Here they are one leaf, so an adapter always changes both.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.array import LoraArray, SavedArray
from lora_jax.config.lora import LoraConfig
from lora_jax.config.matching import fits
from lora_jax.hf.peft.card import is_encoder_decoder, parts_of
from lora_jax.hf.peft.index import PREFIX, is_embedding, is_table
from lora_jax.paths import module_of
from lora_jax.plan.leaf import Plan

HEAD = "lm_head"

# Modules that PEFT takes for embeddings by their names, and its field that ties their adapters.
EMBEDDING_MODULES = ("embed_tokens", HEAD)
TYING = "ensure_weight_tying"


def ties(config: LoraConfig) -> bool:
    """Whether PEFT ties the adapters of head and embedding: its field is set, and one is named.

    PEFT looks for its own names of embeddings only; a table of another name (`wte`) is tied
    where the head is named.
    """
    if not config.extra.get(TYING):
        return False
    targets = config.target_modules
    named = [*config.modules_to_save, *(targets if isinstance(targets, tuple) else ())]
    if isinstance(targets, str) and any(fits(targets, m) for m in EMBEDDING_MODULES):
        return True
    return any(name.rpartition(".")[2] in EMBEDDING_MODULES for name in named)


def tied_tables(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of trained embedding tables that are the output head too.

    Tables of which only some rows train are not listed: PEFT ties those by itself.
    """
    trained = [
        path
        for path, leaf in leaves.items()
        if is_table(path, leaf) and isinstance(leaf, LoraArray | SavedArray)
    ]
    return [path for path in trained if _is_tied(path, leaves)]


def _is_tied(path: str, leaves: Mapping[str, Any]) -> bool:
    if (known := leaves[path].tied) is not None:
        return known
    # A leaf that no plan made: without a head beside it, the table with the most rows is the
    # vocabulary, and the others hold positions or types of tokens.
    if any(module_of(other).rpartition(".")[2] == HEAD for other in leaves):
        return False
    return leaves[path].shape[0] == max(x.shape[0] for p, x in leaves.items() if is_embedding(p))


def tied_config(leaves: Mapping[str, Any], config: LoraConfig) -> LoraConfig:
    """The config with which PEFT adapts the head too, where one leaf is head and embedding."""
    tables = tied_tables(leaves)
    if not tables:
        return config
    config = dataclasses.replace(config, extra={**config.extra, TYING: True})
    if ties(config):
        return config
    # The field alone has no effect in PEFT unless the head is named too.
    field = "target_modules" if isinstance(leaves[tables[0]], LoraArray) else "modules_to_save"
    entries = getattr(config, field)
    named = f"{entries}|{HEAD}" if isinstance(entries, str) else (*entries, HEAD)
    return dataclasses.replace(config, **{field: named})


def tied_by_file(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> LoraConfig:
    """A config that names the head where only the file shows that PEFT tied it.

    PEFT takes the head out of the config that it writes, and then no longer ties a table whose
    name it does not know (`wte`) when it loads its own file.
    """
    if ties(config) or not config.extra.get(TYING):
        return config
    adapted = any(key.startswith(f"{PREFIX}{HEAD}.lora_") for key in tensors)
    if isinstance(config.target_modules, tuple) and adapted:
        return dataclasses.replace(config, target_modules=(*config.target_modules, HEAD))
    if config.modules_to_save and f"{PREFIX}{HEAD}.weight" in tensors:
        return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, HEAD))
    return config


def check_shared(tensors: Iterable[str], paths: Iterable[str], source: str) -> None:
    """Refuses an adapter on T5's table: in transformers, encoder and decoder read copies of it.

    Where the head is tied too, PEFT gives trained rows to all of them.

    Args:
      tensors: PEFT's names of the adapter's tensors.
      paths: of the model's leaves.
      source: what messages call the adapter.

    Raises:
      ValueError: there is one.
    """
    parts = parts_of(paths)
    if not is_encoder_decoder(parts):
        return
    rows = HEAD not in parts
    for key in tensors:
        if key.startswith(f"{PREFIX}shared.") and not (rows and ".token_adapter." in key):
            raise ValueError(
                f"{source}: `{key}` has no effect in PEFT, where encoder and decoder read copies "
                "of `shared`: leave it out of the targets and of modules_to_save"
            )


def check_tying(config: LoraConfig, tensors: Iterable[str], plan: Plan, source: str) -> None:
    """Refuses an adapter that changes one of embedding and head where one table is both.

    Args:
      config: the adapter's config.
      tensors: names of the adapter's own tensors, without copies of the base's.
      plan: of the config on the model.
      source: what messages call the adapter.

    Raises:
      ValueError: the config does not tie the adapters of a table that the model also uses as its
        head.
    """
    check_shared(tensors, [leaf.path for leaf in plan.leaves], source)
    if ties(config):
        return
    table = next((leaf.path for leaf in plan.leaves if leaf.tied), None)
    # RoBERTa's head of words has a linear layer of its own in front of the table.
    inside = [m for leaf in plan.leaves if (m := module_of(leaf.path)).startswith(f"{HEAD}.")]
    apart = tuple(f"{PREFIX}{module}." for module in inside)
    heads = (key for key in tensors if key.startswith(f"{PREFIX}{HEAD}."))
    head = next((key for key in heads if not key.startswith(apart)), None)
    if table is not None and head is not None:
        raise ValueError(
            f"{source}: the adapter changes the output head only (`{head}`), but this model uses "
            f"`{table}` as its head and its embedding; train it in PEFT with {TYING}=True, or load "
            "a model whose head is not tied"
        )
    for leaf in (*plan.adapted, *plan.saved):
        if leaf.kind != "rows" and leaf.tied:
            raise ValueError(
                f"{source}: the adapter changes `{leaf.path}` as an embedding only, but this model "
                f"uses it as the output head too; train it in PEFT with {TYING}=True and "
                f'"{HEAD}" among its modules, or load a model whose head is not tied'
            )
