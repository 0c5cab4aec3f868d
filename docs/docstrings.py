"""A griffe extension: what our docstrings write shorter than Google's style has it.

The lines of an `Example:` are shown as code, and `a, b: text` describes `a` and `b`.
"""

import re

import griffe

SEVERAL = re.compile(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)+): ")
SECTION = re.compile(r"^(\w+):$")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """The docstring in Google's style."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        if SECTION.match(line):
            sections.append([])
        sections[-1].append(line)
    return "\n".join("\n".join(_section(lines)) for lines in sections)


def _section(lines: list[str]) -> list[str]:
    if lines and lines[0] == "Example:":
        return _fenced(lines)
    if lines and lines[0] in ("Args:", "Attributes:"):
        return _apart(lines)
    return lines


def _fenced(lines: list[str]) -> list[str]:
    """An example with fences, unless it is one of prompts, which are code already."""
    body = lines[1:]
    if any(line.lstrip().startswith(">>>") for line in body):
        return ["Examples:", *body]
    inside = [line for line in body if not line or line.startswith("  ")]
    while inside and not inside[-1]:
        inside.pop()
    return [lines[0], "  ```python", *inside, "  ```", *body[len(inside) :]]


def _apart(lines: list[str]) -> list[str]:
    """One entry for each name of `a, b: text`."""
    out: list[str] = []
    entry: list[str] = []
    for line in [*lines, ""]:
        if not line.startswith("    "):
            out += _entries(entry)
            entry = []
        entry.append(line)
    return out + entry[:-1]


def _entries(entry: list[str]) -> list[str]:
    found = SEVERAL.match(entry[0]) if entry else None
    if found is None:
        return entry
    rest = entry[0][found.end() :]
    return [line for name in found[1].split(", ") for line in (f"  {name}: {rest}", *entry[1:])]
