"""Which leaves a config means, as a table; test_matching_peft.py asks PEFT the same."""

import math
from typing import Any, NamedTuple

import pytest

from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig

pytestmark = pytest.mark.once

Q3 = "model.layers.3.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"


class Case(NamedTuple):
    name: str
    targets: list | str
    expected: bool
    layers: list | int | None = None
    pattern: list | str | None = None
    exclude: list | str | None = None
    save: list | None = None


CASES = [
    # names in a list: the whole name, or its end after a dot; no regular expressions
    Case("", ["q_proj"], False),
    Case("q_proj", ["q_proj"], True),
    Case("q_proj", ["k_proj"], False),
    Case("q_proj", ["q_proj", "k_proj"], True),
    Case(Q3, ["q_proj"], True),
    Case(Q3, ["q_proj", "v_proj"], True),
    Case(Q3, ["self_attn.q_proj"], True),
    Case(Q3, [Q3], True),
    Case(Q3, ["proj"], False),
    Case(Q3, ["attn.q_proj"], False),
    Case(Q3, ["self_attn"], False),
    Case(Q3, [".*q_proj"], False),
    Case(Q3, ["Q_PROJ"], False),
    Case(Q3 + ".inner", ["q_proj"], False),
    Case("model.layers.3.self_attn.rotary", ["q_proj", "v_proj"], False),
    Case("a.b.q_proj", ["q_proj"], True),
    # an empty list means nothing
    Case("", [], False),
    Case("q_proj", [], False),
    Case(Q3, [], False, pattern=[]),
    # a string: a regular expression for the whole name
    Case("q_proj", "q_proj", True),
    Case(Q3, "q_proj", False),
    Case("q_proj", ".*oj", True),
    Case("q_proj", "q_.*", True),
    Case("q_proj", ".*down.*", False),
    Case("undertow", ".*dert.*", True),
    Case(Q3, r".*\.(q_proj|v_proj)", True),
    Case(Q3, r".*\.(k_proj|v_proj)", False),
    Case(Q3, r"model\.layers\.[0-3]\..*_proj", True),
    Case(Q3, r"layers\.3\..*", False),
    # layers_to_transform with the name of the list of layers
    Case("net.stage.1.up", ["up"], True, [1], ["stage"]),
    Case("net.stage.1.up", ["up"], False, [0], ["stage"]),
    Case("net.stage.1.up", ["up"], False, [2], ["stage"]),
    Case("net.stage.10.up", ["up"], False, [0], ["stage"]),
    Case("net.stage.10.up", ["up"], False, [1], ["stage"]),
    Case("net.stage.10.up", ["up"], True, [10], ["stage"]),
    Case("net.stage.1.up", ["up"], True, [0, 1, 2], ["stage"]),
    Case("net.stage.1.up", ["up", "down"], True, [1], ["stage"]),
    Case("net.stage.1.up", ["up", "down"], True, [0, 1, 2], ["stage"]),
    Case("net.stage.1.up", ["up"], False, [1], ["net"]),
    Case("net.stage.1.up", ["up"], False, [1], ["up"]),
    Case("net.stage.1.up", ["up"], True, [1], "stage"),
    Case("net.stage.1.up", ["up"], True, [1], ["block", "stage"]),
    Case("net.stage.007.up", ["up"], True, [7], ["stage"]),
    Case("net.stage.1.part.2.up", ["up"], True, [1], ["stage"]),
    Case("net.stage.2.part.1.up", ["up"], False, [1], ["stage"]),
    Case("net.stage.1.part.2.up", ["up"], True, [2], ["part"]),
    # the list of layers at the very start of the name (PEFT since 0.21)
    Case("stage.1.up", ["up"], True, [1], ["stage"]),
    Case("stage.1.up", ["up"], False, [0], ["stage"]),
    Case("stage.1.side", ["up"], False, [1], ["stage"]),
    Case("backstage.1.up", ["up"], False, [1], ["stage"]),
    # ... and without: the first number after two names
    Case("net.whatever.1.up", ["up"], True, [1], []),
    Case("net.whatever.1.up", ["up"], False, [0], []),
    Case("net.whatever.1.up", ["up"], True, [1], ""),
    Case("net.whatever.1.up", ["up"], False, [0], ""),
    Case("net.whatever.1.up", ["up"], True, [1]),
    Case("net.whatever.1.up", ["up"], False, [0]),
    Case("net.whatever.1.up", ["up"], True, 1),
    Case("net.whatever.1.up", ["up"], False, 0),
    Case("net.whatever.1.up", ["up"], True, []),
    Case("stage.1.up", ["up"], False, [1]),
    Case("net.up", ["up"], False, [1]),
    Case(EXPERT, ["up_proj"], True, [1]),
    Case(EXPERT, ["up_proj"], False, [0]),
    Case(EXPERT, ["up_proj"], True, [0], ["experts"]),
    Case(Q3, ["q_proj"], True, [3], ["layers"]),
    Case(Q3, ["q_proj", "v_proj"], True, [1, 2, 3], ["layers"]),
    # a module listed by its whole name is adapted in any layer
    Case(Q3, [Q3], True, [0]),
    Case(Q3, [Q3, "q_proj"], True, [0]),
    # exclusion comes before everything
    Case(Q3, ["q_proj"], False, exclude=["q_proj"]),
    Case(Q3, ["q_proj"], False, exclude=[Q3]),
    Case(Q3, [Q3], False, exclude=["self_attn.q_proj"]),
    Case(Q3, ["q_proj"], True, exclude=["proj"]),
    Case(Q3, ["q_proj"], True, exclude=["self_attn"]),
    Case(Q3, ["q_proj"], False, exclude=r".*layers\.3\..*"),
    Case(Q3, ["q_proj"], True, exclude=r"layers\.3\..*"),
    Case(Q3, r".*q_proj", False, exclude=["q_proj"]),
    # and so do the modules that are trained whole, with all that is inside
    Case("lm_head", ["lm_head"], False, save=["lm_head"]),
    Case("model.score", ["score"], False, save=["score"]),
    Case("model.score.dense", ["dense"], False, save=["score"]),
    Case("model.scores.dense", ["dense"], True, save=["score"]),
    Case("model.myscore", ["myscore"], True, save=["score"]),
    Case(Q3, ["q_proj"], False, save=["self_attn"]),
]


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


# name, patterns in their order, the pattern that wins
PATTERNS = [
    ("up", ["up"], "up"),
    ("net.up", ["up"], "up"),
    ("net.mlp.up", ["up"], "up"),
    ("net.mlp.up", ["mlp.up"], "mlp.up"),
    ("net.mlp.up", ["lp.up"], None),
    ("backup", ["up"], None),
    ("upper", ["up"], None),
    ("up.down", ["up"], None),
    ("net.up", ["^up"], None),
    ("up", ["^up"], "^up"),
    ("net.up", [r"^net\.up"], r"^net\.up"),
    ("net.up", [r"n.t\.up"], r"n.t\.up"),
    ("net.up", [".*up"], ".*up"),
    ("net.backup", [".*up"], ".*up"),
    ("net.up", ["up", "net.up"], "up"),
    ("net.up", ["net.up", "up"], "net.up"),
    ("net.up", ["down", "up"], "up"),
    ("net.up", ["up$"], "up$"),
    ("net.layers.10.up", [r"layers\.1\.up"], None),
    ("net.layers.10.up", [r"layers\.1.\.up"], r"layers\.1.\.up"),
    ("net.layers.1.up", ["(up|down)"], "(up|down)"),
    ("net.layers.1.up", ["up|down"], "up|down"),
    ("net.up", [], None),
]


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


# name, modules_to_save, trained whole?
SAVED = [
    ("lm_head", ["lm_head"], True),
    ("model.lm_head", ["lm_head"], True),
    ("lm_head", ["head"], True),
    ("lm_head.dense", ["lm_head"], True),
    ("lm_heads", ["lm_head"], False),
    ("model.embed_tokens", ["lm_head", "embed_tokens"], True),
    ("model.layers.0.mlp.up_proj", ["mlp"], True),
    ("model.layers.0.mlp.up_proj", ["layers.0.mlp"], True),
    ("model.layers.10.mlp.up_proj", ["layers.1.mlp"], False),
    ("model.layers.0.mlp.up_proj", [], False),
]


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
