"""Names of leaves and tensors: values in both directions, round trips, errors."""

import pytest

from lora_jax.hf import names

PAIRS = [
    ("model.embed_tokens.embedding", (), "model.embed_tokens.weight", None),
    ("model.norm.scale", (), "model.norm.weight", None),
    ("lm_head.kernel", (), "lm_head.weight", (1, 0)),
    (
        "model.layers.self_attn.q_proj.kernel",
        (3,),
        "model.layers.3.self_attn.q_proj.weight",
        (1, 0),
    ),
    ("model.layers.self_attn.q_proj.bias", (11,), "model.layers.11.self_attn.q_proj.bias", None),
    ("model.layers.self_attn.q_norm.scale", (0,), "model.layers.0.self_attn.q_norm.weight", None),
    ("model.layers.input_layernorm.scale", (2,), "model.layers.2.input_layernorm.weight", None),
    (
        "model.layers.mlp.experts.up_proj.kernel",
        (1, 7),
        "model.layers.1.mlp.experts.7.up_proj.weight",
        (1, 0),
    ),
]


@pytest.mark.parametrize("path, index, name, axes", PAIRS)
def test_stacked_names_both_ways(path, index, name, axes):
    assert names.tensor_of(path, index) == (name, axes)
    assert names.leaf_of(name) == (path, index, axes)
    assert names.stack_depth(path) == len(index)


@pytest.mark.parametrize("path, index, name, axes", PAIRS)
def test_unstacked_names_carry_their_numbers(path, index, name, axes):
    leaf = names.leaf_of(name, stacked=False)
    assert leaf.index == () and leaf.axes == axes
    assert names.tensor_of(leaf.path) == (name, axes)
    assert names.stack_depth(leaf.path) == 0


def test_module_name_writes_the_number_after_the_stack():
    assert names.module_name("model.layers.mlp.up_proj", (3,)) == "model.layers.3.mlp.up_proj"
    assert names.module_name("lm_head") == "lm_head"


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: names.module_name("model.layers.mlp.up_proj"),
            r"by 1 number\(s\), got index \(\)",
        ),
        (lambda: names.module_name("lm_head", (1,)), r"by 0 number\(s\), got index \(1,\)"),
        (lambda: names.tensor_of("model.norm.gain"), "no parameter `gain`.*`kernel`"),
        (lambda: names.leaf_of("model.norm.running_mean"), "no parameter `running_mean`"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
