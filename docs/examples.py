"""A griffe extension: the lines of a docstring's `Example:` are shown as code."""

import griffe


class Examples(griffe.Extension):
    """Puts the text of `Example:` sections between fences."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The docstring with fences around each example, and their indentation kept.

    >>> print(fenced("One line.\\n\\nExample:\\n  x = 1\\n\\nSource: a paper"))
    One line.
    <BLANKLINE>
    Example:
      ```python
      x = 1
      ```
    <BLANKLINE>
    Source: a paper
    """
    out: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if inside and line and not line.startswith(" "):
            inside = _close(out)
        out.append(line)
        if line == "Example:":
            out.append("  ```python")
            inside = True
    if inside:
        _close(out)
    return "\n".join(out).rstrip("\n")


def _close(out: list[str]) -> bool:
    blank = 0
    while not out[-1]:
        out.pop()
        blank += 1
    out += ["  ```", *[""] * blank]
    return False
