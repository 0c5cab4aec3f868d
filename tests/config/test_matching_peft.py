"""The tables of test_matching.py, asked of PEFT itself."""

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_jax.config import matching

from tests.config.test_matching import CASES, PATTERNS, Q3, SAVED, config_of

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.targets}")
def test_is_target(case):
    config = peft.LoraConfig(
        target_modules=case.targets,
        layers_to_transform=case.layers,
        layers_pattern=case.pattern,
        exclude_modules=case.exclude,
        modules_to_save=case.save,
    )
    assert bool(check_target_module_exists(config, case.name)) is case.expected


@pytest.mark.parametrize("name, patterns, winner", PATTERNS)
def test_matched_pattern(name, patterns, winner):
    found = get_pattern_key(patterns, name)
    assert (found if found in patterns else None) == winner


@pytest.mark.parametrize("seed", range(4))
def test_random_names_and_configs(seed):
    """Every answer equals PEFT's on a few thousand combinations of parts that look alike."""
    import random

    rng = random.Random(seed)
    parts = ["model", "layers", "0", "1", "10", "mlp", "experts", "up", "up_proj", "q", "lm_head"]
    globs = ["up", "q", "mlp.up", ".*up.*", "layers.1.up", r".*\.1\..*", "model", "head", "up_proj"]
    for _ in range(1500):
        name = ".".join(rng.choices(parts, k=rng.randint(1, 6)))
        as_list = rng.random() < 0.7
        fields = {
            "target_modules": rng.sample(globs, k=2) if as_list else rng.choice(globs),
            "exclude_modules": rng.choice([None, None, ["q"], ["up_proj"], r".*\.q"]),
            "modules_to_save": rng.choice([None, None, ["lm_head"], ["mlp"]]),
            "layers_to_transform": rng.choice([None, [], 0, 1, [0, 10]]) if as_list else None,
        }
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = rng.choice([None, "layers", ["experts", "layers"]])
        theirs = bool(check_target_module_exists(peft.LoraConfig(**fields), name))
        assert matching.is_target(matching.LoraConfig(**fields), name) is theirs, (name, fields)


def _module(name: str) -> torch.nn.Module:
    """A torch model in which `name` is a Linear."""
    root = module = torch.nn.Module()
    *around, last = name.split(".")
    for part in around:
        child = torch.nn.Module()
        module.add_module(part, child)
        module = child
    module.add_module(last, torch.nn.Linear(2, 2))
    root.adapted = torch.nn.Linear(2, 2)
    return root


@pytest.mark.parametrize("name, entries, expected", SAVED)
def test_is_saved(name, entries, expected):
    config = peft.LoraConfig(target_modules=["adapted"], modules_to_save=entries)
    model = peft.get_peft_model(_module(name), config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert bool(trained) is expected


def test_a_whole_name_is_adapted_in_any_layer():
    case = next(c for c in CASES if c.targets == [Q3] and c.layers == [0])
    assert matching.is_target(config_of(case), case.name)
