"""What the processes of a run compare before they read a model's parameters together.

Each of them reads other parts: where one has another file, another mesh or other settings, the
parameters would be a mixture, or the processes would wait for each other without end.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.files import named
from lora_jax.hf.checkpoint.fill import Spread, is_shared
from lora_jax.hf.checkpoint.names import Family, without_numbers
from lora_jax.hf.checkpoint.weights import Part, Weights, check_counts
from lora_jax.hf.gguf.file import open_gguf, rope_divisors
from lora_jax.hf.gguf.weights import weights_of
from lora_jax.hf.tokenizer.tokenizer import Tokenizer, from_gguf
from lora_jax.models.gguf import config_of
from lora_jax.models.model import Model
from lora_jax.quant.loading import FILE, QuantConfig

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


class Found(NamedTuple):
    """What is read of a model before its forward is made.

    Attributes:
      config: the configuration.
      path: the file that it is from.
      weights: its tensors.
      tokenizer: rows of the embedding -> the tokenizer, or None.
    """

    config: Any
    path: Path
    weights: Weights
    tokenizer: Callable[[int], Tokenizer | None]


def opened_gguf(path: Path) -> Found:
    """A GGUF file's.

    Raises:
      ValueError: as `open_gguf` and `config_of`.
    """
    file = open_gguf(path)
    weights = weights_of(file)
    with named(path):
        config = config_of(file.metadata, weights.shapes, path=path, divisors=rope_divisors(file))
    check_counts(config, weights, path)
    return Found(config, path, weights, lambda rows: from_gguf(file.metadata, path=path, rows=rows))


def stacked_by_format(
    forward: Any, weights: Weights, family: Family, quantize: QuantConfig | None
) -> Any:
    """The forward, whose blocks are stacked apart where their tensors are in different formats."""
    if quantize is None or quantize.format != FILE or not (forward.scan and weights.formats):
        return forward
    # Of each block the formats of its tensors. The layers of a vision tower are not the model's.
    held: list[set[Any]] = [set() for _ in range(forward.config.num_hidden_layers)]
    for name, form in weights.formats.items():
        plain, index = without_numbers(name, family)
        if name.startswith(family.prefix) and index and index[0] < len(held):
            held[index[0]].add((plain, form))
    kinds = list(dict.fromkeys(map(frozenset, held)))
    numbers = tuple(kinds.index(frozenset(each)) for each in held)
    return dataclasses.replace(forward, scan=len(kinds) == 1 or numbers)


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
