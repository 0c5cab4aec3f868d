"""Tokenizers of Hugging Face directories and of GGUF files."""

from lora_jax.hf.tokenizer.directory import from_directory as from_directory
from lora_jax.hf.tokenizer.tokenizer import Tokenizer as Tokenizer
from lora_jax.hf.tokenizer.tokenizer import from_gguf as from_gguf
