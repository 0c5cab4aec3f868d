"""Chats to tokens, with the assistant's turns marked as a template and generation have them.

What is learned is what the model has to generate: from the end of the prompt that
`add_generation_prompt=True` makes, to the token that ends the turn. A template with
`{% generation %}` marks it itself.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from lora_jax.train.jsonl import Record
from lora_jax.train.messages import REASONING, Message, is_learned

# Fields of an answer beside its content; those in one row are names of the same thing.
_FIELDS = (("tool_calls",), REASONING)
# Variables of templates that switch reasoning on and off.
_SWITCHES = ("enable_thinking", "thinking")
_ENDS_OF_THOUGHT = ("</think>", "<channel|>", "<|END_THINKING|>")
# Tokens, and which of them are learned.
Marked = tuple[list[int], list[bool]]


def chat_examples(
    messages: Sequence[Message], options: Mapping[str, Any], tokenizer: Any
) -> list[Marked]:
    """The examples of one chat: one, or one an answer if its template rewrites earlier turns.

    Args:
      messages: the chat.
      options: further variables of the template, such as `tools`.
      tokenizer: has `render_chat`, `marked_chat`, `encode`, `decode` and `stop_ids`.

    Raises:
      ValueError: no template, one that refuses the messages, or one that writes an answer
        elsewhere than behind its own prompt.
    """
    # What the template's author marked goes before what is worked out here.
    marked = tokenizer.marked_chat(messages, **options)
    if marked is not None:
        return [_as_marked(marked, messages)]
    if messages[0]["role"] == "assistant":
        raise ValueError(
            "the first message is the assistant's; begin with a system or user message"
        )
    answers = [i for i, message in enumerate(messages) if is_learned(message)]
    whole = _encode(messages, False, options, tokenizer)
    learned = [False] * len(whole)
    for i in answers:
        before = _encode(messages[:i], True, options, tokenizer)
        after = _encode(messages[: i + 1], False, options, tokenizer)
        if whole[: len(after)] != after or after[: len(before)] != before:
            # Qwen3 drops the reasoning of earlier turns, Phi-3 ends the last one with EOS. While
            # it answers, the model sees the chat up to there, so each answer is an example.
            return [_answer(messages[: i + 1], options, tokenizer) for i in answers]
        end = _end(after, len(before), tokenizer)
        learned[len(before) : end] = [True] * (end - len(before))
    return [(whole, learned)]


def unwritten(
    messages: Sequence[Message], options: Mapping[str, Any], tokenizer: Any, known: set[str]
) -> tuple[list[str], bool]:
    """What a chat has and its template leaves out: tools, calls of them, reasoning, contents.

    Args:
      messages, options, tokenizer: as for `chat_examples`.
      known: what the template is known to write; this chat's is added.

    Returns:
      The names, and whether a learned answer is empty without them.
    """

    def writes(
        name: str, chat: Sequence[Message], other: Sequence[Message], rest: Mapping[str, Any]
    ) -> bool:
        """Whether the text of a chat is not that of the other one, with the rest of the options."""
        if name not in known:
            try:
                text = tokenizer.render_chat(chat, False, **options)
                if tokenizer.render_chat(other, False, **rest) == text:
                    return False
            except ValueError:  # what the template refuses, `chat_examples` says
                return True
            known.add(name)
        return True

    lost, empty = [], False
    for name in ("tools", "documents"):
        rest = {each: x for each, x in options.items() if each != name}
        if name in options and not writes(name, messages, messages, rest):
            lost.append(name)
    for i, message in enumerate(messages):
        fields = [x for x in _FIELDS if is_learned(message) and any(map(message.get, x))]
        before, after, gone = messages[:i], messages[i + 1 :], []
        for names in fields:
            bare = {name: x for name, x in message.items() if name not in names}
            # Templates such as Qwen3's leave the reasoning of earlier turns out.
            if not writes(names[0], [*before, message], [*before, bare], options):
                gone.append(next(filter(message.get, names)))
        said, silent = bool(message["content"]), [*before, {**message, "content": ""}, *after]
        if said and not writes(_content(message), messages, silent, options):
            gone.append(_content(message))
        lost += gone
        empty |= is_learned(message) and bool(gone) and len(gone) == len(fields) + said
    return list(dict.fromkeys(lost)), empty


def _content(message: Message) -> str:
    beside = " beside tool_calls" if message.get("tool_calls") else ""
    return f"content of role {message['role']}{beside}"


def _as_marked(marked: Marked, messages: Sequence[Message]) -> Marked:
    if any(m["role"] == "assistant" and not is_learned(m) for m in messages):
        raise ValueError(
            'the chat template marks its answers itself, so "weight" and a prompt of messages '
            "cannot leave any out; remove the `{% generation %}` marks"
        )
    if not any(marked[1]):
        raise ValueError("the chat template marks nothing of this chat by `{% generation %}`")
    return marked


def _answer(messages: Sequence[Message], options: Mapping[str, Any], tokenizer: Any) -> Marked:
    """The last message as an answer to those before it."""
    before = tokenizer.render_chat(messages[:-1], True, **options)
    after = tokenizer.render_chat(messages, False, **options)
    if not after.startswith(before):
        after = _behind_no_thought(messages, before, after, options, tokenizer) or after
    if not after.startswith(before):
        raise ValueError(
            f"the tokenizer's chat template writes message {len(messages) - 1} elsewhere than "
            "behind the prompt it makes for it, so what is trained is not what is generated; "
            f"{_way_out(messages, options, tokenizer)}mark the answers in the template by "
            '`{% generation %}`, or use "prompt" and "completion"'
        )
    head, tokens = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
    if tokens[: len(head)] != head:
        # The answer's first letters merge with the end of the prompt; generation reads the
        # prompt alone.
        tokens = head + tokenizer.encode(after[len(before) :], add_special_tokens=False)
        if tokenizer.decode(tokens, skip_special_tokens=False) != after:
            raise ValueError(
                f"the prompt of message {len(messages) - 1} ends inside a token of the answer; "
                "let the chat template end its prompt with a special token or a line break"
            )
    end = _end(tokens, len(head), tokenizer)
    # What the template writes behind the end token belongs to the next turn.
    return tokens[:end], [False] * len(head) + [True] * (end - len(head))


def _behind_no_thought(
    messages: Sequence[Message], before: str, after: str, options: Mapping[str, Any], tokenizer: Any
) -> str | None:
    """The prompt and the answer, where the prompt has an empty thought that turns have not.

    Gemma 4 31B's ends in `<|channel>thought\\n<channel|>`, DeepSeek-V3.2's in `<think></think>`,
    of which turns have `</think>`. The model answers behind it: the answer is learned there.
    """
    answer = messages[-1]
    if not _is_plain_turn(answer) or not isinstance(answer["content"], str):
        return None
    # Where the content begins, both texts begin to differ.
    other = {**answer, "content": "#" if answer["content"].lstrip()[:1] == "@" else "@"}
    try:
        second = tokenizer.render_chat([*messages[:-1], other], False, **options)
    except ValueError:
        return None
    head = os.path.commonprefix([after, second])
    shared = len(os.path.commonprefix([before, head]))
    # A turn may have the end of the empty thought alone.
    closed = before[shared:].rstrip().endswith(_ENDS_OF_THOUGHT) and before.endswith(head[shared:])
    return before + after[len(head) :] if closed else None


def _way_out(messages: Sequence[Message], options: Mapping[str, Any], tokenizer: Any) -> str:
    """A switch of thinking with which the template writes the answer behind its prompt, if any."""
    for name, value in product(_SWITCHES, (False, True)):
        if _follows(messages, {**options, name: value}, tokenizer):
            return f'add "chat_template_kwargs": {json.dumps({name: value})} to the rows, '
    return ""


def _follows(messages: Sequence[Message], options: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether the template writes the last message behind the prompt that it makes for it."""
    try:
        before = tokenizer.render_chat(messages[:-1], True, **options)
        return tokenizer.render_chat(messages, False, **options).startswith(before)
    except ValueError:
        return False


def without_thinking(records: Sequence[Record], tokenizer: Any) -> list[Record]:
    """Chats with thinking switched off, where the template's prompt begins it and no row has any.

    The prompts of some templates (GLM-4.7, Nemotron 3) begin a thought unless a switch is off.
    Answers without one would be learned behind another prompt than the one of generation. With the
    switch off both are the same; it is kept beside the adapter as if the rows had named it.

    Args:
      records: of any form.
      tokenizer: as for `chat_examples`.

    Warns:
      UserWarning: it is switched off.
    """
    plain = [i for i, record in enumerate(records) if _is_plain(record)]
    first = records[plain[0]] if plain else None
    if first is None:
        return list(records)
    turns, options = first.fields[0], first.options
    chats = [turns[: i + 1] for i, turn in enumerate(turns) if i and is_learned(turn)]
    for name in (None, *_SWITCHES):
        off = {} if name is None else {name: False}
        if all(_follows(chat, {**off, **options}, tokenizer) for chat in chats):
            break
    else:
        return list(records)
    if not off or tokenizer.marked_chat(turns, **options) is not None:
        return list(records)
    warnings.warn(
        f"{first.source}: the chat template begins a thought for the answer, and the rows have "
        f'none: they are trained with "chat_template_kwargs": {json.dumps(off)}, as `generate` '
        "writes its prompts with this adapter; give the same to other programs that serve it",
        stacklevel=3,
    )
    out = list(records)
    for i in plain:
        out[i] = records[i]._replace(options={**off, **records[i].options})
    return out


def _is_plain(record: Record) -> bool:
    """Whether a record is a chat whose answers have no reasoning."""
    return record.form == "messages" and all(
        _is_plain_turn(turn) for turn in record.fields[0] if turn["role"] == "assistant"
    )


def _is_plain_turn(turn: Message) -> bool:
    text = str(turn["content"])
    return not any(map(turn.get, REASONING)) and not any(end in text for end in _ENDS_OF_THOUGHT)


def _end(tokens: Sequence[int], start: int, tokenizer: Any) -> int:
    """The place behind the last end token; a newline after it is never generated."""
    stops = [i for i in range(start, len(tokens)) if tokens[i] in tokenizer.stop_ids]
    return stops[-1] + 1 if stops else len(tokens)


def _encode(
    messages: Sequence[Message], prompt: bool, options: Mapping[str, Any], tokenizer: Any
) -> list[int]:
    text = tokenizer.render_chat(messages, prompt, **options)
    # The template writes the special tokens itself.
    return tokenizer.encode(text, add_special_tokens=False)
