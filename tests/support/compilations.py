"""How many programs XLA compiles."""

from collections.abc import Callable

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
