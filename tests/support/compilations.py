"""How many programs XLA compiles, and programs for devices that are not there."""

from collections.abc import Callable
from typing import Any

import jax
from jax import monitoring


def compilations(run: Callable) -> int:
    """Calls `run()` and counts."""
    seen = []

    def note(event: str, duration_secs: float, **_: str | int):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    monitoring.register_event_duration_secs_listener(note)
    try:
        run()
    finally:
        monitoring.unregister_event_duration_listener(note)
    return len(seen)


def lowered(f: Any, platform: str, *args: Any) -> str:
    """The text of `f` lowered for "cuda" or "tpu", which need not be there."""
    if jax.__version_info__ >= (0, 11) and platform == "cuda":
        device = jax.sharding.AbstractDevice("NVIDIA H200", 132, platform="gpu")
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
