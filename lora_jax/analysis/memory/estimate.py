"""How much memory training takes, from a config.json alone: full fine-tuning, LoRA and QLoRA.

    total = weights + adapters + optimizer state + gradients + activations

Weights, adapters and optimizer state are exact: they are the shapes of the real model, planned and
initialized abstractly. Gradients and activations are what the step of `lora_jax.train` holds at its
peak, computed from its jaxpr (`lora_jax.analysis.memory.liveness`). `remat`
decides what is kept for the backward pass:

    True            the residual stream before each block: L · B · T · D
    "projections"   that, and what every projection gave
    False           everything the backward pass reads, the attention's scores (B · N · T · T) too

and with True and "projections" one block is computed again at a time.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lora_jax import paths
from lora_jax.analysis.memory import mesh as memory_mesh
from lora_jax.analysis.memory import step as memory_step
from lora_jax.analysis.memory.compiled import compiled
from lora_jax.analysis.memory.liveness import HABITS, Alive, Habits, alive, on_cpu
from lora_jax.analysis.memory.program import whole_bytes
from lora_jax.analysis.memory.step import AbstractStep, Spread, StepSettings, config_of
from lora_jax.config.lora import LoraConfig
from lora_jax.models.sharding import ROWS
from lora_jax.tree import Count, count_parameters, format_count

GIB = 2**30

_PARTS = ("weights", "adapters", "optimizer", "gradients", "activations")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a training step, on each device; prints as a table.

    Attributes:
      model: its name.
      settings: of the step.
      parameters: of the model, adapters included.
      trainable: how many of them train.
      weights: bytes of the base's weights.
      adapters: bytes of what is added to it and trains.
      optimizer: bytes of the optimizer's state, and of the batch.
      gradients: bytes of the gradients of what trains.
      activations: bytes of everything else that is there at the fullest moment.
      kept: of the activations, what the forward pass keeps, block by block, for the backward pass.
      copied: of weights, adapters and optimizer state, what every device of the mesh holds whole.
      all_devices: of weights, adapters and optimizer state, the bytes before they are spread.
      largest: `(what, bytes)` of the largest arrays among gradients and activations then.
      exact: whether the compiler was asked (gradients and activations).
    """

    model: str
    settings: StepSettings
    parameters: int
    trainable: int
    weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    kept: int
    copied: int
    all_devices: int
    largest: tuple[tuple[str, int], ...] = ()
    exact: bool = False

    @property
    def arguments(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.adapters + self.optimizer

    @property
    def temporaries(self) -> int:
        """Bytes that a step needs beside them."""
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return self.arguments + self.temporaries

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.settings.mesh.values())

    @property
    def described(self) -> str:
        """The settings in words."""
        return _described(self.settings)

    def fits(self, device_memory: int) -> bool:
        """Whether the step fits a device of so many bytes."""
        return self.total <= device_memory

    def to_dict(self) -> dict[str, Any]:
        """Every number and setting, ready for JSON."""
        settings = {
            field.name: _plain(getattr(self.settings, field.name))
            for field in dataclasses.fields(StepSettings)
        }
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("settings", "largest")
        }
        return {
            **own,
            "method": self.settings.method,
            "devices": self.devices,
            "arguments": self.arguments,
            "temporaries": self.temporaries,
            "total": self.total,
            "largest": [{"what": what, "bytes": size} for what, size in self.largest],
            "settings": settings,
        }

    def table(self) -> str:
        """A line for each part, in GiB."""
        where = "on each device" if self.devices > 1 else ""
        lines = [(name, getattr(self, name)) for name in _PARTS]
        text = [f"{self.model}, {self.settings.method}: {self.described}"]
        text += [f"  {name:<12} {_gib(size):>12}" for name, size in lines]
        text += [f"  {'total':<12} {_gib(self.total):>12}  {where}"]
        text += [f"  kept between forward and backward pass: {_gib(self.kept)}"]
        text += [f"  {format_count(Count(self.trainable, self.parameters))}"]
        if self.devices > 1:
            text.append(
                f"  weights, adapters and optimizer state: {_gib(self.all_devices)} in all, of "
                f"which {_gib(self.copied)} is copied to every device and the rest is spread over "
                + " x ".join(f"{name} {n}" for name, n in self.settings.mesh.items() if n > 1)
            )
            if not self.exact:
                text.append(f"  {memory_mesh.mesh_note(self.settings.backend)}")
        return "\n".join(line.rstrip() for line in text)

    def __str__(self) -> str:
        return self.table()


def memory(
    model: str | Path | Mapping[str, Any] | Any,
    *,
    adapter: LoraConfig | None = LoraConfig(),  # noqa: B008 (frozen)
    quantize: str | None = None,
    batch: int = 1,
    length: int | None = None,
    accumulation: int = 1,
    dtype: str = "bfloat16",
    train_dtype: str = "float32",
    remat: bool | str = True,
    optimizer: Any = "adamw",
    clip: bool = True,
    mesh: Mapping[str, int] | None = None,
    backend: str = "gpu",
    exact: bool = False,
) -> MemoryEstimate:
    """The memory of a training step of a model, of which only its configuration is needed.

    Args:
      model: a known shape ("llama-2-7b", see `analysis.memory.step.SHAPES`), the path of a
        config.json or of its directory, the parsed JSON, or a configuration of `lora_jax.models`.
      adapter: what is adapted; None is full fine-tuning.
      quantize: format of the frozen base ("nf4", "int4", ...): QLoRA. As `models.load(quantize=)`
        every matrix but the head's and the tables is quantized.
      batch: rows of one forward pass, on all devices together.
      length: tokens of a row; the smaller of 2048 and the model's context by default.
      accumulation, dtype, train_dtype, remat, optimizer, clip, backend: see `StepSettings`.
      mesh: axis ("data", "fsdp", "tensor") to number of devices; see
        `lora_jax.models.sharding` for what each axis shards.
      exact: compile the step on this machine's default backend and ask the compiler for gradients
        and activations. A mesh takes as many local devices.

    Returns:
      Bytes on each device. Its numbers are XLA's buffers: leave some room for the runtime.

    Raises:
      FileNotFoundError: no such model.
      ValueError: a configuration that is not supported or a setting that does not fit it.

    Example:
      >>> from lora_jax import analysis
      >>> found = analysis.memory("smollm2-135m", length=256)
      >>> found.trainable, found.weights
      (2442240, 269030856)
    """
    name, config = config_of(model)
    context = getattr(config, "context", config.max_position_embeddings)
    settings = StepSettings(
        adapter=adapter,
        quantize=quantize,
        batch=batch,
        length=min(2048, context) if length is None else length,
        accumulation=accumulation,
        dtype=dtype,
        train_dtype=train_dtype,
        remat=remat,
        optimizer=optimizer,
        clip=clip,
        mesh=mesh or {},
        backend="auto" if exact else backend,
    )
    return estimate(name, config, settings, exact=exact)


def estimate(
    name: str, config: Any, settings: StepSettings, *, exact: bool = False
) -> MemoryEstimate:
    """As `memory`, for a given configuration and settings."""
    memory_mesh.one_device(config, settings.mesh)  # raises for what cannot be sharded
    rows = ROWS if exact and math.prod(settings.mesh.values()) > 1 else ()
    step = memory_step.abstract_step(config, settings, batch=settings.batch, rows=rows)
    places = memory_step.spread(step, settings)
    trained = _device_bytes(step.state.trainable, places.state.trainable, settings)
    base = _device_bytes(step.frozen, places.frozen, settings)
    rest = [
        _device_bytes(getattr(step.state, part), getattr(places.state, part), settings)
        for part in ("step", "opt_state", "key")
    ]
    rest.append(_device_bytes(step.batch, places.batch, settings))
    every = [trained, base, *rest]
    if exact:
        found = compiled(step, places, settings)
    else:
        found = _read(config, settings, step, places, trained.here)
    whole = settings.adapter is None
    counted = count_parameters(step.params)
    return MemoryEstimate(
        model=name,
        settings=settings,
        parameters=counted.total,
        trainable=counted.total if whole else counted.trainable,
        weights=trained.here if whole else base.here,
        adapters=0 if whole else trained.here,
        optimizer=sum(x.here for x in rest),
        gradients=min(trained.here, found.bytes),
        activations=max(found.bytes - trained.here, 0),
        kept=found.kept,
        copied=sum(x.copied for x in every),
        all_devices=sum(x.everywhere for x in every),
        largest=found.largest,
        exact=exact,
    )


def parameters(model: str | Path | Mapping[str, Any] | Any, adapter: LoraConfig) -> Count:
    """How many parameters an adapter trains, of how many there are with it.

    Args:
      model: as for `memory`.
      adapter: what is adapted.

    Raises:
      FileNotFoundError, ValueError: as `memory`.
    """
    _, config = config_of(model)
    settings = StepSettings(adapter=adapter, length=1)
    return count_parameters(memory_step.abstract_step(config, settings, batch=1).params)


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a tree on one device, of what every device has whole, and before it is spread."""

    here: int
    copied: int
    everywhere: int


def _device_bytes(tree: Any, specs: Any, settings: StepSettings) -> _Bytes:
    here = copied = everywhere = 0
    for x, spec in zip(jax.tree.leaves(tree), memory_mesh.leaves(specs), strict=True):
        size, parts = whole_bytes(x), memory_mesh.parts(spec, settings.mesh)
        here += -(-size // parts)
        everywhere += size
        copied += size if parts == 1 else 0
    return _Bytes(here, copied, everywhere)


def _read(
    config: Any, settings: StepSettings, step: AbstractStep, places: Spread, trained: int
) -> Alive:
    """Temporaries of what one device computes, from the jaxpr."""
    rows = settings.batch // memory_mesh.parts(places.batch.tokens, settings.mesh)
    own = memory_mesh.one_device(config, settings.mesh)
    if rows != settings.batch or own is not config:
        step = memory_step.abstract_step(own, settings, batch=rows)

    def counts(specs) -> list[int]:
        return [memory_mesh.parts(s, settings.mesh, "fsdp") for s in memory_mesh.leaves(specs)]

    args = (step.state, step.frozen, step.batch)
    state = counts(places.state)
    others = counts(places.frozen) + [1] * len(step.batch)
    found = alive(
        step.fn,
        *args,
        donate=(0,),
        gathered=state + others,
        parts=[*state, 1, 1, 1],
        habits=HABITS.get(settings.backend, Habits()),
    )
    if settings.backend != "reference":
        return found
    named = jax.tree_util.tree_leaves_with_path(step.state.trainable)
    flat = zip(named, counts(places.state.trainable), strict=True)
    single = sum(  # the head's, a product's result, stays whole as it was summed over devices
        -(-whole_bytes(x) // (1 if paths.spell(path).endswith("kernel") else n))
        for (path, x), n in flat
        if x.ndim == 2
    )
    return on_cpu(found, trained=trained, single=single)


def memory_table(estimates: Sequence[MemoryEstimate], *, device_memory: int | None = None) -> str:
    """A row for each estimate: its parts in GiB, and whether it fits.

    Args:
      estimates: any.
      device_memory: bytes of a device.
    """
    heads = ["model", "method", "trainable", *_PARTS, "total"]
    rows = [
        [
            e.model,
            e.settings.method,
            f"{100 * e.trainable / e.parameters:.4f} %",
            *(f"{getattr(e, part) / GIB:.2f}" for part in _PARTS),
            f"{e.total / GIB:.2f} GiB",
        ]
        for e in estimates
    ]
    if device_memory is not None:
        heads.append("fits")
        for row, e in zip(rows, estimates, strict=True):
            row.append("yes" if e.fits(device_memory) else "no")
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *rows]
    )


def _plain(value: Any) -> Any:
    if isinstance(value, LoraConfig):
        return value.to_peft()
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _gib(size: int) -> str:
    if size < 10 * 2**20:
        return f"{size / 2**20:,.2f} MiB"
    return f"{size / 2**20:,.0f} MiB" if size < GIB else f"{size / GIB:,.2f} GiB"


def _described(settings: StepSettings) -> str:
    words = [f"batch {settings.batch} x {settings.length} tokens", settings.dtype]
    if settings.adapter is not None:
        targets = settings.adapter.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        words.append(f"rank {settings.adapter.rank} on {named}")
    if settings.quantize:
        words.append(f"base in {settings.quantize}")
    words.append(f"remat {settings.remat}")
    words.append(settings.optimizer if isinstance(settings.optimizer, str) else "own optimizer")
    return ", ".join(words)
