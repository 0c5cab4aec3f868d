"""The formats that adapters are read from and written to: one row a format.

A new format is a row of `ADAPTER_FORMATS` and the functions in it. The flags `--to`, their help
and the errors about formats follow from the table.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import hf
from lora_jax.array import LoraArray, leaves_by_path
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.peft.index import make_index
from lora_jax.hf.peft.tensors import tensor_specs


class Content(NamedTuple):
    """An adapter between two formats.

    Attributes:
      config: its config.
      tensors: PEFT's tensors by name.
      base: how the base was quantized, as PEFT directories hold it; None for floats, or where the
        format does not hold it.
    """

    config: LoraConfig
    tensors: dict[str, np.ndarray]
    base: str | None = None


ADAPTER = "adapter"  # the PEFT directory inside a run's output_dir
# Plans a config on the model: reading an adapter must not depend on how a model is run.
PlanOf = Callable[[LoraConfig], Any]


class OnModel(NamedTuple):
    """An adapter on its model.

    Attributes:
      model: from `lora_jax.models.load`.
      lora_params: the model's parameters with the adapter.
      config: the adapter's.
    """

    model: Any
    lora_params: Any
    config: LoraConfig


class AdapterFormat(NamedTuple):
    """A format, and how it is read and written.

    Attributes:
      summary: one line for the help of `--to`.
      save: writes an adapter that is on its model:
        `save(adapter, output, base_model_name=..., dtype=...)`.
      write: writes an adapter's content: `write(content, output, base=..., dtype=...)`. None: that
        takes the model, because the format holds numbers of the base.
      check: refuses what is no whole adapter of the format: `check(source, step)`. None, as for
        `load` and `read`: the format is only written.
      load: reads onto a model: `load(model, source, plan_of, step)`.
      read: reads the content without a model: `read(source, base)`.
      is_at: whether a path holds the format. None: it is recognised by being none of the others.
      needs_base: reading and writing without the model take the base's configuration.
      has_dtype: `dtype` is that of the numbers it writes; other formats keep the adapter's own.
      holds: what it holds, for messages.
      replaces: an output that exists already may be replaced.
      repeats: its readers repeat a start that changed the base.
    """

    summary: str
    save: Callable[..., None]
    write: Callable[..., None] | None = None
    check: Callable[[str | Path, int | None], None] | None = None
    load: Callable[..., tuple[Any, LoraConfig]] | None = None
    read: Callable[..., Content] | None = None
    is_at: Callable[[Path], bool] | None = None
    needs_base: bool = False
    has_dtype: bool = False
    holds: str = "adapter"
    replaces: bool = True
    repeats: bool = False


# PEFT, and vLLM's kind of it ---------------------------------------------------------------------


def _check_peft(source: str | Path, step: int | None) -> None:
    from lora_jax.hf.peft.directory import read_directory

    # Reads it whole: the headers alone do not show NaN.
    _refuse_step(source, step)
    read_directory(source)


def _refuse_step(source: str | Path, step: int | None) -> None:
    if step is not None:
        raise ValueError(f"{source}: has no step {step}: it is no training run")


def _read_peft(source: str | Path, base: Any = None, *, model_type: str | None = None) -> Content:
    from lora_jax.hf.peft.directory import trained_over

    content = hf.read_peft(source, model_type=model_type)
    return Content(*content, trained_over(source))


def _load_peft(
    model: Any, source: str | Path, plan_of: PlanOf, step: int | None
) -> tuple[Any, LoraConfig]:
    _refuse_step(source, step)
    from lora_jax.hf.peft.base import warn_of_base

    content = _read_peft(source, model_type=model.config.model_type)
    loaded = _attach(content, model, source, plan_of)
    # Orbax adapters are compared with the whole base, and GGUF files hold nothing about it.
    warn_of_base(content.base, loaded[0], str(source))
    return loaded


def _attach(
    content: Content, model: Any, source: str | Path, plan_of: PlanOf, *, names_tables: bool = True
) -> tuple[Any, LoraConfig]:
    from lora_jax.hf.peft.api import attach

    config, tensors, _ = content
    return attach(
        config,
        tensors,
        plan_of,
        model.params,
        source=str(source),
        model_type=model.config.model_type,
        base_model_name=model.checkpoint,
        names_tables=names_tables,
    )


def _save_peft(
    adapter: OnModel,
    output: str | Path,
    *,
    target: str,
    base_model_name: str | None,
    dtype: str,
) -> None:
    hf.save_peft(
        output,
        adapter.lora_params,
        adapter.config,
        base_model_name=base_model_name,
        target=target,
        model_type=adapter.model.config.model_type,
    )


def _write_peft(
    content: Content, output: str | Path, *, target: str, base: Any, dtype: str
) -> None:
    from lora_jax.hf.peft.directory import write_directory
    from lora_jax.hf.peft.vllm import for_vllm

    config, tensors, trained_over = content
    fields = config.to_peft()
    if target == "vllm":
        fields, tensors = for_vllm(fields, tensors, config)
    write_directory(output, fields, tensors, base=trained_over)


# MLX ---------------------------------------------------------------------------------------------


def _is_mlx(path: Path) -> bool:
    from lora_jax.hf.mlx import MLX_FILE

    return (path / MLX_FILE).is_file()


def _check_mlx(source: str | Path, step: int | None) -> None:
    _refuse_step(source, step)
    _read_mlx(source)


def _read_mlx(source: str | Path, base: Any = None) -> Content:
    return Content(*hf.read_mlx(source))


def _load_mlx(
    model: Any, source: str | Path, plan_of: PlanOf, step: int | None
) -> tuple[Any, LoraConfig]:
    _refuse_step(source, step)
    return _attach(_read_mlx(source), model, source, plan_of, names_tables=False)


def _save_mlx(
    adapter: OnModel, output: str | Path, *, base_model_name: str | None, dtype: str
) -> None:
    hf.save_mlx(output, adapter.lora_params, adapter.config, base_model_name=base_model_name)


def _write_mlx(content: Content, output: str | Path, *, base: Any, dtype: str) -> None:
    from lora_jax.hf.mlx import write_mlx

    write_mlx(output, content.config, content.tensors)


# llama.cpp ---------------------------------------------------------------------------------------


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def _check_gguf(source: str | Path, step: int | None) -> None:
    _refuse_step(source, step)
    open_gguf(source, kind="adapter")


def _read_gguf(source: str | Path, base: Any, params: Any = None) -> Content:
    return Content(*hf.read_gguf_lora(source, base=base, params=params))


def _load_gguf(
    model: Any, source: str | Path, plan_of: PlanOf, step: int | None
) -> tuple[Any, LoraConfig]:
    _refuse_step(source, step)
    content = _read_gguf(source, hf.base_of(model), model.params)
    return _attach(content, model, source, plan_of)


def _save_gguf(
    adapter: OnModel, output: str | Path, *, base_model_name: str | None, dtype: str
) -> None:
    base = hf.base_of(adapter.model)
    hf.save_gguf_lora(
        output,
        adapter.lora_params,
        adapter.config,
        base=base,
        dtype=dtype,
        base_model_name=base_model_name,
    )


def _write_gguf(content: Content, output: str | Path, *, base: Any, dtype: str) -> None:
    from lora_jax.hf.gguf.lora_write import to_gguf, write_gguf_lora

    config, tensors, _ = content
    write_gguf_lora(output, to_gguf(tensors, config, base), base, dtype=dtype)


# The merged model --------------------------------------------------------------------------------


def _save_merged(
    adapter: OnModel, output: str | Path, *, base_model_name: str | None, dtype: str
) -> None:
    hf.save_merged(output, adapter.model, adapter.lora_params, dtype=dtype)


# Orbax -------------------------------------------------------------------------------------------


def _is_orbax(path: Path) -> bool:
    # A run's folder has PEFT's directory `adapter/` inside, and `checkpoints/`, of which the newest
    # is read. A PEFT directory may hold anything beside its config.
    inside = ("adapter", "checkpoints", "meta")
    is_peft = (path / "adapter_config.json").exists()
    return not is_peft and any((path / name).is_dir() for name in inside)


def _check_orbax(source: str | Path, step: int | None) -> None:
    from lora_jax.checkpoint import adapters

    adapters.find(source, step=step)


def _load_orbax(
    model: Any, source: str | Path, plan_of: PlanOf, step: int | None
) -> tuple[Any, LoraConfig]:
    from lora_jax.checkpoint import adapters
    from lora_jax.checkpoint.fingerprint import OtherFormError

    try:
        return adapters.restore_stored(adapters.find(source, step=step), plan_of, model.params)
    except OtherFormError as error:
        written = Path(source) / ADAPTER
        if step is not None or not written.is_dir():
            raise
        raise OtherFormError(
            f"{error}; or give {written}, which loads over the base in any form, with a warning"
        ) from None


def _save_orbax(
    adapter: OnModel, output: str | Path, *, base_model_name: str | None, dtype: str
) -> None:
    from lora_jax.checkpoint.adapters import save

    save(output, adapter.lora_params, adapter.config)


def _read_orbax(source: str | Path, base: Any) -> Content:
    """An Orbax adapter as PEFT names it; of its base only names and shapes are known."""
    from lora_jax.checkpoint import adapters
    from lora_jax.checkpoint.flat import nested, parse, quantization
    from lora_jax.hf.peft.base import described
    from lora_jax.hf.peft.save import content_of

    stored = adapters.find(source)
    leaves = adapters.read_leaves(stored)
    # The fingerprint names every weight of the base, with dtype and shape.
    shapes = {name: parse(text) for name, text in stored.base.items()}
    frozen = {n: jax.ShapeDtypeStruct(size, jnp.dtype(kind)) for n, (kind, size) in shapes.items()}
    config = adapters.config_from(stored.config)
    index = make_index(leaves_by_path(nested(frozen | leaves)), config)
    # What trains whole is compared with the base, and some embeddings are repeated in the file.
    takes_base = [name for name, leaf in leaves.items() if not isinstance(leaf, LoraArray)]
    takes_base += [
        path for path, specs in tensor_specs(index).items() if any(s.part == "w" for s in specs)
    ]
    if takes_base:
        raise ValueError(
            f"{stored.directory}: `{takes_base[0]}` takes the model to convert, for the file "
            "repeats or compares the base's numbers; export the adapter over its model"
        )
    fields, tensors = content_of(index)
    # LoftQ's adapters have their base in PEFT's config.
    held = {} if config.init == "loftq" else {name: stored.base[name] for name in leaves}
    return Content(
        LoraConfig.from_peft(fields),
        tensors,
        described(filter(None, map(quantization, held.values()))),
    )


ADAPTER_FORMATS: Mapping[str, AdapterFormat] = {
    "peft": AdapterFormat(
        summary="a directory that the Python package peft loads",
        save=partial(_save_peft, target="peft"),
        write=partial(_write_peft, target="peft"),
        check=_check_peft,
        load=_load_peft,
        read=_read_peft,
        repeats=True,
    ),
    "vllm": AdapterFormat(
        summary="the same, with one rank and one alpha, as vLLM serves it",
        save=partial(_save_peft, target="vllm"),
        write=partial(_write_peft, target="vllm"),
    ),
    "gguf": AdapterFormat(
        summary="a file for llama.cpp: llama-cli --lora adapter.gguf",
        save=_save_gguf,
        write=_write_gguf,
        check=_check_gguf,
        load=_load_gguf,
        read=_read_gguf,
        is_at=_is_gguf,
        needs_base=True,
        has_dtype=True,
    ),
    "mlx": AdapterFormat(
        summary="a directory for MLX: mlx_lm.generate --adapter-path DIR",
        save=_save_mlx,
        write=_write_mlx,
        check=_check_mlx,
        load=_load_mlx,
        read=_read_mlx,
        is_at=_is_mlx,
        replaces=False,
    ),
    "hf": AdapterFormat(
        summary="the merged model, as a directory that transformers loads",
        save=_save_merged,
        has_dtype=True,
        holds="merged model",
        replaces=False,
        repeats=True,
    ),
    "orbax": AdapterFormat(
        summary="a folder for lora_jax.checkpoint.restore, with the base's fingerprint",
        save=_save_orbax,
        check=_check_orbax,
        load=_load_orbax,
        read=_read_orbax,
        is_at=_is_orbax,
        repeats=True,
    ),
}
