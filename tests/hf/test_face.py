"""`lora_jax.hf`: each name is imported at its first use, and a stub lists the same names."""

import ast
from pathlib import Path

import pytest

from lora_jax import hf

pytestmark = pytest.mark.once

STUB = Path(hf.__file__).with_suffix(".pyi")


def test_every_name_is_found():
    assert [name for name in dir(hf) if getattr(hf, name, None) is None] == []


def test_the_stub_names_the_same_objects():
    found = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.parse(STUB.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {name: f"{module}.{name}" for name, module in hf._NAMES.items()}
    assert found == names | hf._MODULES


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="'lora_jax.hf' has no attribute 'peff'"):
        hf.peff  # noqa: B018
