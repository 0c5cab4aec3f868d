"""The examples run, and do what they say."""

import json
import runpy
from pathlib import Path

import pytest

from tests.support.places import ROOT

pytestmark = pytest.mark.once

EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))


def run(name: str, *args) -> dict:
    (path,) = [p for p in EXAMPLES if p.stem == name]
    return runpy.run_path(str(path))["main"](*args)


def test_quickstart():
    found = run("01_quickstart")
    assert found["before"] > 0.3
    assert found["after"] < 0.01
    # float32: the adapted and the merged function add in another order
    assert abs(found["merged"] - found["after"]) < 1e-5


def test_linen():
    found = run("02_linen")
    assert found["losses"][-1] < 0.6 * found["losses"][0]
    assert found["difference"] < 1e-4


def test_nnx():
    found = run("03_nnx")
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    assert found["right"]["base"] < 0.6 < 0.9 < found["right"]["adapted"]
    assert found["right"]["merged"] == found["right"]["adapted"]


@pytest.mark.slow
def test_own_model_map():
    found = run("06_own_model_map")
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    # Two programs of the same arithmetic in float32.
    assert found["gap"] < 1e-4 and found["apart"] < 1e-4 and found["same"]


def test_optax_masked():
    found = run("04_optax_masked")
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    assert found["faster"][20] < found["losses"][20]
    assert found["ratio"] == 2 and found["unmoved"]


@pytest.mark.slow
def test_train_llm(tmp_path):
    found = run("05_train_llm", tmp_path)
    assert found["losses"][-1] < 0.05
    assert found["said"] == ["rouge", "bleu"]
    assert found["same"]


def test_many_adapters():
    found = run("07_many_adapters", True)
    assert found["right"] == found["checked"] >= 4
    # Rows are refilled as they come free: 24 requests of 12 tokens in 8 rows.
    assert found["steps"] < 24 * 12 / 8 + 12 and found["slots"] >= 8
    assert found["different"] > 12


def test_every_example_is_tested_here():
    here = Path(__file__).read_text("utf-8")
    assert len(EXAMPLES) >= 5
    for path in EXAMPLES:
        assert f'run("{path.stem}"' in here, path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_says_what_it_shows(path):
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith('"""') and lines[0].endswith(".")


SHARED = {"in_transformers", "openpi_layers"}  # what programs import
INTEGRATIONS = sorted(
    path for path in (ROOT / "examples" / "integrations").glob("*.py") if path.stem not in SHARED
)


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda p: p.stem)
def test_every_integration_is_short_tested_recorded_and_on_the_page(path):
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith('"""') and len(lines) <= 60
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests/integrations").glob("test_*.py"))
    assert f'figures_of("{path.stem}"' in tests
    page = ROOT / "docs" / "integrations"
    record = json.loads((page / "figures" / f"{path.stem}.json").read_text("utf-8"))
    assert record["lines"] == len(lines), "LORA_JAX_FIGURES=record make integrations"
    assert f"`{path.stem}.py`" in (page / "index.md").read_text("utf-8").rpartition("| ")[2]


def test_the_table_of_integrations_is_that_of_the_figures():
    page = runpy.run_path(str(ROOT / "docs" / "integrations.py"))
    text = page["PAGE"].read_text("utf-8")
    assert page["START"] + page["table"]() + page["END"] in text, (
        "run `python docs/integrations.py`"
    )
