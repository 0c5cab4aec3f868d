"""Many adapters on one base: stacked, chosen by row, and replaced while the model runs."""

from lora_jax.array import count
from lora_jax.multi.pool import AdapterPool
from lora_jax.multi.single import adapter, replace
from lora_jax.multi.stack import stack
from lora_jax.multi.weighted import add_weighted_adapter, common_rank
from lora_jax.transform.many.rows import select

__all__ = [
    "AdapterPool",
    "adapter",
    "add_weighted_adapter",
    "common_rank",
    "count",
    "replace",
    "select",
    "stack",
]


def __dir__() -> list[str]:
    return __all__
