"""Checkpoints through Orbax: adapters alone, plain parameters, and the state of a training run.

Adapters and runs never contain the base model. Both store its fingerprint, and restoring onto
another base is an error.
"""

from lora_jax.checkpoint.adapters import (
    Pending,
    find,
    read_config,
    restore,
    restore_into,
    save,
    save_async,
)
from lora_jax.checkpoint.fingerprint import base_of, check_base, fingerprint
from lora_jax.checkpoint.params import restore_params, save_params
from lora_jax.checkpoint.state import (
    Checkpoint,
    manager,
    read_meta_of,
    restore_state,
    save_state,
)

__all__ = [
    "Checkpoint",
    "Pending",
    "base_of",
    "check_base",
    "find",
    "fingerprint",
    "manager",
    "read_config",
    "read_meta_of",
    "restore",
    "restore_into",
    "restore_params",
    "restore_state",
    "save",
    "save_async",
    "save_params",
    "save_state",
]


def __dir__() -> list[str]:
    return __all__
