"""Settings of a training step that fit a device: the fastest, or changes that would help."""

import bisect
import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lora_jax.analysis.step_memory import mesh as memory_mesh
from lora_jax.analysis.step_memory.estimate import GIB, MemoryEstimate, estimate, in_units
from lora_jax.analysis.step_memory.program import whole_bytes
from lora_jax.analysis.step_memory.shapes import config_of
from lora_jax.analysis.step_memory.step import StepSettings, abstract_step
from lora_jax.config.lora import LoraConfig
from lora_jax.models.remat import remat_name
from lora_jax.models.sharding import RULES
from lora_jax.sharding import partition_specs, placed_specs

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
            f"`device_memory` must be a size above 0 such as 80GB or 24GiB, got {text!r}"
        )
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if not found[2] and size < _UNITS["MIB"]:
        raise ValueError(f"`device_memory` needs a unit: write {text}GB or {text}GiB, got {text!r}")
    return size


# A forward pass and the products of the backward pass take a unit each. `full` repeats the forward
# pass; what `projections` repeats has no products.
_WORK = {"none": 1.0, "projections": 1.03, "full": 1.5}
# On a CPU what `none` stores and reads takes longer than computing it again.
_WORK_CPU = {**_WORK, "none": 1.1}
# A pass reads the weights, which takes as long as the products of this many tokens: an H200's
# 989 TFLOP/s over its 4.8 TB/s, with 2 bytes and 2 operations a weight.
_READING = 206


def fastest(
    config: Any, settings: StepSettings, device_memory: int, *, weights: int | None = None
) -> MemoryEstimate:
    """The fastest rows of a pass and rematerialization that fit, with as many rows a step.

    Args:
      config: the model's configuration.
      settings: the settings, with `batch * accumulation` rows a step. A `remat` that is a policy
        of JAX's stays, and so does one that offloads.
      device_memory: bytes of a device.
      weights: bytes of the base on a device, where they are known.

    Raises:
      ValueError: nothing fits; the message has the smallest step, and what would help.
    """
    # Of two that fit, the one with more tokens a pass and less to compute again is the faster.
    parts = settings.mesh["data"] * settings.mesh["fsdp"]
    rows = settings.batch * settings.accumulation
    kinds = tuple(_WORK) if settings.remat in _WORK and not settings.offload else (settings.remat,)
    sizes = [n for n in range(parts, rows + 1, parts) if rows % n == 0]

    work = _WORK_CPU if settings.backend == "reference" else _WORK

    def seconds(size: int, remat: Any) -> float:
        passes = rows // size
        return passes * (size // parts * settings.length + _READING) * work.get(remat, 1.0)

    @functools.cache
    def found(size: int, remat: Any) -> MemoryEstimate:
        own = dataclasses.replace(settings, batch=size, accumulation=rows // size, remat=remat)
        one = estimate(str(config.model_type), config, own)
        return one if weights is None else dataclasses.replace(one, weights=weights)

    for size, remat in sorted(itertools.product(sizes, kinds), key=lambda x: seconds(*x)):
        # An estimate of a large model takes seconds. What is kept grows with the rows.
        fewest = found(parts, remat)
        least_bytes = fewest.arguments + fewest.kept * (size // parts)
        if max(least_bytes, fewest.total) <= device_memory:
            if found(size, remat).fits(device_memory):
                return found(size, remat)
    least = min((found(parts, remat) for remat in kinds), key=lambda one: one.total)
    others = "; ".join(remedies(config, least, device_memory))
    raise ValueError(
        f"`device_memory` is {in_units(device_memory)}, and the smallest step takes about "
        f"{in_units(least.total)} (batch_size {least.settings.batch}, accumulation "
        f"{least.settings.accumulation}, remat {remat_name(least.settings.remat)}). "
        f"A shorter `max_length` takes less; beyond that: {others}"
    )


def remedies(model: Any, found: MemoryEstimate, device_memory: int) -> list[str]:
    """The single changes of the settings that make the step fit, or all of them together.

    Args:
      model: the model that `found` was estimated for.
      found: an estimate that may not fit.
      device_memory: bytes of a device.

    Returns:
      A line for each sufficient change: more rematerialization, a smaller batch,
      an adapter instead of full fine-tuning, a quantized base, more devices. If none is
      sufficient, a line that says so, with the least that was found.
      Empty if the step already fits.
    """
    if found.fits(device_memory):
        return []
    _, config = config_of(model)
    lines, together, names = [], found.settings, []
    for name, change in _changes(found.settings):
        # Nothing is allocated or compiled, so every change can be tried.
        try:
            best = estimate(found.model, config, change)
        except ValueError:  # such as blocks that do not divide a matrix
            continue
        names.append(name)
        if best.fits(device_memory):
            lines.append(f"{name}: {best.total / GIB:.2f} GiB")
        together = _joined(together, found.settings, change)
    # All changes together are of interest only where none is enough by itself.
    best = None if lines else estimate(found.model, config, together)
    if best is not None and best.fits(device_memory):
        lines.append(f"all of these together ({_joined_names(names)}): {best.total / GIB:.2f} GiB")
    joined = _joined_names(names)
    tried = [(best or found, names)]
    for own, settings in [([], found.settings), (names, together)][: 1 + bool(names)]:
        spread = _devices(found.model, config, settings, device_memory=device_memory)
        if spread is None:
            continue
        count, batch = spread.settings.mesh["fsdp"], spread.settings.batch
        if spread.fits(device_memory):
            how = f"with {joined}" if own else "as it is"
            size = f"{spread.total / GIB:.2f} GiB on each device"
            return [*lines, f"fsdp {count} {how}, batch {batch}: {size}"]
        tried.append((spread, [*own, f"fsdp {count}"]))
    if lines:
        return lines
    least, changes = min(tried, key=lambda one: one[0].total)
    how = f"with {_joined_names(changes)} " * bool(changes)
    return [f"no change here is enough: {how}a device still needs {in_units(least.total)}"]


def _changes(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    """The changes to try, each by itself."""
    replace = dataclasses.replace
    if settings.remat != "full":
        yield "remat full", replace(settings, remat="full")
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


def _joined_names(names: list[str]) -> str:
    """All changes as text, of the batches only the smallest."""
    # By the first word, the kind of change, a smaller batch replaces the larger ones.
    return "; ".join({name.split()[0]: name for name in names}.values())


def _devices(
    name: str, config: Any, settings: StepSettings, *, device_memory: int
) -> MemoryEstimate | None:
    """The fewest devices along `fsdp` that fit the step, each with at least one row.

    Returns:
      The estimate with them; where none fit, that with the most; None where more devices hold no
      less.
    """

    @functools.cache
    def on(count: int) -> MemoryEstimate:
        mesh = {**settings.mesh, "fsdp": count}
        rows = mesh["data"] * count
        batch = -(-settings.batch // rows) * rows  # rounded up to whole rows of every device
        with warnings.catch_warnings():
            # What is left whole here is counted.
            warnings.filterwarnings("ignore", message="every device holds all of")
            return estimate(name, config, dataclasses.replace(settings, mesh=mesh, batch=batch))

    least, counts, held = settings.mesh["fsdp"], [], _held(config, settings)
    # Where `fsdp` divides no dim of a large matrix, each device holds more than with fewer.
    for count in [least << i for i in range(1, (_MOST_DEVICES // least).bit_length())]:
        if held(count) < held(least):
            counts, least = [*counts, count], count
    # The more devices, the less each holds: an estimate takes half a second, so few are made.
    if not counts or not on(counts[-1]).fits(device_memory):
        return on(counts[-1]) if counts else None
    first = bisect.bisect_left(counts, True, key=lambda count: on(count).fits(device_memory))
    return on(counts[first])


def _held(config: Any, settings: StepSettings) -> Callable[[int], int]:
    """Bytes of the base on each device, by the number of devices along `fsdp`."""
    one = dataclasses.replace(settings, mesh={}, batch=1, length=1)
    base = abstract_step(config, one).base

    @functools.cache
    def held(count: int) -> int:
        mesh = {**settings.mesh, "fsdp": count}
        specs = partition_specs(base, placed_specs(base, RULES, mesh))
        parts = (memory_mesh.parts(spec, mesh) for spec in memory_mesh.leaves(specs))
        return sum(whole_bytes(x) // n for x, n in zip(jax.tree.leaves(base), parts, strict=True))

    return held
