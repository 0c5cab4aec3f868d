"""lora_jax/hf/peft*.py without PEFT: names, shapes, layouts, strictness; vLLM."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.array import LoraArray, SavedArray, Window, leaves_by_path
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft import api
from lora_jax.hf.peft import directory as peft_files
from lora_jax.hf.peft.index import make_index, named_targets
from lora_jax.hf.peft.load import check_task
from lora_jax.hf.peft.save import to_peft
from lora_jax.hf.peft.settle import settled
from lora_jax.hf.peft.vllm import _experts, _Pair, for_vllm
from lora_jax.multi.stack import stack
from lora_jax.plan.decide import plan
from lora_jax.tree import init

from tests.support.peft_trees import (
    QV,
    D,
    L,
    V,
    equal,
    nested,
    planted,
    random_params,
    randomized,
    specs_of,
)

pytestmark = pytest.mark.once

BASE = "base_model.model.model.layers"


# ---- names and layout


def test_a_layer_is_a_pair_of_transposed_matrices(tree):
    _, tensors = to_peft(tree, QV)
    q = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert len(tensors) == 2 * 2 * L
    a = tensors[f"{BASE}.2.self_attn.q_proj.lora_A.weight"]
    b = tensors[f"{BASE}.2.self_attn.q_proj.lora_B.weight"]
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_array_equal(a, np.asarray(q.a)[2].T)
    np.testing.assert_array_equal(b, np.asarray(q.b)[2].T)


def test_stacked_and_unstacked_trees_write_the_same(tree):
    _, tensors = to_peft(tree, QV)
    flat = planted(random_params(stacked=False), QV)
    filled = api.fill(flat, QV, tensors)
    assert isinstance(filled["model"]["layers"]["1"]["self_attn"]["q_proj"]["kernel"], LoraArray)
    _, again = to_peft(filled, QV)
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)


def test_split_heads_are_flattened_in_hugging_faces_order():
    """A kernel (D, heads, head_dim), and one that contracts both, are PEFT's flat matrices."""
    rng = np.random.default_rng(0)
    config = LoraConfig(rank=2, alpha=2, target_modules=("q_proj", "o_proj"))
    flat = {
        "model.layers.0.self_attn.q_proj.kernel": jnp.zeros((6, 3, 5)),
        "model.layers.0.self_attn.o_proj.kernel": jnp.zeros((3, 5, 6)),
    }
    roles = dict(zip(flat, ("ioo", "iio"), strict=True))
    tree = planted(nested(flat), config, roles=roles)
    tensors = {
        f"{BASE}.0.self_attn.{name}_proj.lora_{part}.weight": rng.normal(size=shape).astype("f4")
        for name, part, shape in (
            ("q", "A", (2, 6)),
            ("q", "B", (15, 2)),
            ("o", "A", (2, 15)),
            ("o", "B", (6, 2)),
        )
    }
    filled = api.fill(tree, config, tensors)
    attention = filled["model"]["layers"]["0"]["self_attn"]
    q, o = attention["q_proj"]["kernel"], attention["o_proj"]["kernel"]
    assert (q.b.shape, o.a.shape) == ((2, 3, 5), (3, 5, 2))
    b = tensors[f"{BASE}.0.self_attn.q_proj.lora_B.weight"]
    a = tensors[f"{BASE}.0.self_attn.o_proj.lora_A.weight"]
    np.testing.assert_array_equal(np.asarray(q.b).reshape(2, 15), b.T)
    np.testing.assert_array_equal(np.asarray(o.a).reshape(15, 2), a.T)
    _, again = to_peft(filled, config)
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)


def test_linen_collections_and_experts_are_named():
    config = LoraConfig(rank=2, target_modules=("up",))
    flat = {"params.layers.mlp.experts.up.kernel": jnp.zeros((2, 3, 4, 5))}
    tree = planted(nested(flat), config, roles={next(iter(flat)): "ssio"})
    assert [spec.key for spec in specs_of(tree, config)][::2] == [
        f"base_model.model.layers.{i}.mlp.experts.{j}.up.lora_A.weight"
        for i in range(2)
        for j in range(3)
    ]


def test_a_stack_without_a_place_for_its_numbers_is_an_error():
    config = LoraConfig(rank=2, target_modules=("up",))
    leaf = LoraArray(
        w=jnp.zeros((3, 4, 5)),
        a=jnp.zeros((3, 4, 2)),
        b=jnp.zeros((3, 2, 5)),
        scale=jnp.ones(3),
        roles="sio",
    )
    with pytest.raises(ValueError, match="leaf `tower.up.kernel` stacks 1 dimension.* rename"):
        to_peft({"tower": {"up": {"kernel": leaf}}}, config)


def test_bfloat16_base_and_saved_modules_keep_their_dtype(tmp_path):
    config = dataclasses.replace(QV, modules_to_save=("lm_head", "input_layernorm"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
    tree = randomized(planted(half, config), config)
    api.save_peft(tmp_path / "a", tree, config)
    _, tensors = api.read_peft(tmp_path / "a")
    head = tensors["base_model.model.lm_head.weight"]
    assert head.dtype == ml_dtypes.bfloat16 and head.shape == (V, D)
    norm = tensors[f"{BASE}.1.input_layernorm.weight"]
    assert norm.dtype == ml_dtypes.bfloat16 and norm.shape == (D,)
    assert tensors[f"{BASE}.0.self_attn.q_proj.lora_A.weight"].dtype == np.float32
    equal(api.fill(planted(half, config), config, tensors), tree)


def test_adapters_stored_in_16_bits_are_read_as_float32(tree, directory):
    path = directory / peft_files.TENSOR_FILE
    halved = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(path).items()}
    save_file(halved, path, metadata={"format": "pt"})
    config, tensors = api.read_peft(directory)
    filled = api.fill(planted(random_params(), QV), config, tensors)
    q = filled["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    want = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.a.dtype == jnp.float32
    np.testing.assert_array_equal(q.a, want.a.astype(jnp.bfloat16).astype(jnp.float32))


def test_all_linear_is_written_as_names():
    config = LoraConfig(rank=2)
    fields, tensors = to_peft(randomized(planted(random_params(), config), config), config)
    assert fields["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert len(tensors) == 2 * 7 * L


def test_all_linear_is_written_as_full_names_where_ends_would_mean_more():
    params = random_params()
    params["other"] = {"up_proj": {"kernel": jnp.zeros((3, 3))}}
    config = LoraConfig(rank=2, exclude_modules=("self_attn.q_proj",))
    tree = planted(params, config)
    assert "q_proj" not in named_targets(make_index(leaves_by_path(tree), config))
    tree["other"]["up_proj"] = params["other"]["up_proj"]  # not adapted, though linear
    layers = tree["model"]["layers"]
    for block, name in (("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj")):
        layers[block][name] = params["model"]["layers"][block][name]
    assert named_targets(make_index(leaves_by_path(tree), config)) == sorted(
        f"model.layers.{i}.mlp.{p}_proj" for i in range(L) for p in ("down", "gate", "up")
    )


def test_targets_of_some_layers_have_one_name_where_the_others_are_excluded():
    excluded = ("layers.0.self_attn.q_proj",)
    config = LoraConfig(rank=2, target_modules=("q_proj",), exclude_modules=excluded)
    index = make_index(leaves_by_path(planted(random_params(), config)), config)
    assert index.adapted and named_targets(index) == ["q_proj"]


def test_layers_without_an_adapter_stay_zero(tree):
    config = LoraConfig(rank=4, alpha=6, target_modules=("q_proj",), layers_to_transform=1)
    blank = planted(random_params(), config)
    filled = randomized(blank, config)
    q = filled["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert not np.any(q.a[0]) and not np.any(q.b[2]) and np.any(q.a[1])
    _, tensors = to_peft(filled, config)
    assert sorted(tensors) == [f"{BASE}.1.self_attn.q_proj.lora_{p}.weight" for p in "AB"]


# ---- the tree and the config agree, or it is an error


def changed(tree, **parts):
    q = tree["model"]["layers"]["self_attn"]["q_proj"]
    q["kernel"] = dataclasses.replace(q["kernel"], **parts)
    return tree


def test_another_scale_is_an_error(tree):
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj` has scale 3, .* give 1\.5"
    ):
        to_peft(changed(tree, scale=jnp.full(L, 3.0)), QV)


def test_a_scale_may_be_off_by_its_rounding_alone(tree):
    """An optimizer on the whole tree moves the scale by little in its first steps."""
    to_peft(changed(tree, scale=jnp.full(L, np.nextafter(np.float32(1.5), 2))), QV)
    with pytest.raises(ValueError, match=r"has scale 1\.5, but"):
        to_peft(changed(tree, scale=jnp.full(L, 1.5 + 5e-7)), QV)


def test_an_adapter_the_config_does_not_mean_is_an_error(tree):
    other = dataclasses.replace(QV, target_modules=("v_proj",))
    with pytest.raises(ValueError, match="q_proj` has a trained adapter, and the config does"):
        to_peft(tree, other)
    smaller = dataclasses.replace(QV, rank=2, alpha=3)
    with pytest.raises(ValueError, match="has an adapter beyond rank 2"):
        to_peft(tree, smaller)
    larger = dataclasses.replace(QV, rank=5)
    with pytest.raises(ValueError, match="its rank is 4, but the config gives .* rank 5"):
        to_peft(tree, larger)


def test_dora_of_tree_and_config_agree(tree):
    with pytest.raises(ValueError, match="has no DoRA magnitude, but the config says use_dora=Tr"):
        to_peft(tree, dataclasses.replace(QV, use_dora=True))
    with pytest.raises(ValueError, match="has DoRA magnitude, but the config says use_dora=False"):
        to_peft(changed(tree, m=jnp.ones((L, D))), QV)


def test_a_trained_leaf_that_would_not_be_written_is_an_error(tree):
    head = tree["lm_head"]["kernel"]
    tree["lm_head"]["kernel"] = SavedArray(w=head, value=head + 1)
    with pytest.raises(ValueError, match="`lm_head.kernel` was trained, but .* do not mean it"):
        to_peft(tree, QV)


def test_a_base_changed_for_good_is_an_error(tree):
    with pytest.raises(ValueError, match='init="pissa_niter_4", changed the base .* merged model'):
        to_peft(tree, dataclasses.replace(QV, init="pissa_niter_4"))


def test_not_finite_or_nothing_adapted(tree):
    with pytest.raises(ValueError, match="is a stack of adapters: pass one of them"):
        to_peft(stack([tree, tree]), QV)
    with pytest.raises(ValueError, match="no leaf has an adapter"):
        to_peft(random_params(), QV)
    q = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    with pytest.raises(ValueError, match="q_proj.lora_A.weight` holds NaN or infinity"):
        to_peft(changed(tree, a=q.a.at[1, 2, 3].set(jnp.inf)), QV)


# ---- keys


def test_a_tree_of_another_config_is_an_error(tree):
    _, tensors = to_peft(tree, QV)
    other = dataclasses.replace(QV, target_modules=("v_proj",))
    with pytest.raises(ValueError, match="q_proj.kernel` has an adapter, but the config targets"):
        api.fill(tree, other, tensors)


def test_missing_left_over_and_misshapen_keys_are_one_error(tree):
    _, tensors = to_peft(tree, QV)
    q0 = f"{BASE}.0.self_attn.q_proj.lora_A.weight"
    tensors[q0.replace("q_proj", "q_prj")] = tensors.pop(q0)
    v1 = f"{BASE}.1.self_attn.v_proj.lora_B.weight"
    tensors[v1] = tensors[v1][:, :2]
    with pytest.raises(ValueError) as caught:
        api.fill(planted(random_params(), QV), QV, tensors, source="here")
    text = str(caught.value)
    assert text.startswith("here: the adapter does not fit this model; 1 missing: `" + q0)
    assert "nearest in the file: `" + q0.replace("q_proj", "q_prj") in text
    assert "1 left over: `" + q0.replace("q_proj", "q_prj") in text
    assert f"1 misshapen: `{v1}` is (8, 2), expected (8, 4)" in text
    assert "\n" not in text


def test_an_adapter_of_another_model_says_how_many_keys(tree):
    _, tensors = to_peft(tree, QV)
    strangers = {k.replace("model.layers", "transformer.h"): v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=r"12 missing: .* and 9 more; 12 left over: .* and 9 more"):
        api.fill(planted(random_params(), QV), QV, strangers)


def test_another_base_embedding_in_the_file_is_an_error():
    config = LoraConfig(rank=2, target_modules=("embed_tokens",))
    tree = randomized(planted(random_params(), config), config)
    _, tensors = to_peft(tree, config)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert tensors[key].shape == (V, D)
    equal(api.fill(planted(random_params(), config), config, tensors), tree)
    without = {k: v for k, v in tensors.items() if k != key}
    equal(api.fill(planted(random_params(), config), config, without), tree)
    with pytest.raises(ValueError, match="is not this model's base weight"):
        api.fill(planted(random_params(7), config), config, tensors)


# ---- vLLM


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"use_dora": True}, r"DoRA \(use_dora=True\)"),
        ({"bias": "all"}, 'trained biases \\(bias="all"\\)'),
        ({"modules_to_save": ("lm_head",)}, r"whole saved modules \(lm_head\)"),
        ({"init": "pissa"}, r'a changed base weight \(init="pissa"; see `lora.rebase`\)'),
    ],
)
def test_vllm_refuses(fields, what, tmp_path):
    config = dataclasses.replace(QV, **fields)
    tree = randomized(planted(random_params(biases=True), config), config)
    with pytest.raises(ValueError, match=f"vLLM cannot serve an adapter with {what}; merge the ad"):
        api.save_peft(tmp_path / "a", tree, config, target="vllm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "what"), [("encoder.block.0.layer.0.SelfAttention.q", "T5"), ("vit.layers.0.q", "ViT")]
)
def test_vllm_refuses_what_it_does_not_serve(name, what):
    config = LoraConfig(rank=1, target_modules=("q",))
    ends = {".lora_A.weight": (1, 2), ".lora_B.weight": (2, 1)}
    found = {f"base_model.model.{name}{end}": np.ones(s, np.float32) for end, s in ends.items()}
    with pytest.raises(ValueError, match=f"vLLM serves no {what}: keep the adapter for PEFT"):
        for_vllm(config.to_peft(), found, config)


def test_targets_without_an_adapter_are_said(tree):
    wide = dataclasses.replace(QV, target_modules=("q_proj", "v_proj", "o_proj"))
    with pytest.warns(
        UserWarning, match='calls "o_proj" have no adapter in this tree, and a reader'
    ):
        to_peft(tree, wide)


def test_vllm_refuses_what_only_peft_knows(tmp_path):
    config = dataclasses.replace(QV, lora_bias=True)
    tree = randomized(planted(random_params(), config), config)
    with pytest.raises(ValueError, match=r"with biases of its own \(lora_bias=True\); merge the"):
        api.save_peft(tmp_path / "a", tree, config, target="vllm")
    config = dataclasses.replace(QV, trainable_token_indices=(3, 5))
    tree = randomized(planted(random_params(), config), config)
    with pytest.raises(ValueError, match=r"with trained rows \(trainable_token_indices\)"):
        api.save_peft(tmp_path / "a", tree, config, target="vllm")


def test_biases_and_rows_of_tree_and_config_agree(tmp_path):
    config = dataclasses.replace(QV, lora_bias=True, trainable_token_indices=(3, 5))
    tree = randomized(planted(random_params(), config), config)
    for other, text in (
        (dataclasses.replace(config, lora_bias=False), "has adapter's bias, but the config says"),
        (
            dataclasses.replace(config, trainable_token_indices=(5, 3)),
            r"its trained rows \[3, 5\] are not those of the config's",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            api.save_peft(tmp_path / "a", tree, other)
    api.save_peft(tmp_path / "a", tree, config)
    _, tensors = api.read_peft(tmp_path / "a")
    with pytest.raises(ValueError, match=r"1 misshapen: `.*_delta` is \(2, 16\), expected \(1, 16"):
        fewer = dataclasses.replace(config, trainable_token_indices=(3,))
        api.fill(planted(random_params(), fewer), fewer, tensors)


def test_kernels_of_any_layout_are_written_alike():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 2, 4, 2)), rng.normal(size=(2, 6))  # (height, width, in, r)
    common: dict[str, Any] = dict(scale=np.float32(8 / 2), b=np.float32(b))
    hwio = LoraArray(np.zeros((3, 2, 4, 6), "f4"), np.float32(a), **common, roles="iiio",
                     window=Window((0, 1)))  # fmt: skip
    oihw = LoraArray(np.zeros((6, 4, 3, 2), "f4"), np.float32(a.transpose(2, 0, 1, 3)), **common,
                     roles="oiii", window=Window((2, 3)))  # fmt: skip
    config = LoraConfig(rank=2, alpha=8, target_modules=("conv",))
    one, other = (to_peft({"conv": {"kernel": x}}, config)[1] for x in (hwio, oihw))
    equal(one, other)
    theirs = one["base_model.model.conv.lora_A.weight"]
    np.testing.assert_array_equal(theirs, np.float32(a.transpose(3, 2, 0, 1)))
    assert one["base_model.model.conv.lora_B.weight"].shape == (6, 2, 1, 1)
    fields = config.to_peft()
    with pytest.raises(ValueError, match="cannot serve an adapter of a convolution, `base_model"):
        for_vllm(fields, one, config)


def test_parameters_whose_order_nobody_knows():
    leaf, other = (
        LoraArray(np.zeros((3, n, 4), "f4"), np.ones((3, 4, 2), "f4"), np.ones((3, 2, n), "f4"),
                  np.full(3, 8, "f4"), roles="soi") for n in (4, 6)
    )  # fmt: skip
    config = LoraConfig(rank=2, target_modules=(), target_parameters=("theta", "phi", "xi"))
    for more in ({}, {"xi": other}):
        names = "`moe.phi`, `moe.theta`" + ", `moe.xi`" * len(more)
        with pytest.raises(ValueError, match=f"{names} by the order in which its model r"):
            to_peft({"moe": {"theta": leaf, "phi": leaf, **more}}, config)
    assert len(to_peft({"moe": {"theta": leaf}}, config)[1]) == 2


def test_each_further_parameter_of_a_module_is_wrapped_once_more():
    def leaf(fan_in, fan_out):
        shapes = ((2, fan_in, fan_out), (2, fan_in, 1), (2, 1, fan_out), (2,))
        return LoraArray(*(np.full(shape, 8, np.float32) for shape in shapes), roles="sio")

    parameters = {"w2": leaf(5, 3), "w3": leaf(3, 6), "w1": leaf(3, 5)}
    config = LoraConfig(rank=1, alpha=8, target_modules=(), target_parameters=("w1", "w2", "w3"))
    tree = {"moe": {"experts": parameters}}
    _, tensors = to_peft(tree, config)
    # In the order in which Mixtral registers them, the first innermost.
    start = "base_model.model.moe.experts."
    outs = {key.removeprefix(start): len(x) for key, x in tensors.items() if "lora_B" in key}
    assert outs == {
        "base_layer.base_layer.lora_B.weight": 5,
        "base_layer.lora_B.weight": 6,
        "lora_B.weight": 3,
    }


@pytest.mark.parametrize("pattern", ["vision_.*", ("vision_tower",)])
def test_exclusions_that_match_nothing_are_left_out(pattern):
    config = settled(
        dataclasses.replace(QV, exclude_modules=pattern), leaves_by_path(random_params())
    )
    assert config.exclude_modules == () and config.target_modules == QV.target_modules


def test_vllm_folds_scales_and_pads_ranks(tmp_path):
    config = LoraConfig(
        rank=4,
        alpha=6,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"1\.self_attn\.q_proj": 2},
        use_rslora=True,
    )
    tree = randomized(planted(random_params(), config), config)
    _, plain = to_peft(tree, config)
    api.save_peft(tmp_path / "a", tree, config, target="vllm")
    read, folded = api.read_peft(tmp_path / "a")
    assert (read.rank, read.alpha, read.use_rslora) == (4, 4, False)
    assert not read.rank_pattern and not read.alpha_pattern
    for name, scale in (("0.self_attn.q_proj", 3.0), ("1.self_attn.q_proj", 1.0)):
        b = f"{BASE}.{name}.lora_B.weight"
        np.testing.assert_array_equal(folded[b], plain[b] * scale)
    a, b = (f"{BASE}.2.self_attn.v_proj.lora_{p}.weight" for p in "AB")
    assert folded[a].shape == (4, D) and folded[b].shape == (8, 4)
    s = np.float32(6 / np.sqrt(2))
    np.testing.assert_allclose(folded[b] @ folded[a], s * plain[b] @ plain[a], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "scale"), [(dict(rank=4, rank_pattern=2), 3), (dict(rank=2, alpha_pattern=9), 4.5)]
)
def test_vllm_reads_the_rank_and_the_scale_that_the_patterns_give_all(fields, scale, tmp_path):
    names = ("q_proj", "v_proj")
    given: Any = {k: dict.fromkeys(names, v) if "pattern" in k else v for k, v in fields.items()}
    config = LoraConfig(alpha=6, target_modules=names, **given)
    tree = randomized(planted(random_params(), config), config)
    api.save_peft(tmp_path / "a", tree, config, target="vllm")
    read, folded = api.read_peft(tmp_path / "a")
    b = f"{BASE}.0.self_attn.q_proj.lora_B.weight"
    factor = folded[b] / to_peft(tree, config)[1][b]
    assert read.rank == 2 and folded[b].shape[1] == 2
    np.testing.assert_allclose(factor * read.alpha / read.rank, scale, rtol=1e-6)


def test_vllm_gets_experts_as_the_models_type_has_them():
    plain, wrapped = "model.layers.0.mlp.experts", "model.language_model.layers.0.mlp.experts"
    down = _Pair(plain, np.ones((4 * 2, 5)), np.ones((6, 2 * 4)), 2, 1.0)
    each = {pair.module: (pair.a.shape, pair.b.shape)
            for pair in _experts(plain, {"down_proj": down}, "qwen3_5_moe_text")}  # fmt: skip
    # What has no adapter gets one of zeros.
    one = ((2, 6), (5, 2))
    shapes = {"gate_proj": one, "up_proj": one, "down_proj": ((2, 5), (6, 2))}
    assert each == {f"{plain}.{e}.{name}": s for e in range(4) for name, s in shapes.items()}
    for module, kind in ((plain, "gpt_oss"), (wrapped, "qwen3_5_moe_text")):
        both = _experts(module, {"down_proj": down._replace(module=module)}, kind)
        # PEFT nests the adapters of gate and up inside that of down.
        assert [pair.module for pair in both] == [f"{module}.base_layer", module]


def test_vllm_leaves_numbers_alone_when_one_scale_holds(tree):
    fields, tensors = to_peft(tree, QV)
    same, folded = for_vllm(fields, tensors, QV)
    assert same == fields
    for name, value in tensors.items():
        np.testing.assert_array_equal(folded[name], value)


def test_unknown_target_of_export(tree, tmp_path):
    with pytest.raises(ValueError, match='target must be one of "peft", "vllm", got \'tgi\''):
        api.save_peft(tmp_path / "a", tree, QV, target="tgi")


def test_roles_given_to_load_peft(tmp_path):
    """A weight whose uses show no roles is loaded with those it was trained with."""

    def fn(p, x):
        return jnp.linalg.solve(p["model"]["solver"]["kernel"], x.mT).mT

    params = {"model": {"solver": {"kernel": jnp.eye(D) + 0.1}}}
    config = LoraConfig(rank=2, target_modules=("solver",), roles={"solver.kernel": "io"})
    x = jnp.ones((2, D))
    tree = init(jax.random.key(0), plan(config, fn, params, x), params)
    tree = randomized(tree, config)
    api.save_peft(tmp_path, tree, config)
    with pytest.raises(ValueError, match=r"adapts nothing .* set roles={'model.solver.kernel': "):
        api.load_peft(tmp_path, fn, params, x)
    loaded, _ = api.load_peft(tmp_path, fn, params, x, roles={"solver.kernel": "io"})
    np.testing.assert_array_equal(loaded["model"]["solver"]["kernel"].a,
                                  tree["model"]["solver"]["kernel"].a)  # fmt: skip


def test_a_classifiers_adapter_on_a_model_without_its_head(tree):
    _, tensors = to_peft(tree, QV)
    config = dataclasses.replace(QV, extra={"task_type": "SEQ_CLS"})
    tensors["base_model.model.score.weight"] = np.ones((2, D), "f4")
    with pytest.raises(
        ValueError, match=r"of a classifier \(task_type SEQ_CLS\): .* `score`, which"
    ):
        check_task(config, tensors, leaves_by_path(tree), "adapter")
    check_task(config, tensors, ["score.kernel"], "adapter")
