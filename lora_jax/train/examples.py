"""Tokenized examples, and which of their tokens are learned.

`learned[t]` is true if token t is a label of the loss. The first token is never learned, because
there is no token before it to predict it from.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lora_jax.train.jsonl import Record, load_jsonl

TooLong = Literal["error", "truncate", "skip"]
TOO_LONG: tuple[TooLong, ...] = get_args(TooLong)


class Example(NamedTuple):
    """One tokenized example.

    Attributes:
      tokens: int32 (T,), the token ids, unpadded.
      learned: bool (T,), true at learned tokens; `learned[0]` is false.
      source: file and line, `data.jsonl:3`.
    """

    tokens: np.ndarray
    learned: np.ndarray
    source: str


def load_examples(
    path, tokenizer: Any, *, max_length, too_long="error", fields=None
) -> list[Example]:
    """Reads and tokenizes a JSON-lines file: `load_jsonl`, then `examples`."""
    records = load_jsonl(path, fields=fields)
    return examples(records, tokenizer, max_length=max_length, too_long=too_long)


def examples(
    records: Iterable[Record], tokenizer: Any, *, max_length: int, too_long: str = "error"
) -> list[Example]:
    """Tokenizes records and marks the learned tokens.

    Args:
      records: from `load_jsonl` or `record_of`.
      tokenizer: `encode(text) -> list[int]`, `eos_id`, and for messages
        `apply_chat_template(messages, add_generation_prompt) -> list[int]`.
      max_length: maximum number of tokens of an example, usually the model's context.
      too_long: how to treat longer examples: "error", "truncate" (drop the end) or "skip".

    Returns:
      At least one example.

    Raises:
      ValueError: an example is too long under "error", has nothing left to learn, its chat
        template rewrites earlier turns, or no example is left.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"`too_long` must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    if max_length < 2:
        raise ValueError(f"`max_length` must be at least 2 tokens, got {max_length}")
    if tokenizer is None:
        raise ValueError("`tokenizer` is None: this model came without one; pass a tokenizer")
    records = list(records)
    fitted = (_fit(_tokenize(r, tokenizer), max_length, too_long) for r in records)
    kept = [example for example in fitted if example is not None]
    if not kept:
        why = (
            "there are no records"
            if not records
            else (f"all {len(records)} examples are longer than {max_length} tokens and skipped")
        )
        raise ValueError(f"the dataset is empty: {why}; give more or shorter examples")
    return kept


def _fit(example: Example, max_length: int, too_long: str) -> Example | None:
    length = len(example.tokens)
    if length > max_length:
        if too_long == "skip":
            return None
        if too_long == "error":
            raise ValueError(
                f"{example.source}: the example has {length} tokens, more than the context of"
                f' {max_length}; shorten it, or pass too_long="truncate" or "skip"'
            )
        example = example._replace(
            tokens=example.tokens[:max_length], learned=example.learned[:max_length]
        )
    if not example.learned.any():
        cut = f" after truncation to {max_length} tokens" if length > max_length else ""
        raise ValueError(
            f"{example.source}: the example has nothing to learn{cut}; give it a completion that"
            " fits, or remove it"
        )
    return example


def _tokenize(record: Record, tokenizer: Any) -> Example:
    tokens, learned = _FORMS[record.form](record, tokenizer)
    learned = np.asarray(learned, bool)
    learned[:1] = False
    return Example(np.asarray(tokens, np.int32), learned, record.source)


def _text(record: Record, tokenizer: Any) -> tuple[Sequence[int], Sequence[bool]]:
    tokens = _with_eos(list(tokenizer.encode(record.fields[0])), tokenizer)
    return tokens, [True] * len(tokens)


def _completion(record: Record, tokenizer: Any) -> tuple[Sequence[int], Sequence[bool]]:
    # Prompt and completion are tokenized separately, as in generation, where the prompt is
    # tokenized alone: the learned tokens begin exactly where generation begins.
    prompt, completion = record.fields
    head = list(tokenizer.encode(prompt))
    tail = list(tokenizer.encode(completion))
    # What the tokenizer puts before every text (BOS): it must not occur inside the example.
    opening = list(tokenizer.encode(""))
    if head and opening and tail[: len(opening)] == opening:
        tail = tail[len(opening) :]
    tail = _with_eos(tail, tokenizer)
    return head + tail, [False] * len(head) + [True] * len(tail)


def _with_eos(tokens: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _chat(record: Record, tokenizer: Any) -> tuple[Sequence[int], Sequence[bool]]:
    """Marks what the template adds for each assistant turn, up to its end-of-turn token."""
    messages = [{"role": role, "content": content} for role, content in record.fields[0]]
    whole = _rendered(messages, False, tokenizer, record.source)
    learned = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(messages, i, whole, tokenizer, record.source)
            learned[start:end] = [True] * (end - start)
    return whole, learned


def _turn(messages, i: int, whole: list[int], tokenizer: Any, source: str) -> tuple[int, int]:
    if i == 0:
        raise ValueError(
            f"{source}: the first message is the assistant's; begin with a system or user message"
        )
    before = _rendered(messages[:i], True, tokenizer, source)
    after = _rendered(messages[: i + 1], False, tokenizer, source)
    if whole[: len(after)] != after or after[: len(before)] != before:
        raise ValueError(
            f"{source}: the tokenizer's chat template writes the turns before message {i}"
            " differently once it is there, so its tokens cannot be separated; use"
            ' "prompt" and "completion" instead'
        )
    end = len(after)
    # What follows the end-of-turn token (a newline in most templates) is never generated.
    if tokenizer.eos_id in after[len(before) :]:
        end -= after[::-1].index(tokenizer.eos_id)
    return len(before), end


def _rendered(messages, prompt: bool, tokenizer: Any, source: str) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt))
    except ValueError as error:  # no template, or one that rejects these roles
        raise ValueError(f"{source}: {error}") from None


_FORMS = {"text": _text, "prompt": _completion, "messages": _chat}
