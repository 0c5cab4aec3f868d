"""The form of the text that an adapter was trained on, kept beside the adapter.

An adapter that was trained on prompts and completions has never seen the chat template, and one
that was trained on messages has never seen a bare prompt. In the other form it generates as if it
had learned nothing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from lora_jax.files import read_json, write_text
from lora_jax.hf.peft.directory import FORM_FILE, local
from lora_jax.train.jsonl import Record

TrainedForm = Literal["prompt", "messages", "text", "mixed"]


def form_of(records: Iterable[Record]) -> TrainedForm:
    """The form of all records, or "mixed"."""
    found: set[TrainedForm] = {record.form for record in records}
    return found.pop() if len(found) == 1 else "mixed"


def write_form(directory: str | Path, form: TrainedForm, labels: Sequence[str] = ()) -> None:
    """Writes the form beside an adapter, or into the folder of a run.

    `labels` are the classes of a classifier whose head was fresh: no file of its base has them.
    """
    named = {"labels": list(labels)} if labels else {}
    write_text(Path(directory) / FORM_FILE, json.dumps({"form": form, **named}) + "\n")


def carry_form(adapter: str | Path, output: str | Path) -> None:
    """Gives a copy of an adapter the form that is kept beside it, in place of an older one's."""
    # A GGUF file has no place beside it.
    if not Path(output).is_dir():
        return
    if form := read_form(adapter):
        write_form(output, form, read_labels(adapter))
    else:
        (Path(output) / FORM_FILE).unlink(missing_ok=True)


def read_labels(adapter: str | Path) -> tuple[str, ...]:
    """The classes that are kept beside an adapter; () for a language model's, or without a form."""
    path = local(adapter) / FORM_FILE
    value = read_json(path) if path.is_file() else None
    return tuple(value.get("labels") or ()) if isinstance(value, dict) else ()


def read_form(adapter: str | Path) -> TrainedForm | None:
    """The form that is kept beside an adapter, a hub id's too, or None.

    Raises:
      ValueError: the file is not one that `write_form` wrote.
    """
    path = local(adapter) / FORM_FILE
    if not path.is_file():
        return None
    # The file may have come with an adapter from elsewhere.
    value = read_json(path)
    form = value.get("form") if isinstance(value, dict) else None
    if form not in get_args(TrainedForm):
        raise ValueError(
            f"{path}: `form` must be one of {', '.join(get_args(TrainedForm))}, got {form!r}"
        )
    return form
