"""Whole tasks in a few calls: what the command line runs. Each is imported at its first use."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from lora_jax.recipes import classify as classify
    from lora_jax.recipes import convert as convert
    from lora_jax.recipes import demo as demo
    from lora_jax.recipes import estimate as estimate
    from lora_jax.recipes import export as export
    from lora_jax.recipes import finetune as finetune
    from lora_jax.recipes import forms as forms
    from lora_jax.recipes import generate as generate
    from lora_jax.recipes import inspect as inspect
    from lora_jax.recipes import settings as settings
    from lora_jax.recipes import sweep as sweep

__all__ = [
    "classify",
    "convert",
    "demo",
    "estimate",
    "export",
    "finetune",
    "forms",
    "generate",
    "inspect",
    "settings",
    "sweep",
]

if not typing.TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> typing.Any:
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
