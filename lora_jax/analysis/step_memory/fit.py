"""Suggests changes of the settings for a training step that does not fit a device."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from lora_jax.analysis.step_memory.estimate import GIB, MemoryEstimate, estimate
from lora_jax.analysis.step_memory.shapes import config_of
from lora_jax.analysis.step_memory.step import StepSettings
from lora_jax.config.lora import LoraConfig

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_DEVICES = 1024  # where the search for a mesh that fits ends


def parse_bytes(text: str | int) -> int:
    """Bytes of "80GB" (10^9 each), "80GiB" (2^30 each), or a number of bytes.

    Raises:
      ValueError: the text is not a size above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(
            f"`device_memory` must be a size above 0 such as 80GB, 24GiB or a number of bytes, "
            f"got {text!r}"
        )
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if not found[2] and size < _UNITS["MIB"]:
        raise ValueError(f"`device_memory` needs a unit: write {text}GB or {text}GiB, got {text!r}")
    return size


def remedies(model: Any, found: MemoryEstimate, device_memory: int) -> list[str]:
    """The single changes of the settings that make the step fit, or all of them together.

    Args:
      model: the model that `found` was estimated for.
      found: an estimate that may not fit.
      device_memory: bytes of a device.

    Returns:
      A line for each sufficient change: more rematerialization, a smaller batch,
      an adapter instead of full fine-tuning, a quantized base, more devices. If none is
      sufficient, the total with all of them on as many devices, and the number of devices needed.
      Empty if the step already fits.
    """
    if found.fits(device_memory):
        return []
    _, config = config_of(model)
    lines, together = [], found.settings
    for name, change in _changes(found.settings):
        # Nothing is allocated or compiled, so every change can be tried.
        best = estimate(found.model, config, change)
        if best.fits(device_memory):
            lines.append(f"{name}: {best.total / GIB:.2f} GiB")
        together = _joined(together, found.settings, change)
    # All changes together are of interest only where none is enough by itself.
    best = None if lines else estimate(found.model, config, together)
    if best is not None and best.fits(device_memory):
        lines.append(
            f"all of these together ({_names(found.settings)}): {best.total / GIB:.2f} GiB"
        )
    for settings, label in ((found.settings, "as it is"), (together, "with all of the above")):
        line = _devices(found.model, config, settings, device_memory=device_memory, label=label)
        if line:
            return [*lines, line]
    if best is None or lines:
        return lines
    return [
        f"no change here is enough: with {_names(found.settings)} the step still takes "
        f"{best.total / GIB:.2f} GiB on each of {_MOST_DEVICES} devices or fewer"
    ]


def _changes(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    """The changes to try, each by itself."""
    replace = dataclasses.replace
    if settings.remat is not True:
        yield "remat True", replace(settings, remat=True)
    # Halving the batch and doubling the accumulation gives the same gradient; every device needs
    # at least one row.
    least = settings.mesh["data"] * settings.mesh["fsdp"]
    batch = settings.batch // 2
    while batch >= least and batch % least == 0:
        count = settings.accumulation * (settings.batch // batch)
        name = f"batch {batch}, accumulation {count}"
        yield name, replace(settings, batch=batch, accumulation=count)
        batch //= 2
    if settings.adapter is None:
        yield "LoRA instead of full fine-tuning", replace(settings, adapter=LoraConfig())
    if settings.quantize is None:
        adapter = settings.adapter or LoraConfig()
        yield "QLoRA, base in nf4", replace(settings, adapter=adapter, quantize="nf4")


def _joined(together: StepSettings, start: StepSettings, change: StepSettings) -> StepSettings:
    """`together` with the fields in which `change` differs from `start`."""
    own = {
        field.name: getattr(change, field.name)
        for field in dataclasses.fields(change)
        if getattr(change, field.name) != getattr(start, field.name)
    }
    return dataclasses.replace(together, **own)


def _names(settings: StepSettings) -> str:
    """All changes as text, of the batches only the smallest."""
    # By the first word, the kind of change, a smaller batch replaces the larger ones.
    last = {name.split()[0]: name for name, _ in _changes(settings)}
    return "; ".join(last.values())


def _devices(
    name: str, config: Any, settings: StepSettings, *, device_memory: int, label: str
) -> str:
    """The fewest devices along `fsdp` that fit the step, each with at least one row; or ""."""
    count = 2 * settings.mesh["fsdp"]
    while count <= _MOST_DEVICES:
        mesh = {**settings.mesh, "fsdp": count}
        rows = mesh["data"] * count
        batch = -(-settings.batch // rows) * rows  # rounded up to whole rows of every device
        try:
            best = estimate(name, config, dataclasses.replace(settings, mesh=mesh, batch=batch))
        except ValueError:  # `fsdp` divides no dim of some matrix, nor does any multiple of it
            return ""
        if best.fits(device_memory):
            return f"fsdp {count} {label}, batch {batch}: {best.total / GIB:.2f} GiB on each device"
        count *= 2
    return ""
