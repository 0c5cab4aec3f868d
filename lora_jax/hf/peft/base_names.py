"""Whether an adapter and a loaded base name different models.

Adapters of a chat model load without an error over its base model, and outputs are wrong. Names are
weak evidence: mirrors, quantized copies and folders of one's own differ from the hub id and are the
same model. So only what a name says for sure counts, and other names pass. Of directories that are
there, the types of their models count too.
"""

import dataclasses
import os
import re
import warnings
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from lora_jax.config.lora import LoraConfig
from lora_jax.files import read_object
from lora_jax.hf.hub import is_hub_id

BASE_NAME = "base_model_name_or_path"

# Words of copies that hold the same weights in another form, and how such a form may end.
_FORMS = frozenset(
    "hf meta bnb unsloth gptq awq gguf mlx dynamic quantized fp bf f int nf exl eetq torchao "
    "imatrix 3bit 4bit 5bit 6bit 8bit bit sharded safetensors original mirror copy ungated".split()
)
_FORM_AT_END = re.compile(r"[-_.](i?q\d\w*|w\d+a\d+)$")
# What follows a model's name where its weights are others.
_VARIANTS = frozenset(
    "instruct chat it coder code math thinking reasoning guard vl vision sft dpo rlhf "
    "distill".split()
)
_CASES = frozenset(("cased", "uncased"))
# Folders, whose path looks like a hub id.
_FOLDERS = frozenset(
    "models model runs run out output outputs checkpoints ckpt data weights base tmp work results "
    "llms llm hf pretrained saved merged cache".split()
)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


class _Named(NamedTuple):
    """What a name says: words, sizes (135m, 8x, 7b) and versions, and whether it is a hub id."""

    words: frozenset[str]
    sizes: frozenset[str]
    versions: frozenset[str]
    family: str
    on_hub: bool


def with_name(config: LoraConfig, name: Any) -> LoraConfig:
    """A config that names its base, unless there is no name."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        return config
    return dataclasses.replace(config, extra={**config.extra, BASE_NAME: os.fspath(name)})


def warn_of_name(trained: str | None, loaded: str | os.PathLike | None, source: str) -> None:
    """Warns where the base that an adapter names is known to be another than the loaded one.

    Args:
      trained: `base_model_name_or_path` of the adapter.
      loaded: the base's directory, file or hub id; None where it is not known.
      source: what the warning calls the adapter.

    Warns:
      UserWarning: the names are those of different models.
    """
    place = "" if loaded is None else os.fspath(loaded)
    if place and (isinstance(loaded, Path) or os.path.exists(place) or not is_hub_id(place)):
        # Absolute, it is no hub id; and "." has a name.
        place = str(Path(place).absolute())
    there, here = _named(trained or ""), _named(place)
    differ = there is not None and here is not None and _differ(there, here)
    # Both may lie here, and say more than their names.
    kinds = _model_type(trained or ""), _model_type(place)
    if not differ and (None in kinds or kinds[0] == kinds[1]):
        return
    warnings.warn(
        f"{source}: the adapter names the base `{trained}`, and `{_spelled(place)}` is "
        "loaded, whose shapes fit too: outputs are wrong if the adapter was not trained on these "
        "weights; load the base that it names",
        stacklevel=3,
    )


def _model_type(place: str) -> str | None:
    """What the config.json of a directory says; None where there is none."""
    try:
        return read_object(Path(place) / "config.json").get("model_type")
    except (OSError, ValueError):
        return None


def _spelled(name: str) -> str:
    """The hub id of a folder in the hub's cache, or the name of a folder or file."""
    if cached := _CACHED.search(name):
        return "/".join(cached.groups())
    return name if is_hub_id(name) else PurePath(name.replace("\\", "/")).name


def _named(name: str) -> _Named | None:
    name = _spelled(name)
    owner, _, last = name.lower().rpartition("/")
    last = _FORM_AT_END.sub("", last.removesuffix(".gguf"))
    # "Llama-3.1-8B", "llama3.1_8b": llama, 3.1, 8b.
    parts = [p for p in re.findall(r"v?\d+(?:\.\d+)*[a-z]*|[a-z]+", last) if p not in _FORMS]
    if not parts or not parts[0].isalpha():
        return None
    sizes = frozenset(p for p in parts if re.fullmatch(r"[\d.]+[mbx]", p))
    versions = frozenset(p for p in parts if re.fullmatch(r"v?[\d.]+", p))
    words = frozenset(parts) - sizes - versions
    return _Named(words, sizes, versions, parts[0], is_hub_id(name) and owner not in _FOLDERS)


def _differ(a: _Named, b: _Named) -> bool:
    """Whether two names are surely those of different models."""
    if a.sizes != b.sizes:
        # Shortened: the shapes fit, so that the sizes are equal.
        return False
    words, versions = a.words ^ b.words, (a.versions, b.versions)
    if not (a.on_hub and b.on_hub):
        # A folder may be named after anything: the same family in another variant is a sign.
        words &= _VARIANTS | (_CASES if a.words & _CASES and b.words & _CASES else frozenset())
        if a.family != b.family:
            return False
    # One that has no version, or has a date beside it, may be any.
    others = not (versions[0] <= versions[1] or versions[1] <= versions[0])
    return bool(words) or others
