"""The folder of a run: its content, and resuming from it.

output_dir/checkpoints/<step>/   see `lora_jax.checkpoint.state`
output_dir/metrics.jsonl         see `metrics`
output_dir/tensorboard/
output_dir/loss.png
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import processes
from lora_jax.checkpoint import state as checkpoints
from lora_jax.checkpoint.adapters import RUN_CHECKPOINTS, RUN_FORMAT, config_json
from lora_jax.checkpoint.fingerprint import check_base, fingerprint
from lora_jax.checkpoint.flat import outline
from lora_jax.checkpoint.folder import read_meta, steps_in
from lora_jax.config.arguments import SettingsError
from lora_jax.config.lora import LoraConfig
from lora_jax.config.peft import MAPPED
from lora_jax.files import locked, write_text
from lora_jax.train import metrics
from lora_jax.train.batches import Loader
from lora_jax.train.config import TrainConfig, fixed_fields
from lora_jax.train.examples import Example, data_hash
from lora_jax.train.step import TrainState


class Archive(NamedTuple):
    """An open run folder.

    Attributes:
      directory: the run's folder.
      manager: Orbax's manager of its checkpoints.
    """

    directory: Path
    manager: Any


class Batched(NamedTuple):
    """How a run lays its data out, which it keeps when the rule for that changes.

    Attributes:
      ladder: the lengths that batches are padded to; None in checkpoints without it.
      packed: tokens of a packed row, or None.
    """

    ladder: tuple[int, ...] | None
    packed: int | None


class Start(NamedTuple):
    """The starting point of a run.

    Attributes:
      state: a fresh state, or that of the newest checkpoint.
      step: optimizer steps taken.
      position: position of the data iterator; None at the beginning.
      history: records of the steps taken.
    """

    state: TrainState
    step: int
    position: dict | None
    history: list[dict]


@contextlib.contextmanager
def archive(config: TrainConfig) -> Iterator[Archive | None]:
    """Opens the folder of a run; None if the run writes nothing.

    Raises:
      FileExistsError: the folder already holds a run and `resume` is false.
      BlockingIOError: another process writes there.
      OSError: the folder cannot be written.
    """
    if config.output_dir is None:
        yield None
        return
    directory = config.output_dir.absolute()
    place = directory / RUN_CHECKPOINTS
    with checkpoints.manager(place, keep=config.keep) as opened, contextlib.ExitStack() as stack:

        def claim() -> None:
            if processes.is_first():
                stack.enter_context(locked(directory))
                checkpoints.sweep(place)
                # The steps were listed before the lock was taken.
                opened.reload()
                if not config.resume:
                    _check_empty(directory, opened.latest_step())

        processes.together(claim)
        check_shared(directory)
        opened.reload()
        yield Archive(directory, opened)


def check_new_run(config: TrainConfig) -> None:
    """Checks that the folder holds no run yet, unless it is resumed; before a model is loaded.

    Raises:
      FileExistsError: it holds one.
      OSError: it cannot be written.
    """
    if config.output_dir is not None:
        _check_writable(config.output_dir)
    if config.output_dir is not None and not config.resume:
        steps = steps_in(config.output_dir / RUN_CHECKPOINTS)
        _check_empty(config.output_dir, steps[0] if steps else None)


def _check_writable(directory: Path) -> None:
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"`output_dir` is {directory}, and {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"`output_dir` is {directory}, and {there} cannot be written")


def _check_empty(directory: Path, step: int | None) -> None:
    if step is not None or (directory / metrics.METRICS).exists():
        newest = "no checkpoint yet" if step is None else f"newest checkpoint: step {step}"
        raise FileExistsError(
            f"`output_dir` holds a run already: {directory} ({newest}); pass resume=True to"
            " continue it, or choose another folder"
        )


def check_shared(directory: Path) -> None:
    """Checks that all processes see the same folder, to which each writes its parts.

    Raises:
      ValueError: a process has a folder of its own, such as one on its host's disk.
    """
    if not processes.several():
        return
    # A name that no process has looked up yet: network file systems remember what was missing.
    token = directory / f".shared.{processes.exchange(uuid.uuid4().hex[:8])[0]}"
    processes.together(lambda: processes.is_first() and write_text(token, ""))

    def find() -> None:
        if not token.exists():
            raise ValueError(
                f"`output_dir` is {directory}, where the files of process 0 do not appear: it must "
                "be a folder that all processes share, such as one on a network file system"
            )

    try:
        processes.together(find, ValueError)
    finally:
        if processes.is_first():
            token.unlink()


def batched(config: TrainConfig) -> Batched | None:
    """How the run that is resumed lays its data out; None where there is none."""
    if config.output_dir is None or not config.resume:
        return None
    place = config.output_dir.absolute() / RUN_CHECKPOINTS
    for step in steps_in(place):
        # Every checkpoint of the run has it; one that is damaged is said when it is restored.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            run, _ = read_meta(place / str(step), RUN_FORMAT, part="run")
            ladder = run.get("ladder")
            return Batched(ladder and tuple(ladder), run["train"].get("packed_length"))
    return None


def describe(
    config: TrainConfig,
    total: int,
    data: Loader,
    *,
    lora_config: LoraConfig | None,
    lora_params: Any,
) -> dict:
    """The identity of a run as JSON values, stored in every checkpoint."""
    packed = None if data.by_rank is None else data.ladder[0]
    settings = _settings(config, total, data.examples, packed, lora_config)
    # Through JSON, as the stored one is: a tuple would differ from the list that is read back.
    of_model = {"base": fingerprint(lora_params), "plan": outline(lora_params)}
    return json.loads(json.dumps({**settings, **of_model, "ladder": data.ladder}))


def _settings(
    config: TrainConfig,
    total: int,
    data: Sequence[Example],
    packed: int | None,
    lora_config: LoraConfig | None,
) -> dict:
    # Left out of runs in buckets, so that they match checkpoints from before there was packing.
    more = {} if packed is None else {"packed_length": packed}
    return {
        "format": RUN_FORMAT,
        "train": {**fixed_fields(config), **more, "steps": total},
        "lora": None if lora_config is None else config_json(lora_config),
        "data": data_hash(data),
    }


def check_resumed(
    config: TrainConfig,
    total: int,
    data: Sequence[Example],
    *,
    packed: int | None,
    lora_config: LoraConfig | None,
) -> None:
    """Checks the settings and the data of a run that is resumed, before a model is loaded.

    Args:
      config: the run.
      total: its optimizer steps.
      data: its examples.
      packed: tokens of a packed row, or None.
      lora_config: the adapter's config; None where it is not known yet, and not compared.

    Raises:
      ValueError: the run that is there has others.
    """
    place = None if config.output_dir is None else config.output_dir.absolute() / RUN_CHECKPOINTS
    # Several processes compare when all of them have opened the folder.
    if place is None or not config.resume or not steps_in(place) or processes.several():
        return
    with checkpoints.manager(place, keep=config.keep) as opened:
        found = checkpoints.read_meta_of(opened)
    assert found is not None
    now = json.loads(json.dumps(_settings(config, total, data, packed, lora_config)))
    was = found[1]["run"]
    unknown = {"lora": was["lora"]} if lora_config is None else {}
    _check_settings(was, {**now, **unknown}, where=str(place), newest=found[0])


def start(opened: Archive | None, state: TrainState, described: dict, lora_params: Any) -> Start:
    """Restores the newest checkpoint of the run, or starts from the beginning.

    Raises:
      ValueError: the checkpoint is of another base, config or dataset.
    """
    if opened is None:
        return Start(state, 0, None, [])
    records = opened.directory / metrics.METRICS
    if opened.manager.latest_step() is None:
        # A run killed before its first checkpoint may have left records.
        metrics.rewind(records, -1)
        return Start(state, 0, None, [])
    where, newest = str(opened.manager.directory), opened.manager.latest_step()
    # Checked before the arrays are read: a mismatch then has a sentence about what differs, not
    # about shapes.
    restored = checkpoints.restore_state(
        opened.manager,
        state,
        check=lambda meta: _check(meta["run"], described, lora_params, where=where, newest=newest),
    )
    # What is damaged stays for its owner to look at, but out of the way of this run's steps.
    checkpoints.set_aside(opened.manager, restored.step)
    # Records after the checkpoint belong to steps that are trained again.
    history = metrics.rewind(records, restored.step)
    return Start(restored.state, restored.step, restored.meta["position"], history)


def save(opened: Archive, step: int, state: TrainState, *, described: dict, position: dict) -> None:
    """Writes a checkpoint, unless this step has one.

    Raises:
      OSError: it cannot be written; the previous checkpoint is intact.
    """
    # A signal may come at a step that was due to be saved anyway.
    if opened.manager.latest_step() != step:
        meta = {"run": described, "position": position}
        checkpoints.save_state(opened.manager, step, state, meta)


def _check(was: dict, now: dict, lora_params: Any, *, where: str, newest: int) -> None:
    if was["format"] == now["format"]:
        check_base(was["base"], lora_params, where=where)
    _check_settings(was, now, where=where, newest=newest)


def _check_settings(was: dict, now: dict, *, where: str, newest: int) -> None:
    if was["format"] != now["format"]:
        raise ValueError(f"{where}: expected format {now['format']!r}, got {was['format']!r}")
    kept = [was["train"], now["train"]]
    if newest == was["train"]["steps"] < now["train"]["steps"]:
        # A finished run goes on: its schedule is now that of the longer run.
        kept = [{k: v for k, v in run.items() if k not in _LENGTH} for run in kept]
    before, after = ({**k, **_named(r["lora"])} for k, r in zip(kept, (was, now), strict=True))
    changed = [
        f"`{name}` was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        raise SettingsError(
            f"{where} is of a run with another config: {'; '.join(changed)}; resume with the same"
            " config, or choose another `output_dir`"
        )
    if was["data"] != now["data"]:
        raise ValueError(
            f"{where} was trained on other data; resume with the same examples in the same order,"
            " or choose another `output_dir`"
        )


_LENGTH = ("steps", "epochs")


def _named(fields: dict | None) -> dict:
    """PEFT's fields of an adapter under the names of `LoraConfig`."""
    return {MAPPED[k][0] if k in MAPPED else k: value for k, value in (fields or {}).items()}
