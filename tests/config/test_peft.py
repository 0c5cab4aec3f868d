"""LoraConfig against PEFT's own: the same fields, the same defaults, files that both read."""

import json

import peft
import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from lora_jax.config import peft as peft_config
from lora_jax.config.lora import LoraConfig

from tests.config.test_lora import FULL, full

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def written(config: peft.LoraConfig, directory) -> dict:
    config.save_pretrained(str(directory))
    return json.loads((directory / "adapter_config.json").read_text())


def test_every_field_of_peft_is_in_one_table(tmp_path):
    theirs = written(peft.LoraConfig(target_modules=["q_proj"], inference_mode=True), tmp_path)
    tables = (peft_config.MAPPED, peft_config.CARRIED, peft_config.REFUSED)
    assert sorted(theirs) == sorted(name for table in tables for name in table)
    assert full() == theirs


def test_default_targets_are_pefts():
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = peft_config.DEFAULT_TARGETS
    assert {k: v if isinstance(v, str) else list(v) for k, v in ours.items()} == theirs


def test_defaults_are_pefts():
    theirs = peft.LoraConfig().to_dict()
    for name, (_, default) in peft_config.MAPPED.items():
        assert theirs[name] == default, name
    for name, off in peft_config.REFUSED.items():
        assert theirs[name] == off, name


KNOWN_TO_PEFT = [f for f in FULL if "future_feature" not in f]


@pytest.mark.parametrize("fields", KNOWN_TO_PEFT, ids=str)
def test_peft_reads_what_we_write_and_back(fields, tmp_path):
    ours = LoraConfig.from_peft(full(**fields))
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours.to_peft(), indent=2))
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert isinstance(theirs, peft.LoraConfig)
    back = written(theirs, tmp_path)
    for name in ("target_modules", "exclude_modules"):  # PEFT keeps lists as sets
        if isinstance(back[name], list):
            assert sorted(back[name]) == sorted(full(**fields)[name])
            back[name] = full(**fields)[name]
    assert LoraConfig.from_peft(back) == ours
