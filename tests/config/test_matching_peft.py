"""The tables of module names, and random ones, as PEFT decides them."""

import random

import pytest

from lora_jax.config import matching

from tests.support.module_names import CASES, PATTERNS, SAVED
from tests.support.oracle import oracle

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def test_is_target():
    def ask():
        return [(*case[:2], is_target(case.name, peft_fields(case))) for case in CASES]

    found = oracle("config/matching/is_target", ask)
    assert found == [list(case[:3]) for case in CASES]


def test_matched_pattern():
    def ask():
        from peft.utils.other import get_pattern_key

        found = [get_pattern_key(patterns, name) for name, patterns, _ in PATTERNS]
        # PEFT returns the name itself where no pattern matches.
        return [
            (name, patterns, key if key in patterns else None)
            for key, (name, patterns, _) in zip(found, PATTERNS, strict=True)
        ]

    assert oracle("config/matching/pattern", ask) == [list(row) for row in PATTERNS]


def test_is_saved():
    def ask():
        return [(name, entries, is_saved(name, entries)) for name, entries, _ in SAVED]

    assert oracle("config/matching/is_saved", ask) == [list(row) for row in SAVED]


@pytest.mark.parametrize("seed", range(4))
def test_random_names_and_configs(seed):
    """1500 combinations of parts that look alike."""
    rng = random.Random(seed)
    drawn = [draw(rng) for _ in range(1500)]
    ours = [matching.is_target(matching.LoraConfig(**fields), name) for name, fields in drawn]
    want = oracle(
        f"config/matching/random.{seed}",
        # The digits of a number: a list of 1500 values is ten times as long in the file.
        lambda: "".join(str(int(is_target(name, fields))) for name, fields in drawn),
    )
    wrong = [case for case, x, y in zip(drawn, ours, want, strict=True) if x != (y == "1")]
    assert not wrong, wrong[0]


PARTS = ["model", "layers", "0", "1", "10", "mlp", "experts", "up", "up_proj", "q", "lm_head"]
GLOBS = ["up", "q", "mlp.up", ".*up.*", "layers.1.up", r".*\.1\..*", "model", "head", "up_proj"]


def draw(rng: random.Random) -> tuple[str, dict]:
    """A module's name and the fields of a config."""
    name = ".".join(rng.choices(PARTS, k=rng.randint(1, 6)))
    as_list = rng.random() < 0.7
    fields = {
        "target_modules": rng.sample(GLOBS, k=2) if as_list else rng.choice(GLOBS),
        "exclude_modules": rng.choice([None, None, ["q"], ["up_proj"], r".*\.q"]),
        "modules_to_save": rng.choice([None, None, ["lm_head"], ["mlp"]]),
        "layers_to_transform": rng.choice([None, [], 0, 1, [0, 10]]) if as_list else None,
    }
    if fields["layers_to_transform"] is not None:
        fields["layers_pattern"] = rng.choice([None, "layers", ["experts", "layers"]])
    return name, fields


def peft_fields(case) -> dict:
    """The fields of `peft.LoraConfig`."""
    return {
        "target_modules": case.targets,
        "layers_to_transform": case.layers,
        "layers_pattern": case.pattern,
        "exclude_modules": case.exclude,
        "modules_to_save": case.save,
    }


def is_target(name: str, fields: dict) -> bool:
    """Whether PEFT adapts a module."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(peft.LoraConfig(**fields), name))


def is_saved(name: str, entries: list[str]) -> bool:
    """Whether PEFT trains a Linear of this name whole."""
    import peft
    import torch

    root = module = torch.nn.Module()
    *around, last = name.split(".")
    for part in around:
        child = torch.nn.Module()
        module.add_module(part, child)
        module = child
    module.add_module(last, torch.nn.Linear(2, 2))
    root.adapted = torch.nn.Linear(2, 2)
    model = peft.get_peft_model(
        root, peft.LoraConfig(target_modules=["adapted"], modules_to_save=entries)
    )
    named = model.named_parameters()
    return any(parameter.requires_grad and "lora" not in name for name, parameter in named)
