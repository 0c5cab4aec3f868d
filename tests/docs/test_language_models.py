"""The Python of pages that load a language model runs, and prints what they show."""

import pytest

from tests.support.pages import LANGUAGE_MODELS, PAGES, blocks, run, run_page

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_python_of_a_page_runs(name, empty_folder, smollm2_is_small):
    run_page(name)


@pytest.mark.slow
def test_the_readme_runs_with_the_real_model(empty_folder):
    names: dict = {}
    for block in blocks(PAGES["README.md"]):
        if block.language == "python":
            run("README.md", block, None, names)
    losses = [r["loss"] for r in names["result"].history if r["kind"] == "train"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (empty_folder / "adapter" / "adapter_model.safetensors").is_file()
