"""Rows of the heads of tasks: tokens of a text, a text pair, words, or a question and its context.

What has a target is marked in `learned`: a text's last token, the first token of each word, or the
last token of a question's row. Words are tokenized one by one, as transformers' examples do.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.config.arguments import quoted
from lora_jax.train.goals import Goal
from lora_jax.train.jsonl import Record, at_source

# The share of a row that windows of a long context have in common: 128 of 384 tokens in the
# examples of transformers.
_OVERLAP = 1 / 3


class Row(NamedTuple):
    """One tokenized row.

    Attributes:
      tokens: token ids.
      types: which of two texts a token belongs to.
      learned: true at tokens with a target.
      targets: a target for each of those.
      spans: (first, end) characters of the context for each token, (-1, -1) outside of it; only of
        a question's row.
      words: numbers of the words that have a token, of a row of words.
    """

    tokens: Sequence[int]
    types: Sequence[int]
    learned: np.ndarray
    targets: np.ndarray
    spans: np.ndarray | None = None
    words: Sequence[int] = ()


def rows_of(
    record: Record,
    goal: Goal,
    tokenizer: Any,
    labels: Sequence[str],
    *,
    window: int | None = None,
    known: bool = True,
) -> list[Row]:
    """The rows of a record: one, or windows of a question's long context.

    Args:
      record: the record.
      goal: what its head learns.
      tokenizer: a `lora_jax.hf.Tokenizer`.
      labels: names of the classes.
      window: tokens of a window, or None for one row.
      known: the targets are read; otherwise they are zeros.

    Raises:
      ValueError: a record of another form, or a label that is none.
    """
    wanted = {"text": "text", "token": "tokens", "answer": "question"}[goal.per]
    if record.form != wanted:
        choose = "" if wanted == "text" else f"; choose by `fields`: {wanted}={wanted}"
        raise ValueError(
            f'{record.source}: {_NEEDS[goal.per]}, got fields of the form "{record.form}"{choose}'
        )
    if goal.per == "answer":
        return list(_answered(record, tokenizer, window, known))
    if goal.per == "token":
        return [_marked(record, tokenizer, labels, known)]
    with at_source(record):
        encoded = tokenizer.encoded(*record.fields)
    size = (len(labels),) if goal.floats else ()
    target = np.zeros(size, np.float32 if goal.floats else np.int32)
    if known:
        target = target_of(record, goal, labels)
    last = np.arange(len(encoded.ids)) == len(encoded.ids) - 1
    return [Row(encoded.ids, encoded.type_ids, last, np.asarray(target)[None])]


def target_of(record: Record, goal: Goal, labels: Sequence[str]) -> np.ndarray:
    """The target of a whole text or image.

    Raises:
      ValueError: a label that is none.
    """
    return _TARGETS[goal.name](record, labels)


_NEEDS = {
    "text": 'a classifier of texts reads "text", or "text" and "text_pair"',
    "token": 'a classifier of tokens reads "tokens", a list of words, and "labels" or "ner_tags"',
    "answer": 'answers are of rows with "question", "context" and "answers"',
}


def _number(named: Any, labels: Sequence[str], source: str, field: str = "label") -> int:
    """The number of a class, by its name or number."""
    if isinstance(named, str) and named in labels:
        return labels.index(named)
    if type(named) is int and 0 <= named < len(labels):
        return named
    got = "none" if named is None else repr(named)
    raise ValueError(
        f'{source}: field "{field}" must be one of {quoted(labels)}, or its number from '
        f"0 to {len(labels) - 1}, got {got}"
    )


def _class(record: Record, labels: Sequence[str]) -> np.ndarray:
    return np.asarray(_number(record.label, labels, record.source), np.int32)


def _classes(record: Record, labels: Sequence[str]) -> np.ndarray:
    given = record.label
    if not isinstance(given, list):
        raise ValueError(
            f'{record.source}: field "labels" must be a list of classes, got {given!r}'
        )
    if len(given) == len(labels) and all(type(x) is float and x in (0, 1) for x in given):
        return np.asarray(given, np.float32)
    numbers = [_number(each, labels, record.source, "labels") for each in given]
    if len({*numbers}) < len(numbers):
        raise ValueError(
            f'{record.source}: field "labels" names a class twice: {given!r}; give a list of '
            f"classes, or {len(labels)} numbers 0.0 and 1.0"
        )
    target = np.zeros(len(labels), np.float32)
    target[numbers] = 1
    return target


def _values(record: Record, labels: Sequence[str]) -> np.ndarray:
    given = record.label if isinstance(record.label, list) else [record.label]
    real = all(type(x) in (int, float) and np.isfinite(x) for x in given)
    if not real or len(given) != len(labels):
        what = "a number" if len(labels) == 1 else f"a list of {len(labels)} numbers"
        raise ValueError(f'{record.source}: field "label" must be {what}, got {record.label!r}')
    return np.asarray(given, np.float32)


_TARGETS: Mapping[str, Callable[[Record, Sequence[str]], np.ndarray]] = {
    "single_label_classification": _class,
    "multi_label_classification": _classes,
    "regression": _values,
}


def _marked(record: Record, tokenizer: Any, labels: Sequence[str], known: bool) -> Row:
    """Words and the class of each, which the first of its tokens has."""
    (words,) = record.fields
    if known and (not isinstance(record.label, list) or len(record.label) != len(words)):
        raise ValueError(
            f'{record.source}: "tokens" are {len(words)} words, and need as many "labels" or '
            f'"ner_tags", got {record.label!r}'
        )
    with at_source(record):
        encoded = tokenizer.encoded_words(words)
    ids = encoded.word_ids
    # The tokens of a word follow each other.
    first = np.array([i is not None and i != j for i, j in zip(ids, [None, *ids], strict=False)])
    own = [i for i, one in zip(ids, first, strict=True) if one]
    names = record.label if known else [0] * len(words)
    # -100 is what transformers' examples give tokens without a class.
    kept = [names[i] != -100 for i in own]
    first[first] = kept
    numbers = [
        _number(names[i], labels, record.source, "labels")
        for i, keep in zip(own, kept, strict=True)
        if keep
    ]
    targets = np.asarray(numbers, np.int32)
    return Row(encoded.ids, encoded.type_ids, first, targets, words=own)


def _answered(record: Record, tokenizer: Any, window: int | None, known: bool) -> Iterator[Row]:
    """Windows of a context behind the question, each with the answer's tokens, or 0 without it."""
    question, context = record.fields
    first, end = _characters(record, context) if known else (-1, -1)
    stride = int((window or 0) * _OVERLAP)
    with at_source(record):
        whole = tokenizer.encoded(question, context, window=window, stride=stride)
    for encoded in (whole, *whole.overflowing):
        inside = np.array([number == 1 for number in encoded.sequence_ids])
        spans = np.where(inside[:, None], np.asarray(encoded.offsets), -1)
        target, own = (0, 0), np.flatnonzero(inside)
        if first >= 0 and len(own) and spans[own[0], 0] <= first and end <= spans[own[-1], 1]:
            target = (int(own[spans[own, 0] <= first][-1]), int(own[spans[own, 1] >= end][0]))
        last = np.arange(len(encoded.ids)) == len(encoded.ids) - 1
        yield Row(encoded.ids, encoded.type_ids, last, np.asarray([target], np.int32), spans)


def _characters(record: Record, context: str) -> tuple[int, int]:
    """Where the first answer is in the context; (-1, -1) without one."""
    texts, starts = answers_of(record)
    if not texts:
        return -1, -1
    text, start = texts[0], starts[0]
    if context[start : start + len(text)] != text or not text:
        raise ValueError(
            f"{record.source}: the answer {json.dumps(text)} is not at character {start} of "
            f"the context, which has {context[start : start + len(text)]!r} there"
        )
    return start, start + len(text)


def answers_of(record: Record) -> tuple[list[str], list[int]]:
    """The answers of a question, and their first characters.

    Raises:
      ValueError: they are not of SQuAD's form.
    """
    given = record.label
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        # SQuAD's own files have a list of objects, tables of the hub an object of lists.
        given = {name: [each.get(name) for each in given] for name in ("text", "answer_start")}
    given = given if isinstance(given, dict) else {}
    texts, starts = given.get("text"), given.get("answer_start")
    fine = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if (
        not fine
        or not all(isinstance(x, str) for x in texts or ())
        or not all(type(x) is int and x >= 0 for x in starts or ())
    ):
        raise ValueError(
            f'{record.source}: "answers" must be {{"text": [...], "answer_start": [...]}}, got '
            f"{record.label!r}"
        )
    return list(texts or ()), list(starts or ())
