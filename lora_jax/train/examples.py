"""Tokenized examples, and which of their tokens are learned.

`learned[t]` is true if token t is a label of the loss. The first token is never learned, because
there is no token before it to predict it from. Of a model with the head of a task `learned` marks
the tokens that have a target of their own.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32

from lora_jax.config.arguments import SettingsError, check_count, kind_of, quoted
from lora_jax.hf.images import Pixels
from lora_jax.train.chat import Marked, chat_examples, unwritten, without_thinking
from lora_jax.train.goals import Goal, goal_of
from lora_jax.train.jsonl import Record, at_source, load_jsonl
from lora_jax.train.labelled import rows_of
from lora_jax.train.messages import is_empty, is_learned

TooLong = Literal["error", "truncate", "skip", "windows"]
TOO_LONG: tuple[TooLong, ...] = get_args(TooLong)


class Example(NamedTuple):
    """One tokenized example.

    Attributes:
      tokens: int32 (T,), the token ids, unpadded.
      learned: bool (T,), true at learned tokens; `learned[0]` is false without `targets`.
      source: file and line, `data.jsonl:3`.
      targets: what is learned at each of those, (n, ...), by the head of a task
        (`lora_jax.train.goals`); None where the tokens themselves are learned.
      types: int32 (T,), which of two texts a token belongs to; None for one text.
      read: int32 (S,), what an encoder-decoder's encoder reads; None for other models.
      image: what an encoder of images reads, whose `tokens` are zeros, one a patch; else None.
    """

    tokens: Int32[np.ndarray, " t"]
    learned: Bool[np.ndarray, " t"]
    source: str
    targets: np.ndarray | None = None
    types: Int32[np.ndarray, " t"] | None = None
    read: Int32[np.ndarray, " s"] | None = None
    image: Pixels | None = None

    @property
    def count(self) -> int:
        """The number of places with a target."""
        return int(self.learned[1 if self.targets is None else 0 :].sum())

    def predicted(self) -> tuple[np.ndarray, np.ndarray]:
        """Where something is predicted, (T,), and what, (T, ...): the next token, or a target."""
        if self.targets is None:
            after = np.append(self.tokens[1:], np.int32(0))
            return np.append(self.learned[1:], False), after
        all_ = np.zeros((len(self.tokens), *self.targets.shape[1:]), self.targets.dtype)
        all_[self.learned] = self.targets
        return self.learned, all_

    def kept(self, places: np.ndarray, *, whole: bool) -> "Example":
        """Some of its tokens; the last of them has the target of a `whole` text."""
        if whole:
            last = np.arange(len(places)) == len(places) - 1
            types = None if self.types is None else self.types[places]
            return self._replace(tokens=self.tokens[places], learned=last, types=types)
        found = self._replace(tokens=self.tokens[places], learned=self.learned[places])
        if self.targets is None:
            return found
        some = np.isin(np.flatnonzero(self.learned), places)
        types = None if self.types is None else self.types[places]
        return found._replace(targets=self.targets[some], types=types)

    def spare(self) -> "Example":
        """The same tokens, of which none is learned."""
        targets = None if self.targets is None else self.targets[:0]
        return self._replace(learned=np.zeros_like(self.learned), targets=targets)


def data_hash(data: Sequence[Example]) -> str:
    """A hash of all tokens of a dataset and their `learned` marks, in order."""
    digest = hashlib.sha256()
    for example in data:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
        digest.update(np.ascontiguousarray(example.learned, bool).tobytes())
        for more in (example.targets, example.types, example.read, *(example.image or ())):
            digest.update(b"" if more is None else np.ascontiguousarray(more).tobytes())
    # 64 bits are enough against a mistake, which is all that this guards against.
    return digest.hexdigest()[:16]


def load_examples(
    path: str | os.PathLike,
    tokenizer: Any,
    *,
    max_length: int,
    too_long: TooLong = "error",
    fields: Mapping[str, str] | None = None,
    config: Any = None,
) -> list[Example]:
    """Reads and tokenizes a JSON-lines file: `load_jsonl`, then `examples`."""
    records = load_jsonl(path, fields=fields)
    return examples(records, tokenizer, max_length=max_length, too_long=too_long, config=config)


def examples(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: TooLong = "error",
    config: Any = None,
) -> list[Example]:
    """Tokenizes records and marks the learned tokens.

    A chat whose template writes earlier answers differently in later turns becomes one example an
    answer, each as it is generated. For a model with the head of a task `config` says which, and
    the examples have its targets.

    Args:
      records: from `load_jsonl` or `record_of`.
      tokenizer: a `lora_jax.hf.Tokenizer`, or an object with its `encode`, `encode_prompt`,
        `eos_id`, `stop_ids`, and for messages `render_chat` and `marked_chat`.
      max_length: maximum number of tokens of an example, usually the model's context.
      too_long: how to treat longer examples: "error", "truncate" (drop the end), "skip", or
        "windows" of a question's context, which have a third in common.
      config: `model.config` of a model with a head, or of an encoder-decoder: its encoder reads the
        prompt, the answer begins with `decoder_start_token_id`, and `max_length` is of each.

    Returns:
      At least one example.

    Raises:
      TypeError: no records, no tokenizer, or another configuration than a model's.
      ValueError: an example is too long under "error", has an empty answer or nothing left to
        learn, its chat template cannot be followed, or no example is left.

    Warns:
      UserWarning: no example teaches the model to end its answer, or the chat template leaves out
        tools, calls of them, or reasoning, or begins reasoning that no row has, which is switched
        off; or records have classes, and there are no `labels`.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"`too_long` must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    check_count("max_length", max_length, least=2)
    if tokenizer is None:
        raise ValueError("`tokenizer` is None: this model came without one; pass a tokenizer")
    if not hasattr(tokenizer, "encode_prompt"):
        raise TypeError(
            f"`tokenizer` must be one of `lora.hf`, as `model.tokenizer` is, got "
            f"{kind_of(tokenizer)}: read one by `lora.hf.tokenizer.from_directory(directory)`"
        )
    if config is not None and not (hasattr(config, "task") or hasattr(config, "model_type")):
        raise TypeError(f"`config` must be `model.config`, got {kind_of(config)}")
    # The records may be a generator, and are read twice.
    records, goal = list(records), goal_of(config)
    start = getattr(config, "decoder_start_token_id", None)
    check_records(records)
    if (too_long == "windows") > (goal is not None and goal.per == "answer"):
        raise SettingsError('`too_long` "windows" is for answers in long contexts: use "truncate"')
    _check_answers(records)
    if goal is not None:
        window = max_length if too_long == "windows" else None
        made = [
            each
            for record in records
            for each in _labelled(record, goal, tokenizer, config, window)
        ]
    elif start is not None:
        made = [_read_first(record, tokenizer, start) for record in records]
    else:
        records = without_thinking(records, tokenizer)
        _check_written(records, tokenizer)
        if classes := [record.source for record in records if record.label is not None]:
            warnings.warn(
                f'{classes[0]}: "label" is not learned, the text alone is: name the classes in '
                "`labels` to train a classifier",
                stacklevel=2,
            )
        made = [example for record in records for example in _tokenize(record, tokenizer)]
    ends = 0 if goal is None and start is None else tokenizer.closing
    if goal is not None and goal.per == "answer" and too_long == "truncate":
        raise SettingsError('`too_long` "truncate" would cut answers off: use "windows"')
    whole = goal is not None and goal.per == "text"
    fitted = (_fit(example, max_length, too_long, ends=ends, whole=whole) for example in made)
    kept = [example for example in fitted if example is not None]
    if not kept:
        why = (
            "there are no records"
            if not records
            else (f"all {len(made)} examples are longer than {max_length} tokens and skipped")
        )
        raise ValueError(f"the dataset is empty: {why}; give more or shorter examples")
    if goal is None:
        _check_ends(kept, tokenizer)
    return kept


def check_records(records: Sequence[Any]) -> None:
    """Refuses what is no record."""
    other = next((x for x in records if not isinstance(x, Record)), None)
    if other is not None:
        raise TypeError(
            f"`records` must be `Record`s, got {kind_of(other)}: `lora.train.record_of(row)` makes "
            "one of a dict, `load_jsonl` reads a file of them"
        )


def _check_answers(records: Sequence[Record]) -> None:
    """Refuses empty answers, all in one message: they would teach the model to be silent."""
    empty = [record.source for record in records if _has_empty_answer(record)]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ValueError(f"{empty[0]}{more}: the answer is empty; remove such rows, or fill them")


def _check_written(records: Sequence[Record], tokenizer: Any) -> None:
    """Refuses answers that are empty as the template writes them; warns of other lost fields."""
    known: set[str] = set()
    lost: dict[str, list[str]] = {}
    for record in (r for r in records if r.form == "messages"):
        fields, empty = unwritten(record.fields[0], record.options, tokenizer, known)
        if empty:
            raise ValueError(
                f"{record.source}: the chat template does not write {quoted(fields)}, so the "
                "answer is empty; remove such rows, or take a template that writes them"
            )
        for name in fields:
            lost.setdefault(name, []).append(record.source)
    for name, sources in lost.items():
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        warnings.warn(
            f"{sources[0]}{more}: the chat template does not write `{name}`, so the model is "
            "trained without it",
            stacklevel=3,
        )


def _has_empty_answer(record: Record) -> bool:
    if record.form == "messages":
        return any(is_learned(turn) and is_empty(turn) for turn in record.fields[0])
    return not record.fields[-1]


def _check_ends(kept: Sequence[Example], tokenizer: Any) -> None:
    """Warns if no example ends an answer: the trained model then never stops."""
    stops = list(tokenizer.stop_ids)
    # One example is enough: under "truncate" most may have lost their ends.
    if any(np.isin(example.tokens[example.learned], stops).any() for example in kept):
        return
    if not stops:
        why = "the tokenizer has no eos_token, and config.json names no eos_token_id"
    else:
        ends = "the chat template or the truncation leaves out"
        why = f"{ends} the end tokens, {', '.join(map(str, stops))}"
    warnings.warn(
        f"EOS is never learned, so the model will not end its answers: {why}; "
        "set eos_token in tokenizer_config.json to what ends an answer",
        stacklevel=3,
    )


def _fit(
    example: Example, max_length: int, too_long: TooLong, *, ends: int, whole: bool
) -> Example | None:
    """The example, cut to the length before so many last tokens, those that close a text."""
    length = len(example.tokens)
    if example.read is not None:
        length = max(length - 1, len(example.read))
        if length > max_length and too_long == "truncate":
            return _fit_both(example, max_length, ends)
    if length > max_length:
        if too_long == "skip":
            return None
        if too_long == "error":
            raise SettingsError(
                f"{example.source}: the example has {length} tokens, more than"
                f' `max_length`, {max_length}; shorten it, or pass too_long="truncate" or'
                ' too_long="skip"'
            )
        kept = np.r_[: max(max_length - ends, 0), length - ends : length]
        example = example.kept(kept, whole=whole)
    if not example.learned.any():
        cut = f" after truncation to {max_length} tokens" if length > max_length else ""
        raise ValueError(
            f"{example.source}: the example has nothing to learn{cut}; give it a completion that"
            " fits, or remove it"
        )
    return example


def _fit_both(example: Example, max_length: int, ends: int) -> Example:
    """Both texts of an encoder-decoder, cut to the length before their ends."""
    tokens, read = example.tokens, example.read
    assert read is not None
    if len(read) > max_length:
        read = read[np.r_[: max_length - ends, len(read) - ends : len(read)]]
    if len(tokens) - 1 > max_length:
        tokens = tokens[np.r_[:max_length, len(tokens) - 1]]
    return example._replace(tokens=tokens, learned=np.arange(len(tokens)) > 0, read=read)


def _tokenize(record: Record, tokenizer: Any) -> list[Example]:
    made = []
    with at_source(record):  # a template that refuses the chat, a text that cannot be read
        found = _FORMS[record.form](record, tokenizer)
    for tokens, marks in found:
        learned = np.asarray(marks, bool)
        # No token before the first one predicts it.
        learned[:1] = False
        made.append(Example(np.asarray(tokens, np.int32), learned, record.source))
    return made


def _labelled(
    record: Record, goal: Goal, tokenizer: Any, config: Any, window: int | None
) -> list[Example]:
    """The examples of a row for the head of a task."""
    typed = getattr(config, "typed", False)
    return [
        Example(
            np.asarray(row.tokens, np.int32), row.learned, record.source, row.targets,
            np.asarray(row.types, np.int32) if typed and any(row.types) else None,
        )
        for row in rows_of(record, goal, tokenizer, config.labels, window=window)
    ]  # fmt: skip


def _read_first(record: Record, tokenizer: Any, start: int) -> Example:
    """What an encoder reads, and what the decoder writes, both as the tokenizer closes a text."""
    if record.form != "prompt":
        raise ValueError(
            f'{record.source}: an encoder-decoder learns "completion" from "prompt", got '
            f'"{record.form}"'
        )
    prompt, completion = record.fields
    with at_source(record):
        read = tokenizer.encode(prompt)
        tokens = [start, *_with_eos(list(tokenizer.encode(completion)), tokenizer)]
    learned = np.arange(len(tokens)) > 0
    both = (np.asarray(x, np.int32) for x in (tokens, read))
    return Example(next(both), learned, record.source, read=next(both))


def _text(record: Record, tokenizer: Any) -> list[Marked]:
    # BOS comes from `encode_prompt`, as in generation; EOS teaches the model where a text ends.
    tokens = _with_eos(list(tokenizer.encode_prompt(record.fields[0])), tokenizer)
    return [(tokens, [True] * len(tokens))]


def _completion(record: Record, tokenizer: Any) -> list[Marked]:
    # Prompt and completion are tokenized separately, as in generation, where the prompt is
    # tokenized alone: the learned tokens begin exactly where generation begins.
    prompt, completion = record.fields
    head = list(tokenizer.encode_prompt(prompt))
    tail = _with_eos(list(tokenizer.encode(completion, add_special_tokens=False)), tokenizer)
    return [(head + tail, [False] * len(head) + [True] * len(tail))]


def _with_eos(tokens: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_id
    # A text that ends in it has been written by a template.
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _chat(record: Record, tokenizer: Any) -> list[Marked]:
    return chat_examples(record.fields[0], record.options, tokenizer)


def _of_a_head(record: Record, tokenizer: Any) -> list[Marked]:
    raise ValueError(
        f'a row of the form "{record.form}" is for a model with such a head: name `task`, or load '
        "a model that has it"
    )


_FORMS = {
    "text": _text, "prompt": _completion, "messages": _chat, "tokens": _of_a_head,
    "question": _of_a_head, "image": _of_a_head,
}  # fmt: skip


def check_data(name: str, data: Any) -> None:
    """Checks that data are a list of tokenized examples.

    Raises:
      TypeError: they are something else, such as records, texts or a path.
    """
    listed = isinstance(data, Sequence) and not isinstance(data, str | bytes | Example)
    others = [x for x in data if not isinstance(x, Example)][:1] if listed else [data]
    if others:
        raise TypeError(
            f"`{name}` must be a list of `Example`s, got {'one of ' * listed}{kind_of(others[0])}: "
            "`lora.train.examples(records, tokenizer, max_length=...)` makes them"
        )
