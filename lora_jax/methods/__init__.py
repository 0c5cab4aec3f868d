"""Ways to start an adapter, one function each: `start(key, config, leaf, w) -> (w, a, b)`."""

from collections.abc import Callable

from lora_jax.methods import starts

METHODS: dict[str, Callable] = {
    "default": starts.default,
    "random": starts.random,
    "gaussian": starts.gaussian,
    "orthogonal": starts.orthogonal,
    "pissa": starts.pissa,
    "olora": starts.olora,
    "mica": starts.mica,
    "loftq": starts.loftq,
    "eva": starts.eva,
}
