"""Many adapters on one base: stacked, chosen row by row, exchanged while the model runs."""

from lora_jax.array import count as count
from lora_jax.multi.combine import combine as combine
from lora_jax.multi.combine import rank_of as rank_of
from lora_jax.multi.pool import AdapterPool as AdapterPool
from lora_jax.multi.slots import adapter as adapter
from lora_jax.multi.slots import replace as replace
from lora_jax.multi.stack import stack as stack
from lora_jax.transform.many.rows import select as select
