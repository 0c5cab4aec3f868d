"""A tree of LoRA leaves as the content of a PEFT directory, checked against its config."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.array import RowsArray, SavedArray, is_lora
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.peft import directory
from lora_jax.hf.peft.modules import (
    HEAD,
    adapted_names,
    adapts,
    leaves_of,
    modules_of,
    parameters_of,
    ties,
)
from lora_jax.hf.peft.tensors import Slot, by_path, on_host, read_slot, slots_of


def to_peft(lora_params, config: LoraConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of a PEFT directory: the config's fields and the tensors by name.

    Raises:
      ValueError: as `save_peft`.
    """
    if base_change(config.init) == "unrepeatable":
        raise ValueError(
            f'lora_params: their start, init="{config.init}", changed the base weights in a way '
            "that a reader of the adapter cannot repeat; save the merged model (lora_jax.merge) "
            "instead"
        )
    slots = slots_of(lora_params, config)
    if not any(slot.part == "a" for slot in slots):
        raise ValueError(
            "lora_params: no leaf carries an adapter that the config means; pass the tree that "
            "lora_jax.init made with this config"
        )
    grouped = by_path(slots)
    tensors = {}
    for path, leaf in leaves_of(lora_params).items():
        if is_lora(leaf):
            here = grouped.get(path, [])
            leaf = on_host(leaf, here)
            _check_agreement(path, leaf, config, here)
            tensors |= {slot.key: _as_peft(read_slot(leaf, slot), slot) for slot in here}
    for name, value in tensors.items():
        directory.check_tensor(name, value, "lora_params")
    fields = config.to_peft()
    adapted = adapted_names(lora_params, config)
    if config.target_modules == ALL_LINEAR or not all(
        matching.is_target(config, name) for name in adapted
    ):
        # Names that mean in PEFT, which knows no stacked paths, what they mean here.
        fields["target_modules"] = named_targets(lora_params, config)
        if ties(config) and HEAD in config.target_modules:
            fields["target_modules"].append(HEAD)  # no module of ours: it ties PEFT's
    return fields, tensors


def _as_peft(tensor: np.ndarray, slot: Slot) -> np.ndarray:
    return tensor if slot.part in ("w", "value") else tensor.astype(np.float32, copy=False)


def named_targets(lora_params, config: LoraConfig) -> list[str]:
    """The adapted modules as names for target_modules that mean exactly these, sorted.

    The last components of the names, unless they also mean a module that is not adapted: then
    the full names.
    """
    adapted = set(adapted_names(lora_params, config))
    every = {
        name
        for path, leaf in leaves_of(lora_params).items()
        if not parameters_of(path, leaf, config)
        for _, name in modules_of(path, leaf)
    }
    short = {name.rpartition(".")[2] for name in adapted}
    meant = {n for n in every if any(matching.ends_with(n, s) for s in short)}
    excluded = {n for n in every if matching.is_excluded(config, n)}
    return sorted(short if meant - excluded == adapted else adapted)


def _check_agreement(path: str, leaf, config: LoraConfig, slots: list[Slot]) -> None:
    if isinstance(leaf, SavedArray):
        _check_saved(path, leaf, slots)
        return
    if isinstance(leaf, RowsArray):
        _check_rows(path, leaf, config)
        return
    if (leaf.bias is not None) != config.lora_bias:
        has = "has" if leaf.bias is not None else "has no"
        raise ValueError(
            f"leaf `{path}` {has} adapter's bias, but the config says lora_bias="
            f"{config.lora_bias}; use the config the adapter was made with"
        )
    if (leaf.m is not None) != config.use_dora:
        has = "has" if leaf.m is not None else "has no"
        raise ValueError(
            f"leaf `{path}` {has} DoRA magnitude, but the config says use_dora={config.use_dora}; "
            "use the config the adapter was made with"
        )
    for index, name in modules_of(path, leaf, config):
        rank = matching.rank_of(config, name) if adapts(config, path, name) else 0
        if np.any(leaf.a[index][..., rank:]) and np.any(leaf.b[index][rank:]):
            raise ValueError(
                f"leaf `{path}`: `{name}` has an adapter beyond rank {rank}, which the config "
                "gives it; use the config the adapter was made with"
            )
        if rank:
            _check_scale(path, name, float(leaf.scale[index]), config)


def _check_scale(path: str, name: str, scale: float, config: LoraConfig) -> None:
    rank, alpha = matching.rank_of(config, name), matching.alpha_of(config, name)
    expected = matching.scale_of(config, rank, alpha)
    if abs(scale - expected) > 1e-6 * abs(expected):
        raise ValueError(
            f"leaf `{path}`: `{name}` has scale {scale:.6g}, but the config's alpha and rank give "
            f"{expected:.6g}, and PEFT would use that; change alpha (or alpha_pattern), or "
            "multiply b by the ratio"
        )


def _check_saved(path: str, leaf: SavedArray, slots: list[Slot]) -> None:
    """Nothing that was trained is left out of the file."""
    unwritten = np.ones(leaf.shape, bool)
    for slot in slots:
        unwritten[slot.index] = False
    trains = np.full(leaf.shape, leaf.only is None)
    for place in leaf.only or ():
        trains[place] = True
    if np.any(unwritten & trains & (np.asarray(leaf.value) != np.asarray(leaf.w))):
        raise ValueError(
            f"leaf `{path}` was trained, but the config's bias and modules_to_save do not mean "
            "it (or some of its layers); use the config the adapter was made with"
        )


def _check_rows(path: str, leaf: RowsArray, config: LoraConfig) -> None:
    """The rows that train are the config's: PEFT's file does not say which they are."""
    asked = config.trainable_token_indices
    lists = asked.values() if isinstance(asked, Mapping) else [asked]
    if leaf.ids not in [tuple(ids) for ids in lists]:
        raise ValueError(
            f"leaf `{path}`: its trained rows {list(leaf.ids)[:8]} are not those of the config's "
            f"trainable_token_indices {asked!r}; use the config the adapter was made with"
        )


# The modules of classifiers' heads that PEFT takes for trained.
_HEADS = ("classifier", "score")


def task_of(lora_params, tensors: Mapping[str, np.ndarray]) -> str | None:
    """The task type of a tree.

    Args:
      lora_params: in Hugging Face's names, or ours.
      tensors: what is written, by PEFT's names.

    Returns:
      "CAUSAL_LM" for all that is no encoder; "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" for an
      encoder with such a head, where its head is written too, as PEFT expects of these types;
      "FEATURE_EXTRACTION" without a head; None (any model) otherwise, for instance with the head
      of a masked language model.
    """
    if not is_encoder(lora_params):
        return "CAUSAL_LM"
    parts = _parts(leaves_of(lora_params))
    if "classifier" in parts:
        whole = bool({"pooler", "out_proj"} & parts)  # classifiers of tokens have neither
        found = "SEQ_CLS" if whole else "TOKEN_CLS"
        return found if "classifier" in _parts(tensors) else None
    if "qa_outputs" in parts:
        return "QUESTION_ANS" if "qa_outputs" in _parts(tensors) else None
    return None if {"cls", "lm_head"} & parts else "FEATURE_EXTRACTION"


def is_encoder(lora_params) -> bool:
    """Whether a tree is an encoder of BERT's kind, with whatever head."""
    parts = _parts(leaves_of(lora_params))
    return {"word_embeddings", "encoder"} <= parts and "decoder" not in parts


def check_head(task_type: str | None, lora_params, tensors: Mapping[str, np.ndarray]) -> None:
    """PEFT takes the heads of classifiers for trained, and finds no file whole that lacks them.

    Raises:
      ValueError: the file would lack a head.
    """
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return
    for head in _HEADS:
        if head in _parts(leaves_of(lora_params)) - _parts(tensors):
            raise ValueError(
                f'task_type "{task_type}": PEFT would look for the head `{head}` in the file; '
                f'train it too, modules_to_save=("{head}",), or pass task_type=None'
            )


def _parts(names) -> set[str]:
    return {part for name in names for part in name.split(".")}
