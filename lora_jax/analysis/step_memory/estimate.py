"""The memory of training, from a config.json alone: full fine-tuning, LoRA and QLoRA.

    total = weights + adapters + optimizer state + gradients + activations

Weights, adapters and optimizer state are exact: the model is planned and initialized as abstract
arrays. Gradients and activations are the peak of the step of `lora_jax.train`, from its jaxpr
(`lora_jax.analysis.step_memory.liveness`). `remat` determines what the backward pass finds kept:

    "full"          the residual stream before each block: L · B · T · D
    "projections"   that, and the output of every projection
    "none"          all that the backward pass reads, including attention scores (B · N · T · T)

With "full" and "projections" the backward pass recomputes one block at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from lora_jax.analysis.step_memory import mesh as memory_mesh
from lora_jax.analysis.step_memory import step as memory_step
from lora_jax.analysis.step_memory.compiled import compiled, placement, temporaries
from lora_jax.analysis.step_memory.liveness import Alive, alive, on_cpu
from lora_jax.analysis.step_memory.program import HABITS, Habits, whole_bytes
from lora_jax.analysis.step_memory.shapes import config_of, held_of
from lora_jax.analysis.step_memory.step import AbstractStep, OptimizerName, Spread, StepSettings
from lora_jax.config.lora import LoraConfig
from lora_jax.models.registry import IMAGE_ENCODER, architecture_of
from lora_jax.models.remat import Remat, remat_name
from lora_jax.models.sharding import EXPERTS, ROWS, TOKENS
from lora_jax.quant.array import Backend
from lora_jax.quant.formats import FormatName
from lora_jax.quant.loading import FILE
from lora_jax.quant.scales import HeldName
from lora_jax.tree import Count, count_parameters, format_count

GIB = 2**30
_PARTS = ("weights", "adapters", "optimizer", "gradients", "activations")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a training step, on each device; prints as a table.

    Attributes:
      model, settings: the model's name, and the settings of the step.
      parameters, trainable: number of parameters, adapters included, and of those that train.
      weights: bytes of the base's weights.
      adapters: bytes of the adapters.
      optimizer: bytes of the optimizer's state and of the batch.
      gradients: bytes of the gradients.
      activations: bytes of all other temporaries at the peak.
      kept: the part of the activations that the forward pass keeps for the backward pass.
      copied: the part of weights, adapters and optimizer state that every device holds in full.
      all_devices: bytes of weights, adapters and optimizer state before sharding.
      largest: `(what, bytes)` of the largest gradients and activations at the peak.
      exact: whether gradients and activations are the compiler's numbers.
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
        """Bytes that a step allocates beside its arguments."""
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
        """The settings as one line of text."""
        settings = self.settings
        kind = "packed" if settings.packing else "batch"
        parts = [f"{kind} {settings.batch} x {settings.length} tokens", settings.dtype]
        if settings.adapter is not None:
            targets = settings.adapter.target_modules
            named = targets if isinstance(targets, str) else ", ".join(targets)
            parts.append(f"rank {settings.adapter.rank} on {named}")
        if settings.quantize:
            named = isinstance(settings.quantize, str)
            parts.append(f"base in {settings.quantize}" if named else "base as its files hold it")
        name = settings.optimizer if isinstance(settings.optimizer, str) else "custom optimizer"
        parts.append(f"remat {remat_name(settings.remat)}")
        return ", ".join([*parts, *["offloaded"] * settings.offload, name])

    def fits(self, device_memory: int) -> bool:
        """Whether the step fits a device with this many bytes."""
        return self.total <= device_memory

    def to_dict(self) -> dict[str, Any]:
        """Every number and setting, ready for JSON."""
        # `asdict` would take the adapter's config and the optimizer apart.
        settings = {name: _plain(value) for name, value in vars(self.settings).items()}
        own = {n: value for n, value in vars(self).items() if n not in ("settings", "largest")}
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
        text = [f"{self.model}, {self.settings.method}: {self.described}"]
        text += [f"  {name:<12} {in_units(getattr(self, name)):>12}" for name in _PARTS]
        text += [f"  {'total':<12} {in_units(self.total):>12}  {where}"]
        text += [f"  kept between forward and backward pass: {in_units(self.kept)}"]
        text += [f"  {format_count(Count(self.trainable, self.parameters))}"]
        if self.devices > 1:
            text.append(
                f"  weights, adapters and optimizer state: {in_units(self.all_devices)} in all, of "
                f"which {in_units(self.copied)} lies on every device and the rest is spread over "
                + " x ".join(f"{name} {n}" for name, n in self.settings.mesh.items() if n > 1)
            )
            if not self.exact:
                text.append(f"  {memory_mesh.MESH_NOTE}")
        return "\n".join(line.rstrip() for line in text)

    def __str__(self) -> str:
        return self.table()


def memory(
    model: str | Path | Mapping[str, Any] | Any,
    *,
    adapter: LoraConfig | None = LoraConfig(),  # noqa: B008 (frozen)
    quantize: FormatName | HeldName | Literal["file"] | None = None,
    batch: int = 1,
    length: int | None = None,
    accumulation: int = 1,
    packing: bool = False,
    balance_experts: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    train_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    remat: Remat = "full",
    offload: bool = False,
    optimizer: OptimizerName | optax.GradientTransformation = "adamw",
    clip: bool = True,
    mesh: Mapping[str, int] | None = None,
    backend: Backend = "gpu",
    exact: bool = False,
) -> MemoryEstimate:
    """The memory of a training step of a model; only the model's configuration is needed.

    Args:
      model: a known shape ("llama-2-7b", see `analysis.step_memory.shapes.SHAPES`), a config.json,
        its directory, a .gguf file, a hub id, the parsed JSON, or a configuration of
        `lora_jax.models`.
      adapter: the adapter's config; None is full fine-tuning.
      quantize: format of the frozen base ("nf4", "q4_k", ...): QLoRA. As in
        `models.load(quantize=)` every matrix except the head and the embedding tables is quantized;
        "file" is what the model's own files hold, of which little more than headers are read.
      batch: rows of one forward pass, on all devices together.
      length: tokens of a row, of an encoder-decoder those of each of its texts; the smaller of 2048
        and the model's context by default.
      accumulation, packing, balance_experts, dtype, train_dtype, remat, offload: `StepSettings`.
      optimizer, clip, backend: the same.
      mesh: axis to number of devices; see `lora_jax.models.sharding` for what an axis shards.
      exact: compile the step on this machine's default backend and take gradients and activations
        from the compiler. A mesh then needs as many local devices.

    Returns:
      Bytes on each device, of XLA's buffers: leave some room for the runtime.

    Raises:
      FileNotFoundError: no such model.
      ValueError: an unsupported configuration, or a setting that does not fit it.

    Example:
      >>> from lora_jax import analysis
      >>> found = analysis.memory("smollm2-135m", length=256)
      >>> found.trainable, found.weights
      (2442240, 269030856)
    """
    name, config = config_of(model)
    # RoBERTa reserves positions, which its `context` leaves out.
    context = getattr(config, "context", config.max_position_embeddings)
    images = architecture_of(config.model_type).kind == IMAGE_ENCODER
    if images and length not in (None, context):
        raise ValueError(
            f"`length` {length} is for texts, and an image of this `{config.model_type}` has "
            f"{context} tokens: leave it out"
        )
    settings = StepSettings(
        adapter=adapter,
        quantize=held_of(model, dtype) if quantize == FILE else quantize,
        batch=batch,
        length=min(2048, context) if length is None else length,
        accumulation=accumulation,
        packing=packing,
        balance_experts=balance_experts,
        dtype=dtype,
        train_dtype=train_dtype,
        remat=remat,
        offload=offload,
        optimizer=optimizer,
        clip=clip,
        mesh=mesh or {},
        backend="auto" if exact else backend,
    )
    return estimate(name, config, settings, exact=exact)


def estimate(
    name: str, config: Any, settings: StepSettings, *, exact: bool = False
) -> MemoryEstimate:
    """As `memory`, for a configuration and settings."""
    memory_mesh.one_device(config, settings.mesh)
    at = placement(settings) if exact else None
    step = memory_step.abstract_step(config, settings, at=at)
    places = memory_step.spread(step, settings)
    trained = _device_bytes(step.state.trainable, places.state.trainable, settings)
    base = _device_bytes(step.frozen, places.frozen, settings)
    # The batch is counted with the optimizer's state: both are arguments and no parameters.
    kept = (step.state._replace(trainable=()), step.batch)
    specs = (places.state._replace(trainable=()), places.batch)
    rest = _device_bytes(kept, specs, settings)
    every = [trained, base, rest]
    if exact:
        found = Alive(temporaries(compiled(step, places, at)), 0, ())
    else:
        found = _peak(config, settings, step, places, trained=trained.here)
    whole = settings.adapter is None
    counted = count_parameters(step.params)
    return MemoryEstimate(
        model=name,
        settings=settings,
        parameters=counted.total,
        trainable=counted.total if whole else counted.trainable,
        weights=trained.here if whole else base.here,
        adapters=0 if whole else trained.here,
        optimizer=rest.here,
        # Gradients are as large as the trained leaves, unless the whole peak is smaller.
        gradients=min(trained.here, found.bytes),
        activations=max(found.bytes - trained.here, 0),
        kept=found.kept,
        copied=sum(x.copied for x in every),
        all_devices=sum(x.everywhere for x in every),
        largest=found.largest,
        exact=exact,
    )


def parameters(model: str | Path | Mapping[str, Any] | Any, adapter: LoraConfig) -> Count:
    """Counts the parameters that an adapter trains, and all parameters with it.

    Args:
      model: as for `memory`.
      adapter: the adapter's config.

    Raises:
      FileNotFoundError, ValueError: as `memory`.
    """
    _, config = config_of(model)
    # The count does not depend on the batch.
    settings = StepSettings(adapter=adapter, length=1)
    return count_parameters(memory_step.abstract_step(config, settings).params)


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a tree on one device, of its unsharded arrays, and before sharding."""

    here: int
    copied: int
    everywhere: int


def _device_bytes(tree: Any, specs: Any, settings: StepSettings) -> _Bytes:
    here = copied = everywhere = 0
    # Devices hold equal parts; the last one is padded.
    for x, spec in zip(jax.tree.leaves(tree), memory_mesh.leaves(specs), strict=True):
        size, parts = whole_bytes(x), memory_mesh.parts(spec, settings.mesh)
        here += -(-size // parts)
        everywhere += size
        copied += size if parts == 1 else 0
    return _Bytes(here, copied, everywhere)


def _peak(
    config: Any, settings: StepSettings, step: AbstractStep, places: Spread, *, trained: int
) -> Alive:
    """Temporaries of one device's part of the step; `trained` is the size of its gradients."""
    # Where a device has other rows, tokens or heads than the step, its part is traced.
    rows = settings.batch // memory_mesh.parts(places.batch.tokens, settings.mesh, *ROWS)
    own = memory_mesh.one_device(config, settings.mesh)
    alone = settings.mesh[TOKENS] == settings.mesh[EXPERTS] == 1
    if rows != settings.batch or own is not config or not alone:
        step = memory_step.device_step(own, settings, batch=rows)

    def counts(specs: Any) -> list[int]:
        return [memory_mesh.parts(s, settings.mesh, "fsdp") for s in memory_mesh.leaves(specs)]

    args = (step.state, step.frozen, step.batch)
    # Only `fsdp` gathers weights; `tensor` computes with the parts. The batch is never gathered.
    state = counts(places.state)
    others = counts(places.frozen) + [1] * len(jax.tree.leaves(step.batch))
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
    shards = counts(places.state.trainable)
    return on_cpu(found, step.state.trainable, shards, trained=trained)


def memory_table(estimates: Sequence[MemoryEstimate], *, device_memory: int | None = None) -> str:
    """A row for each estimate: its parts in GiB, and whether it fits.

    Args:
      estimates: of any models and methods.
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
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _plain(value: Any) -> Any:
    if isinstance(value, LoraConfig):
        return value.to_peft()
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def in_units(size: int) -> str:
    """Bytes as text in KiB, MiB or GiB."""
    if size < 10 * 2**20:
        return f"{size / 2**20:,.2f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
    return f"{size / 2**20:,.0f} MiB" if size < GIB else f"{size / GIB:,.2f} GiB"
