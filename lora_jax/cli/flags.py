"""The flags of a command: what to write for an unknown one, and Python's arguments as flags."""

import argparse
import ast
import difflib
import itertools
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.config.elsewhere import ELSEWHERE


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long flags of a command."""
    return [f for a in parser._actions for f in a.option_strings if f.startswith("--")]


# Flags whose text may be empty.
_TEXTUAL = ("--system", "--message")


def fault_of(argv: Sequence[str], unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What is wrong with a command line that could be read: an unknown argument, or an empty one.

    An empty path would be the folder that the command runs in.

    Args:
      argv: the words behind the program's name.
      unknown: those that the command does not have.
      parser: of the command.
    """
    if unknown:
        hint = instead_of_flag(unknown[0], parser)
        return f"`{unknown[0]}` is no argument of this command{hint}"
    for before, word in itertools.pairwise(argv):
        flag, equals, value = word.partition("=")
        # `generate MODEL ""` continues the empty prompt.
        prompt = argv[0] == "generate" and before != "generate" and not before.startswith("--")
        name = flag if flag.startswith("--") and equals else before if not word else ""
        if not value and name and name not in _TEXTUAL and not prompt:
            shown = f"`{name}`" if name.startswith("--") else "an argument"
            return f"{shown} is empty: is a variable of the shell not set?"
    return ""


def instead_of_flag(unknown: str, parser: argparse.ArgumentParser) -> str:
    """What to write for a flag that the command has not; empty where nothing is known."""
    # transformers' scripts spell flags with underscores, and some people write --flag=value.
    flag = unknown.partition("=")[0].replace("_", "-")
    if not flag.startswith("-"):
        return ""
    return instead(flag[2:], {known[2:]: known for known in flags_of(parser)}, "{} {}")


def instead(unknown: str, spelled: Mapping[str, str], with_value: str) -> str:
    """What to write for a setting that there is not.

    Args:
      unknown: its name, with dashes.
      spelled: the names that there are, with dashes, and how each is written.
      with_value: the form of a setting with its value, `"{} {}"`.
    """
    setting, _, value = ELSEWHERE.get(unknown.replace("-", "_"), "").partition("=")
    name = unknown if unknown in spelled else setting.replace("_", "-")
    if name in spelled:
        return f": it is {with_value.format(spelled[name], value) if value else spelled[name]} here"
    # Below some likeness the nearest name has nothing to do with what was meant.
    like = difflib.get_close_matches(unknown, spelled, n=3, cutoff=0.65)
    listed = ", ".join(f"`{spelled[name]}`" for name in like)
    return f"; the nearest are {listed}" if like else ", and none is like it"


# Arguments of functions that a command's setting of another name becomes.
_SETTINGS = {
    "batch": "batch_size",
    "block_size": "quantize_block",
    "format": "quantize",
    "length": "max_length",
}

_NAME = r"[a-z][a-z0-9_]*"
# A call such as `lora.quantize(params, format="int8")`: its keywords stay Python's.
_CALL = r"[\w.]+\([^()]*\)"
_VALUE = r"\"[^\"]*\"|'[^']*'|\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]|[\w.+-]*\w"
_GIVEN = rf"(?P<tick>`?)(?<![\w\"'./\\-])(?P<given>{_NAME})=(?P<value>{_VALUE})(?P=tick)"
_TEXTS = re.compile(rf"{_CALL}|{_GIVEN}|`(?P<named>{_NAME})`")


def in_flags(text: str, flags: Collection[str]) -> str:
    """Python's `too_long="truncate"` as `--too-long truncate`, where the command has that flag.

    In errors and warnings of this package an argument's name stands in backticks or before its
    value. Names of other things that a flag could have too, such as keys of a file and axes of a
    mesh, stand in quotes.

    Args:
      text: an error or a warning of the library, in one line.
      flags: the long flags of the command.
    """

    def flag_of(name: str | None) -> str:
        flag = "--" + _SETTINGS.get(name or "", name or "").replace("_", "-")
        return flag if flag in flags else ""

    def spelled(found: re.Match) -> str:
        if flag := flag_of(found["given"]):
            given = _with_value(flag, found["value"])
            return f"`{given}`" if found["tick"] else given
        flag = flag_of(found["named"])
        return f"`{flag}`" if flag else found[0]

    return _TEXTS.sub(spelled, text)


def _with_value(flag: str, value: str) -> str:
    try:
        read = ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a word such as `axis=devices`
        read = value
    if isinstance(read, bool):
        return flag if read else f"--no-{flag[2:]}"
    return f"{flag} {_words(read)}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{shlex.quote(str(k))}={_listed(v)}" for k, v in value.items())
    if isinstance(value, tuple | list):
        return " ".join(map(_words, value))
    return "none" if value is None else shlex.quote(str(value))


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else _words(value)
