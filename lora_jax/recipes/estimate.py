"""Prints the memory estimate of training steps: the recipe of `lora-jax estimate`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_jax.analysis import memory_table, parameters
from lora_jax.analysis.memory.estimate import memory
from lora_jax.analysis.memory.fit import parse_bytes, remedies
from lora_jax.config.lora import LoraConfig

# What is shown where no model is named.
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
METHODS = ("full", "lora", "qlora")
_QUERY_VALUE = ("q_proj", "v_proj")  # of the paper's experiments
_REMAT = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """The training steps whose memory is estimated.

    Attributes:
      method: any of "full", "lora" and "qlora".
      batch: rows of one forward pass, on all devices together.
      length: tokens of a row; none takes 2048, or the model's context if that is shorter.
      accumulation: forward passes of one optimizer step.
      rank: rank of the adapters.
      targets: adapted modules, as `target_modules`.
      quantize: format of the base in QLoRA, "nf4", "int4", "int8", ...
      dtype: dtype of the computation and of frozen weights that are not quantized.
      train_dtype: dtype of the weights in full fine-tuning, their gradients and optimizer state.
      remat: what the backward pass recomputes: "true" everything inside a block, "projections"
        everything but the projections, "false" nothing; or the name of a JAX policy.
      optimizer: "adamw", "lion", "momentum" or "sgd".
      mesh: devices by axis: "data" spreads rows, "fsdp" rows and weights, "tensor" heads, the MLP
        and the vocabulary.
      backend: kernels of quantized products: "gpu", "tpu" or "reference" (a CPU).
      device_memory: memory of a device, "80GB" or "24GiB": marks the steps that fit, and lists
        changes with which the others would.
      exact: compile the steps on this machine and take the compiler's figures.
      json: print JSON.
    """

    method: tuple[str, ...] = METHODS
    batch: int = 1
    length: int | None = None
    accumulation: int = 1
    rank: int = 16
    targets: tuple[str, ...] | str = "all-linear"
    quantize: str = "nf4"
    dtype: str = "bfloat16"
    train_dtype: str = "float32"
    remat: str = "true"
    optimizer: str = "adamw"
    mesh: Mapping[str, int] = field(default_factory=dict)
    backend: str = "gpu"
    device_memory: str | None = None
    exact: bool = False
    json: bool = False

    def __post_init__(self):
        if not self.method:
            raise ValueError(f"`method` must be one or more of {', '.join(METHODS)}")
        for name in self.method:
            if name not in METHODS:
                raise ValueError(f"`method` must be of {', '.join(METHODS)}, got `{name}`")


def estimate(
    model: str | None, config: EstimateConfig, *, log: Callable[[str], None] = print
) -> None:
    """Prints the memory of a model's training steps.

    Args:
      model: see `lora_jax.analysis.memory`; None shows Llama 2's sizes, and how few parameters
        LoRA trains.
      config: the steps.
      log: receives each text for the user.

    Raises:
      FileNotFoundError, ValueError: as `lora_jax.analysis.memory`.
    """
    limit = None if config.device_memory is None else parse_bytes(config.device_memory)
    names = MODELS if model is None else (model,)
    found = [(name, one) for name in names for one in _estimates(name, config)]
    every = [one for _, one in found]
    if config.json:
        log(json.dumps({"estimates": [one.to_dict() for one in every]}, indent=1))
        return
    log(f"{every[-1].described}; GiB on each device")
    log(memory_table(every, device_memory=limit))
    if len(every) == 1:
        log(f"\n{every[0]}")
    if model is None:
        log(_reductions())
    for name, one in found:
        if limit is not None and (lines := remedies(name, one, limit)):
            log(f"\n{one.model}, {one.settings.method}, does not fit; these would:")
            log("\n".join(f"  {line}" for line in lines))


def _estimates(model: str, config: EstimateConfig) -> list[Any]:
    adapter = LoraConfig(rank=config.rank, target_modules=config.targets)
    return [
        memory(
            model,
            adapter=None if method == "full" else adapter,
            quantize=config.quantize if method == "qlora" else None,
            batch=config.batch,
            length=config.length,
            accumulation=config.accumulation,
            dtype=config.dtype,
            train_dtype=config.train_dtype,
            remat=_REMAT.get(config.remat.lower(), config.remat),
            optimizer=config.optimizer,
            mesh=config.mesh,
            backend=config.backend,
            exact=config.exact,
        )
        for method in METHODS
        if method in config.method
    ]


def _reductions() -> str:
    """How many parameters LoRA trains: rank 8 on queries and values."""
    lines = [f"\nrank 8 on {' and '.join(_QUERY_VALUE)}:"]
    for name in MODELS:
        count = parameters(name, LoraConfig(rank=8, target_modules=_QUERY_VALUE))
        share = 100 * count.trainable / count.total
        lines.append(f"  {name:<12} {count.trainable:>12,} of {count.total:,}, {share:.4f} %")
    return "\n".join(lines)
