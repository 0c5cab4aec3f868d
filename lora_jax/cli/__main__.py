"""`python -m lora_jax.cli` is `lora-jax`."""

from lora_jax.cli import start

start()
