"""Flax NNX models that load Hugging Face checkpoints."""

from lora_jax.models.attention import Cache as Cache
from lora_jax.models.bert_config import BertConfig as BertConfig
from lora_jax.models.config import LlamaConfig as LlamaConfig
from lora_jax.models.encoder import EncoderForward as EncoderForward
from lora_jax.models.encoder_loading import load_encoder as load_encoder
from lora_jax.models.generation import generate as generate
from lora_jax.models.gpt2 import GPT2Config as GPT2Config
from lora_jax.models.init import init as init
from lora_jax.models.loading import find_smollm2 as find_smollm2
from lora_jax.models.loading import load as load
from lora_jax.models.model import Forward as Forward
from lora_jax.models.model import Model as Model
from lora_jax.models.registry import ARCHITECTURES as ARCHITECTURES
from lora_jax.models.registry import Architecture as Architecture
from lora_jax.models.registry import config_from_hf as config_from_hf
from lora_jax.models.sharding import make_mesh as make_mesh
