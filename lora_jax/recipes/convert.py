"""Adapters from any format to any other, over their model or, where that is possible, without.

peft    a directory with adapter_config.json and adapter_model.safetensors
vllm    the same, as vLLM serves it rightly; written only
gguf    a file that llama.cpp applies (`--lora`)
orbax   a folder of `lora_jax.checkpoint.save`, or of a training run
hf      the merged model as a Hugging Face directory; written only
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config.lora import LoraConfig

WRITTEN = ("peft", "vllm", "gguf", "hf", "orbax")
CONVERTED = ("peft", "vllm", "gguf")

# PEFT's config and tensors by name: the form between two formats.
Content = tuple[LoraConfig, dict[str, np.ndarray]]


def kind_of(source: str | Path) -> str:
    """Which format an adapter is in: "peft", "gguf" or "orbax".

    What does not exist is taken for a Hub id of a PEFT adapter.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return "gguf"
    inside = {"adapter", "checkpoints", "meta"}
    if path.is_dir() and not (path / "adapter_config.json").exists():
        return "orbax" if any((path / name).is_dir() for name in inside) else "peft"
    return "peft"


def check_there(source: str | Path, *, step: int | None = None) -> None:
    """Refuses what is no adapter, before its model is loaded, which takes a while.

    Raises:
      FileNotFoundError: there is none.
      ValueError: damaged, or `step` is given for what has no steps.
    """
    kind = kind_of(source)
    if kind == "orbax":
        from lora_jax.checkpoint import adapters

        adapters.find(source, step=step)
        return
    _refuse_step(source, step)
    if kind == "gguf":
        from lora_jax.hf.gguf.file import open_gguf

        open_gguf(source, kind="adapter")
    else:
        from lora_jax.hf.peft.directory import read_directory

        read_directory(source)


def _refuse_step(source: str | Path, step: int | None) -> None:
    if step is not None:
        raise ValueError(f"{source}: has no step {step}: it is no training run")


def load_adapter(
    model: Any, source: str | Path, plan_of: Callable[[LoraConfig], Any], *, step: int | None = None
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
      FileNotFoundError: there is none.
      ValueError: damaged, for another model, or `step` is given for what has no steps.
    """
    from lora_jax.checkpoint import adapters
    from lora_jax.hf.peft.api import attach, read_peft

    kind = kind_of(source)
    if kind == "orbax":
        return adapters.restore_stored(adapters.find(source, step=step), plan_of, model.params)
    _refuse_step(source, step)
    if kind == "gguf":
        from lora_jax.hf.gguf.lora_read import read_gguf_lora
        from lora_jax.models.gguf import base_of

        config, tensors = read_gguf_lora(source, base=base_of(model.config))
    else:
        config, tensors = read_peft(source, model_type=model.config.model_type)
    return attach(config, tensors, plan_of, model.params, source=str(source))


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
    """Writes an adapter in any format, whole or not at all.

    Args:
      model: it is on, from `lora_jax.models.load`.
      lora_params: the model's parameters with the adapter.
      config: the adapter's.
      output: the directory or, for "gguf", the file.
      to: one of `WRITTEN`.
      base_model_name: of the model, for readers of the adapter.
      dtype: of the numbers that "gguf" and "hf" write; the other formats keep them as they are.

    Raises:
      ValueError: an unknown format, or one that cannot hold this adapter.
      FileExistsError: something is at `output` that is not to be replaced.
      OSError: it cannot be written.
    """
    from lora_jax import checkpoint
    from lora_jax.hf.gguf.lora_write import save_gguf_lora
    from lora_jax.hf.peft.api import save_peft
    from lora_jax.models.gguf import base_of

    _check_target(to, WRITTEN, dtype, ("gguf", "hf"))
    if to in ("peft", "vllm"):
        save_peft(output, lora_params, config, base_model_name=base_model_name, target=to)
    elif to == "gguf":
        save_gguf_lora(output, lora_params, config, base=base_of(model.config), dtype=dtype)
    elif to == "hf":
        from lora_jax.models.saving import save_merged

        save_merged(output, model, lora_params, dtype=dtype)
    else:
        checkpoint.save(output, lora_params, config)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    dtype: str = "float32",
) -> None:
    """Turns an adapter of one format into another without loading its model.

    Args:
      source: the adapter: a PEFT directory, a GGUF LoRA file, or an Orbax folder.
      output: the directory or, for "gguf", the file.
      to: one of `CONVERTED`.
      base: the model, of which only the configuration is read: a directory with config.json, or
        a .gguf file. Needed where one of the formats is GGUF.
      dtype: of the numbers in a GGUF file.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: damaged, it takes the model itself, or the format cannot hold it.
      OSError: it cannot be written.
    """
    from lora_jax.hf.gguf import lora_write
    from lora_jax.hf.gguf import names as gguf_names
    from lora_jax.hf.peft import directory, vllm

    _check_target(to, CONVERTED, dtype, ("gguf",))
    kind = kind_of(source)
    if base is None and "gguf" in (kind, to):
        raise ValueError(
            "`base` is missing: a GGUF adapter orders some rows by the model's heads; give the "
            "model's directory with config.json, or its .gguf file"
        )
    known = None if base is None else gguf_names.read_base(base)
    config, tensors = _content(kind, source, known)
    if to == "gguf" and known is not None:
        content = lora_write.to_gguf(tensors, config, known)
        lora_write.write_gguf_lora(output, content, known, dtype=dtype)
        return
    fields = config.to_peft()
    if to == "vllm":
        fields, tensors = vllm.for_vllm(fields, tensors, config)
    directory.write_directory(output, fields, tensors)


def _check_target(to: str, known: tuple[str, ...], dtype: str, sized: tuple[str, ...]) -> None:
    if to not in known:
        raise ValueError(f"`to` must be one of {', '.join(known)}, got {to!r}")
    if dtype != "float32" and to not in sized:
        raise ValueError(f"{to} keeps the adapter's own float32; dtype {dtype} is for "
                         f"{' and '.join(sized)} only")  # fmt: skip


def _content(kind: str, source: str | Path, base: Any) -> Content:
    if kind == "gguf":
        from lora_jax.hf.gguf.lora_read import read_gguf_lora

        return read_gguf_lora(source, base=base)
    if kind == "orbax":
        return _from_orbax(source)
    from lora_jax.hf.peft.api import read_peft

    return read_peft(source)


def _from_orbax(source: str | Path) -> Content:
    """An Orbax adapter as PEFT names it, its base known by names and shapes only."""
    from lora_jax.array import LoraArray, leaves_by_path
    from lora_jax.checkpoint import adapters
    from lora_jax.checkpoint.flat import nested, parse
    from lora_jax.hf.peft.index import make_index
    from lora_jax.hf.peft.save import content_of
    from lora_jax.hf.peft.tensors import tensor_specs

    stored = adapters.find(source)
    config = adapters.config_from(stored.config)
    leaves = adapters.read_leaves(stored)
    whole = [name for name, leaf in leaves.items() if not isinstance(leaf, LoraArray)]
    shapes = {name: parse(text) for name, text in stored.base.items()}
    base = {n: jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for n, (kind, shape) in shapes.items()}
    index = make_index(leaves_by_path(nested(base | leaves)), config)
    specs = tensor_specs(index)
    whole += [path for path, here in specs.items() if any(spec.part == "w" for spec in here)]
    if whole:
        raise ValueError(
            f"{stored.directory}: `{whole[0]}` takes the model to convert, for the file repeats "
            "or compares the base's numbers; export the adapter over its model"
        )
    fields, tensors = content_of(index)
    return LoraConfig.from_peft(fields), tensors
