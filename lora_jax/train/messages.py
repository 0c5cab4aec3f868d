"""Messages of a chat, checked, from the spellings that datasets have.

A message is a dict with `role`, `content` and what else the chat template reads: `tool_calls`,
`reasoning_content`, `name`. Whatever cannot reach the template as it is meant is refused.
"""

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]

# ShareGPT's names of the speakers.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields that are an answer beside `content`.
_ANSWERS = ("tool_calls", "function_call", *REASONING)


def from_list(value: Any, name: str, source: str) -> tuple[Message, ...]:
    """The messages of a list, in OpenAI's or ShareGPT's spelling.

    Args:
      value: the JSON value.
      name: the field's name, for messages.
      source: file and line.

    Raises:
      ValueError: not a list of messages, or none of the assistant's is learned.
    """
    turns = _checked(value, name, source)
    if not any(is_learned(turn) for turn in turns):
        raise ValueError(
            f'{source}: "{name}" has no message of role "assistant" that is learned: there is '
            "nothing to learn"
        )
    return turns


def from_pair(prompt: str, answer: str) -> tuple[Message, ...]:
    """The messages of one question and its answer."""
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def from_prompt(
    prompt: Any, completion: Any, names: Mapping[str, str], source: str
) -> tuple[Message, ...]:
    """The messages of a prompt and a completion that are lists; only the completion is learned."""
    before = _checked(prompt, names["prompt"], source)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    after = from_list(completion, names["completion"], source)
    # Weight 0 keeps the prompt's own answers, of earlier turns, out of the loss.
    return (*({**turn, "weight": 0} for turn in before), *after)


def is_learned(message: Message) -> bool:
    """Whether a message is the assistant's and its weight, as OpenAI has it, is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def is_empty(message: Message) -> bool:
    """Whether an answer has no text, no call of a tool and no reasoning."""
    return not message["content"] and not any(message.get(field) for field in _ANSWERS)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {"dict": "an object", "str": "text", "bool": "true or false"}.get(
        type(value).__name__, "a number"
    )


def _checked(value: Any, name: str, source: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{source}: field "{name}" must be a list of messages, got {kind_of(value)}'
        )
    return tuple(_message(m, f'{source}: "{name}"[{i}]') for i, m in enumerate(value))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(
            f'{where} must be an object with "role" and "content", got {kind_of(message)}'
        )
    # A table has a column for every field that any message has, null elsewhere.
    given = {field: x for field, x in message.items() if x is not None}
    if "from" in given and "role" not in given:
        given = _from_sharegpt(given, where)
    if "role" not in message and "role" not in given:
        raise ValueError(f'{where}: missing field "role"')
    if not isinstance(given.get("role"), str):
        raise ValueError(f'{where}: "role" must be text, got {kind_of(message.get("role"))}')
    if "content" not in message and "content" not in given and not any(map(given.get, _ANSWERS)):
        raise ValueError(f'{where}: missing field "content"')
    if "function_call" in given:
        raise ValueError(
            f'{where}: "function_call" is OpenAI\'s old spelling, which templates do not read; '
            'write "tool_calls"'
        )
    # OpenAI's field of fine-tuning files; it allows nothing between.
    if given.get("weight", 1) not in (0, 1):
        raise ValueError(f'{where}: "weight" must be 0 or 1, got {given["weight"]!r}')
    if "content" not in given and given["role"] != "assistant":
        raise ValueError(f'{where}: "content" must be text, got null')
    # An answer that only calls tools has no content; templates want text there.
    return {**given, "content": _content(given.get("content"), where)}


def _from_sharegpt(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker = given["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise ValueError(
            f'{where}: "from" is {speaker!r}, expected one of {", ".join(_SPEAKERS)}; write it as '
            '"role" and "content"'
        )
    if "value" not in given:
        raise ValueError(f'{where}: missing field "value"')
    rest = {field: x for field, x in given.items() if field not in ("from", "value")}
    return {"role": _SPEAKERS[speaker], "content": given["value"], **rest}


def _content(content: Any, where: str) -> str:
    """The text of a message; parts of text are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f'{where}: "content" must be text, got {kind_of(content)}')
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    if kind != "text" or not isinstance(part["text"] if "text" in part else None, str):
        raise ValueError(
            f'{where}: "content" has a part of type {kind!r}; only text can be trained on'
        )
    return part["text"]
