"""Settings of a command: each field of a dataclass is both a key of a TOML file and a flag.

    [lora]                          --rank 16 --target-modules q_proj v_proj
    rank = 16
    target_modules = ["q_proj", "v_proj"]

Names, types, defaults and help texts come from the dataclasses, so each is written once. Flags
override the file; a setting in neither keeps its default. An unknown key is an error that lists
the nearest names.
"""

import argparse
import dataclasses
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.cli import kinds
from lora_jax.cli.flags import instead


class Section(NamedTuple):
    """A table of the TOML file and the dataclass that it fills.

    Attributes:
      name: the table's name; "" is the top of the file.
      cls: the dataclass.
      leave_out: fields that are not settings.
    """

    name: str
    cls: type
    leave_out: frozenset[str] = frozenset()


class Option(NamedTuple):
    """One setting.

    Attributes:
      section: the name of its table.
      name: the name of the field and of the key; the flag has dashes instead of underscores.
      kind: the field's annotation.
      default: the default value; `dataclasses.MISSING` for a required setting.
      help: the field's entry in the dataclass's docstring.
    """

    section: str
    name: str
    kind: Any
    default: Any
    help: str

    @property
    def key(self) -> str:
        """Its spelling in the TOML file, `lora.rank`."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def flag(self) -> str:
        """Its spelling on the command line, `--target-modules`."""
        return "--" + self.name.replace("_", "-")


# (section, name) -> value, of the settings that were given.
Values = dict[tuple[str, str], Any]


def options(sections: Sequence[Section]) -> list[Option]:
    """All settings of the sections, in the order of the dataclasses.

    Raises:
      ValueError: two sections have a field of the same name, and so the same flag.
    """
    found = [option for section in sections for option in _options_of(section)]
    names = [option.name for option in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two sections share the settings {', '.join(sorted(twice))}")
    return found


def _options_of(section: Section) -> Iterable[Option]:
    hints = typing.get_type_hints(section.cls)
    texts = field_docs(section.cls)
    # Settings that commands share, which a dataclass inherits, come last.
    own = section.cls.__annotations__
    for field in sorted(dataclasses.fields(section.cls), key=lambda f: f.name not in own):
        if field.name not in section.leave_out:
            yield Option(
                section=section.name,
                name=field.name,
                kind=hints[field.name],
                default=_default(field),
                help=texts[field.name],
            )


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def field_docs(cls: type) -> Mapping[str, str]:
    """The text of each field in the `Attributes:` part of a dataclass's docstring.

    Raises:
      ValueError: a field has no description, which `--help` needs.
    """
    texts = {}
    for each in cls.__mro__[:-1]:
        # To the end of the docstring, or to the next line that is not indented.
        part = re.search(
            r"^(?:Attributes|Args):\n(.*?)(?=^\S|\Z)", inspect.getdoc(each) or "", re.DOTALL | re.M
        )
        # An entry begins with a name at the first indentation.
        entries = re.split(r"^  (?=\w+:)", part[1] if part else "", flags=re.MULTILINE)
        for entry in filter(None, map(str.strip, entries)):
            name, _, text = entry.partition(":")
            texts[name] = " ".join(text.split())
    if missing := [f.name for f in dataclasses.fields(cls) if f.name not in texts]:
        raise ValueError(f"the docstring of {cls.__name__} does not describe {missing[0]}")
    return texts


# --- the command line -------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, found: Iterable[Option]) -> None:
    """Adds a flag for every setting, with one group of the help for each section."""
    groups: dict[str, Any] = {}
    for option in found:
        title = f"[{option.section}]" if option.section else "settings"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        # The docstring is Python's: on the command line None is "none", and {"up": 16} is up=16.
        help_text = option.help.replace("%", "%%").replace("None ", "none ")
        help_text = re.sub(r'\{"([^"]+)": "?([^"}]+)"?\}', r"\1=\2", help_text)
        kind = _argparse_kind(option)
        if kind.get("metavar") == _ONE_OF_MANY:
            choices = ", ".join(_choices(kinds.alternatives(option.kind)))
            help_text = f"{help_text.rstrip('.')}; one of {choices}"
        if option.default is not dataclasses.MISSING:
            help_text += f" (default: {kinds.spelled(option.default)})".replace("%", "%%")
        groups[title].add_argument(
            option.flag,
            dest=f"{option.section}.{option.name}",
            default=argparse.SUPPRESS,
            help=help_text,
            **kind,
        )


def _argparse_kind(option: Option) -> dict[str, Any]:
    """The arguments of `add_argument` for a setting's type."""
    allowed = kinds.alternatives(option.kind)
    if allowed == [bool]:
        # --name and --no-name: a flag can turn off what the file turns on.
        return {"action": argparse.BooleanOptionalAction}
    if bool in allowed:
        # --packing alone is --packing true.
        return {"nargs": "?", "const": "true", "metavar": _metavar(allowed)}
    many = any(kinds.is_mapping(kind) or kinds.is_list(kind) for kind in allowed)
    return {"nargs": "+" if many else None, "metavar": _metavar(allowed)}


# Stands for choices that do not fit a line of help.
_ONE_OF_MANY = "NAME"


def _metavar(allowed: list) -> str:
    if any(kinds.is_mapping(kind) for kind in allowed):
        return "NAME=VALUE"
    if choices := _choices(allowed):
        text = "{" + ",".join(choices) + "}"
        return text if len(text) <= 50 else _ONE_OF_MANY
    plain = _without_lists(allowed)
    return {int: "N", float: "X"}.get(plain[0], "PATH" if Path in plain else "TEXT")


def _choices(allowed: list) -> tuple[str, ...]:
    """The words that a setting may be; () for a setting of another type."""
    plain = _without_lists(allowed)
    if not kinds.is_choice(plain[0]):
        return ()
    return (*typing.get_args(plain[0]), *(("true", "false") if bool in plain else ()))


def _without_lists(allowed: list) -> list:
    return [typing.get_args(k)[0] if kinds.is_list(k) else k for k in allowed]


def from_flags(namespace: argparse.Namespace, found: Iterable[Option]) -> Values:
    """Reads settings from flags; those that were not given are left out.

    Raises:
      ValueError: a text is not a value of the setting's type.
    """
    values: Values = {}
    for option in found:
        # Not a default of argparse's: a flag that was not given leaves the file's value.
        given = vars(namespace).get(f"{option.section}.{option.name}", dataclasses.MISSING)
        if given is not dataclasses.MISSING:
            values[option.section, option.name] = _parse_flag(option, given)
    return values


def _parse_flag(option: Option, given: Any) -> Any:
    if isinstance(given, bool):  # from --name or --no-name
        return given
    texts = given if isinstance(given, list) else [given]
    if any(kinds.is_list(kind) for kind in kinds.alternatives(option.kind)):
        _check_spaces(option.flag, texts)
    if types.NoneType in kinds.all_kinds(option.kind) and texts == ["none"]:
        return None
    # The first alternative that the text is a value of.
    for kind in kinds.alternatives(option.kind):
        try:
            return _parse_as(kind, texts)
        except ValueError:
            continue
    raise ValueError(
        f"{option.flag} expects {kinds.spelled_kind(option.kind)}, got `{' '.join(texts)}`"
    )


def _check_spaces(flag: str, texts: list[str]) -> None:
    """Refuses `q_proj,v_proj`, which would be taken for a regular expression."""
    for text in texts:
        if re.fullmatch(r"[\w.]+(,[\w.]+)+,?|[\w.]+,", text):
            apart = " ".join(text.split(",")).strip()
            raise ValueError(f"{flag} takes a list with spaces, got `{text}`: write {flag} {apart}")


def _parse_as(kind: Any, texts: list[str]) -> Any:
    if kinds.is_mapping(kind):
        item = typing.get_args(kind)[1]
        pairs = [_parse_pair(part, item) for text in texts for part in _pairs(text, item)]
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError
        return found
    if kinds.is_list(kind):
        item = typing.get_args(kind)[0]
        # A single text that is not a plain name is a regular expression or a word such as
        # "all-linear"; the alternative `str` of the setting's type takes it.
        if item is str and len(texts) == 1 and not re.fullmatch(r"[A-Za-z_][\w.]*", texts[0]):
            raise ValueError
        return tuple(_parse_one(item, text) for text in texts)
    if len(texts) != 1:
        raise ValueError
    return _parse_one(kind, texts[0])


def _parse_one(kind: Any, text: str) -> Any:
    if kinds.is_choice(kind):
        if text not in typing.get_args(kind):
            raise ValueError
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    return kind(text)


def _pairs(text: str, item: type) -> list[str]:
    """Splits `fsdp=4,tensor=2`, but no comma in a list of values or in a pattern."""
    parts = text.split(",")
    apart = not kinds.is_list(item) and all("=" in part for part in parts)
    return parts if apart else [text]


def _parse_pair(text: str, item: type) -> tuple[str, Any]:
    # From the right: a pattern, as a name, may hold a "=".
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise ValueError
    if kinds.is_list(item):
        return name, tuple(typing.get_args(item)[0](part) for part in value.split(","))
    return name, item(value)


# --- the file -----------------------------------------------------------------------------------


def from_toml(path: str | Path, found: Sequence[Option]) -> Values:
    """Reads settings from a TOML file.

    Args:
      path: the file.
      found: the known settings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not TOML, has an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; give the path of a TOML file")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except RecursionError:  # of thousands of brackets
        raise ValueError(f"{path}: not a TOML file: nested too deeply") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = f"; data are given as --train-data {path}" if path.suffix == ".jsonl" else ""
        raise ValueError(f"{path}: not a TOML file: {error}{hint}") from None
    # Keys are checked against all settings, so that a misspelled one is never ignored.
    known = {option.key: option for option in found}
    sections = {option.section for option in found}
    values: Values = {}
    for key, value in _flat(content, sections - {""}, path):
        if key not in known and isinstance(value, Mapping):
            tables = ", ".join(f"[{section}]" for section in sorted(sections - {""}))
            raise ValueError(f"{path}: there is no table [{key}]; the tables are {tables}")
        if key not in known:
            # Python's spelling, whichever table it stands in.
            spelled = {option.flag[2:]: option.key for option in found}
            hint = instead(key.rpartition(".")[2].replace("_", "-"), spelled, '{} = "{}"')
            raise ValueError(f"{path}: there is no setting `{key}`{hint}")
        values[known[key].section, known[key].name] = _checked(known[key], value, path)
    return values


def _flat(content: Mapping[str, Any], sections: set[str], path: Path) -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if key not in sections:
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            raise ValueError(f"{path}: `{key}` must be a table, written [{key}], got {value!r}")


def _checked(option: Option, value: Any, path: Path) -> Any:
    # Lists as tuples, which frozen dataclasses hold.
    value = _tuples(value)
    for kind in kinds.all_kinds(option.kind):
        if _fits(value, kind):
            return Path(value) if kind is Path else value
    raise ValueError(
        f"{path}: `{option.key}` expects {kinds.spelled_kind(option.kind)}, got {_in_toml(value)}"
    )


def _in_toml(value: Any) -> str:
    """A value as the file has it: a text in quotes, a list in brackets."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_in_toml, value))}]"
    return json.dumps(value) if isinstance(value, str) else kinds.spelled(value)


def _tuples(value: Any) -> Any:
    """Lists as tuples, in a table's values too."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kinds.is_mapping(kind):
        item = typing.get_args(kind)[1]
        return isinstance(value, Mapping) and all(_fits(v, item) for v in value.values())
    if kinds.is_choice(kind):
        return value in typing.get_args(kind)
    if kinds.is_list(kind):
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(v, item) for v in value)
    # In Python a bool is an integer, in TOML it is not.
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    # TOML has no paths, and 3 is a number too.
    return isinstance(value, {float: (int, float), Path: str}.get(kind, kind))


# --- both ---------------------------------------------------------------------------------------


def build(section: Section, values: Values) -> Any:
    """Builds the section's dataclass from its values.

    Raises:
      ValueError: a required setting is missing, or the dataclass rejects a value.
    """
    given = {name: value for (where, name), value in values.items() if where == section.name}
    for option in _options_of(section):
        if option.default is dataclasses.MISSING and option.name not in given:
            raise ValueError(
                f"`{option.key}` is missing: give {option.flag}, or {option.key} in the config file"
            )
    return section.cls(**given)
