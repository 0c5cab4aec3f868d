"""Folders with arrays under one name and JSON under `meta`, as Orbax writes them."""

import os
from pathlib import Path
from typing import Any


def checkpointer(item: str) -> Any:
    """Orbax's reader and writer of a folder with arrays under `item` and JSON under `meta`."""
    import orbax.checkpoint as ocp

    handlers = {item: ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def is_folder(directory: Path, item: str) -> bool:
    """Whether there is a folder of ours with such arrays."""
    return (directory / item).is_dir() and (directory / "meta").is_dir()


def place_for(directory: str | os.PathLike, item: str, what: str) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
      FileExistsError: it holds something else than `item`.
    """
    directory = Path(os.path.abspath(directory))
    if directory.is_dir():
        taken = any(directory.iterdir()) and not is_folder(directory, item)
    else:
        taken = directory.exists()
    if taken:
        raise FileExistsError(
            f"{directory} exists and is not {what} written by lora_jax; choose another folder"
        )
    return directory


def read_meta(directory: Path, expected: str, *, part: str | None = None) -> dict:
    """The JSON of a folder, or one part of it, which must say that it is of a format.

    Raises:
      ValueError: damaged, or of another format.
    """
    import orbax.checkpoint as ocp

    try:
        with checkpointer("adapter") as opened:
            meta = opened.restore(directory, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        meta = meta if part is None else meta[part]
        found = meta.get("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory}: its `meta` cannot be read: {type(error).__name__}: {error}"
        ) from None
    if found != expected:
        raise ValueError(f"{directory}: expected format {expected!r}, got {found!r}")
    return meta
