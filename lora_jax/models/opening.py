"""What the processes of a run compare before they read a model's parameters together.

Each of them reads other parts: where one has another file, another mesh or other settings, the
parameters would be a mixture, or the processes would wait for each other without end.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.hf.checkpoint.fill import Spread, is_shared
from lora_jax.hf.checkpoint.weights import Part, Weights
from lora_jax.models.model import Model

# Of how many tensors, and how many of their numbers, processes compare.
_SOME = 32


class Opened(NamedTuple):
    """A model of which everything but the parameters is read.

    Attributes:
      model: the model without parameters.
      weights: its tensors.
      read: reads the parameters; its argument is as in `fill`. Returns them with the forward pass,
        whose blocks may be stacked otherwise.
    """

    model: Model
    weights: Weights
    read: Callable[..., tuple[Any, dict[str, Any]]]


def read_together(
    opens: Callable[[], Opened],
    spread: Spread | None,
    settings: Mapping[str, Any],
    prepare: Callable[[Model], None] | None = None,
) -> Model:
    """Reads a model, after all processes whose devices it is spread over have found the same.

    Args:
      opens: opens the model in this process.
      spread: as in `fill`.
      settings: the arguments of the loader.
      prepare: called with the model before its parameters are read; raises where it does not fit.

    Raises:
      ValueError: `opens` or `prepare` fails in another process, or the processes have opened
        different models or have different settings.
    """

    def opened() -> Opened:
        found = opens()
        if prepare is not None:
            prepare(found.model)
        return found

    def do() -> tuple[Opened, dict[str, str]]:
        found = opened()
        return found, {**_as_text(settings), **_described(found)}

    if not is_shared(spread):
        return _read(opened(), spread)
    with processes.reachable():
        found, texts = processes.together(do, ValueError, "models.load")
        processes.check_same(texts, "models.load")
        return _read(found, spread)


def _read(found: Opened, spread: Spread | None) -> Model:
    forward, params = found.read(spread)
    return dataclasses.replace(found.model, forward=forward, params=params)


def _as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    # The repr of a function, such as a policy of `remat`, is another one in every process.
    found = {name: repr(value) for name, value in settings.items() if not callable(value)}
    if (mesh := settings["mesh"]) is not None:
        # Its repr does not name the devices.
        found |= {"mesh": str(dict(mesh.shape)), "mesh.devices": str(mesh.device_ids.tolist())}
    if (key := settings.get("fresh_head")) is not None:
        found["fresh_head"] = str(np.asarray(jax.random.key_data(key)).tolist())
    return found


def _described(found: Opened) -> dict[str, str]:
    """What tells a checkpoint from another one: its configuration, its tensors, some numbers."""
    config, weights = found.model.config, found.weights
    fields = {f"config.{f.name}": repr(getattr(config, f.name)) for f in dataclasses.fields(config)}
    shapes = sorted((name, tuple(shape)) for name, shape in weights.shapes.items())
    some = [weights.read(*_part(*each)).tobytes() for each in shapes[:: -(-len(shapes) // _SOME)]]
    return {
        **fields,
        "tensors": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        "numbers of the tensors": hashlib.sha256(b"".join(some)).hexdigest()[:16],
    }


def _part(name: str, shape: tuple[int, ...]) -> tuple[str, Part]:
    """A few numbers in the middle of a tensor."""
    middle = (slice(n // 2, n // 2 + 1) for n in shape[:-1])
    return name, (*middle, *(slice(0, min(n, _SOME)) for n in shape[-1:]))
