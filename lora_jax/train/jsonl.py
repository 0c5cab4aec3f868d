"""Training records from JSON lines: one JSON object per line, in one of these forms.

    {"prompt": "...", "completion": "..."}                      the completion is learned
    {"messages": [{"role": "user", "content": "..."}, ...]}     the assistant's turns are learned
    {"text": "..."}                                             everything is learned
    {"text": "...", "label": "..."}                             a classifier learns the label
    {"text": "...", "text_pair": "...", "label": 3.5}           of two texts, here a number
    {"text": "...", "labels": ["...", "..."]}                   several classes
    {"tokens": ["...", "..."], "labels": ["O", "..."]}          words, and the class of each
    {"question": "...", "context": "...", "answers": {...}}     SQuAD: the answer's place
    {"image": "cats/1.jpg", "label": "cat"}                     a path, from the file's folder
    {"conversations": [{"from": "human", "value": "..."}]}      ShareGPT: as messages
    {"instruction": "...", "input": "...", "output": "..."}     Alpaca: as messages

Beside messages, `tools`, `documents` and `chat_template_kwargs` go to the chat template, and
`system` becomes the first message. Alpaca's `history` holds earlier turns, pairs of texts. Other
fields are ignored: many datasets have some. Every error names the file and the line.
"""

import codecs
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from lora_jax.config.arguments import check_argument, quoted
from lora_jax.files import half_character
from lora_jax.train import messages
from lora_jax.train.messages import Message, kind_of

Form = Literal["prompt", "messages", "text", "tokens", "question", "image"]

# The fields of each form; the first names it in messages.
_FORMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("tokens",),
    "question": ("question", "context"),
    "image": ("image",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
}
# For heads of tasks: taken where there is no other form.
_OF_HEADS = ("tokens", "question", "image")
# Optional fields, which may be renamed too.
_LABELS = ("label", "labels", "ner_tags", "answers")
_MORE = ("input", "history", "system", "tools", "documents", "text_pair", *_LABELS)
_HOW = '"prompt" and "completion", or "messages", or "text"'


class Record(NamedTuple):
    """One training example as text.

    Attributes:
      form: "prompt", "messages" or "text"; "tokens", "question" or "image" for heads of tasks.
      fields: (prompt, completion), (messages,), (text,) or (text, text_pair), (tokens,), (question,
        context), (image,); a message is a dict with `role`, `content` and what else it has, an
        image as for `lora_jax.train.image_examples`.
      source: file and line for error messages: `data.jsonl:3`.
      options: further variables of the chat template: `tools`, `documents`, ...
      label: what a head learns, as the row has it: a class, by name or number, a number, a list of
        them, or SQuAD's answers; None where there is none.
    """

    form: Form
    fields: tuple
    source: str
    options: Mapping[str, Any] = {}  # noqa: RUF012
    label: Any = None


@contextlib.contextmanager
def at_source(record: Record) -> Iterator[None]:
    """Puts a record's file and line before a ValueError about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{record.source}: {error}") from None


# Endings of other files of data, and what `datasets.load_dataset` calls them.
_KINDS = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


def load_jsonl(path: str | os.PathLike, *, fields: Mapping[str, str] | None = None) -> list[Record]:
    """Reads every record of a JSON-lines file.

    Args:
      path: the file, UTF-8. Blank lines are allowed and skipped.
      fields: other names for the fields, `{"prompt": "question", "completion": "answer"}`. Of
        several forms in a row, the one whose fields are given is taken.

    Returns:
      The records in the order of the file, at least one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a JSON object of one of the forms, or the file is empty.
    """
    check_argument("train.load_jsonl(path)", "path", path, (str, os.PathLike))
    path = Path(path)
    if not path.is_file():
        what = "a directory, not a data file" if path.is_dir() else "no such data file"
        if (path / "dataset_info.json").exists():
            call = f'datasets.load_from_disk("{path}").to_json("data.jsonl")'
            what = f"a folder of `datasets`, which {call} writes as JSON lines"
        raise FileNotFoundError(f"{path}: {what}; expected JSON lines with {_HOW}")
    records = [
        _beside(record_of(value, source=source, fields=fields), path.parent)
        for value, source in _values(path)
    ]
    if not records:
        raise ValueError(f"{path}: the dataset is empty; expected a JSON object a line with {_HOW}")
    return records


def _beside(record: Record, folder: Path) -> Record:
    """The record; the path of an image begins at a folder."""
    if record.form != "image":
        return record
    (image,) = record.fields
    return record._replace(fields=(str(folder / _text(image, "image", record.source)),))


def _values(path: Path) -> Iterator[tuple[Any, str]]:
    # Bytes: an encoding error then has the number of its line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{path}:{number}"
            if line.strip():
                if number == 1:
                    _check_first(line, path)
                yield _parse(line, source), source


def _check_first(line: bytes, path: Path) -> None:
    """Names the files that are often given for JSON lines, and how they become that."""
    if line.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}: a gzip file; unpack it first: gunzip {path}")
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise ValueError(f"{path}: a JSON array; expected one object a line: jq -c '.[]' {path}")
    if (kind := _KINDS.get(path.suffix)) and not line.lstrip().startswith(b"{"):
        raise ValueError(
            f'{path}: a {kind} file; write it as JSON lines first: datasets.load_dataset("{kind}", '
            f'data_files="{path}")["train"].to_json("data.jsonl")'
        )


def _parse(line: bytes, source: str) -> Any:
    try:
        # "-sig": editors on Windows put a byte order mark at the start of the file.
        value = json.loads(line.decode("utf-8-sig"))
        half = half_character(value, line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason}); save as UTF-8") from None
    except json.JSONDecodeError as error:
        # Counted from the start of the line; `colno` starts again after a break in the line.
        raise ValueError(
            f"{source}: not JSON ({error.msg} at column {error.pos + 1}); expected one JSON object"
            f" a line with {_HOW}"
        ) from None
    except (RecursionError, ValueError) as error:  # nested, or a number of thousands of digits
        raise ValueError(f"{source}: not JSON that can be read ({error})") from None
    if half:
        raise ValueError(f"{source}: `{half}` is half of a character; remove it")
    return value


def record_of(
    value: Any, *, source: str = "example", fields: Mapping[str, str] | None = None
) -> Record:
    """Checks one decoded JSON value and determines its form.

    Args:
      value: the JSON value of one line; a dict of one of the forms.
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
    form = _form_of(value, names, fields or {}, source)
    hint = "; `fields` gives it another name"
    given = {part: _get(value, names[part], source, hint) for part in _FORMS[form]}
    beside = {part: value[names[part]] for part in _MORE if value.get(names[part]) is not None}
    label = next((beside[name] for name in _LABELS if name in beside), None)
    if form == "image":
        return Record("image", (given["image"],), source, label=label)
    if form == "tokens":
        return Record(
            "tokens", (_words(given["tokens"], names["tokens"], source),), source, {}, label
        )
    if form in ("text", "question") or (form == "prompt" and not isinstance(given["prompt"], list)):
        given |= {
            part: beside[part] for part in ("text_pair",) if form == "text" and part in beside
        }
        parts = tuple(_text(x, names[part], source) for part, x in given.items())
        return Record(cast(Form, form), parts, source, label=label)
    turns = _turns(form, given, beside, names=names, source=source)
    if beside.get("system") is not None and turns[0]["role"] != "system":
        # An empty system prompt means none; a template would write an empty turn.
        text = _text(beside["system"], names["system"], source)
        turns = ({"role": "system", "content": text}, *turns) if text else turns
    return Record("messages", (turns,), source, _options(value, beside, source))


def _form_of(
    value: Mapping[str, Any], names: Mapping[str, str], fields: Mapping[str, str], source: str
) -> str:
    """The form whose fields are all there; those named in `fields` come first."""
    some = [form for form, parts in _FORMS.items() if any(names[p] in value for p in parts)]
    whole = [form for form in some if all(names[p] in value for p in _FORMS[form])]
    # Tables of texts have columns of these names for other things too.
    some = [form for form in some if form not in _OF_HEADS]
    whole = [form for form in whole if form not in _OF_HEADS or form in fields or not some]
    chosen = [form for form in whole if any(part in fields for part in _FORMS[form])]
    found = chosen or whole or some
    if len(found) == 1:
        return found[0]
    what = "none of them" if not found else " and ".join(f'"{names[f]}"' for f in found)
    have = quoted(value) or "no field"
    choose = '; where they have other names, give `fields`, as in "prompt=question"'
    if found:
        choose = f"; choose by `fields`: {found[0]}={names[found[0]]}"
    raise ValueError(f"{source}: expected {_HOW}, got {what} (fields: {have}){choose}")


def _field_names(fields: Mapping[str, str] | None) -> dict[str, str]:
    known = {part: part for parts in (*_FORMS.values(), _MORE) for part in parts}
    if unknown := sorted(set(fields or ()) - set(known)):
        raise ValueError(
            f"`fields` renames `{unknown[0]}`, expected one of {', '.join(sorted(known))}"
        )
    return {**known, **(fields or {})}


def _get(value: Mapping[str, Any], name: str, source: str, hint: str = "") -> Any:
    if name not in value:
        there = quoted(value) or "none"
        raise ValueError(f'{source}: missing field "{name}" (fields: {there}){hint}')
    return value[name]


def _text(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{source}: field "{name}" must be text, got {kind_of(value)}')
    return value


def _words(value: Any, name: str, source: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{source}: field "{name}" must be a list of words, got {value!r}')
    return tuple(_text(word, name, source) for word in value)


def _turns(
    form: str,
    given: Mapping[str, Any],
    beside: Mapping[str, Any],
    *,
    names: Mapping[str, str],
    source: str,
) -> tuple[Message, ...]:
    if form == "instruction":
        # The input is a paragraph of its own, as in Alpaca's training.
        parts = [given["instruction"], beside.get("input") or ""]
        text = [
            _text(x, names[n], source) for x, n in zip(parts, ("instruction", "input"), strict=True)
        ]
        question = "\n\n".join(x for x in text if x)
        answer = _text(given["output"], names["output"], source)
        pairs = [*_earlier(beside.get("history", []), names["history"], source), (question, answer)]
        return tuple(turn for pair in pairs for turn in messages.from_pair(*pair))
    if form == "prompt":
        return messages.from_prompt(given["prompt"], given["completion"], names, source)
    field = next(iter(given))
    return messages.from_list(given[field], names[field], source)


def _earlier(history: Any, name: str, source: str) -> list[tuple[str, str]]:
    """The turns before an instruction, as LLaMA-Factory's files have them."""
    pairs = isinstance(history, list) and all(isinstance(x, list) and len(x) == 2 for x in history)
    if not pairs:
        raise ValueError(
            f'{source}: field "{name}" must be a list of pairs of texts, got {history!r}'
        )
    return [(_text(q, name, source), _text(a, name, source)) for q, a in history]


def _options(value: Mapping[str, Any], beside: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the chat template gets beside the messages."""
    more = value.get("chat_template_kwargs")
    if not isinstance(more, dict | None):
        raise ValueError(
            f'{source}: field "chat_template_kwargs" must be an object, got {kind_of(more)}'
        )
    options = {**(more or {}), **{n: beside[n] for n in ("tools", "documents") if n in beside}}
    for name in ("tools", "documents"):
        # Tables whose columns have one type hold them as JSON text.
        if isinstance(options.get(name), str):
            options[name] = _parse(options[name].encode() or b"[]", f'{source}: "{name}"')
        if not isinstance(options.get(name), list | None):
            raise ValueError(
                f'{source}: field "{name}" must be a list, got {kind_of(options[name])}'
            )
    return {name: found for name, found in options.items() if found not in (None, [])}
