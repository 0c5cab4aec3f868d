"""An adapter of query and value, as a tree and as a PEFT directory."""

import pytest

from lora_jax.hf.peft import api

from tests.support.peft_trees import QV, planted, random_params, randomized


@pytest.fixture
def tree():
    return randomized(planted(random_params(), QV), QV)


@pytest.fixture
def directory(tree, tmp_path):
    api.save_peft(tmp_path / "adapter", tree, QV)
    return tmp_path / "adapter"
