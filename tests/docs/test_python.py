"""The Python of pages runs, and prints what they show.

A page's Python blocks run one after the other, in one namespace and an empty folder, as a reader
who pastes them would run them. A `text` block behind a Python block is what that block prints, or
the error it raises.
"""

import pytest

from tests.support.pages import LANGUAGE_MODELS, PAGES, PYTHON, alike, blocks, run, run_page

pytestmark = pytest.mark.once

# What a page needs beside the package; a test dependency.
NEEDS = {"docs/guides/equinox.md": "equinox", "docs/guides/haiku.md": "haiku"}
# Shows the package's own errors of wrong arguments.
WRONG = pytest.param("docs/guides/troubleshooting.md", marks=pytest.mark.wrong_types)
RUN = [name for name in PYTHON if name not in (*LANGUAGE_MODELS, WRONG.values[0])]


@pytest.mark.parametrize("name", [*RUN, WRONG])
def test_the_python_of_a_page_runs(name, empty_folder):
    pytest.importorskip(NEEDS.get(name, "jax"))
    run_page(name)


def test_the_first_block_of_the_readme_learns_and_merges():
    names = executed(1)
    assert names["loss"](names["trainable"]) < 0.2 * names["loss"](
        names["lora"].split(names["lora_params"])[0]
    )
    base = names["params"]["up"]["kernel"]
    leaf = names["lora"].combine(names["trainable"], names["frozen"])["up"]["kernel"]
    assert abs(names["merged"]["up"]["kernel"] - (base + 2.0 * leaf.a @ leaf.b)).max() < 1e-5


def executed(count: int) -> dict:
    """The names after the first Python blocks of the README."""
    names: dict = {}
    python = [b for b in blocks(PAGES["README.md"]) if b.language == "python"]
    for block in python[:count]:
        run("README.md", block, None, names)
    return names


def test_texts_are_compared_by_words_and_numbers():
    assert alike("a  1.2345 b\n", "a 1.2351 b")
    assert alike("a 12 rows x.py:3 (why)", "a 12 rows ... (why)")
    assert not alike("a 1.2345 b", "a 1.5 b")
    assert not alike("a 12 rows", "a 13 rows")
    assert not alike("a 12 rows", "a 12")
