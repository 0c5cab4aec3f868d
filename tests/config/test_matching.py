"""Which leaves a config means; test_matching_peft.py compares the same tables with PEFT."""

import math
from typing import Any

import pytest

from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig

from tests.support.module_names import CASES, PATTERNS, Q3, SAVED, Case

pytestmark = pytest.mark.once


def config_of(case: Case) -> LoraConfig:
    make: Any = LoraConfig  # the cases hold lists, as PEFT's JSON does
    return make(
        target_modules=case.targets,
        layers_to_transform=case.layers,
        layers_pattern=case.pattern,
        exclude_modules=case.exclude,
        modules_to_save=case.save,
        # An empty list of modules is allowed beside parameters only.
        target_parameters=() if case.targets else ("experts.up",),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.targets}")
def test_is_target(case):
    assert matching.is_target(config_of(case), case.name) is case.expected


def test_all_linear_is_not_decided_by_names():
    config = LoraConfig(target_modules="ALL-Linear", exclude_modules=("q_proj",))
    with pytest.raises(ValueError, match="decided by how weights are used, not by names"):
        matching.is_target(config, Q3)
    assert matching.is_excluded(config, Q3)
    assert not matching.is_excluded(config, "model.layers.3.self_attn.k_proj")


@pytest.mark.parametrize("name, patterns, winner", PATTERNS)
def test_matched_pattern(name, patterns, winner):
    assert matching.matched_pattern(patterns, name) == winner
    config = LoraConfig(
        rank_pattern={p: i + 20 for i, p in enumerate(patterns)},
        alpha_pattern={p: i + 0.5 for i, p in enumerate(patterns)},
    )
    place = patterns.index(winner) if winner else None
    assert matching.rank_of(config, name) == (8 if place is None else place + 20)
    assert matching.alpha_of(config, name) == (16 if place is None else place + 0.5)


def test_scale():
    plain, stable = LoraConfig(), LoraConfig(use_rslora=True)
    assert matching.scale_of(plain, 4, 6) == 1.5
    assert matching.scale_of(stable, 4, 6) == 3.0
    assert matching.scale_of(stable, 8, 16) == 16 / math.sqrt(8)


@pytest.mark.parametrize("name, entries, expected", SAVED)
def test_is_saved(name, entries, expected):
    assert matching.is_saved(LoraConfig(modules_to_save=entries), name) is expected


@pytest.mark.parametrize(
    "bias, name, adapted, expected",
    [
        ("none", "q_proj.bias", True, False),
        ("lora_only", "q_proj.bias", True, True),
        ("lora_only", "q_proj.bias", False, False),
        ("all", "q_proj.bias", False, True),
        ("all", "bias", False, True),
        ("all", "q_proj.weight", True, False),
        ("all", "q_proj.rel_bias", False, False),
    ],
)
def test_trains_bias(bias, name, adapted, expected):
    assert matching.trains_bias(LoraConfig(bias=bias), name, adapted=adapted) is expected


def test_unmatched_entries():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"]
    config = LoraConfig(
        target_modules=("q_proj", "v_prj", "proj"),
        exclude_modules=("up_proj", "gate"),
        modules_to_save=("head", "score"),
        rank_pattern={"q_proj": 4, "^layers": 2},
        alpha_pattern={"down_proj": 4},
    )
    assert matching.unmatched(config, names) == [
        ("target_modules", "v_prj"),
        ("target_modules", "proj"),
        ("exclude_modules", "gate"),
        ("modules_to_save", "score"),
        ("rank_pattern", "^layers"),
        ("alpha_pattern", "down_proj"),
    ]
    assert matching.unmatched(LoraConfig(), names) == []
    regex = LoraConfig(target_modules="v_proj", exclude_modules=".*q_proj")
    assert matching.unmatched(regex, names) == [("target_modules", "v_proj")]


SLOW = r"(\w|\.|[a-z])+[^\w.]"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": SLOW},
        {"target_modules": ("up",), "exclude_modules": SLOW},
        {"target_modules": ("up",), "rank_pattern": {SLOW: 2}},
        {"target_modules": ("up",), "alpha_pattern": {SLOW: 2}},
        {"target_modules": ("up",), "modules_to_save": (SLOW,)},
        {"target_modules": ("up",), "layers_to_transform": (1,), "layers_pattern": SLOW},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_an_expression_that_never_ends_is_refused(fields):
    """They come with downloaded adapters."""
    config = LoraConfig(**fields)
    name = f"model.{'a' * 40}.layers.1.mlp.up"
    with pytest.raises(ValueError, match="takes too long to match `model.aaa"):
        matching.match(config, (name, f"{name}.kernel"), (name,))


@pytest.mark.parametrize("pattern", ["(" * 5000, "a{99999999999}", "(?P<a>x)(?P<a>y)", "*"])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(ValueError, match="is not a regular expression"):
        LoraConfig(target_modules=pattern)


def test_expressions_of_python_work():
    """Looking ahead and back, which engines without backtracking lack, is common in adapters."""
    for pattern, name in ((r"^(?!.*visual).*(?:q_proj|v_proj).*", "model.layers.0.q_proj"),
                          (r"(?i:MODEL)\..*(?<!k)_proj", "model.layers.0.q_proj")):  # fmt: skip
        config = LoraConfig(target_modules=pattern)
        assert matching.is_target(config, name) and not matching.is_target(config, "visual.k_proj")
