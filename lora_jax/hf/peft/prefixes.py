"""Names that PyTorch's wrappers and PEFT's own put into an adapter's file, taken out.

    _orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

`torch.compile`, DistributedDataParallel, FSDP and activation checkpointing each put a component of
their own into the name of every module inside them, and a state dict that was saved without PEFT's
help has the adapter's name in every key. PEFT loads nothing of such a file, or all of it, depending
on where the component stands; here it is taken out, with a warning.
"""

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft.index import PREFIX

# No module of a model has such a name.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile(rf"\b(?:{'|'.join(_WRAPPERS)})\\?\.")

# DistributedDataParallel's. A model may have a module of that name, but not in front of PEFT's.
_PARALLEL = "module."

# What stands in front of an adapter's name in a key, and what may follow it.
_NAMED = re.compile(
    r"(?P<part>\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta))\.(?P<name>(?!weight$|bias$)[\w-]+)(?P<rest>\.weight|\.bias)?$"
)

# Fields of a config that hold names of modules, or patterns of them.
_FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
)


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, their names of modules without the wrappers' components."""
    return {k: _without_wrappers(v) if k in _FIELDS else v for k, v in fields.items()}


def _without_wrappers(value: Any) -> Any:
    if isinstance(value, str):
        return _WRAPPED.sub("", value)
    if isinstance(value, list):
        return [_without_wrappers(v) for v in value]
    if isinstance(value, Mapping):
        return {_without_wrappers(k): v for k, v in value.items()}
    return value


def plain_keys(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The tensors by the names that PEFT gives them; warns where these are others.

    Args:
      tensors: the content of a file, by its keys.
      source: what messages call the file.

    Raises:
      ValueError: the file holds several adapters, or two tensors would get one name.
    """
    renamed = {key: _unwrapped(key) for key in tensors}
    adapts = any(".lora_" in key for key in tensors)
    if adapts and not any(key.startswith(PREFIX) for key in renamed.values()):
        # Saved from the model inside PEFT's: PEFT itself would load none of it.
        renamed = {key: PREFIX + name for key, name in renamed.items()}
    names = Counter(found["name"] for key in renamed.values() if (found := _NAMED.search(key)))
    if len(names) > 1:
        raise ValueError(
            f"{source}: the file holds {len(names)} adapters ({', '.join(sorted(names))}); save "
            "one of them in PEFT: save_pretrained(..., selected_adapters=[name])"
        )
    renamed = {key: _NAMED.sub(r"\g<part>\g<rest>", name) for key, name in renamed.items()}
    # Versions of PEFT before 0.10, too, wrote a magnitude as it is in memory.
    renamed = {
        key: name.removesuffix(".weight") if name.endswith("_magnitude_vector.weight") else name
        for key, name in renamed.items()
    }
    _warn(renamed, source)
    plain: dict[str, np.ndarray] = {}
    for key, name in renamed.items():
        if name in plain:
            raise ValueError(f"{source}: `{key}` and another tensor both stand for `{name}`")
        plain[name] = tensors[key]
    return plain


def _unwrapped(key: str) -> str:
    key = _WRAPPED.sub("", key)
    return key.removeprefix(_PARALLEL) if key.startswith(_PARALLEL + PREFIX) else key


def _warn(renamed: Mapping[str, str], source: str) -> None:
    changed = {key: name for key, name in renamed.items() if key != name}
    if changed:
        key, name = next(iter(changed.items()))
        warnings.warn(
            f"{source}: {len(changed)} of {len(renamed)} tensors have names that PEFT does not "
            f"write; `{key}` is read as `{name}`",
            stacklevel=2,
        )


def without_module(
    tensors: Mapping[str, np.ndarray], paths: Mapping[str, Any], source: str
) -> Mapping[str, np.ndarray]:
    """The tensors without DistributedDataParallel's `module.` inside PEFT's prefix.

    Args:
      tensors: PEFT's tensors by name.
      paths: the model's leaves by path; a model that has a module `module` keeps the names.
      source: what messages call the adapter.
    """
    start = PREFIX + _PARALLEL
    if not tensors or not all(key.startswith(start) for key in tensors):
        return tensors
    if any(path.startswith(_PARALLEL) for path in paths):
        return tensors
    renamed = {key: PREFIX + key.removeprefix(start) for key in tensors}
    _warn(renamed, source)
    return {renamed[key]: tensor for key, tensor in tensors.items()}


# What the names of one decoder begin with: inside a model of images and texts, inside Llama 4's or
# one of transformers before 4.52, both with their head, and on its own.
_PLACES = ("model.language_model.", "language_model.model.", "model.")
_INSIDE = ("layers.", "embed_tokens.", "norm.")


def respelled(
    config: LoraConfig, tensors: Mapping[str, np.ndarray], paths: Iterable[str]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter of a decoder that the model holds in another place, by the model's names.

    Args:
      config: the adapter's config.
      tensors: PEFT's tensors by name.
      paths: of the model's leaves, or anything else with its names.

    Returns:
      Both as they are where the places agree or are not known. Otherwise the config names the
      modules of the file one by one.
    """
    theirs = _place(key.removeprefix(PREFIX) for key in tensors)
    ours = _place(paths)
    if theirs is None or ours is None or theirs == ours:
        return config, dict(tensors)
    inside = "language_model." if ours == _PLACES[1] else ""  # where our head is

    def name(text: str) -> str:
        if text.startswith(theirs):
            return ours + text.removeprefix(theirs)
        if "lm_head" not in text:
            return text
        return inside + text.removeprefix("language_model.")

    moved = {PREFIX + name(key.removeprefix(PREFIX)): x for key, x in tensors.items()}
    modules = dict.fromkeys(
        key.removeprefix(PREFIX).partition(".lora_")[0] for key in moved if ".lora_" in key
    )
    pattern = re.compile(re.escape(theirs).replace(r"\.", r"\\?\."))

    def patterns(values: Mapping[str, Any]) -> dict[str, Any]:
        return {pattern.sub(lambda _: re.escape(ours), k, count=1): v for k, v in values.items()}

    return dataclasses.replace(
        config,
        target_modules=tuple(modules) if not config.target_parameters else config.target_modules,
        exclude_modules=(),
        modules_to_save=tuple(map(name, config.modules_to_save)),
        rank_pattern=patterns(config.rank_pattern),
        alpha_pattern=patterns(config.alpha_pattern),
        layers_to_transform=None,
        layers_pattern=None,
    ), moved


def _place(names: Iterable[str]) -> str | None:
    """Where the decoder is, by the first of some names that shows it."""
    for name in names:
        for place in _PLACES:
            if name.startswith(place) and name.removeprefix(place).startswith(_INSIDE):
                return place
    return None
