"""The form of the text that an adapter was trained on, kept beside the adapter.

An adapter that was trained on prompts and completions has never seen the chat template, and one
that was trained on messages has never seen a bare prompt. In the other form it generates as if it
had learned nothing.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lora_jax.files import read_json, write_text
from lora_jax.hf.peft.directory import FORM_FILE, local
from lora_jax.models.heads import TASKS, Problem, Task
from lora_jax.train.jsonl import Record

TrainedForm = Literal["prompt", "messages", "text", "tokens", "question", "image", "mixed"]


class Trained(NamedTuple):
    """What is kept beside an adapter.

    Attributes:
      form: of its data; None where nothing is kept.
      labels: the classes of a head that was fresh, of which no file of its base has the names.
      task: what that head is for; None for a language model's, or for texts.
      problem: of such a head for texts, see `lora_jax.models.load`.
      template: variables of the chat template that all its chats had: `tools` and others.
      system: the system message that all its chats began with.
    """

    form: TrainedForm | None = None
    labels: tuple[str, ...] = ()
    task: Task | None = None
    problem: Problem | None = None
    template: Mapping[str, Any] = {}  # noqa: RUF012
    system: str | None = None

    @property
    def has_head(self) -> bool:
        """Whether the head was fresh."""
        return bool(self.labels) or self.task is not None


NOTHING = Trained()


def form_of(records: Iterable[Record]) -> TrainedForm:
    """The form of all records, or "mixed"."""
    found: set[TrainedForm] = {record.form for record in records}
    return found.pop() if len(found) == 1 else "mixed"


def template_of(records: Iterable[Record]) -> dict[str, Any]:
    """The variables of the chat template that all chats have alike, such as tools or thinking."""
    found = [record.options for record in records if record.form == "messages"]
    first = found[0] if found else {}
    return {name: x for name, x in first.items() if all(each.get(name) == x for each in found)}


def system_of(records: Iterable[Record]) -> str | None:
    """The system message that all chats begin with; None where they have none, or several."""
    first = [record.fields[0][0] for record in records if record.form == "messages"]
    found = {turn["content"] if turn["role"] == "system" else None for turn in first}
    return found.pop() if len(found) == 1 else None


def write_form(directory: str | Path, form: TrainedForm | None, head: Trained = NOTHING) -> None:
    """Writes the form and a fresh head's facts beside an adapter, or into a run's folder."""
    known = {
        "form": form, "labels": list(head.labels), "task": head.task, "problem": head.problem,
        "template": dict(head.template), "system": head.system,
    }  # fmt: skip
    text = json.dumps({name: value for name, value in known.items() if value})
    write_text(Path(directory) / FORM_FILE, text + "\n")


def carry_form(adapter: str | Path, output: str | Path) -> None:
    """Gives a copy of an adapter the form that is kept beside it, in place of an older one's."""
    # A GGUF file has no place beside it.
    if not Path(output).is_dir():
        return
    found = read_trained(adapter)
    if found.form:
        write_form(output, found.form, found)
    else:
        (Path(output) / FORM_FILE).unlink(missing_ok=True)


def read_form(adapter: str | Path) -> TrainedForm | None:
    """The form that is kept beside an adapter; as `read_trained`."""
    return read_trained(adapter).form


def read_trained(adapter: str | Path) -> Trained:
    """What is kept beside an adapter, a hub id's too.

    Raises:
      ValueError: the file is not one that `write_form` wrote.
    """
    path = local(adapter) / FORM_FILE
    if not path.is_file():
        return NOTHING
    # The file may have come with an adapter from elsewhere.
    value = read_json(path)
    value = value if isinstance(value, dict) else {}
    known = {"form": get_args(TrainedForm), "task": TASKS, "problem": get_args(Problem)}
    for name, values in known.items():
        given = value.get(name)
        if given not in values and (given is not None or name == "form"):
            raise ValueError(f"{path}: `{name}` must be one of {', '.join(values)}, got {given!r}")
    labels = value.get("labels") or ()
    if not isinstance(labels, list | tuple) or not all(isinstance(x, str) for x in labels):
        raise ValueError(f"{path}: `labels` must be a list of names, got {labels!r}")
    template = value.get("template") or {}
    if not isinstance(template, dict):
        raise ValueError(f"{path}: `template` must be an object, got {template!r}")
    system = value.get("system")
    if not isinstance(system, str | None):
        raise ValueError(f"{path}: `system` must be text, got {system!r}")
    kept = value["form"], tuple(labels), value.get("task"), value.get("problem")
    return Trained(*kept, template=template, system=system)
