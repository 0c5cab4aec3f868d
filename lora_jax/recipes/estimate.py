"""Prints the memory estimate of training steps: the recipe of `lora-jax estimate`."""

import json
from collections.abc import Callable
from typing import Any

from lora_jax.analysis import memory_table, parameters
from lora_jax.analysis.step_memory.estimate import memory
from lora_jax.analysis.step_memory.fit import parse_bytes, remedies
from lora_jax.config.lora import LoraConfig
from lora_jax.recipes.settings import METHODS, EstimateConfig

# The models of a call without a model.
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
_QUERY_VALUE = ("q_proj", "v_proj")  # the adapted matrices of the paper's experiments


def estimate(
    model: str | None, config: EstimateConfig, *, log: Callable[[str], None] = print
) -> None:
    """Prints the memory of a model's training steps.

    Args:
      model: see `lora_jax.analysis.memory`; None shows Llama 2's sizes, and how few parameters
        LoRA trains.
      config: the steps.
      log: called with each text for the user.

    Raises:
      FileNotFoundError, ValueError: as `lora_jax.analysis.memory`.
    """
    limit = None if config.device_memory is None else parse_bytes(config.device_memory)
    names = MODELS if model is None else (model,)
    # With the name given, as a model's display name may be a path's last part.
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
    # After the table, as these take as many estimates again.
    for name, one in found:
        if limit is not None and (lines := remedies(name, one, limit)):
            log(f"\n{one.model}, {one.settings.method}, does not fit; what would:")
            log("\n".join(f"  {line}" for line in [*lines, "shorter rows (max_length) take less"]))


def _estimates(model: str, config: EstimateConfig) -> list[Any]:
    adapter = LoraConfig(
        rank=config.rank, rank_pattern=config.rank_pattern, target_modules=config.target_modules
    )
    return [
        memory(
            model,
            adapter=None if method == "full" else adapter,
            quantize=config.quantize if method == "qlora" else None,
            batch=config.batch_size,
            length=config.max_length,
            accumulation=config.accumulation,
            packing=config.packing,
            balance_experts=config.balance_experts,
            dtype=config.dtype,
            train_dtype=config.train_dtype,
            remat=config.remat,
            offload=config.offload,
            optimizer=config.optimizer,
            mesh=config.mesh,
            backend=config.backend,
            exact=config.exact,
        )
        # In the table's order, whatever the order of the flags.
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
