"""Calls outside `jit`: the program of a call is compiled once, however often it is made.

JAX keeps compiled programs by the identity of the functions they came from. An un-jitted call
traces functions anew, so JAX would compile every loop in them again and keep every result: half a
second and megabytes a call. Here a program is recognized by its text instead.
"""

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

MOST_PROGRAMS = 128  # the least recently used one is dropped

_programs: OrderedDict[tuple, jax.stages.Compiled] = OrderedDict()
_lock = threading.Lock()


def call(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, compiled if every array is concrete and nothing around it is being traced.

    The function is traced on every call, so it may close over anything that changes; only the
    compilation is saved.

    Args:
      fn: returns a list of arrays. It may print or call Python inside the program.
      args: trees of arrays.
    """
    leaves, structure = jax.tree.flatten(args)
    traced = is_staged() or any(isinstance(x, jax.core.Tracer) for x in leaves)
    if traced or getattr(jax.config, "jax_disable_jit", False):
        return fn(*args)
    # Tracing and lowering cost milliseconds; compiling costs the half second. A compiled program
    # takes its own tree structure alone, and trees may differ in what the text does not hold, such
    # as a dropout rate: it gets the leaves.
    flat = jax.jit(lambda *leaves: fn(*structure.unflatten(leaves)), keep_unused=True)
    lowered = flat.lower(*leaves)
    text = lowered.as_text()
    # What the text does not hold: constants under `jax_use_simplified_jaxpr_constants`, which are
    # hidden arguments then, and Python functions that the program calls.
    if any(mark in text for mark in ("jax.const = true", "callback", "stablehlo.send")):
        return lowered.compile()(*leaves)
    digest = hashlib.sha256(text.encode()).digest()
    # The text does not name devices.
    key = (digest, *map(_placement, leaves), getattr(jax.config, "jax_default_device", None))
    # Taken out and put back at the end: the order of the dict is that of use.
    with _lock:
        program = _programs.pop(key, None)
    program = program or lowered.compile()
    with _lock:
        _programs[key] = program
        while len(_programs) > MOST_PROGRAMS:
            _programs.popitem(last=False)
    return program(*leaves)


def compiled(*static: str) -> Callable[[Callable], Callable]:
    """A decorator that jits a pure function where it is called outside tracing, and only there.

    An inner `jit` would be one more call for whatever transforms the program around it.

    Args:
      static: names of the arguments that are no arrays.
    """

    def decorate(fn: Callable) -> Callable:
        jitted = jax.jit(fn, static_argnames=static)

        @functools.wraps(fn)
        def run(*args, **kwargs) -> Any:
            return (fn if is_staged() else jitted)(*args, **kwargs)

        return run

    return decorate


def is_staged() -> bool:
    """Whether the code around the call is being traced as a whole, as `jit` and `scan` do it.

    Under `grad` and `vmap` only their arguments are tracers.
    """
    # No public function of JAX tells; but while it traces, an operation on constants is staged too.
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _placement(x: Any) -> Any:
    return (x.sharding, x.committed) if isinstance(x, jax.Array) else None
