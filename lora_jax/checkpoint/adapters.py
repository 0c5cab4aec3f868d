"""Adapters on disk: what was trained, its config and its base's fingerprint, and nothing else.

    folder/
      adapter/     Orbax: a flat dict, `model.layers.self_attn.q_proj.kernel.a` and so on
      meta/        JSON: format, the LoRA config in PEFT's spelling, the base's fingerprint
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from lora_jax.checkpoint.disk import check_space, one_line, quiet
from lora_jax.checkpoint.fingerprint import check_base, fingerprint
from lora_jax.checkpoint.flat import differences, flatten, summary, unflatten

FORMAT = "lora_jax adapter 1"
RUN_FORMAT = "lora_jax training state 1"
RUN_CHECKPOINTS = "checkpoints"


def save(directory: str | os.PathLike, lora_params, config) -> None:
    """Writes the trained leaves of `lora_params`; the base is never written.

    The folder is written under another name beside its place and moved there when it is whole,
    so that a failure leaves an earlier one as it was.

    Args:
      directory: the folder; its parent is made if need be. An adapter already there is replaced,
        anything else is refused.
      lora_params: from `lora.init`.
      config: the `LoraConfig` it was made with.

    Raises:
      FileExistsError: the folder holds something that is not an adapter.
      OSError: it cannot be written (the earlier content is intact).
    """
    import lora_jax as lora

    directory = Path(os.path.abspath(directory))
    if directory.exists() and not _is_adapter(directory) and any(_listing(directory)):
        raise FileExistsError(
            f"{directory} exists and is not an adapter written by lora_jax; choose another folder"
        )
    trainable, _ = lora.split(lora_params)
    meta = {
        "format": FORMAT,
        "config": config_json(config),
        "base": fingerprint(lora_params),
    }
    _replace(directory, lambda new: _write(new, flatten(trainable), meta))


def config_json(config) -> dict:
    """A `LoraConfig` as JSON values, such that `from_peft` gives an equal one."""
    values = config.to_peft()
    # to_peft always says a task type; from_peft takes a said one for the user's choice.
    if "task_type" not in config.extra:
        values.pop("task_type", None)
    return values


def _listing(directory: Path):
    return directory.iterdir() if directory.is_dir() else [directory]


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter").is_dir() and (directory / "meta").is_dir()


def _replace(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside its place, then moves it there."""
    mark = f".{directory.name}.{os.getpid()}"
    new, old = directory.with_name(mark + ".new"), directory.with_name(mark + ".old")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        if directory.exists():
            os.rename(directory, old)
        os.rename(new, directory)
    except Exception as error:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        raise OSError(
            f"cannot write {directory}: {one_line(error)}; what was there before is intact"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _write(directory: Path, arrays: dict, meta: dict) -> None:
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(adapter=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    check_space(directory.parent, arrays)
    with quiet(), _checkpointer("adapter") as checkpointer:
        checkpointer.save(directory, args)


def _checkpointer(item: str):
    """Orbax's reader and writer of a folder with arrays under `item` and JSON under `meta`."""
    import orbax.checkpoint as ocp

    handlers = {item: ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


class Stored(NamedTuple):
    """An adapter on disk before its arrays are read.

    Attributes:
      directory: that Orbax reads: the adapter's folder, or a step of a training run.
      item: its part that holds the arrays.
      prefix: what the arrays' names begin with.
      config: the LoRA config in PEFT's spelling.
      base: the base's fingerprint.
    """

    directory: Path
    item: str
    prefix: str
    config: dict
    base: dict[str, str]


def find(directory: str | os.PathLike) -> Stored:
    """The adapter in a folder of `save`, or in the newest checkpoint of a training run.

    Raises:
      FileNotFoundError: no such folder, or a run without a checkpoint.
      ValueError: not an adapter, or one of another format.
    """
    directory = Path(os.path.abspath(directory))
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such adapter folder")
    if _is_adapter(directory):
        meta = _read_meta(directory, FORMAT)
        return Stored(directory, "adapter", "", meta["config"], meta["base"])
    if (directory / RUN_CHECKPOINTS).is_dir():
        step = _newest(directory / RUN_CHECKPOINTS)
        run = _read_meta(step, RUN_FORMAT, part="run")
        if run["lora"] is None:
            raise ValueError(
                f"{step} was written without `lora_config`, so its adapter cannot be rebuilt from"
                " the file alone; pass lora_config= to fit"
            )
        return Stored(step, "state", "trainable.", run["lora"], run["base"])
    raise ValueError(
        f"{directory} is neither an adapter written by lora.checkpoint.save nor the folder of a"
        " training run; a PEFT folder is read by lora.hf.load_peft"
    )


def _newest(checkpoints: Path) -> Path:
    steps = [p for p in checkpoints.iterdir() if p.name.isdigit()]
    if not steps:
        raise FileNotFoundError(f"{checkpoints}: the run has no checkpoint yet")
    return max(steps, key=lambda p: int(p.name))


def _read_meta(directory: Path, expected: str, *, part: str | None = None) -> dict:
    import orbax.checkpoint as ocp

    with _checkpointer("adapter") as checkpointer:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = checkpointer.restore(directory, args).meta
    meta = meta if part is None else meta[part]
    if meta.get("format") != expected:
        raise ValueError(f"{directory}: expected format {expected!r}, got {meta.get('format')!r}")
    return meta


def read_config(directory: str | os.PathLike):
    """The `LoraConfig` of an adapter on disk; see `find` for what may be given."""
    import lora_jax as lora

    return lora.LoraConfig.from_peft(find(directory).config)


def restore(directory: str | os.PathLike, fn: Callable, params, *args, **kwargs):
    """Reads an adapter over its base model.

    Args:
      directory: from `save`, or the `output_dir` of a training run (its newest checkpoint).
      fn: the model's function, as for `lora.plan`.
      params: the base's params.
      *args: example arguments of `fn`, as for `lora.plan`.
      **kwargs: the same.

    Returns:
      `(lora_params, config)`.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: the base is another one, or an array is missing, left over or misshapen.
    """
    import lora_jax as lora

    stored = find(directory)
    check_base(stored.base, params, where=str(stored.directory))
    config = lora.LoraConfig.from_peft(stored.config)
    plan = lora.plan(config, fn, params, *args, **kwargs)
    # The key's numbers are all replaced; init gives the structure and the frozen scales.
    return _filled(stored, lora.init(jax.random.key(0), plan, params)), config


def restore_into(directory: str | os.PathLike, lora_params):
    """Reads an adapter into a tree that `lora.init` made for the same config and base."""
    stored = find(directory)
    check_base(stored.base, lora_params, where=str(stored.directory))
    return _filled(stored, lora_params)


def _filled(stored: Stored, lora_params):
    import lora_jax as lora

    trainable, frozen = lora.split(lora_params)
    arrays = _read_arrays(stored, flatten(trainable))
    return lora.combine(unflatten(trainable, arrays), frozen)


def _read_arrays(stored: Stored, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    cut = len(stored.prefix)
    with _checkpointer(stored.item) as checkpointer:
        found = checkpointer.metadata(stored.directory).item_metadata[stored.item].tree
        named = {n[cut:]: x for n, x in found.items() if n.startswith(stored.prefix)}
        if phrases := differences(like, named):
            raise ValueError(f"{stored.directory} does not fit the model: {summary(phrases)}")
        place = next(iter(like.values())).sharding
        wanted = {
            n: _struct(like[n[cut:]]) if n.startswith(stored.prefix) else _struct(x, place)
            for n, x in found.items()
        }
        args = ocp.args.Composite(**{stored.item: ocp.args.StandardRestore(wanted)})
        arrays = checkpointer.restore(stored.directory, args)[stored.item]
    return {n: arrays[stored.prefix + n] for n in like}


def _struct(x, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)
