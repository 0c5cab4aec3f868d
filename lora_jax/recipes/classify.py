"""Classification of texts: the classes of a model's head, and their probabilities."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lora_jax.models.mesh import entered, placement
from lora_jax.transform.lorafy import lorafy

_ROUND = 32  # rows are padded to a multiple of it: each length compiles once


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
    run, found = _compiled(model.forward), []
    with entered(placement(model, params)):
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            tokens, mask = _padded(some, batch_size, model.config.context, model.tokenizer.pad_id)
            logits = run(params, tokens, mask=mask)
            found += _classified(np.asarray(jax.nn.softmax(logits))[: len(some)], model)
    return found


@lru_cache(maxsize=8)
def _compiled(forward: Any) -> Callable:
    return jax.jit(lorafy(forward.apply))


def _padded(
    rows: Sequence[Sequence[int]], size: int, context: int, pad: int | None
) -> tuple[Int[jax.Array, "b t"], Bool[jax.Array, "b t"]]:
    """Tokens and mask; the rows that are missing repeat the first."""
    rows = [*rows, *[rows[0]] * (size - len(rows))]
    longest = max(map(len, rows))
    width = max(longest, min(-(-longest // _ROUND) * _ROUND, context))
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    tokens = np.full(mask.shape, 0 if pad is None else pad, np.int32)
    tokens[mask] = np.concatenate(rows)
    return jnp.asarray(tokens), jnp.asarray(mask)


def _classified(shares: Float[np.ndarray, "b c"], model: Any) -> list[Classified]:
    best = shares.argmax(axis=-1)
    names = model.config.labels
    return [Classified(names[i], float(row[i])) for i, row in zip(best, shares, strict=True)]


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
