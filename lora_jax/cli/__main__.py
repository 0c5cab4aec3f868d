"""`python -m lora_jax.cli` is the command `lora-jax`, as `python -m lora_jax` is."""

from lora_jax.cli import start

if __name__ == "__main__":
    start()
