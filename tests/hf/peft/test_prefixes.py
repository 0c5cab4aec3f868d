"""Names that wrappers of PyTorch, or PEFT's own, left in an adapter's files."""

import json

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.array import leaves_by_path
from lora_jax.hf.peft import api
from lora_jax.hf.peft.prefixes import without_module
from lora_jax.hf.peft.save import to_peft

from tests.support.peft_trees import QV, equal, planted, random_params

pytestmark = pytest.mark.once

KEYS = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("model.model.", "model._orig_mod.model.", 1),
    "parallel": lambda key: f"module.{key}",
    "parallel inside": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
    "sharded": lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
    "adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another adapter's name": lambda key: key.replace(".weight", ".my-run.weight"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "all": lambda key: f"_orig_mod.module.{key.replace('.weight', '.default.weight')}",
}


@pytest.mark.parametrize("case", KEYS)
def test_a_prefix_is_taken_out_with_a_warning(case, tree, directory):
    path = directory / "adapter_model.safetensors"
    save_file({KEYS[case](key): value for key, value in load_file(path).items()}, path)
    with pytest.warns(UserWarning, match=r"adapter: \d+ of 12 tensors have names that PEFT does"):
        config, tensors = api.read_peft(directory)
        loaded, _ = api.attach(config, tensors, planned, random_params(), source="adapter")
    equal(loaded, tree)


def planned(config):
    """A plan of the tree, from shapes alone."""

    def layer(x, block):
        attention = block["self_attn"]
        q = x @ attention["q_proj"]["kernel"]
        v = x @ attention["v_proj"]["kernel"]
        return x, q.sum() + v.sum()

    def fn(params, x):
        return jax.lax.scan(layer, x, params["model"]["layers"])[1]

    return lora.plan(config, fn, random_params(), jnp.ones((1, 16)))


def test_names_in_the_config_lose_the_prefix_too(directory):
    path = directory / "adapter_config.json"
    fields = json.loads(path.read_text()) | {
        "target_modules": ["_orig_mod.model.layers.0.self_attn.q_proj"],
        "modules_to_save": ["_orig_mod.lm_head"],
        "rank_pattern": {r"^_orig_mod\.model\.layers\.0": 4},
    }
    path.write_text(json.dumps(fields))
    config, _ = api.read_peft(directory)
    assert config.target_modules == ("model.layers.0.self_attn.q_proj",)
    assert config.modules_to_save == ("lm_head",)
    assert config.rank_pattern == {r"^model\.layers\.0": 4}


def test_several_adapters_in_one_file_are_an_error(directory):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    both = {k.replace(".weight", f".{n}.weight"): x for k, x in tensors.items() for n in ("a", "b")}
    save_file(both, path)
    with pytest.raises(ValueError, match=r"the file holds 2 adapters \(a, b\); save one of them"):
        api.read_peft(directory)


def test_two_tensors_of_one_name_are_an_error(directory):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file({**tensors, f"_orig_mod.{key}": tensors[key]}, path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="another tensor both stand"):
        api.read_peft(directory)


def test_a_module_named_module_keeps_its_name():
    params = {"module": random_params()}
    _, tensors = to_peft(planted(params, QV), QV)
    assert all(key.startswith("base_model.model.module.") for key in tensors)
    assert without_module(tensors, leaves_by_path(params), "adapter") is tensors


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "PROMPT_TUNING", "VERA", "OFT"])
def test_another_method_is_named_before_its_tensors_are_read(kind, directory):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": kind, "r": "any"}))
    (directory / "adapter_model.safetensors").write_bytes(b"not even safetensors")
    with pytest.raises(ValueError, match=f"adapter_config.json: .* '{kind}', only LORA can be"):
        api.read_peft(directory)
