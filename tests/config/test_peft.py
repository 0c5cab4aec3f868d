"""LoraConfig against PEFT's own: the same fields, the same defaults, files that both read."""

import json
from pathlib import Path

import pytest

from lora_jax.config import peft as peft_config
from lora_jax.config.lora import LoraConfig

from tests.support.oracle import oracle
from tests.support.peft_fields import FULL, full

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def written(config, directory: Path) -> dict:
    """The file that PEFT writes of its `LoraConfig`."""
    config.save_pretrained(str(directory))
    return json.loads((directory / "adapter_config.json").read_text())


def test_every_field_of_peft_is_in_one_table(tmp_path):
    def ask():
        import peft

        return written(peft.LoraConfig(target_modules=["q_proj"], inference_mode=True), tmp_path)

    theirs = oracle("config/peft/fields", ask)
    tables = (peft_config.MAPPED, peft_config.CARRIED, peft_config.REFUSED)
    assert sorted(theirs) == sorted(name for table in tables for name in table)
    assert full() == theirs


def test_default_targets_are_pefts():
    def ask():
        from peft.utils import constants

        return constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    theirs = oracle("config/peft/default targets", ask)
    ours = peft_config.DEFAULT_TARGETS
    assert {k: v if isinstance(v, str) else list(v) for k, v in ours.items()} == theirs


def test_defaults_are_pefts():
    def ask():
        import peft

        return peft.LoraConfig().to_dict()

    theirs = oracle("config/peft/defaults", ask)
    for name, (_, default) in peft_config.MAPPED.items():
        assert theirs[name] == default, name
    for name, off in peft_config.REFUSED.items():
        assert theirs[name] == off, name


# PEFT keeps these lists as sets.
SETS = ("target_modules", "exclude_modules")
KNOWN_TO_PEFT = [f for f in FULL if "future_feature" not in f]


@pytest.mark.parametrize("fields", KNOWN_TO_PEFT, ids=str)
def test_peft_reads_what_we_write_and_back(fields, tmp_path):
    ours = LoraConfig.from_peft(full(**fields))
    text = json.dumps(ours.to_peft(), indent=2)

    def ask():
        import peft

        (tmp_path / "adapter_config.json").write_text(text)
        theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
        assert isinstance(theirs, peft.LoraConfig)
        back = written(theirs, tmp_path)
        for name in SETS:
            if isinstance(back[name], list):
                back[name].sort()
        return {"from": text, "back": back}

    there = oracle(f"config/peft/back.{KNOWN_TO_PEFT.index(fields)}", ask)
    # What was recorded is PEFT's reading of this very file.
    assert there["from"] == text
    back = there["back"]
    for name in SETS:
        if isinstance(back[name], list):
            assert back[name] == sorted(full(**fields)[name])
            back[name] = full(**fields)[name]
    assert LoraConfig.from_peft(back) == ours
