"""Hugging Face checkpoints: safetensors files, shards, tensor names and bitsandbytes blocks."""
