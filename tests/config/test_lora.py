"""lora_jax/config.py: what a LoraConfig accepts and refuses; PEFT's fields both ways."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis
from lora_jax.config import peft
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import STARTS, find_start
from lora_jax.methods import start_function
from lora_jax.train.config import TrainConfig

from tests.support.peft_fields import FULL, full

pytestmark = pytest.mark.once


def test_defaults_and_normal_forms():
    config = LoraConfig()
    assert (config.rank, config.alpha, config.target_modules) == (8, 16, "all-linear")
    assert LoraConfig(target_modules="All-Linear").target_modules == "all-linear"
    # As JSON and PEFT's own config have them; the annotations have the normal form only.
    make: Any = LoraConfig
    assert make(target_modules=["q", "v"]).target_modules == ("q", "v")
    assert make(target_modules={"v", "q"}).target_modules == ("q", "v")
    assert make(modules_to_save=None, exclude_modules=None) == config
    assert make(layers_to_transform=[1], target_modules=["q"]).layers_to_transform == (1,)


def test_frozen_keyword_only_and_hashable():
    config = LoraConfig(rank_pattern={"q": 4})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4
    with pytest.raises(TypeError):
        LoraConfig(8)  # pyright: ignore[reportCallIssue]
    assert hash(config) == hash(LoraConfig(rank_pattern={"q": 4}))
    assert config != LoraConfig(rank_pattern={"q": 5})
    assert dataclasses.replace(config, rank=4).rank_pattern == {"q": 4}


def test_numbers_of_numpy_and_jax_are_python_s():
    make: Any = LoraConfig
    config = make(
        rank=np.int64(4), alpha=np.float32(8), dropout=jnp.float32(0.5), use_dora=np.bool_(True),
        target_modules=np.array(["q", "v"]), layers_to_transform=np.arange(2),
        rank_pattern={"q": np.int32(2)}, trainable_token_indices={"embed": np.array([3, 5])},
    )  # fmt: skip
    assert config == LoraConfig(
        rank=4, alpha=8.0, dropout=0.5, use_dora=True, target_modules=("q", "v"),
        layers_to_transform=(0, 1), rank_pattern={"q": 2},
        trainable_token_indices={"embed": (3, 5)},
    )  # fmt: skip
    assert type(config.rank) is type(config.rank_pattern["q"]) is int
    json.dumps(config.to_peft())
    for bad in (np.float64(4), np.int64(0), np.bool_(True)):
        with pytest.raises((TypeError, ValueError), match="rank` must be"):
            make(rank=bad)
    assert make(rank=jnp.int32(2)).rank == 2 and TrainConfig(steps=make(rank=np.uint8(3)).rank)
    assert analysis.SweepConfig(ranks=np.array([1, 2])).ranks == (1, 2)  # pyright: ignore
    assert TrainConfig(steps=np.int64(5), buckets=np.int64(2)).steps == 5  # pyright: ignore


def test_a_pattern_given_is_not_shared():
    pattern = {"q": 4}
    config = LoraConfig(rank_pattern=pattern)
    pattern["q"] = 99
    assert config.rank_pattern == {"q": 4}


@pytest.mark.parametrize("init", [start.name.replace("N", "4") for start in STARTS if start.known])
def test_inits(init):
    assert LoraConfig(init=init).init == init


BAD = [
    ({"rank": 0}, ValueError, "rank` must be at least 1, got 0"),
    ({"rank": 2.0}, TypeError, r"rank` must be an integer of at least 1, got 2\.0"),
    ({"rank": True}, TypeError, "rank` must be an integer"),
    ({"alpha": 0}, ValueError, "alpha` must be a number from 1e-30 to 1e30, got 0"),
    ({"alpha": 1e308}, ValueError, r"alpha` must be a number from 1e-30 to 1e30, got 1e\+308"),
    ({"alpha_pattern": {"q": 10**400}}, ValueError, r"alpha_pattern\['q'\]` must be a number from"),
    ({"modules_to_save": ["x"] * 1001}, ValueError, "`modules_to_save` has 1,001 names, more than"),
    ({"alpha": float("nan")}, ValueError, "alpha` must be a number from .*, got nan"),
    ({"alpha": float("inf")}, ValueError, "alpha` must be a number from .*, got inf"),
    ({"alpha": "16"}, TypeError, "alpha` must be a number above 0, got '16'"),
    ({"dropout": 1.0}, ValueError, r"dropout` must be at least 0 and below 1, got 1\.0"),
    ({"dropout": -0.1}, ValueError, "dropout` must be at least 0 and below 1"),
    ({"dropout": None}, TypeError, "dropout` must be a number, 0 <= dropout < 1, got None"),
    ({"use_dora": 1}, TypeError, "use_dora` must be True or False, got 1"),
    ({"use_rslora": "yes"}, TypeError, "use_rslora` must be True or False"),
    ({"target_modules": []}, ValueError, "target_modules` is empty"),
    ({"target_modules": None}, TypeError, "target_modules` must be a tuple or list .* got None"),
    ({"target_modules": ["q", 1]}, TypeError, "target_modules` must be a tuple or list"),
    ({"target_modules": ["q", ""]}, ValueError, "target_modules` holds an empty name"),
    ({"target_modules": "*.q_proj"}, ValueError, r"target_modules`: .\*\.q_proj. is not a regular"),
    ({"target_modules": ""}, TypeError, "target_modules` must be a regular expression"),
    ({"exclude_modules": "(q"}, ValueError, r"exclude_modules`: .\(q. is not a regular expression"),
    ({"exclude_modules": "a{99999999}"}, ValueError, r"a part more than 10,000 times, which takes"),
    ({"rank_pattern": {"((q{99}){99}){9}": 3}}, ValueError, "a part more than 10,000 times"),
    ({"exclude_modules": 3}, TypeError, "exclude_modules` must be a tuple or list"),
    ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save` must be a tuple or list"),
    ({"modules_to_save": ["("]}, ValueError, r"modules_to_save`: .\(. is not a regular expression"),
    ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]` must be at least 1, got 0"),
    ({"rank_pattern": {"q": 1.5}}, TypeError, r"rank_pattern\['q'\]` must be an integer"),
    ({"rank_pattern": [("q", 1)]}, TypeError, "rank_pattern` must be a dict"),
    ({"alpha_pattern": {"q": -1}}, ValueError, r"alpha_pattern\['q'\]` must be a number from"),
    ({"alpha_pattern": {"q(": 1}}, ValueError, r"alpha_pattern`: .q\(. is not a regular"),
    ({"bias": "some"}, ValueError, 'bias` must be one of "none", "all", "lora_only", got \'some\''),
    ({"init": True}, TypeError, 'init` must be one of .*PEFT\'s True is "default"'),
    ({"init": "pisa"}, ValueError, 'init` must be one of .*got "pisa"'),
    ({"init": "pissa_niter_0"}, ValueError, "init` must be one of"),
    ({"init": "orthogonal", "rank": 3}, ValueError, 'init="orthogonal" needs an even rank'),
    ({"layers_to_transform": [0]}, ValueError, "layers_to_transform` needs `target_modules` as a"),
    ({"layers_to_transform": 0, "target_modules": ".*q"}, ValueError, 'got the string "\\.\\*q"'),
    (
        {"layers_to_transform": [-1], "target_modules": ["q"]},
        ValueError,
        r"layers_to_transform` counts layers from 0, got \(-1,\)",
    ),
    (
        {"layers_to_transform": "0", "target_modules": ["q"]},
        TypeError,
        "layers_to_transform` must be a layer number or a list of them, got '0'",
    ),
    (
        {"layers_pattern": 3, "layers_to_transform": 0, "target_modules": ["q"]},
        TypeError,
        "layers_pattern` must be a name or a list of names, got 3",
    ),
    ({"lora_bias": True, "use_dora": True}, ValueError, "lora_bias=True does not work with use_d"),
    (
        {"lora_bias": True, "init": "olora"},
        ValueError,
        'init="default" or init="random" only, got "olo',
    ),
    ({"lora_bias": None}, TypeError, "lora_bias` must be True or False, got None"),
    ({"target_parameters": "up"}, TypeError, "target_parameters` must be a tuple or list"),
    (
        {"target_parameters": ["up"], "dropout": 0.1},
        ValueError,
        r"target_parameters` does not work with dropout=0\.1 in PEFT",
    ),
    ({"target_parameters": ["up"], "use_dora": True}, ValueError, "does not work with use_dora=T"),
    ({"trainable_token_indices": [[1]]}, TypeError, "must be a list of token ids"),
    ({"trainable_token_indices": {"": [1]}}, ValueError, "trainable_token_indices` holds an empty"),
    (
        {"layers_pattern": "h", "target_modules": ["q"]},
        ValueError,
        "layers_pattern='h' needs `layers_to_transform` as well",
    ),
]


@pytest.mark.parametrize("fields, error, text", BAD, ids=lambda v: str(v)[:40])
def test_refused(fields, error, text):
    with pytest.raises(error, match=text) as caught:
        LoraConfig(**fields)
    assert "\n" not in str(caught.value)


# ---- PEFT's JSON


@pytest.mark.parametrize("fields", FULL, ids=str)
def test_peft_fields_survive_import_and_export(fields):
    given = full(**fields)
    config = LoraConfig.from_peft(given)
    assert json.dumps(config.to_peft(), sort_keys=True) == json.dumps(given, sort_keys=True)
    assert LoraConfig.from_peft(config.to_peft()) == config


def test_extra_holds_only_what_is_unusual():
    config = LoraConfig(rank=4, target_modules=("q_proj",), dropout=0.1)
    read = LoraConfig.from_peft(config.to_peft())
    assert read == config
    # Even null is kept of a file's task type, so that saving again does not fill it in.
    assert LoraConfig.from_peft(full()).extra == {"task_type": None}
    assert LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"]}).extra == {}
    some = LoraConfig.from_peft(full(revision="v1", task_type="SEQ_CLS"))
    assert some.extra == {"revision": "v1", "task_type": "SEQ_CLS"}


def test_absent_fields_take_pefts_defaults():
    config = LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert (config.rank, config.alpha, config.dropout) == (8, 8, 0.0)
    assert config.init == "default"
    assert config.to_peft()["lora_alpha"] == 8


def test_null_stands_for_the_default():
    nulls = dict.fromkeys(full()) | {"peft_type": "LORA", "target_modules": ["q_proj"]}
    config = LoraConfig.from_peft(nulls)
    assert config == LoraConfig(alpha=8, target_modules=("q_proj",), extra={"task_type": None})
    assert config.to_peft() == full(target_modules=["q_proj"])


@pytest.mark.parametrize(
    "value, init", [(True, "default"), (False, "random"), (None, "default"), ("olora", "olora")]
)
def test_init_names(value, init):
    assert LoraConfig.from_peft(full(init_lora_weights=value)).init == init


def test_default_targets_by_family():
    fields = full(target_modules=None)
    llama = LoraConfig.from_peft(fields, model_type="llama")
    assert llama.target_modules == ("q_proj", "v_proj")
    gemma4 = LoraConfig.from_peft(fields, model_type="gemma4")
    assert gemma4.target_modules == r".*language_model\..*\.(q_proj|v_proj)"
    with pytest.raises(ValueError, match=".target_modules. is missing, and its default"):
        LoraConfig.from_peft(fields)
    with pytest.raises(ValueError, match="no default for model_type 'mine'"):
        LoraConfig.from_peft(fields, model_type="mine")


ON = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 3]],
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
}


@pytest.mark.parametrize("field", peft.REFUSED)
def test_unsupported_fields_are_named(field):
    with pytest.raises(ValueError, match=f".{field}. = .* is not supported and may change"):
        LoraConfig.from_peft(full(**{field: ON[field]}))


BAD_PEFT = [
    (full(new_trick=0.5), r".new_trick. = 0\.5 is unknown and may change the numbers"),
    ({"r": 8}, ".peft_type. is missing"),
    (full(peft_type=None), ".peft_type. is missing"),
    (full(peft_type="IA3"), "peft_type is 'IA3', only LORA can be read; merge it in PEFT"),
    (full(peft_type="P_TUNING"), "'P_TUNING', only LORA can be read; it changes no weights"),
    ({"peft_type": "VERA", "r": "x", "d_initial": 0.1}, "peft_type is 'VERA', only LORA"),
    ([], "expected a JSON object, got list"),
    (full(init_lora_weights="corda"), ".init_lora_weights. = 'corda' changes the base weights"),
    (full(init_lora_weights="lora_ga"), "path_initial_model_for_weight_conversion"),
    (full(init_lora_weights=3), ".init_lora_weights. = 3 changes the base weights"),
    (full(r=0), "PEFT config: .r. must be at least 1, got 0"),
    (full(target_modules=[]), "PEFT config: .target_modules. is empty"),
    (full(bias="vera_only"), "PEFT config: .bias. must be one of"),
]


@pytest.mark.parametrize("fields, text", BAD_PEFT, ids=lambda v: str(v)[-40:])
def test_peft_config_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        LoraConfig.from_peft(fields)


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.name)
def test_every_start_that_a_config_knows_has_a_function(start):
    init = start.name.replace("N", "4")
    assert find_start(init) is start
    if start.known:
        assert start_function(init).__name__ == init.partition("_niter_")[0]
    else:
        with pytest.raises(ValueError, match="init` must be one of"):
            LoraConfig(init=init)
