"""The former place of `lora_jax.models.serve`."""

from lora_jax.compat import moved

__getattr__ = moved(__name__, {"Server": "lora_jax.models.serve:Server"})
