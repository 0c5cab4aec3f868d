"""The README tells the truth: its Python runs, its commands and files are there."""

import re

import pytest

from tests.support.places import ROOT

pytestmark = pytest.mark.once

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(block: str, names: dict) -> dict:
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_first_block_learns_and_merges(capsys):
    names = run(BLOCKS[0], {})
    assert names["loss"](names["trainable"]) < 0.2 * names["loss"](
        names["lora"].split(names["lora_params"])[0]
    )
    base = names["params"]["up"]["kernel"]
    leaf = names["lora"].combine(names["trainable"], names["frozen"])["up"]["kernel"]
    expected = base + 2.0 * leaf.a @ leaf.b
    assert abs(names["merged"]["up"]["kernel"] - expected).max() < 1e-5
    # 4 * (16 + 64) + 4 * (64 + 4) of those and 16 * 64 + 64 * 4 more
    assert capsys.readouterr().out == (
        "trainable params: 592 || all params: 1,872 || trainable%: 31.6239\n"
    )


@pytest.mark.slow
def test_the_second_block_writes_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(BLOCKS[1], run(BLOCKS[0], {}))
    losses = [r["loss"] for r in names["result"].history if r["kind"] == "train"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_rows_with_adapters_of_their_own_and_a_base_in_four_bits():
    assert len(BLOCKS) == 4
    names = run(BLOCKS[3], run(BLOCKS[2], run(BLOCKS[0], {})))
    model, x, lora = names["model"], names["x"], names["lora"]
    for row, params in ((0, names["params"]), (1, names["ann"]), (2, names["bob"])):
        alone = lora.lorafy(model)(params, x[row : row + 1])[0]
        assert abs(names["answers"][row] - alone).max() < 1e-5
    # Nothing is trained yet: what differs from the base is four bits' rounding.
    assert 0 < abs(names["y_4bit"] - model(names["merged"], x)).max() < 0.5
    assert isinstance(names["small"]["up"]["kernel"], lora.QuantArray)


def test_the_first_block_is_short():
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code) <= 20


def test_every_target_it_names_is_in_the_makefile():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ((?:demo|test|lint)[a-z-]*)", README))
    assert named and named <= rules


def test_every_file_it_names_is_there():
    table = README.split("## Map of the package")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
    missing = [
        path
        for path in paths
        if not any((root / path).exists() for root in (ROOT, ROOT / "lora_jax"))
    ]
    assert len(paths) > 20 and not missing


def test_every_command_it_names_is_one():
    from lora_jax.cli.parser import COMMANDS, parse

    named = re.findall(r"^    lora-jax (\w+)", README, re.MULTILINE)
    assert sorted(named) == sorted(COMMANDS)
    for command in named:
        with pytest.raises(SystemExit, match="0"):
            parse([command, "--help"])
