"""Pages of the documentation: their blocks, and how a block of Python is run and compared."""

import builtins
import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import tiny
from tests.support.places import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page where it starts."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found, text = [], page.read_text("utf-8")
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[1], match[2], line))
    return found


PYTHON = [name for name, path in PAGES.items() if any(b.language == "python" for b in blocks(path))]
# The pages that load a language model.
LANGUAGE_MODELS = [
    name for name in PYTHON
    if any("smollm2" in b.text for b in blocks(PAGES[name]) if b.language == "python")
]  # fmt: skip


def run_page(name: str) -> None:
    """Runs a page's Python in its order, in one namespace, and compares what it shows."""
    every = blocks(PAGES[name])
    names: dict = {"__name__": "__main__"}
    for block, after in zip(every, [*every[1:], None], strict=True):
        if block.language == "python":
            shown = after.text if after is not None and after.language == "text" else None
            run(name, block, shown, names)


def run(page: str, block: Block, shown: str | None, names: dict) -> None:
    """Executes a block and compares what it prints, or its error, with what the page shows."""
    out = io.StringIO()
    # A plan's table and a warning name the place of an operation: that of a reader's own file.
    code = compile(block.text, "model.py", "exec")
    error = raised_by(shown)
    with contextlib.redirect_stdout(out):
        try:
            exec(code, names)
        except Exception as raised:
            if error is None or not isinstance(raised, error):
                raised.add_note(f"in the block at {page}:{block.line}")
                raise
            print(f"{error.__name__}: {raised}")
        else:
            assert error is None, f"{page}:{block.line} raises no error"
    if shown is not None:
        assert alike(out.getvalue(), shown), (
            f"{page}:{block.line} prints\n{out.getvalue()}\nand shows\n{shown}"
        )


def raised_by(shown: str | None) -> type[Exception] | None:
    """The error that a block of output is the text of."""
    name = re.match(r"(\w+Error): ", shown or "")
    return getattr(builtins, name[1]) if name else None


def alike(printed: str, shown: str) -> bool:
    """Whether two texts are the same but for spaces, "...", and the last digits of fractions."""
    number = r"[-+]?\d+\.\d+(?:e[-+]\d+)?"
    pattern = [
        ".*?".join(
            f"({number})" if re.fullmatch(number, part) else re.escape(part).replace(r"\ ", r"\s+")
            for part in re.split(rf"({number})", " ".join(piece.split()))
        ).replace(".*?", "")
        for piece in shown.split("...")
    ]
    found = re.fullmatch(".*".join(pattern), " ".join(printed.split()), re.DOTALL)
    if found is None:
        # A "..." takes the spaces around it as well.
        loose = ".*".join(part.strip() for part in pattern)
        found = re.fullmatch(loose, " ".join(printed.split()), re.DOTALL)
    if found is None:
        return False
    given = re.findall(number, shown)
    return all(
        float(x) == pytest.approx(float(y), rel=0.02, abs=1e-6)
        for x, y in zip(found.groups(), given, strict=True)
    )


def write_small_model(directory: Path) -> Path:
    """A Hugging Face directory of a decoder whose weights divide into blocks of 64."""
    return tiny.write_tiny(
        directory / "smollm2", hidden_size=64, intermediate_size=128, head_dim=16
    )
