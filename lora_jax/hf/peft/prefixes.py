"""Names that PyTorch's wrappers and PEFT's own put into an adapter's file, taken out.

    _orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

`torch.compile`, DistributedDataParallel, FSDP and activation checkpointing each put a component of
their own into the name of every module inside them, and a state dict that was saved without PEFT's
help has the adapter's name in every key. PEFT loads nothing of such a file, or all of it, depending
on where the component stands; here it is taken out, with a warning.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

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
