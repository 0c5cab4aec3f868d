"""Flax NNX decoders that load Hugging Face checkpoints."""

from lora_jax.models.config import LlamaConfig as LlamaConfig
from lora_jax.models.generation import generate as generate
from lora_jax.models.llama import Cache as Cache
from lora_jax.models.loading import find_smollm2 as find_smollm2
from lora_jax.models.loading import load as load
from lora_jax.models.model import Forward as Forward
from lora_jax.models.model import Model as Model
from lora_jax.models.model import init as init
