"""The functions that start an adapter: `start(key, config, leaf, w) -> (w, a, b)`.

That of LoftQ has one more argument, the floats that `w` was quantized from.
"""

from collections.abc import Callable

from lora_jax.methods import starts
from lora_jax.methods.loftq import loftq

_FUNCTIONS: dict[str, Callable] = {**vars(starts), "loftq": loftq}


def start_function(init: str) -> Callable:
    """The function that starts an adapter with `LoraConfig(init=init)`."""
    # "pissa_niter_4" is PiSSA with a faster, approximate SVD in PEFT; here the SVD is exact.
    return _FUNCTIONS[init.partition("_niter_")[0]]
