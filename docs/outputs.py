"""Runs the Python of pages and writes what it prints into the `text` blocks behind it.

    python docs/outputs.py docs/start.md docs/guides/qlora.md

An output that still fits, within the tolerances of the tests, stays as it is. For an error, write a
block that begins with its name, "ValueError: ", and the rest is filled in.
"""

import contextlib
import importlib
import io
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

FENCE = re.compile(r"(^```\w*[^\n]*\n.*?^```$)", re.DOTALL | re.MULTILINE)


def main(names: list[str]) -> None:
    importlib.import_module("tests.conftest")  # the environment of the tests, before JAX
    from lora_jax import models

    from tests.support import pages as tests

    small = tests.write_small_model(Path(tempfile.mkdtemp()))
    models.find_smollm2 = lambda: small
    for page in names:
        path = Path(page).resolve()
        os.chdir(tempfile.mkdtemp())
        path.write_text(refreshed(path.read_text("utf-8"), tests), "utf-8")
        os.chdir(ROOT)


def refreshed(text: str, tests) -> str:
    """The page with its outputs as they are now."""
    parts = FENCE.split(text)
    names: dict = {"__name__": "__main__"}
    printed = None
    for i in range(1, len(parts), 2):
        opening, _, rest = parts[i].partition("\n")
        language, body = opening.removeprefix("```").strip(), rest.removesuffix("```")
        if language == "python":
            following = parts[i + 2] if i + 2 < len(parts) else ""
            shown = following.removeprefix("```text\n") if "```text\n" in following else None
            printed = output(body, tests.raised_by(shown), names)
        elif language == "text" and printed is not None and not tests.alike(printed, body):
            parts[i] = f"```text\n{printed.rstrip()}\n```"
        if language != "python":
            printed = None
    return "".join(parts)


def output(code: str, error: type[Exception] | None, names: dict) -> str:
    """What a block prints, or the text of the error that it is to raise."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(code, "model.py", "exec"), names)
        except Exception as raised:
            if error is None or not isinstance(raised, error):
                raise
            print(
                *textwrap.wrap(f"{error.__name__}: {raised}", 96, break_long_words=False,
                               break_on_hyphens=False),
                sep="\n",
            )  # fmt: skip
    return out.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
