"""Plain parameters (of a merged model or any other) through Orbax.

folder/
  params/   Orbax: the tree as nested dicts, readable by any program that uses Orbax
  meta/     JSON: format, the fingerprint of the leaves, checksums
"""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from lora_jax.array import check_plain
from lora_jax.checkpoint.checksums import check_arrays, with_checksums
from lora_jax.checkpoint.fingerprint import fingerprint, kinds
from lora_jax.checkpoint.flat import differences, flatten, nested, parse, summary, unflatten
from lora_jax.checkpoint.folder import (
    check_space,
    checkpointer,
    folder_of,
    is_folder,
    place_for,
    quiet,
    read_arrays,
    read_meta,
    replace,
    shapes_of,
)
from lora_jax.compat import require
from lora_jax.models.sharding import RULES, check_rules
from lora_jax.sharding import Rules, shardings

FORMAT = "lora_jax params 1"
ITEM = "params"


def save_params(directory: str | os.PathLike, params: Any) -> None:
    """Writes plain parameters as an Orbax checkpoint, completely or not at all.

    `orbax.checkpoint.StandardCheckpointer().restore(directory / "params")` reads them as well.
    Parameters that are spread over several processes are written by all of them, into a folder that
    they share.

    Args:
      directory: the folder; existing parameters are replaced, anything else is an error.
      params: nested dicts of arrays, sharded or not.

    Raises:
      FileExistsError: the folder holds something else.
      ValueError: a leaf still has an adapter.
      OSError: it cannot be written (the earlier content is intact).
    """
    ocp = require("orbax.checkpoint")
    directory = place_for(directory, ITEM, "plain parameters")
    check_plain(params)
    arrays = flatten(params)
    meta = with_checksums({"format": FORMAT, "weights": fingerprint(params)}, arrays)
    # Nested, as other programs expect a tree; the names in the checksums stay flat.
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(nested(arrays)), meta=ocp.args.JsonSave(meta)
    )

    # Parameters on a mesh of several processes are in parts in each of them.
    together = any(not getattr(x, "is_fully_addressable", True) for x in arrays.values())

    def write(new: Path) -> None:
        check_space(new.parent, arrays)
        with quiet(), checkpointer(ITEM, together=together) as opened:
            opened.save(new, args)

    replace(directory, write, together=together)


def restore_params(
    directory: str | os.PathLike, like: Any, *, mesh: Mesh | None = None, rules: Rules = RULES
) -> Any:
    """Reads plain parameters; each device reads only its own shards.

    Args:
      directory: from `save_params`.
      like: tree of arrays or `jax.ShapeDtypeStruct`s with the expected shapes and dtypes, and the
        shardings; leaves without a sharding are put on one device.
      mesh: spread the parameters over it, whatever shardings `like` has.
      rules: which of its axes shard which dims, as in `sharding.place`.

    Returns:
      A tree shaped as `like`.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: not a folder of `save_params`, or leaves that are missing, unexpected, of another
        shape or quantized differently.

    Warns:
      UserWarning: leaves that every device of the mesh holds whole.
    """
    check_rules(mesh, rules)
    directory = folder_of(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    if not is_folder(directory, ITEM):
        raise ValueError(f"{directory} is not written by lora.checkpoint.save_params")
    meta, sums = read_meta(directory, FORMAT, needs=("weights",))
    named = flatten(like)
    if phrases := differences(named, shapes_of(sums)):
        raise ValueError(f"{directory} does not fit the model: {summary(phrases)}")
    # Format and block size are no arrays: with others the same bytes decode to other values.
    got = {name: text.partition(" ")[0] for name, text in meta["weights"].items()}
    if phrases := _requantized(kinds(like), got):
        raise ValueError(f"{directory} does not fit the model: {summary(phrases)}")
    where = {} if mesh is None else flatten(shardings(like, mesh, rules))
    wanted = {n: placed(x, where.get(n)) for n, x in named.items()}
    arrays = flatten(read_arrays(directory, ITEM, nested(wanted)))
    check_arrays(arrays, sums, directory)
    return unflatten(like, arrays)


def _requantized(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    return [
        f"`{name}` is {got[name]}, expected {kind}"
        for name, kind in expected.items()
        if got.get(name, kind) != kind
    ]


def described(directory: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every leaf in a folder of `save_params`, by name; nothing is read."""
    directory = folder_of(directory)
    weights = read_meta(directory, FORMAT, needs=("weights",))[0]["weights"]
    return {name: parse(text) for name, text in weights.items()}


def placed(x: Any, where: Sharding | None = None) -> jax.ShapeDtypeStruct:
    """The target of a restore: shape, dtype and sharding, by default the array's own."""
    where = where or getattr(x, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
