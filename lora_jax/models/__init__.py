"""Flax NNX models that load Hugging Face checkpoints."""

from lora_jax.models.attention import Cache
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.config import LlamaConfig
from lora_jax.models.encoder import EncoderForward
from lora_jax.models.encoder_decoder import EncoderDecoderForward
from lora_jax.models.encoder_loading import load_encoder
from lora_jax.models.generation import generate
from lora_jax.models.gpt2 import GPT2Config
from lora_jax.models.init import init
from lora_jax.models.loading import find_smollm2, load
from lora_jax.models.model import Forward, Model
from lora_jax.models.registry import ARCHITECTURES, Architecture, config_from_hf
from lora_jax.models.saving import save_merged, save_model
from lora_jax.models.sharding import make_mesh
from lora_jax.models.t5_config import T5Config
from lora_jax.models.vit import ImageForward
from lora_jax.models.vit_config import ViTConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BertConfig",
    "Cache",
    "EncoderDecoderForward",
    "EncoderForward",
    "Forward",
    "GPT2Config",
    "ImageForward",
    "LlamaConfig",
    "Model",
    "T5Config",
    "ViTConfig",
    "config_from_hf",
    "find_smollm2",
    "generate",
    "init",
    "load",
    "load_encoder",
    "make_mesh",
    "save_merged",
    "save_model",
]


def __dir__() -> list[str]:
    return __all__
