"""Loading a vision transformer from a Hugging Face directory, complete or with a fresh head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Array

from lora_jax.files import read_object
from lora_jax.hf.checkpoint.fill import Spread, fill
from lora_jax.hf.checkpoint.names import VIT
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.checkpoint.weights import Weights, check_counts, renamed
from lora_jax.hf.images import read_processor
from lora_jax.models.bert_config import Problem
from lora_jax.models.bert_kinds import FEATURES
from lora_jax.models.init import draw
from lora_jax.models.model import Model
from lora_jax.models.opening import Opened, stacked_by_format
from lora_jax.models.vit import ImageForward
from lora_jax.models.vit_config import IMAGES, ViTConfig
from lora_jax.quant.loading import QuantConfig

_PREFIX, _HEAD = "vit.", "classifier"


def open_images(
    directory: Path,
    options: Mapping[str, Any],
    *,
    labels: Sequence[str] = (),
    fresh_head: Array | None = None,
    problem: Problem | None = None,
    quantize: QuantConfig | None = None,
) -> Opened:
    """As `lora_jax.models.load` on a directory; the options are those of `ImageForward`.

    Args:
      directory: a Hugging Face directory.
      options: dtype, param_dtype, scan, remat.
      labels, fresh_head: the classes of a head that is drawn; the checkpoint's is left out.
      problem: of such a head, for config.json.
      quantize: how weights are held.
    """
    path = directory / "config.json"
    try:
        config = ViTConfig.from_hf(read_object(path), task=IMAGES if labels else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    weights = open_directory(directory)
    check_counts(config, weights, path)
    weights = _as_ours(weights, config, fresh=bool(labels))
    if config.task == FEATURES:
        config = replace(config, pooler="pooler.dense.weight" in weights.shapes)
    if labels:
        config = replace(config, labels=tuple(labels), problem_type=problem)
    forward = ImageForward(config=config, **options)
    processor = read_processor(directory, channels=config.num_channels)

    def read(spread: Spread | None, fill: Callable[..., Any] = fill) -> tuple[Any, dict[str, Any]]:
        held = stacked_by_format(forward, weights, VIT, quantize)
        shapes = held.shapes()
        filling = partial(fill, weights=weights, family=VIT, quantize=quantize, spread=spread)
        if fresh_head is None:
            return held, filling(shapes)
        made = draw(fresh_head, {_HEAD: shapes[_HEAD]}, config, spread=spread)
        rest = {name: each for name, each in shapes.items() if name != _HEAD}
        return held, {**filling(rest), **made}

    return Opened(Model(forward, {}, processor=processor), weights, read)


def _as_ours(weights: Weights, config: ViTConfig, *, fresh: bool) -> Weights:
    """The checkpoint under the names of the task's class, without the parts it does not have."""
    prefixed = any(name.startswith(_PREFIX) for name in weights.shapes)
    theirs = {}
    for name in weights.shapes:
        head = name.startswith(f"{_HEAD}.")
        bare = name.removeprefix(_PREFIX)
        pooler = bare.startswith("pooler.") and config.task == IMAGES
        if (head and fresh) or (pooler and not prefixed):
            continue
        inside = config.task == IMAGES and not head
        theirs[f"{_PREFIX}{bare}" if inside else bare] = name
    return renamed(weights, theirs)
