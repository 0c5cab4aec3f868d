"""Checkpoints through Orbax: adapters alone, and the state of a training run.

Neither ever writes the base model; both carry its fingerprint and refuse another one.
"""

from lora_jax.checkpoint.adapters import find, read_config, restore, restore_into, save
from lora_jax.checkpoint.fingerprint import base_of, check_base, fingerprint
from lora_jax.checkpoint.state import (
    Checkpoint,
    manager,
    read_meta_of,
    restore_state,
    save_state,
)

__all__ = [
    "Checkpoint",
    "base_of",
    "check_base",
    "find",
    "fingerprint",
    "manager",
    "read_config",
    "read_meta_of",
    "restore",
    "restore_into",
    "restore_state",
    "save",
    "save_state",
]
