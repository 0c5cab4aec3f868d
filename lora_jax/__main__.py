"""`python -m lora_jax` is the command `lora-jax`."""

from lora_jax_command import start

if __name__ == "__main__":
    start()
