"""The README and the documentation tell the truth: what they show is run, in their order.

A page's Python blocks run one after the other, in one namespace and an empty folder, as a reader
who pastes them would run them. A `text` block behind a Python block is what that block prints, or
the error it raises. "smollm2" is a model of the same form that is small enough for a test.
"""

import builtins
import contextlib
import importlib
import io
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from lora_jax import models
from lora_jax.cli import commands, settings
from lora_jax.cli.parser import COMMANDS, parse

from tests.support import tiny
from tests.support.places import ROOT

pytestmark = pytest.mark.once

PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
# What a page needs beside the package; a test dependency.
NEEDS = {"docs/guides/equinox.md": "equinox", "docs/guides/haiku.md": "haiku"}
FACES = (
    "lora_jax", "lora_jax.linen", "lora_jax.nnx", "lora_jax.quant", "lora_jax.multi",
    "lora_jax.hf", "lora_jax.models", "lora_jax.checkpoint", "lora_jax.train",
    "lora_jax.analysis",
)  # fmt: skip


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


def write_small_model(directory: Path) -> Path:
    """A Hugging Face directory of a decoder whose weights divide into blocks of 64."""
    from lora_jax.models.saving import save_model

    tokenizer = tiny.tiny_tokenizer()
    config = models.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_ids=(tokenizer.eos_id,),
        pad_token_id=tokenizer.pad_id,
        initializer_range=0.2,
    )
    fresh = models.init(jax.random.key(0), config)
    model = models.Model(fresh.forward, fresh.params, tokenizer)
    save_model(directory / "smollm2", model, fresh.params)
    return directory / "smollm2"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_of_a_page_runs(name, small_model, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "jax"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "find_smollm2", lambda: small_model)
    every = blocks(PAGES[name])
    names: dict = {"__name__": "__main__"}
    for block, after in zip(every, [*every[1:], None], strict=True):
        if block.language == "python":
            shown = after.text if after is not None and after.language == "text" else None
            run(name, block, shown, names)


def test_the_first_block_of_the_readme_learns_and_merges():
    names = executed(1)
    assert names["loss"](names["trainable"]) < 0.2 * names["loss"](
        names["lora"].split(names["lora_params"])[0]
    )
    base = names["params"]["up"]["kernel"]
    leaf = names["lora"].combine(names["trainable"], names["frozen"])["up"]["kernel"]
    assert abs(names["merged"]["up"]["kernel"] - (base + 2.0 * leaf.a @ leaf.b)).max() < 1e-5


@pytest.mark.slow
def test_the_readme_runs_with_the_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = executed(2)
    losses = [r["loss"] for r in names["result"].history if r["kind"] == "train"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def executed(count: int) -> dict:
    """The names after the first Python blocks of the README."""
    names: dict = {}
    python = [b for b in blocks(PAGES["README.md"]) if b.language == "python"]
    for block in python[:count]:
        run("README.md", block, None, names)
    return names


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


def test_texts_are_compared_by_words_and_numbers():
    assert alike("a  1.2345 b\n", "a 1.2351 b")
    assert alike("a 12 rows x.py:3 (why)", "a 12 rows ... (why)")
    assert not alike("a 1.2345 b", "a 1.5 b")
    assert not alike("a 12 rows", "a 13 rows")
    assert not alike("a 12 rows", "a 12")


SHELL = [
    (name, line)
    for name, path in PAGES.items()
    for block in blocks(path)
    if block.language in ("bash", "console")
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
RULES = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
] | {"llm": []}


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
    else:
        assert words[0] in ("cat", "llama-cli", "llama-server", "python", "vllm"), words[0]


def room_target(word: str) -> bool:
    """`make test-ROOM` for a folder of tests."""
    room = word.removeprefix("test-")
    return any(rule.endswith("-%") for rule in RULES) and (ROOT / "tests" / room).is_dir()


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


def public_names(face: str) -> set[str]:
    """What a package offers: `__all__`, or else what its face imports."""
    module = importlib.import_module(face)
    listed = getattr(module, "__all__", None) or getattr(module, "_NAMES", None)
    if listed is None:
        listed = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and not isinstance(value, type(importlib))
            and (face not in ("lora_jax.linen", "lora_jax.nnx")
                 or getattr(value, "__module__", "") == face)
        ]  # fmt: skip
    return {
        f"{face}.{name}" for name in listed
        if not name.startswith("_") and not isinstance(getattr(module, name), type(importlib))
    }  # fmt: skip


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


def test_every_command_is_in_the_reference_and_the_readme():
    for page in ("docs/reference/cli.md", "README.md"):
        text = PAGES[page].read_text("utf-8")
        assert set(COMMANDS) == set(re.findall(r"^lora-jax (\w+)", text, re.MULTILINE)), page


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
