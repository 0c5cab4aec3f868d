"""The base of an adapter: what its directory shows, and the weights that it was trained over.

LoftQ changes the base too: the adapter is trained over the quantized weights, and its file does not
hold them. A reader repeats LoftQ over the float base, or has a base that is quantized already.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_jax.array import is_lora, leaves_by_path
from lora_jax.files import read_json
from lora_jax.hf.checkpoint.names import WRAPPED, renamed, unified
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.peft.index import PREFIX
from lora_jax.hf.peft.tying import HEAD
from lora_jax.paths import nearest
from lora_jax.plan.leaf import Plan
from lora_jax.quant.array import is_quant
from lora_jax.quant.scales import HELD


def as_read(plan: Plan, params: Any, *, source: str, checked: bool = False) -> Plan:
    """The plan with which `init` gives the base that the adapter of a file was trained on.

    Over floats, `init` repeats LoftQ. A base that is quantized already is taken as it is: after one
    turn LoftQ's base is the weights quantized, after more turns it is not.

    Args:
      plan: of the adapter's config on `params`.
      params: the base.
      source: what messages call the adapter.
      checked: the caller compares the base with the adapter's by other means.

    Raises:
      ValueError: the base cannot be the adapter's.
    """
    if plan.config.init != "loftq":
        return plan

    held = leaves_by_path(params)
    quantized = [leaf.path for leaf in plan.adapted if is_quant(held[leaf.path])]
    if not quantized:
        return plan
    if len(quantized) < len(plan.adapted):
        lost = next(leaf.path for leaf in plan.adapted if leaf.path not in quantized)
        raise ValueError(
            f"{source}: the adapter was started by LoftQ, but of the base `{quantized[0]}` is "
            f"quantized and `{lost}` is not: load it over the base in floats"
        )
    turns = plan.config.loftq_config["loftq_iter"]
    if turns > 1 and not checked:
        raise ValueError(
            f"{source}: the adapter was started by LoftQ in {turns} turns, whose base is not the "
            "weights quantized: load it over the base in floats, for which LoftQ is repeated"
        )
    # The base is LoftQ's already: `init` must not quantize it a second time.
    config = dataclasses.replace(plan.config, init="default", loftq_config={})
    return dataclasses.replace(plan, config=config)


def quantization_of(lora_params: Any) -> str | None:
    """How the adapted weights of a tree are quantized, `format="nf4", block_size=64`, or None."""
    adapted = [x.w for x in leaves_by_path(lora_params).values() if is_lora(x)]
    return described((w.format, w.block) for w in adapted if is_quant(w))


def described(formats: Iterable[tuple[str, int]]) -> str | None:
    """Formats and block sizes as the file of an adapter holds them; None where there are none."""
    found = {f'format="{name}", block_size={block}' for name, block in formats}
    return " and ".join(sorted(found)) or None


def warn_of_base(trained: str | None, lora_params: Any, source: str) -> None:
    """Warns of an adapter over another base than the quantized one that it was trained over.

    Args:
      trained: from `directory.trained_over`.
      lora_params: the base with the adapter.
      source: what the warning calls the adapter.

    Warns:
      UserWarning: the base is in floats, or quantized in another way.
    """
    here = quantization_of(lora_params)
    if here is None and any(f'format="{name}"' in (trained or "") for name in HELD):
        warnings.warn(
            f"{source}: the adapter was trained over the quantized weights of a file ({trained}), "
            "and this base is in floats: outputs are those in training if the base comes from that "
            'file; quantize="file" keeps its blocks',
            stacklevel=3,
        )
    elif trained is not None and here != trained:
        warnings.warn(
            f"{source}: the adapter was trained over a base quantized with {trained}, but this one "
            f"is {f'quantized with {here}' if here else 'in floats'}: outputs differ from those in "
            f"training; quantize the base with {trained}: {flags_of(trained)}",
            stacklevel=3,
        )


def flags_of(trained: str) -> str:
    """The settings of a command that quantize a base so."""
    one = re.fullmatch(r'format="(\w+)", block_size=(\d+)', trained)
    if one is None or one[1] in HELD:  # forms of files alone
        return 'quantize="file"'
    return (
        f'quantize="{one[1]}", quantize_block={one[2]}, or quantize="file" if its file holds it so'
    )


def model_type_of(base: Any) -> str | None:
    """The model family of a base model, where its directory is on this machine.

    Args:
      base: path of a directory, or a hub id; anything else has none.
    """
    if not isinstance(base, str | Path) or not base or not (Path(base) / "config.json").is_file():
        return None
    fields = read_json(Path(base) / "config.json")
    return fields.get("model_type") if isinstance(fields, dict) else None


def check_names(tensors: Collection[str], base: str) -> None:
    """Refuses an adapter of modules that its base does not have: PEFT would load none of it.

    Args:
      tensors: PEFT's names of the adapter's tensors.
      base: path of the base's directory; anything else, such as a hub id, is not looked at.

    Raises:
      ValueError: a module of the adapter is not among the base's tensors.
    """
    directory = Path(base)
    if not directory.is_dir() or not any(directory.glob("*.safetensors")):
        return
    names: set[str] = set(open_directory(directory).shapes)
    if any(fnmatchcase(name, glob) for name in names for glob in WRAPPED.ignored):
        # transformers renames old checkpoints of images and texts when it loads them.
        names |= unified(names, WRAPPED).keys()
    names |= set(map(renamed, names))
    if any(".qa_outputs." in key for key in tensors):
        # transformers' class for answers holds some decoders so.
        inside = (n.removeprefix("model.") for n in names if n.startswith("model."))
        names |= {f"transformer.{n}" for n in inside}
    there = {name.rpartition(".")[0] for name in names}
    for key in tensors:
        module = key.removeprefix(PREFIX).partition(".lora_")[0]
        # A tied head has no tensor of its own, and files hold experts one by one.
        if ".lora_" not in key or module == HEAD or "experts" in module:
            continue
        # The base's files may be of its inside alone, saved without the head.
        if module not in there and module.partition(".")[2] not in there:
            raise ValueError(
                f"`{module}` of the adapter is no module of base_model_name `{base}`; nearest: "
                f"{nearest(module, there)}; PEFT would load nothing of it: name the parameters as "
                "the base does (name_map), or give the base that the adapter is for"
            )
