"""The reference is complete, and pages name files, tables and pages that are there."""

import importlib
import re

import pytest

from tests.support.pages import PAGES, blocks
from tests.support.places import ROOT

pytestmark = pytest.mark.once

FACES = (
    "lora_jax", "lora_jax.linen", "lora_jax.nnx", "lora_jax.sharding", "lora_jax.quant",
    "lora_jax.multi", "lora_jax.hf", "lora_jax.models", "lora_jax.checkpoint", "lora_jax.train",
    "lora_jax.analysis", "lora_jax.recipes", "lora_jax.cli",
)  # fmt: skip


def public_names(face: str) -> set[str]:
    """What a package offers, without its modules: each of those has names of its own."""
    module = importlib.import_module(face)
    return {
        f"{face}.{name}"
        for name in module.__all__
        if not isinstance(getattr(module, name), type(importlib))
    }


def value_of(name: str):
    package, _, last = name.rpartition(".")
    return getattr(importlib.import_module(package), last)


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text("utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    named = re.findall(r"^::: (lora_jax[\w.]*)$", text, re.MULTILINE)
    assert len(named) == len(set(named)), "a name stands twice in the reference"
    # What two packages offer is described once.
    described = {id(value_of(name)) for name in named}
    public = set().union(*map(public_names, FACES))
    missing = {name for name in public if id(value_of(name)) not in described}
    assert not missing, f"not in docs/reference: {sorted(missing)}"
    for name in named:
        assert getattr(value_of(name), "__doc__", None), f"{name} has no docstring"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/-]+\.md", nav))
    pages = {str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md")}
    assert pages <= listed


def test_the_readme_is_short():
    lines = PAGES["README.md"].read_text("utf-8").splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 100
    first = next(b for b in blocks(PAGES["README.md"]) if b.language == "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 15


def test_the_readme_links_to_files():
    links = re.findall(r"\]\(([^)]+)\)", PAGES["README.md"].read_text("utf-8"))
    assert links and all((ROOT / link).is_file() for link in links)


def test_files_that_pages_name_are_there():
    known = "(?:lora_jax|tests|docs|examples|benchmarks)"
    for name, path in PAGES.items():
        if name.startswith("docs/reference"):
            continue
        for file in re.findall(rf"`({known}/[\w./-]*)`", path.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{name} names {file}"


def test_tables_that_contributing_names_are_there():
    text = PAGES["CONTRIBUTING.md"].read_text("utf-8")
    named = re.findall(r"`([A-Z_]+)`\s+in\s+`(lora_jax/[\w/]+\.py)`", text)
    assert len(named) >= 4
    for table, file in named:
        assert re.search(rf"^{table}\b", (ROOT / file).read_text("utf-8"), re.MULTILINE), table
