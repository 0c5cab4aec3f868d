"""Runs a program of examples/integrations, and compares or records its figures."""

import ast
import json
import os
import runpy
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.support.places import ROOT

PROGRAMS = ROOT / "examples" / "integrations"
FIGURES = ROOT / "docs" / "integrations" / "figures"
RECORD = "LORA_JAX_FIGURES"  # =record, for `make integrations`


def figures_of(name: str, *packages: str) -> dict[str, Any]:
    """What a program's `main` returns; it is written beside the documentation when asked for.

    Args:
      name: the program's file name without its suffix.
      *packages: the distributions it is for, whose versions are recorded.

    A call that raises, as after a release that has changed it, fails the test in one sentence.
    """
    path = PROGRAMS / f"{name}.py"
    versions = {package: metadata.version(package) for package in (*packages, "jax", "lora-jax")}
    try:
        # As for `python PATH`: what programs share lies beside them.
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(path.parent)
            figures = runpy.run_path(str(path))["main"]()
    except Exception as error:
        pytest.fail(changed_call(path, error, versions))
    record = {
        "figures": figures,
        "lines": len(path.read_text("utf-8").splitlines()),
        "versions": versions,
    }
    if os.environ.get(RECORD) == "record":
        FIGURES.mkdir(exist_ok=True)
        text = json.dumps(record, indent=1, sort_keys=True)
        (FIGURES / f"{name}.json").write_text(text + "\n", "utf-8")
    return figures


def changed_call(path: Path, error: Exception, versions: dict[str, str]) -> str:
    """Which call of a program raised, and with which versions it last worked."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if frame.filename == str(path)]
    # Without a line the program is no Python at all.
    call, line = ("the file", 0) if not lines else (_source(path, lines[-1]), lines[-1].lineno)
    recorded = FIGURES / f"{path.stem}.json"
    worked = json.loads(recorded.read_text("utf-8"))["versions"] if recorded.exists() else {}
    changed = {name: x for name, x in worked.items() if versions.get(name) != x}
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    before = ", ".join(f"{package} {version}" for package, version in changed.items())
    return (
        f"{path.name}:{line}: `{call}` raises {type(error).__name__} ({error}) with {installed}; "
        f"it worked with {before or 'the same versions'}"
    )


def _source(path: Path, frame: traceback.FrameSummary) -> str:
    """The text of the call that a frame is in, or of its line."""
    text = path.read_text("utf-8")
    for node in ast.walk(ast.parse(text)):
        place = tuple(getattr(node, name, None) for name in ("lineno", "end_lineno", "col_offset"))
        if place == (frame.lineno, frame.end_lineno, frame.colno):
            if getattr(node, "end_col_offset", None) == frame.end_colno:
                return " ".join((ast.get_source_segment(text, node) or "").split())
    return frame.line or ""
