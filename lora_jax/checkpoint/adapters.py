"""Adapters on disk: what was trained, its config and its base's fingerprint, and nothing else.

    folder/
      adapter/     Orbax: a flat dict, `model.layers.self_attn.q_proj.kernel.a` and so on
      meta/        JSON: format, the LoRA config in PEFT's spelling, the base's fingerprint
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from lora_jax.checkpoint.fingerprint import check_base, fingerprint
from lora_jax.checkpoint.flat import differences, flatten, summary, unflatten

FORMAT = "lora_jax adapter 1"


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
        "config": config.to_peft(),
        "base": fingerprint(lora_params),
    }
    _replace(directory, lambda new: _write(new, flatten(trainable), meta))


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


def one_line(error: BaseException) -> str:
    """The text of an error of Orbax or TensorStore, cut to what a person can use."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    for known in ("No space left on device", "Permission denied", "Read-only file system",
                  "Disk quota exceeded", "File too large", "Not a directory"):  # fmt: skip
        if known.lower() in text.lower():
            return known
    return text if len(text) <= 200 else text[:200] + "..."


def _write(directory: Path, arrays: dict, meta: dict) -> None:
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(adapter=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args)


def read_meta(directory: str | os.PathLike) -> dict:
    """The JSON beside an adapter: `format`, `config` (PEFT's spelling), `base`.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: not an adapter of this format.
    """
    import orbax.checkpoint as ocp

    directory = Path(os.path.abspath(directory))
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such adapter folder")
    if not _is_adapter(directory):
        raise ValueError(
            f"{directory} is not an adapter written by lora.checkpoint.save (no `adapter` and"
            " `meta` in it); a PEFT folder is read by lora.hf.load_peft"
        )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(
            directory, ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta
    if meta.get("format") != FORMAT:
        raise ValueError(f"{directory}: expected format {FORMAT!r}, got {meta.get('format')!r}")
    return meta


def restore(directory: str | os.PathLike, fn: Callable, params, *args, **kwargs):
    """Reads an adapter over its base model.

    Args:
      directory: from `save`.
      fn: the model's function, as for `lora.plan`.
      params: the base's params.
      *args: example arguments of `fn`, as for `lora.plan`.
      **kwargs: the same.

    Returns:
      `(lora_params, config)`.

    Raises:
      ValueError: the base is another one, or an array is missing, left over or misshapen.
    """
    import lora_jax as lora

    meta = read_meta(directory)
    check_base(meta["base"], params, where=str(directory))
    config = lora.LoraConfig.from_peft(meta["config"])
    plan = lora.plan(config, fn, params, *args, **kwargs)
    # The key's numbers are all replaced; init gives the structure and the frozen scales.
    lora_params = lora.init(jax.random.key(0), plan, params)
    return _filled(directory, lora_params), config


def restore_into(directory: str | os.PathLike, lora_params):
    """Reads an adapter into a tree that `lora.init` made for the same config and base."""
    check_base(read_meta(directory)["base"], lora_params, where=str(directory))
    return _filled(directory, lora_params)


def _filled(directory: str | os.PathLike, lora_params):
    import lora_jax as lora

    trainable, frozen = lora.split(lora_params)
    arrays = _read_arrays(Path(os.path.abspath(directory)), flatten(trainable))
    return lora.combine(unflatten(trainable, arrays), frozen)


def _read_arrays(directory: Path, expected: dict) -> dict:
    import orbax.checkpoint as ocp

    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for n, x in expected.items()}  # fmt: skip
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        stored = checkpointer.item_metadata(directory).adapter
        if phrases := differences(like, getattr(stored, "tree", stored)):
            raise ValueError(f"{directory} does not fit the model: {summary(phrases)}")
        args = ocp.args.Composite(adapter=ocp.args.StandardRestore(like))
        return checkpointer.restore(directory, args).adapter
