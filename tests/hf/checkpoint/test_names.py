"""Names of leaves and tensors: values in both directions, round trips, errors."""

import pytest

from lora_jax.hf.checkpoint import names

pytestmark = pytest.mark.once

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


# Of the other families: GPT-2's Conv1D, whose weights are (in, out) there too, and BERT.
OTHERS = [
    ("transformer.wte.embedding", (), "transformer.wte.weight", None),
    ("transformer.wpe.embedding", (), "transformer.wpe.weight", None),
    ("transformer.h.attn.c_attn.kernel", (3,), "transformer.h.3.attn.c_attn.weight", None),
    ("transformer.h.attn.c_attn.bias", (3,), "transformer.h.3.attn.c_attn.bias", None),
    ("transformer.h.mlp.c_proj.kernel", (0,), "transformer.h.0.mlp.c_proj.weight", None),
    ("transformer.h.ln_2.scale", (1,), "transformer.h.1.ln_2.weight", None),
    ("transformer.ln_f.bias", (), "transformer.ln_f.bias", None),
    (
        "bert.encoder.layer.attention.self.query.kernel",
        (5,),
        "bert.encoder.layer.5.attention.self.query.weight",
        (1, 0),
    ),
    (
        "bert.embeddings.word_embeddings.embedding",
        (),
        "bert.embeddings.word_embeddings.weight",
        None,
    ),
    ("bert.embeddings.LayerNorm.scale", (), "bert.embeddings.LayerNorm.weight", None),
    ("classifier.kernel", (), "classifier.weight", (1, 0)),
]


@pytest.mark.parametrize("path, index, name, axes", [*PAIRS, *OTHERS])
def test_stacked_names_both_ways(path, index, name, axes):
    assert names.tensor_of(path, index) == (name, axes)
    assert names.leaf_of(name) == (path, index, axes)
    assert names.stack_depth(path) == len(index)


@pytest.mark.parametrize("path, index, name, axes", [*PAIRS, *OTHERS])
def test_unstacked_names_carry_their_numbers(path, index, name, axes):
    leaf = names.leaf_of(name, stacked=False)
    assert leaf.index == () and leaf.axes == axes
    assert names.tensor_of(leaf.path) == (name, axes)
    assert names.stack_depth(leaf.path) == 0


def test_module_name_writes_the_number_after_the_stack():
    assert names.module_name("model.layers.mlp.up_proj", (3,)) == "model.layers.3.mlp.up_proj"
    assert names.module_name("lm_head") == "lm_head"


@pytest.mark.parametrize("family", [names.LLAMA, names.GPT2, names.BERT], ids=lambda f: f.name)
def test_the_union_of_the_tables_says_what_each_says(family):
    start = {"gpt2": "transformer", "bert": "bert"}.get(family.name, "model")
    for path, index, name, axes in (*PAIRS, *OTHERS):
        if path.startswith((start, "lm_head")):
            assert names.tensor_of(path, index, family=family) == (name, axes)
            assert names.leaf_of(name, family=family) == (path, index, axes)


def test_a_table_of_the_users_own():
    conv = names.Family(
        name="mine",
        stacks=("blocks",),
        rules=(
            names.Rule("*conv", "weight", "kernel", (2, 3, 1, 0)),
            names.Rule("*", "weight", "w", (1, 0)),
            names.Rule("*", "*", "*"),
        ),
    )
    path, index, name = "blocks.conv.kernel", (2,), "blocks.2.conv.weight"
    assert names.tensor_of(path, index, family=conv) == (name, (2, 3, 1, 0))
    assert names.leaf_of(name, family=conv) == (path, index, (2, 3, 1, 0))
    assert names.tensor_of("blocks.out.w", (0,), family=conv) == ("blocks.0.out.weight", (1, 0))
    assert names.leaf_of("temperature", family=conv) == ("temperature", (), None)


@pytest.mark.parametrize("name", ["model.layers.3.q_proj.weight", "weight", "a.b.running_mean"])
def test_paths_that_are_their_names(name):
    same = names.Family(name="Hugging Face", stacks=(), rules=(names.Rule("*", "*", "*"),))
    assert names.tensor_of(name, family=same) == (name, None)
    assert names.leaf_of(name, family=same) == (name, (), None)


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
