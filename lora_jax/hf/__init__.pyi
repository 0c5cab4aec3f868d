"""The names of `lora_jax.hf` for type checkers; see `__init__.py`."""

from lora_jax.hf import gguf as gguf
from lora_jax.hf import hub as hub
from lora_jax.hf import peft as peft
from lora_jax.hf import tokenizer as tokenizer
from lora_jax.hf.checkpoint import bnb as bnb
from lora_jax.hf.checkpoint import names as names
from lora_jax.hf.checkpoint import safetensors as safetensors
from lora_jax.hf.checkpoint import weights as weights
from lora_jax.hf.gguf.lora_read import load_gguf_lora as load_gguf_lora
from lora_jax.hf.gguf.lora_read import read_gguf_lora as read_gguf_lora
from lora_jax.hf.gguf.lora_write import save_gguf_lora as save_gguf_lora
from lora_jax.hf.gguf.names import read_base as read_base
from lora_jax.hf.name_maps.rules import FLAX as FLAX
from lora_jax.hf.name_maps.rules import name_map as name_map
from lora_jax.hf.name_maps.rules import to_hugging_face as to_hugging_face
from lora_jax.hf.name_maps.weights import from_hugging_face as from_hugging_face
from lora_jax.hf.name_maps.weights import save_weights as save_weights
from lora_jax.hf.peft.api import load_peft as load_peft
from lora_jax.hf.peft.api import read_peft as read_peft
from lora_jax.hf.peft.api import save_peft as save_peft
from lora_jax.hf.peft.save import to_peft as to_peft
from lora_jax.hf.upload import push as push
from lora_jax.models.gguf import base_of as base_of
from lora_jax.models.saving import save_merged as save_merged
