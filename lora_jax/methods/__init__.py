"""Ways to start an adapter, one function each: `start(key, config, leaf, w) -> (w, a, b)`.

LoftQ also takes the numbers that a quantized `w` stands for.
"""

from collections.abc import Callable

from lora_jax.methods import starts
from lora_jax.methods.loftq import loftq

METHODS: dict[str, Callable] = {
    "default": starts.default,
    "random": starts.random,
    "gaussian": starts.gaussian,
    "orthogonal": starts.orthogonal,
    "pissa": starts.pissa,
    "olora": starts.olora,
    "mica": starts.mica,
    "loftq": loftq,
    "eva": starts.eva,
}
