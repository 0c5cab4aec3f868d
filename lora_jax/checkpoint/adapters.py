"""Adapters on disk: the trained arrays, the config, the plan and the base's fingerprint.

folder/
  adapter/     Orbax: a flat dict, `model.layers.self_attn.q_proj.kernel.a` and so on
  meta/        JSON: format, LoRA config in PEFT's fields, `outline`, base's fingerprint, checksums
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.checkpoint.agreement import check_adapter, check_finite
from lora_jax.checkpoint.checksums import check_arrays, with_checksums
from lora_jax.checkpoint.fingerprint import check_base, fingerprint
from lora_jax.checkpoint.flat import (
    check_outline,
    differences,
    flatten,
    leaf_from,
    outline,
    summary,
    unflatten,
)
from lora_jax.checkpoint.folder import (
    check_space,
    checkpointer,
    folder_of,
    is_folder,
    newest_whole,
    place_for,
    quiet,
    read_arrays,
    read_meta,
    replace,
    shapes_of,
    steps_in,
)
from lora_jax.checkpoint.planned import planned
from lora_jax.compat import require
from lora_jax.config.arguments import check_argument, check_function
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.files import leftovers
from lora_jax.hf.peft.base import as_read
from lora_jax.plan.decide import plan as make_plan
from lora_jax.plan.leaf import Plan
from lora_jax.tree import combine, init, split

# Raised with every change that older releases would misread.
FORMAT = "lora_jax adapter 2"
RUN_FORMAT = "lora_jax training state 2"
RUN_CHECKPOINTS = "checkpoints"
ITEM = "adapter"


def save(directory: str | os.PathLike, lora_params: Any, config: LoraConfig) -> None:
    """Writes the trained leaves of `lora_params`; the base is never written.

    The folder is written under a temporary name and renamed when it is complete, so that a failure
    or a kill leaves an earlier adapter intact. Of several processes all have to call it, and the
    first one writes.

    Args:
      directory: the folder; its parent is created if missing. An existing adapter is replaced,
        anything else is an error.
      lora_params: from `lora.init`.
      config: the `LoraConfig` it was made with.

    Raises:
      ValueError: the tree is not one adapter of this config, or holds NaN or infinity.
      FileExistsError: the folder holds something that is not an adapter.
      OSError: it cannot be written (the earlier content is intact).
    """
    directory, arrays, meta = _content("save", directory, lora_params, config)
    processes.together(lambda: _replace(directory, arrays, meta))


def _replace(directory: Path, arrays: dict[str, Any], meta: dict) -> None:
    if processes.is_first():
        replace(directory, lambda new: _write(new, arrays, meta))


class Pending(NamedTuple):
    """A save in progress.

    Attributes:
      thread: the writing thread.
      failures: the exception it raised, if any.
    """

    thread: threading.Thread
    failures: list[Exception]

    def wait(self) -> None:
        """Returns when the adapter is on disk.

        Raises:
          OSError: it could not be written; the earlier content is intact.
        """
        self.thread.join()
        if self.failures:
            raise self.failures[0]


def save_async(directory: str | os.PathLike, lora_params: Any, config: LoraConfig) -> Pending:
    """As `save`, but returns when the trained arrays are copied, and writes in a thread.

    Training may continue immediately, also with donated buffers. `restore` finds the earlier
    adapter until the new one is complete. Wait for a save before the next one to the same folder,
    and before the program ends.

    Returns:
      The pending save; its `wait()` raises the error of the thread.

    Raises:
      ValueError, FileExistsError: as `save`.

    Example:
      pending = lora.checkpoint.save_async("adapter", lora_params, config)
      ...
      pending.wait()
    """
    directory, arrays, meta = _content("save_async", directory, lora_params, config)
    # Copied on the device: the next training step may donate, and so overwrite, the originals.
    copied = {name: x.copy() for name, x in arrays.items()}
    failures: list[Exception] = []

    def run() -> None:
        try:
            _replace(directory, copied, meta)
        except Exception as error:  # raised again by `wait`
            failures.append(error)

    thread = threading.Thread(target=run, name=f"save {directory.name}")
    thread.start()
    return Pending(thread, failures)


def _content(
    name: str, directory: str | os.PathLike, lora_params: Any, config: LoraConfig
) -> tuple[Path, dict[str, Any], dict]:
    """The folder to write, the arrays and the metadata, all checked; `name` is the function's."""
    order = f"checkpoint.{name}(directory, lora_params, config)"
    check_argument(order, "directory", directory, (str, os.PathLike))
    check_argument(order, "config", config, LoraConfig)
    place = place_for(directory, ITEM, "an adapter")
    check_adapter(lora_params, config)
    trainable, _ = split(lora_params)
    arrays = {name: processes.whole(x) for name, x in sorted(flatten(trainable).items())}
    check_finite(arrays)
    meta = {
        "format": FORMAT,
        "config": config_json(config),
        "plan": outline(lora_params),
        "base": fingerprint(lora_params),
    }
    return place, arrays, meta


_ROLES = "lora_jax_roles"  # the only field that PEFT's config lacks


def config_json(config: LoraConfig) -> dict:
    """A `LoraConfig` as JSON values, such that `config_from` gives an equal one."""
    values = config.to_peft()
    return {**values, _ROLES: dict(config.roles)} if config.roles else values


def config_from(values: Mapping[str, Any]) -> LoraConfig:
    """The `LoraConfig` from a result of `config_json`."""
    values = dict(values)
    roles = values.pop(_ROLES, {})
    return replace_fields(LoraConfig.from_peft(values), roles=roles)


def _write(directory: Path, arrays: dict, meta: dict) -> None:
    ocp = require("orbax.checkpoint")
    meta = with_checksums(meta, arrays)
    args = ocp.args.Composite(adapter=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    # `directory` does not exist yet: its parent is on the same disk.
    check_space(directory.parent, arrays)
    with quiet(), checkpointer(ITEM) as opened:
        opened.save(directory, args)


class Stored(NamedTuple):
    """An adapter on disk before its arrays are read.

    Attributes:
      directory: the folder that Orbax reads: the adapter's, or a step of a training run.
      item: the part of it with the arrays.
      prefix: common prefix of the arrays' names.
      config: the LoRA config in PEFT's fields.
      base: the base's fingerprint.
      plan: the outline of each leaf, see `outline`.
      arrays: dtype, shape and checksum of each array in the item.
    """

    directory: Path
    item: str
    prefix: str
    config: dict
    base: dict[str, str]
    plan: dict[str, dict]
    arrays: dict[str, str]


def find(directory: str | os.PathLike, *, step: int | None = None) -> Stored:
    """The adapter in a folder of `save`, or in a checkpoint of a training run.

    Args:
      directory: the adapter's folder, or the run's.
      step: of the run; the newest by default.

    Raises:
      FileNotFoundError: no such folder, or a run without a checkpoint.
      ValueError: not an adapter, or one of another format.
    """
    directory = folder_of(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such adapter folder{_hint(directory)}")
    if is_folder(directory, ITEM):
        if step is not None:
            raise ValueError(f"{directory} is one adapter, not a run: it has no step {step}")
        meta, sums = read_meta(directory, FORMAT, needs=("config", "base", "plan"))
        return Stored(
            directory=directory, item=ITEM, prefix="", config=meta["config"],
            base=meta["base"], plan=meta["plan"], arrays=sums,
        )  # fmt: skip
    if (directory / RUN_CHECKPOINTS).is_dir():
        return _newest_whole(directory / RUN_CHECKPOINTS, step)
    raise ValueError(
        f"{directory} is neither an adapter written by lora.checkpoint.save nor the folder of a"
        " training run; a PEFT folder is read by lora.hf.load_peft"
    )


def _hint(directory: Path) -> str:
    """The hint after a save that was killed between two renames, which left the old folder."""
    # `replacing` moves the old folder aside before the new one takes its name.
    old = [each for half in leftovers(directory) for each in half.glob("*.old")]
    return f"; a save was interrupted: rename {old[0]} to it" if old else ""


def _newest_whole(checkpoints: Path, step: int | None) -> Stored:
    """The adapter of one step, or of the newest checkpoint that is not damaged."""
    steps = steps_in(checkpoints)
    if not steps:
        raise FileNotFoundError(f"{checkpoints}: the run has no checkpoint yet")
    if step is not None:
        if step not in steps:
            kept = ", ".join(map(str, sorted(steps)))
            raise FileNotFoundError(f"{checkpoints}: there is no step {step}; kept are {kept}")
        return _of_run(checkpoints / str(step))

    def read(step: int) -> Stored:
        stored = _of_run(checkpoints / str(step))
        if len(steps) > 1:  # alone, it is read and checked once, by the caller
            _read_arrays(stored, None)
        return stored

    return newest_whole(checkpoints, steps, read)[1]


def _of_run(place: Path) -> Stored:
    run, sums = read_meta(place, RUN_FORMAT, part="run", needs=("lora", "base", "plan"))
    # The plan lists adapted leaves, of which full fine-tuning has none.
    if not run["plan"]:
        raise ValueError(
            f"{place} is of full fine-tuning: it holds whole weights and no adapter; resume "
            "the run with train.fit(..., full=True) to get its parameters"
        )
    if run["lora"] is None:
        raise ValueError(
            f"{place} was written without `lora_config`, so its adapter cannot be rebuilt from"
            " the file alone; pass lora_config= to fit"
        )
    return Stored(
        directory=place, item="state", prefix="trainable.", config=run["lora"],
        base=run["base"], plan=run["plan"], arrays=sums,
    )  # fmt: skip


def read_config(directory: str | os.PathLike) -> LoraConfig:
    """The `LoraConfig` of an adapter on disk; `directory` as for `find`."""
    return config_from(find(directory).config)


def restore(
    directory: str | os.PathLike, fn: Callable, params: Any, *args: Any, **kwargs: Any
) -> tuple[Any, LoraConfig]:
    """Reads an adapter onto its base model; on a mesh it is sharded as its weights are.

    Args:
      directory: written by `save`, or the `output_dir` of a training run (its newest checkpoint).
      fn: the model's function, as for `lora.plan`.
      params: the base's params.
      *args: example arguments of `fn`, as for `lora.plan`.
      **kwargs: the same.

    Returns:
      `(lora_params, config)`.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: another base, or an array that is missing, unexpected or of another shape.
    """
    check_function("checkpoint.restore(directory, fn, params, *args)", fn)
    return restore_stored(
        find(directory), lambda config: make_plan(config, fn, params, *args, **kwargs), params
    )


def restore_stored(
    stored: Stored, plan_of: Callable[[LoraConfig], Plan], params: Any
) -> tuple[Any, LoraConfig]:
    """As `restore`, for a result of `find`.

    Args:
      stored: from `find`.
      plan_of: plans a config on the model.
      params: the base's params.
    """
    config, where = config_from(stored.config), str(stored.directory)
    # Starts such as PiSSA change the base: its fingerprint is that of the changed base, which only
    # exists after `init`.
    keeps_base = base_change(config.init) == "none"
    if keeps_base:
        check_base(stored.base, params, where=where)
    # All random numbers are replaced. `init` gives the structure, the frozen scales, and the
    # changed base of starts such as PiSSA.
    plan = planned(stored.plan, config, plan_of, params)
    plan = as_read(plan, params, source=where, checked=True)
    blank = init(jax.random.key(0), plan, params)
    if not keeps_base:
        check_base(stored.base, blank, where=where)
    return _filled(stored, blank), config


def restore_into(directory: str | os.PathLike, lora_params: Any) -> Any:
    """Reads an adapter into a tree that `lora.init` made for the same config and base."""
    stored = find(directory)
    check_base(stored.base, lora_params, where=str(stored.directory))
    return _filled(stored, lora_params)


def read_leaves(stored: Stored) -> dict[str, Any]:
    """The adapter's leaves by name, without its model: weights are only shapes.

    Args:
      stored: from `find`.
    """
    # On the host, as nothing is computed with them.
    arrays = jax.tree.map(np.asarray, _read_arrays(stored, None))
    leaves = {}
    for name, described in stored.plan.items():
        own = {n.rpartition(".")[2]: x for n, x in arrays.items() if n.startswith(f"{name}.")}
        leaves[name] = leaf_from(described, own)
    return leaves


def _filled(stored: Stored, lora_params: Any) -> Any:
    check_outline(stored.plan, lora_params, where=str(stored.directory))
    # The shapes of the tree's own arrays, and their shardings, are what is read into.
    trainable, frozen = split(lora_params)
    arrays = _read_arrays(stored, flatten(trainable))
    return combine(unflatten(trainable, arrays), frozen)


def _read_arrays(stored: Stored, like: dict[str, Any] | None) -> dict[str, jax.Array]:
    """The trained arrays, sharded as those of `like`, or on one device without it."""
    cut = len(stored.prefix)
    found = shapes_of(stored.arrays)
    named = {n[cut:]: x for n, x in found.items() if n.startswith(stored.prefix)}
    like = named if like is None else like
    if phrases := differences(like, named):
        raise ValueError(f"{stored.directory} does not fit the model: {summary(phrases)}")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    # Orbax restores whole trees only, so the rest of a run's state is read too.
    wanted = {
        n: _struct(like[n[cut:]] if n.startswith(stored.prefix) else x, here)
        for n, x in found.items()
    }
    arrays = read_arrays(stored.directory, stored.item, wanted)
    check_arrays(arrays, stored.arrays, stored.directory)
    return {n: arrays[stored.prefix + n] for n in like}


def _struct(x: Any, here: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    own = getattr(x, "sharding", None)
    own = own if isinstance(own, jax.sharding.Sharding) else here
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)
