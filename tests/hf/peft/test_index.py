"""The index of an adapter: one row a layer, with PEFT's name, rank, alpha and scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.array import leaves_by_path
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft import api
from lora_jax.hf.peft.base import warn_of_base
from lora_jax.hf.peft.index import make_index
from lora_jax.plan.decide import plan
from lora_jax.quant.array import QuantArray
from lora_jax.quantize import quantize
from lora_jax.tree import init

from tests.support.peft_trees import L, nested, planted, random_params

pytestmark = pytest.mark.once

Q = "model.layers.self_attn.q_proj.kernel"


def indexed(config):
    return make_index(leaves_by_path(planted(random_params(), config)), config)


def test_a_row_a_layer_with_its_own_rank_and_scale():
    config = LoraConfig(
        rank=4,
        alpha=6,
        target_modules=("q_proj",),
        rank_pattern={"1.self_attn.q_proj": 2},
        alpha_pattern={"2.self_attn.q_proj": 8},
        use_rslora=True,
    )
    rows = indexed(config).rows[Q]
    assert [(row.layer, row.name) for row in rows] == [
        ((i,), f"model.layers.{i}.self_attn.q_proj") for i in range(L)
    ]
    assert [(row.kind, row.rank, row.alpha) for row in rows] == [
        ("module", 4, 6), ("module", 2, 6), ("module", 4, 8)
    ]  # fmt: skip
    assert [row.scale for row in rows] == pytest.approx([6 / 2, 6 / 2**0.5, 8 / 2])


def test_layers_without_an_adapter_have_rank_0():
    config = LoraConfig(rank=4, target_modules=("q_proj",), layers_to_transform=1)
    index = indexed(config)
    assert [(row.rank, row.scale > 0) for row in index.rows[Q]] == [
        (0, False), (4, True), (0, False)
    ]  # fmt: skip
    assert index.adapted == ["model.layers.1.self_attn.q_proj"]


def test_every_kind_of_leaf_has_its_rows_and_frozen_ones_have_none():
    config = LoraConfig(
        rank=2,
        target_modules=("q_proj",),
        modules_to_save=("lm_head",),
        trainable_token_indices=(3, 5),
    )
    index = indexed(config)
    kinds = {path: {row.kind for row in rows} for path, rows in index.rows.items()}
    assert kinds == {
        Q: {"module"}, "lm_head.kernel": {"saved"}, "model.embed_tokens.embedding": {"rows"}
    }  # fmt: skip
    assert len(index.leaves) > len(index.rows)


def test_experts_of_a_parameter_are_one_row_a_layer():
    config = LoraConfig(
        rank=2, target_modules=(), target_parameters=("layers.1.mlp.experts.gate_up_proj",)
    )
    path = "model.layers.mlp.experts.gate_up_proj"
    params = nested({path: jnp.zeros((2, 3, 4, 5))})

    def fn(params, x):
        w = params["model"]["layers"]["mlp"]["experts"]["gate_up_proj"]
        return sum(x @ w[layer, expert] for layer in range(2) for expert in range(3))

    x = jnp.ones((1, 4))
    tree = init(jax.random.key(0), plan(config, fn, params, x), params)
    rows = make_index(leaves_by_path(tree), config).rows[path]
    assert [(row.kind, row.layer, row.rank) for row in rows] == [
        ("parameter", (0,), 0), ("parameter", (1,), 2)
    ]  # fmt: skip
    assert rows[1].name == "model.layers.1.mlp.experts.gate_up_proj"


def test_excluded_modules_are_found_over_a_quantized_base(tmp_path):
    """A quantized weight is one leaf, whose path is the weight's and not that of its codes."""

    def fn(params, x):
        return x @ params["attn"]["q_proj"]["kernel"] + x @ params["attn"]["k_proj"]["kernel"]

    x, w = jnp.ones((1, 64)), jnp.eye(64)
    params = {"attn": {"q_proj": {"kernel": w}, "k_proj": {"kernel": w}}}
    config = LoraConfig(rank=2, target_modules=("q_proj", "k_proj"), exclude_modules=("k_proj",))
    tree = init(jax.random.key(0), plan(config, fn, params, x), params)
    api.save_peft(tmp_path / "a", tree, config)
    loaded, _ = api.load_peft(tmp_path / "a", fn, quantize(params, ("q_proj", "k_proj")), x)
    wanted = tree["attn"]["q_proj"]["kernel"].a
    np.testing.assert_array_equal(loaded["attn"]["q_proj"]["kernel"].a, wanted)
    assert isinstance(loaded["attn"]["k_proj"]["kernel"], QuantArray)


def test_another_base_than_the_quantized_one_of_the_training_is_a_warning(tmp_path):
    def fn(params, x):
        return x @ params["q_proj"]["kernel"]

    x, params = jnp.ones((1, 64)), {"q_proj": {"kernel": jnp.eye(64)}}
    config = LoraConfig(rank=2, target_modules=("q_proj",))

    def base(**options):
        return quantize(params, ("q_proj",), **options) if options else params

    def saved(name, over):
        tree = init(jax.random.key(0), plan(config, fn, over, x), over)
        api.save_peft(tmp_path / name, tree, config)
        return tmp_path / name

    four = saved("four", base(format="nf4"))
    files = {saved(f"four{k}", base(format="nf4")) / "adapter_model.safetensors" for k in "abcd"}
    assert len({path.read_bytes() for path in files}) == 1  # the metadata have an order
    api.load_peft(four, fn, base(format="nf4"), x)
    trained = 'over a base quantized with format="nf4", block_size=64, but this one is '
    with pytest.warns(
        UserWarning, match=f"four: .* {trained}in floats: .* quantize=.nf4., quantize_block=64, or"
    ):
        loaded, _ = api.load_peft(four, fn, params, x)
    with pytest.warns(UserWarning, match=f'{trained}quantized with format="nf4", block_size=32'):
        api.load_peft(four, fn, base(format="nf4", block_size=32), x)
    kept = 'format="q4_k", block_size=32'
    with pytest.warns(UserWarning, match=r'four: .* of a file \(format="q4_k".* quantize="file"'):
        warn_of_base(kept, params, "four")
    # Written again over floats, it is an adapter over floats; those say nothing of a base.
    api.save_peft(tmp_path / "again", loaded, config)
    for over in (params, base(format="int8")):
        api.load_peft(tmp_path / "again", fn, over, x)


def test_tables_of_a_model_of_ones_own_are_embeddings_of_peft(tmp_path):
    """By what the plan found, whatever the leaf is called; a tied one is the head too."""
    ids = jnp.arange(6).reshape(2, 3)
    table = jax.random.normal(jax.random.key(0), (10, 8))

    def keys(fn, params, target, **fields):
        config = LoraConfig(rank=2, target_modules=(target,), init="random", **fields)
        tree = init(jax.random.key(0), plan(config, fn, params, ids), params)
        api.save_peft(tmp_path / "a", tree, config)
        again, _ = api.load_peft(tmp_path / "a", fn, params, ids)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
        found = {name: x.shape for name, x in api.read_peft(tmp_path / "a")[1].items()}
        return {name.removeprefix("base_model.model."): shape for name, shape in found.items()}

    def looked_up(params, ids):
        return params["emb"]["weight"][ids] @ params["out"]["kernel"]

    params = {"emb": {"weight": table}, "out": {"kernel": jnp.ones((8, 5))}}
    factors = {"emb.lora_embedding_A": (2, 10), "emb.lora_embedding_B": (8, 2)}
    assert keys(looked_up, params, "emb") == factors

    def named(params, ids):
        return params["embed_tokens"]["weight"][ids] @ params["out"]["kernel"]

    params = {"embed_tokens": {"weight": table}, "out": {"kernel": jnp.ones((8, 5))}}
    base = "embed_tokens.base_layer.weight"
    assert keys(named, params, "embed_tokens")[base] == (10, 8)
    # PEFT leaves it out where rows of a table train.
    rows: Any = {"trainable_token_indices": {"out": (1,)}}
    assert base not in keys(named, params, "embed_tokens", **rows)

    def tied(params, ids):
        return params["emb"]["embedding"][ids] @ params["emb"]["embedding"].T

    of_head = {"lm_head.lora_A.weight": (2, 8), "lm_head.lora_B.weight": (10, 2)}
    found = keys(tied, {"emb": {"embedding": table}}, "emb")
    assert {name: x for name, x in found.items() if "base_layer" not in name} == factors | of_head
    read = api.read_peft(tmp_path / "a")[1]
    for of_head, of_table in (("A", "B"), ("B", "A")):
        np.testing.assert_array_equal(
            read[f"base_model.model.lm_head.lora_{of_head}.weight"],
            read[f"base_model.model.emb.lora_embedding_{of_table}"].T,
        )


@pytest.mark.parametrize("name", ["h", "layers", "experts", "layer.fc1", "h.attn", "blocks.1.h"])
def test_a_single_module_may_have_the_name_of_a_stack(tmp_path, name):
    params = nested({f"{name}.kernel": jnp.eye(8), "head.kernel": jnp.ones((8, 4))})

    def fn(params, x):
        flat = leaves_by_path(params)
        return x @ flat[f"{name}.kernel"] @ flat["head.kernel"]

    x = jnp.ones((2, 8))
    last = name.rpartition(".")[2]
    config = LoraConfig(rank=2, target_modules=(last,), init="random")
    tree = init(jax.random.key(0), plan(config, fn, params, x), params)
    api.save_peft(tmp_path / "a", tree, config)
    back, _ = api.load_peft(tmp_path / "a", fn, params, x)
    one, other = (leaves_by_path(t)[f"{name}.kernel"] for t in (tree, back))
    np.testing.assert_array_equal(one.a, other.a)
    np.testing.assert_array_equal(one.b, other.b)
