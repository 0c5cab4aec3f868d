"""Training records from JSON lines: one JSON object per line, in one of three forms.

    {"prompt": "...", "completion": "..."}                      the completion is learned
    {"messages": [{"role": "user", "content": "..."}, ...]}     the assistant's turns are learned
    {"text": "..."}                                             everything is learned

Other fields are ignored: many datasets have some. Every error names the file and the line.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Form = Literal["prompt", "messages", "text"]
FORMS: Mapping[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
_HOW = '"prompt" and "completion", or "messages", or "text"'


class Record(NamedTuple):
    """One training example as text.

    Attributes:
      form: "prompt", "messages" or "text".
      fields: (prompt, completion), (messages,) or (text,); a message is a (role, content) pair.
      source: file and line for error messages: `data.jsonl:3`.
    """

    form: Form
    fields: tuple
    source: str


def load_jsonl(path: str | os.PathLike, *, fields: Mapping[str, str] | None = None) -> list[Record]:
    """Reads every record of a JSON-lines file.

    Args:
      path: the file, UTF-8. Blank lines are allowed and skipped.
      fields: other names for the fields, `{"prompt": "question", "completion": "answer"}`.

    Returns:
      The records in the order of the file, at least one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a JSON object of one of the three forms, or the file is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file; expected JSON lines with {_HOW}")
    records = [record_of(value, source=source, fields=fields) for value, source in _values(path)]
    if not records:
        raise ValueError(f"{path}: the dataset is empty; expected a JSON object a line with {_HOW}")
    return records


def _values(path: Path) -> Iterator[tuple[Any, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{path}:{number}"
            if line.strip():
                yield _parse(line, source), source


def _parse(line: bytes, source: str) -> Any:
    try:
        # "-sig": editors on Windows put a byte order mark at the start of the file.
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason}); save as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}: not JSON ({error.msg} at column {error.colno}); expected one JSON object"
            f" a line with {_HOW}"
        ) from None


def record_of(
    value: Any, *, source: str = "example", fields: Mapping[str, str] | None = None
) -> Record:
    """Checks one decoded JSON value and determines its form.

    Args:
      value: the JSON value of one line; a dict of one of the three forms.
      source: its name in error messages, `data.jsonl:3`.
      fields: other names for the fields, as in `load_jsonl`.

    Raises:
      ValueError: not an object, none or several of the forms, a missing field or a wrong type.
    """
    names = _field_names(fields)
    if not isinstance(value, dict):
        raise ValueError(
            f"{source}: expected a JSON object with {_HOW}, got {type(value).__name__}"
        )
    found: list[Form] = [
        form for form, parts in FORMS.items() if any(names[p] in value for p in parts)
    ]
    if len(found) != 1:
        what = "none of them" if not found else " and ".join(f'"{names[f]}"' for f in found)
        have = ", ".join(f'"{k}"' for k in value) or "no field"
        raise ValueError(f"{source}: expected {_HOW}, got {what} (fields: {have})")
    form = found[0]
    parts = tuple(_part(value, p, names[p], source) for p in FORMS[form])
    return Record(form, parts, source)


def _field_names(fields: Mapping[str, str] | None) -> dict[str, str]:
    known = {part: part for parts in FORMS.values() for part in parts}
    if unknown := sorted(set(fields or ()) - set(known)):
        raise ValueError(
            f"`fields` renames `{unknown[0]}`, expected one of {', '.join(sorted(known))}"
        )
    return {**known, **(fields or {})}


def _part(value: dict, part: str, name: str, source: str):
    if name not in value:
        raise ValueError(f'{source}: missing field "{name}"')
    if part == "messages":
        return _messages(value[name], name, source)
    if not isinstance(value[name], str):
        raise ValueError(f'{source}: field "{name}" must be text, got {_kind(value[name])}')
    return value[name]


def _messages(value: Any, name: str, source: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{source}: field "{name}" must be a list of messages, got {_kind(value)}')
    turns = tuple(_message(m, f'{source}: "{name}"[{i}]') for i, m in enumerate(value))
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError(
            f'{source}: "{name}" has no message of role "assistant": there is nothing to learn'
        )
    return turns


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(
            f'{where} must be an object with "role" and "content", got {_kind(message)}'
        )
    for field in ("role", "content"):
        if field not in message:
            raise ValueError(f'{where}: missing field "{field}"')
        if not isinstance(message[field], str):
            raise ValueError(f'{where}: "{field}" must be text, got {_kind(message[field])}')
    return message["role"], message["content"]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {"dict": "an object", "str": "text", "bool": "true or false"}.get(
        type(value).__name__, "a number"
    )
