"""Classification of texts: the classes of a model's head, and their probabilities."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from lora_jax.models.generation import bucket
from lora_jax.models.mesh import entered, placement
from lora_jax.train.evaluate import pad_id_of
from lora_jax.train.examples import Example
from lora_jax.transform.lorafy import lorafy


class Classified(NamedTuple):
    """The most likely class of a text.

    Attributes:
      label: its name.
      probability: its share of the softmax.
    """

    label: str
    probability: float


def classify_texts(
    model: Any, params: Any, texts: Sequence[str], *, batch_size: int = 8
) -> list[Classified]:
    """The class of each text, which is tokenized as in training: with what the tokenizer adds.

    Args:
      model: a classifier of texts from `lora_jax.models.load`, with a tokenizer.
      params: its parameters, with or without adapters.
      texts: the texts.
      batch_size: texts of a forward pass; does not change the result.

    Raises:
      ValueError: the model has no tokenizer, or a text is longer than its context.
    """
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so it cannot read text: put tokenizer.json beside it"
        )
    rows = [model.tokenizer.encode(text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > model.config.context:
            raise ValueError(
                f"a text has {len(row)} tokens, more than the model's context of "
                f"{model.config.context}: {text[:40]!r}"
            )
    shares = _shares(model, params, rows, batch_size)
    names = model.config.labels
    return [Classified(names[row.argmax()], float(row.max())) for row in shares]


def accuracy(model: Any, params: Any, data: Sequence[Example], *, batch_size: int = 8) -> float:
    """The share of texts whose most likely class is theirs.

    Args:
      model, params, batch_size: as for `classify_texts`.
      data: from `lora_jax.train.examples`, which end in their class.
    """
    rows = [each.tokens[:-1].tolist() for each in data]
    found = _shares(model, params, rows, batch_size).argmax(axis=-1)
    return float(np.mean(found == [each.tokens[-1] for each in data]))


def _shares(
    model: Any, params: Any, rows: Sequence[Sequence[int]], batch_size: int
) -> Float[np.ndarray, "b c"]:
    """The classes' probabilities of each text, from its tokens."""
    at, found = placement(model, params), []
    run = _compiled(model.forward, None if at is None else at.mesh)
    with entered(at):
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            tokens, mask = _padded(some, batch_size, model)
            found.append(np.asarray(run(params, tokens, mask))[: len(some)])
    return np.concatenate(found)


@lru_cache(maxsize=8)
def _compiled(forward: Any, mesh: Mesh | None) -> Callable:
    apply = lorafy(forward.apply)

    def shares(params: Any, tokens: Any, mask: Any) -> Any:
        return jax.nn.softmax(apply(params, tokens, mask=mask))

    # Whole on every device: each process reads them.
    return jax.jit(shares, out_shardings=None if mesh is None else NamedSharding(mesh, P()))


def _padded(
    rows: Sequence[Sequence[int]], size: int, model: Any
) -> tuple[Int[jax.Array, "b t"], Bool[jax.Array, "b t"]]:
    """Tokens and mask, of a few lengths; the rows that are missing repeat the first."""
    rows = [*rows, *[rows[0]] * (size - len(rows))]
    longest = max(map(len, rows))
    width = max(longest, min(bucket(longest), model.config.context))
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    tokens = np.full(mask.shape, pad_id_of(model.tokenizer), np.int32)
    tokens[mask] = np.concatenate(rows)
    return jnp.asarray(tokens), jnp.asarray(mask)


def classify_prompts(
    model: Any,
    params: Any,
    prompts: Iterable[str],
    *,
    batch_size: int,
    write: Callable[[str], None],
    heads: bool,
) -> None:
    """Classifies prompts in their order and writes a line for each: `cancel 0.982`.

    Args:
      model, params, batch_size: as for `classify_texts`.
      prompts: the texts; an iterator is read as far as the next batch needs it.
      write: receives parts of the output.
      heads: write each prompt above its class, and an empty line after it.
    """
    left = iter(prompts)
    classified = partial(classify_texts, model, params, batch_size=batch_size)
    while some := list(islice(left, batch_size)):
        for prompt, (label, share) in zip(some, classified(some), strict=True):
            line = f"{label} {share:.3f}\n"
            write(f"> {prompt}\n{line}\n" if heads else line)
