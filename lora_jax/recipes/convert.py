"""Converts adapters between formats, with their model or, if possible, without it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import hf
from lora_jax.config.arguments import SettingsError, check_argument
from lora_jax.config.lora import LoraConfig
from lora_jax.files import check_new
from lora_jax.hf.hub import snapshot
from lora_jax.methods.rebase import rebase
from lora_jax.recipes.adapter_formats import ADAPTER_FORMATS, AdapterFormat, OnModel, PlanOf

# The formats that can be written without loading the model.
CONVERTED = {name: form for name, form in ADAPTER_FORMATS.items() if form.write is not None}


def kind_of(source: str | Path) -> str:
    """The name of an adapter's format.

    A path that does not exist is taken to be the Hub id of a PEFT adapter.
    """
    check_argument("recipes.convert.kind_of(source)", "source", source, (str, os.PathLike))
    path = Path(source)
    # The first format that recognises it; PEFT's is what none does.
    found = (name for name, form in ADAPTER_FORMATS.items() if form.is_at and form.is_at(path))
    return next(found, "peft")


def check_source(source: str | Path, *, step: int | None = None) -> None:
    """Checks that the source is an adapter, before its model is loaded, which takes a while.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: it is damaged, or `step` is given for a format without steps.
    """
    check = ADAPTER_FORMATS[kind_of(source)].check
    assert check is not None  # `kind_of` gives formats that can be read
    check(source, step)


def check_output(output: str | Path, *, to: str, source: str | Path) -> None:
    """Checks that the output is not the source, and for a format that replaces nothing is new.

    Raises:
      FileExistsError: the output exists.
      ValueError: it is the source, or the format is unknown.
    """
    if Path(output).resolve() == Path(source).resolve():
        raise SettingsError(f"`output` {output} is the adapter that is read: name another place")
    if to not in ADAPTER_FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(ADAPTER_FORMATS)}, got {to!r}")
    if not ADAPTER_FORMATS[to].replaces:
        check_new(output)


def load_adapter(
    model: Any, source: str | Path, plan_of: PlanOf, *, step: int | None = None
) -> tuple[Any, LoraConfig]:
    """Reads an adapter of any format onto a model.

    Args:
      model: from `lora_jax.models.load`.
      source: the adapter.
      plan_of: plans a config on the model.
      step: of a training run; the newest by default.

    Returns:
      The model's parameters with the adapter, and its config.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: it is damaged or for another model, or `step` is given for a format without steps.
    """
    check_argument("finetune.load_adapter(model, source)", "source", source, (str, os.PathLike))
    load = ADAPTER_FORMATS[kind_of(source)].load
    assert load is not None
    return load(model, source, plan_of, step)


def save_adapter(
    model: Any,
    lora_params: Any,
    config: LoraConfig,
    output: str | Path,
    *,
    to: str,
    base_model_name: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes an adapter in any format, completely or not at all.

    Args:
      model: the adapted model, from `lora_jax.models.load`.
      lora_params: the model's parameters with the adapter.
      config: the adapter's config.
      output: the directory or, for "gguf", the file.
      to: a name in `ADAPTER_FORMATS`.
      base_model_name: the model's name, written for readers of the adapter.
      dtype: dtype of the tensors for "gguf" and "hf"; other formats keep the adapter's own.

    Raises:
      ValueError: an unknown format, or one that cannot hold this adapter.
      FileExistsError: something is at `output` that is not to be replaced.
      OSError: it cannot be written.
    """
    _check_target(to, ADAPTER_FORMATS, dtype)
    # LoftQ's base is the quantized one; the writer says what to do.
    if not ADAPTER_FORMATS[to].repeats and config.init != "loftq":
        lora_params, config = rebase(lora_params, model.params, config)
    adapter = OnModel(model, lora_params, config)
    ADAPTER_FORMATS[to].save(adapter, output, base_model_name=base_model_name, dtype=dtype)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    dtype: str = "float32",
) -> None:
    """Converts an adapter to another format without loading its model.

    Args:
      source: the adapter: a PEFT directory, a GGUF LoRA file, or an Orbax folder.
      output: the directory or, for "gguf", the file.
      to: a name in `CONVERTED`.
      base: the model, of which only the configuration is read: a directory with config.json, or
        a .gguf file. Needed where one of the formats is GGUF.
      dtype: of the numbers in a GGUF file.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: the adapter is damaged, the conversion needs the model, or the format cannot hold
        the adapter.
      OSError: it cannot be written.
    """
    # They read tensors' files, which the help of the command need not.
    from lora_jax.hf.peft.base_names import BASE_NAME, warn_of_name
    from lora_jax.recipes.forms import carry_form

    _check_target(to, CONVERTED, dtype)
    check_output(output, to=to, source=source)
    given, wanted = ADAPTER_FORMATS[kind_of(source)], ADAPTER_FORMATS[to]
    # llama.cpp permutes rows of q and k, by numbers of heads that only the model has.
    if base is None and (given.needs_base or wanted.needs_base):
        raise SettingsError(
            "`base` is missing: a GGUF adapter orders some rows by the model's heads; give the "
            "model's directory with config.json, or its .gguf file"
        )
    known = None if base is None else hf.read_base(_local(str(base)))
    assert given.read is not None and wanted.write is not None
    content = given.read(source, known)
    warn_of_name(content.config.extra.get(BASE_NAME), base, str(source))
    wanted.write(content, output, base=known, dtype=dtype)
    carry_form(source, output)


def _local(source: str) -> str | Path:
    """A model as `load_model` takes it, "smollm2" or a hub id too, as a path."""
    if source == "smollm2":
        # Not imported for a conversion that does not need it.
        from lora_jax.models.loading import find_smollm2

        return find_smollm2()
    is_path = source.endswith((".gguf", ".json")) or os.path.exists(source)
    return source if is_path else snapshot(source, patterns=("config.json",))


def _check_target(to: str, known: Mapping[str, AdapterFormat], dtype: str) -> None:
    if to not in known:
        raise ValueError(f"`to` must be one of {', '.join(known)}, got {to!r}")
    # Ignoring it would surprise whoever looks at the size of the file.
    if dtype != "float32" and not known[to].has_dtype:
        others = " and ".join(name for name, form in known.items() if form.has_dtype)
        raise SettingsError(
            f"{to} keeps the adapter's own float32; dtype {dtype} is for {others} only"
        )
