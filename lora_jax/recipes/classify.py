"""What the head of a task says of texts, and how that agrees with the labels of evaluation data.

Classes of texts and their probabilities, numbers, classes of words, and answers in a context.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from lora_jax.config.arguments import SettingsError
from lora_jax.models.generation import bucket
from lora_jax.models.mesh import entered, placement
from lora_jax.models.registry import ENCODER, IMAGE_ENCODER, kind_of_model
from lora_jax.train.evaluate import check_texts, pad_id_of, tokenizer_of
from lora_jax.train.examples import Example
from lora_jax.train.goals import goal_of
from lora_jax.train.images import image_examples
from lora_jax.train.jsonl import Record, record_of
from lora_jax.train.labelled import Row, answers_of, rows_of
from lora_jax.transform.lorafy import lorafy

# Tokens of an answer at most, and how many of the likeliest firsts and lasts are paired, as in
# transformers' examples.
_ANSWER, _LIKELIEST = 30, 20


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
    check_texts("texts", texts)
    records = [record_of({"text": text}, source="a text") for text in texts]
    return [
        _likeliest(z, model.config.labels) for z in _of_records(model, params, records, batch_size)
    ]


def _likeliest(logits: np.ndarray, names: Sequence[str]) -> Classified:
    shares = np.exp(logits - logits.max())
    return Classified(names[int(logits.argmax())], float(shares.max() / shares.sum()))


class Answer(NamedTuple):
    """An answer in a context.

    Attributes:
      text: the words of the context; empty where it has no answer.
      start: its first character.
      score: the sum of its two logits.
    """

    text: str
    start: int
    score: float


def find_answers(
    model: Any, params: Any, records: Sequence[Record], *, batch_size: int = 8
) -> list[Answer]:
    """The likeliest answer to each question in its context.

    A context that is too long is read in windows. The answer is empty where the first token, which
    has no word, scores higher in every window.

    Args:
      model: a model for answers, with a tokenizer.
      params: its parameters, with or without adapters.
      records: from `record_of({"question": ..., "context": ...})`.
      batch_size: rows of a forward pass; does not change the result.
    """
    found, number = [], 0
    rows = [_rows(model, record, windows=True) for record in records]
    logits = _logits(model, params, [row for some in rows for row in some], batch_size)
    for record, some in zip(records, rows, strict=True):
        own = logits[number : number + len(some)]
        number += len(some)
        best = [_best(z, row, record.fields[1]) for z, row in zip(own, some, strict=True)]
        nothing = Answer("", 0, float(min(z[0].sum() for z in own)))
        found.append(max((*filter(None, best), nothing), key=lambda answer: answer.score))
    return found


def _best(logits: Float[np.ndarray, "t 2"], row: Row, context: str) -> Answer | None:
    """The likeliest answer in a window, or None where no words are."""
    assert row.spans is not None
    inside = row.spans[:, 0] >= 0
    firsts, lasts = (np.argsort(-logits[:, end])[:_LIKELIEST] for end in (0, 1))
    pairs = [
        (i, j) for i in firsts for j in lasts
        if inside[i] and inside[j] and 0 <= j - i < _ANSWER
    ]  # fmt: skip
    if not pairs:
        return None
    i, j = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
    start, end = int(row.spans[i, 0]), int(row.spans[j, 1])
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    return Answer(text.strip(), start, float(logits[i, 0] + logits[j, 1]))


def scores(
    model: Any,
    params: Any,
    data: Sequence[Example],
    records: Sequence[Record] = (),
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """How a head agrees with its data: accuracy, F1, mean squared error and others by name.

    Args:
      model, params, batch_size: as for `classify_texts`.
      data: from `lora_jax.train.examples`.
      records: what they were made of, whose texts are compared where the head finds answers.
    """
    goal = goal_of(model.config)
    assert goal is not None
    if goal.score is None:
        found = find_answers(model, params, records, batch_size=batch_size)
        wanted = [answers_of(record)[0] or [""] for record in records]
        each = [_agreement(a.text, texts) for a, texts in zip(found, wanted, strict=True)]
        exact, overlap = np.mean(each, axis=0)
        return {"exact match": float(exact), "F1": float(overlap)}
    logits = _logits(model, params, data, batch_size)
    if goal.per == "token":
        logits = [z[each.learned] for z, each in zip(logits, data, strict=True)]
    else:
        logits = [z[None] for z in logits]
    targets = np.concatenate([np.asarray(each.targets) for each in data])
    return goal.score(np.concatenate(logits), targets, model.config.labels)


def _agreement(found: str, texts: Sequence[str]) -> tuple[float, float]:
    """Whether an answer is one of these, and the best F1 of their words, as SQuAD counts them."""
    own = _words(found)
    exact, best = 0.0, 0.0
    for text in texts:
        wanted = _words(text)
        exact = max(exact, float(own == wanted))
        both = sum((Counter(own) & Counter(wanted)).values())
        size = len(own) + len(wanted)
        best = max(best, 2 * both / size if own and wanted else float(own == wanted))
    return exact, best


def _words(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _of_records(
    model: Any, params: Any, records: Sequence[Record], batch_size: int
) -> list[np.ndarray]:
    """The logits of each record, which has one row."""
    if kind_of_model(model) == IMAGE_ENCODER:
        images = image_examples(records, model, known=False)
        return _logits(model, params, images, batch_size)
    rows = [row for record in records for row in _rows(model, record)]
    return _logits(model, params, rows, batch_size)


def _rows(model: Any, record: Record, *, windows: bool = False) -> list[Row]:
    """The rows of a record without labels.

    Raises:
      ValueError: the model has no tokenizer, or a text is longer than its context.
    """
    tokenizer = tokenizer_of(model)
    goal, context = goal_of(model.config), model.config.context
    if goal is None:
        raise ValueError(
            "`model` is a language model, without the head of a task: load it with `labels` and "
            "`fresh_head`, or generate with it (`lora.recipes.generate`)"
        )
    rows = rows_of(
        record, goal, tokenizer, model.config.labels,
        window=context if windows else None, known=False,
    )  # fmt: skip
    for row in rows:
        if len(row.tokens) > context:
            shown = str(record.fields[0])[:40]
            raise ValueError(
                f"{record.source} has {len(row.tokens)} tokens, more than the model's context of "
                f"{context}: {shown!r}"
            )
    return rows


def _logits(
    model: Any, params: Any, rows: Sequence[Row | Example], batch_size: int
) -> list[np.ndarray]:
    """The logits of each row: (c,), or those of its tokens, (t, c)."""
    goal = goal_of(model.config)
    each = goal is not None and goal.per != "text"
    at, found = placement(model, params), []
    run = _compiled(model.forward, None if at is None else at.mesh)
    with entered(at):
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            tokens, inputs = _padded(some, batch_size, model)
            out = np.asarray(run(params, tokens, **inputs))[: len(some)]
            found += [z[: len(r.tokens)] if each else z for z, r in zip(out, some, strict=True)]
    return found


@lru_cache(maxsize=8)
def _compiled(forward: Any, mesh: Mesh | None) -> Callable:
    apply = lorafy(forward.apply)

    def logits(params: Any, tokens: Any, **inputs: Any) -> Any:
        return apply(params, tokens, **inputs)

    # Whole on every device: each process reads them.
    return jax.jit(logits, out_shardings=None if mesh is None else NamedSharding(mesh, P()))


def _padded(
    rows: Sequence[Row | Example], size: int, model: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens, mask and types, of a few lengths; the rows that are missing repeat the first.

    Or what is read of images.
    """
    rows = [*rows, *[rows[0]] * (size - len(rows))]
    if kind_of_model(model) == IMAGE_ENCODER:
        images = [r.image.floats() for r in rows if isinstance(r, Example) and r.image is not None]
        return jnp.asarray(images), {}
    longest = max(len(row.tokens) for row in rows)
    width = max(longest, min(bucket(longest), model.config.context))
    mask = np.arange(width) < np.array([[len(row.tokens)] for row in rows])
    tokens = np.full(mask.shape, pad_id_of(model.tokenizer), np.int32)
    tokens[mask] = np.concatenate([row.tokens for row in rows])
    inputs = {"mask": jnp.asarray(mask)}
    if kind_of_model(model) == ENCODER and model.config.typed:
        types = np.zeros(mask.shape, np.int32)
        types[mask] = np.concatenate(
            [np.zeros(len(r.tokens), int) if r.types is None else r.types for r in rows]
        )
        inputs["token_type_ids"] = jnp.asarray(types)
    return jnp.asarray(tokens), inputs


def classify_prompts(
    model: Any,
    params: Any,
    prompts: Iterable[str],
    *,
    batch_size: int,
    write: Callable[[str], None],
    heads: bool,
) -> None:
    """Writes what the head says of each prompt, in their order: a line, such as `cancel 0.982`.

    Of words it is a line for each, of answers the answer. A prompt is a text, or the path of an
    image; a pair of texts or a question is a JSON object, as a row of the training data.

    Args:
      model, params, batch_size: as for `classify_texts`.
      prompts: the texts; an iterator is read as far as the next batch needs it.
      write: receives parts of the output.
      heads: write each prompt above its lines, and an empty line after them.
    """
    left = iter(prompts)
    while some := list(islice(left, batch_size)):
        records = [_record(prompt, model) for prompt in some]
        for prompt, lines in zip(some, _said(model, params, records, batch_size), strict=True):
            write(f"> {prompt}\n{lines}\n" if heads else lines)


def _record(prompt: str, model: Any) -> Record:
    goal = goal_of(model.config)
    if kind_of_model(model) == IMAGE_ENCODER:
        return record_of({"image": prompt}, source=prompt)
    if goal is not None and goal.per == "token":
        return record_of({"tokens": prompt.split()}, source="a prompt")
    asked = goal is not None and goal.per == "answer"
    if asked or prompt.lstrip().startswith('{"text"'):
        try:
            return record_of(json.loads(prompt), source="a prompt")
        except ValueError as error:
            if asked:
                raise SettingsError(
                    'a prompt of this model is a JSON object, {"question": "...", "context": '
                    f'"..."}}: {error}'
                ) from None
    return record_of({"text": prompt}, source="a prompt")


def _said(model: Any, params: Any, records: Sequence[Record], batch_size: int) -> list[str]:
    """The lines of each record."""
    goal, labels = goal_of(model.config), model.config.labels
    assert goal is not None
    if goal.per == "answer":
        found = find_answers(model, params, records, batch_size=batch_size)
        return [f"{answer.text}\n" for answer in found]
    if goal.per == "token":
        rows = [row for record in records for row in _rows(model, record)]
        logits = _logits(model, params, rows, batch_size)
        said = []
        for record, row, z in zip(records, rows, logits, strict=True):
            # A word without a token has no class.
            named = [record.fields[0][number] for number in row.words]
            chosen = [_likeliest(each, labels) for each in z[row.learned]]
            pairs = zip(named, chosen, strict=True)
            said.append("".join(f"{word} {c.label} {c.probability:.3f}\n" for word, c in pairs))
        return said
    return [_line(goal.name, z, labels) for z in _of_records(model, params, records, batch_size)]


def _line(name: str, logits: np.ndarray, labels: Sequence[str]) -> str:
    if name == "regression":
        return " ".join(f"{value:.4g}" for value in logits) + "\n"
    if name == "multi_label_classification":
        shares = 1 / (1 + np.exp(-logits))
        some = [f"{n} {p:.3f}" for n, p in zip(labels, shares, strict=True) if p > 0.5]
        return (", ".join(some) or "none") + "\n"
    return "{} {:.3f}\n".format(*_likeliest(logits, labels))
