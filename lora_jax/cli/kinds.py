"""The types that a setting may have: their parts, and their names in errors and help."""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal


def all_kinds(kind: Any) -> list:
    """The members of a union, or the type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return list(typing.get_args(kind))
    return [kind]


def alternatives(kind: Any) -> list:
    """The types a value may have, without None: numbers before tuples, and text last.

    The order decides how a flag with one value is read: as a number where a number or a list of
    numbers is allowed, and as a list of one name where a list of names or any text is.
    """
    kinds = [k for k in all_kinds(kind) if k is not types.NoneType]
    return sorted(kinds, key=lambda k: 2 * (k is str) + is_list(k))


def is_list(kind: Any) -> bool:
    """Whether it is `tuple[X, ...]` or `Sequence[X]`; `str` is none, though it is a sequence."""
    return typing.get_origin(kind) in (tuple, Sequence)


def is_choice(kind: Any) -> bool:
    """Whether it is a `Literal`."""
    return typing.get_origin(kind) is Literal


def is_mapping(kind: Any) -> bool:
    """Whether it is `dict[str, X]` or `Mapping[str, X]`."""
    origin = typing.get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


# Words for users of the command line, who need not know Python.
_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
    types.NoneType: '"none"',
}


def spelled_kind(kind: Any) -> str:
    """A type in words: `an integer or "none"`."""
    words = []
    for one in all_kinds(kind):
        if is_mapping(one):
            value = typing.get_args(one)[1]
            each = "" if value is str else f" whose VALUE is {spelled_kind(value)}"
            words.append(f"NAME=VALUE pairs{each}, each NAME once")
        elif is_choice(one):
            words.append(f"one of {', '.join(typing.get_args(one))}")
        elif is_list(one):
            words.append(f"a list, each {spelled_kind(typing.get_args(one)[0])}")
        else:
            words.append(_KIND_NAMES.get(one, str(one)))
    return " or ".join(words)


def spelled(value: Any) -> str:
    """A value as it is written on the command line: nothing is "none"."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None or value == {} else str(value)
