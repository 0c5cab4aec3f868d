"""A page runs in an empty folder, and "smollm2" is a model small enough for a test."""

from pathlib import Path

import pytest

from lora_jax import models

from tests.support.pages import write_small_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The directory of the model that stands for SmolLM2."""
    return write_small_model(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    """The working directory of a page."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def smollm2_is_small(small_model, monkeypatch) -> None:
    """Loads the small model under SmolLM2's name."""
    monkeypatch.setattr(models, "find_smollm2", lambda: small_model)
