"""Many adapters on one base: stacked, chosen by row, and replaced while the model runs."""

from lora_jax.array import count as count
from lora_jax.multi.pool import AdapterPool as AdapterPool
from lora_jax.multi.single import adapter as adapter
from lora_jax.multi.single import replace as replace
from lora_jax.multi.stack import stack as stack
from lora_jax.multi.weighted import add_weighted_adapter as add_weighted_adapter
from lora_jax.multi.weighted import common_rank as common_rank
from lora_jax.transform.many.rows import select as select
