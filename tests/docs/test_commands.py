"""Commands, flags and settings that pages show exist."""

import re
import shlex
import tomllib

import pytest

from lora_jax.cli import commands, settings
from lora_jax.cli.parser import COMMANDS, parse
from lora_jax.train import load_jsonl

from tests.support.pages import PAGES, blocks
from tests.support.places import ROOT

pytestmark = pytest.mark.once

SHELL = [
    (name, line)
    for name, path in PAGES.items()
    for block in blocks(path)
    if block.language in ("bash", "console")
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
RULES = set(re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize(("name", "line"), SHELL, ids=[f"{n}:{x[:40]}" for n, x in SHELL])
def test_a_command_of_a_page_is_one(name, line):
    """Commands and flags exist; arguments are of their types."""
    words = shlex.split(line.split(" < ")[0], comments=True)
    if words[0] == "lora-jax":
        arguments = parse(words[1:])
        sections = getattr(commands, f"{words[1]}_sections", None)
        if sections is not None:
            settings.from_flags(arguments, settings.options(sections()))
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert targets and all(word in RULES or room_target(word) for word in targets)
    elif words[:2] == ["pip", "install"]:
        assert re.fullmatch(r"lora-jax(\[\w+\])?", words[2])
        assert all(extra in EXTRAS for extra in re.findall(r"\[(\w+)\]", words[2]))
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("cat", "llama-cli", "llama-server", "python", "vllm"), words[0]


def test_the_targets_that_pages_name_are_in_the_makefile():
    text = "\n".join(path.read_text("utf-8") for path in PAGES.values())
    named = set(re.findall(r"`make ([a-z-]+)", text)) - {"test-"}
    assert "test" in named
    assert not [word for word in named if word not in RULES and not room_target(word)]


def room_target(word: str) -> bool:
    """`make test-hf-peft` for a folder of tests, `make test-merge` for a file."""
    room = word.removeprefix("test-")
    folder, file = ROOT / "tests" / room.replace("-", "/"), ROOT / "tests" / f"test_{room}.py"
    return "test-%" in RULES and (folder.is_dir() or file.is_file())


TABLES = [
    (f"{name}:{block.line}", block.text)
    for name, path in PAGES.items()
    for block in blocks(path)
    if block.language == "toml"
]


@pytest.mark.parametrize(("name", "text"), TABLES, ids=[name for name, _ in TABLES])
def test_a_settings_file_of_a_page_is_one(name, text, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text, "utf-8")
    sections = commands.train_sections()
    values = settings.from_toml(file, settings.options(sections))
    assert [settings.build(section, values) for section in sections]


def test_the_data_that_pages_show_can_be_read(tmp_path):
    shown = [b for path in PAGES.values() for b in blocks(path) if b.language == "json"]
    assert shown
    for block in shown:
        file = tmp_path / f"{block.line}.jsonl"
        file.write_text(block.text, "utf-8")
        assert len(load_jsonl(file)) == len(block.text.splitlines())


def test_every_command_is_in_the_reference_and_the_readme():
    for page in ("docs/reference/cli.md", "README.md"):
        text = PAGES[page].read_text("utf-8")
        assert set(COMMANDS) == set(re.findall(r"^lora-jax (\w+)", text, re.MULTILINE)), page
