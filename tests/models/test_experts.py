"""Mixtures of experts, alone or beside dense blocks, against transformers, and the cost."""

import dataclasses
import json
import shutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.array import delta, dense, is_lora
from lora_jax.models import config_from_hf
from lora_jax.models.dialect import Routing
from lora_jax.models.expert_rows import ragged, sort_by_expert, tile_count, tile_size, tiled
from lora_jax.models.experts import (
    Chosen,
    Experts,
    Load,
    balance,
    choose_experts,
    choose_grouped,
    load_of,
    over_experts,
)
from lora_jax.models.latent import LatentAttention
from lora_jax.models.layers import groups_of
from lora_jax.models.llama_parts import norm_of
from lora_jax.paths import numbers_of, slice_of
from lora_jax.quant import QuantConfig
from lora_jax.train.flops import training_flops

from tests.support.decoder_checks import (
    check_blocks_apart,
    check_greedy_text,
    check_logits,
    check_saved_again,
    quick_jit,
)
from tests.support.torch_models import (
    DECODER_SIZES,
    TOLERANCE,
    saver,
    texts,
)

pytestmark = pytest.mark.once

PLACE = "models/experts"
SIZES = dict(DECODER_SIZES, pad_token_id=0)
QWEN3 = dict(
    SIZES, model_type="qwen3_moe", head_dim=8, moe_intermediate_size=12, num_experts=6,
    num_experts_per_tok=3,
)  # fmt: skip
CASES = {
    "mixtral": dict(SIZES, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mixtral with a window": dict(
        SIZES, model_type="mixtral", num_local_experts=5, num_experts_per_tok=1, sliding_window=4
    ),
    "qwen3_moe": dict(QWEN3, norm_topk_prob=True),
    "qwen3_moe with windows": dict(
        QWEN3, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3_moe with plain weights": dict(QWEN3, norm_topk_prob=False, attention_bias=True),
    "gpt_oss": dict(
        SIZES, model_type="gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=4, swiglu_limit=1.0,
    ),
    "gpt_oss without scaling": dict(
        SIZES, model_type="gpt_oss", head_dim=8, num_local_experts=3, num_experts_per_tok=1,
        sliding_window=4, layer_types=["full_attention"] * 3, attention_bias=False,
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
    ),
    "olmoe": dict(SIZES, model_type="olmoe", num_experts=4, num_experts_per_tok=2),
    "olmoe with limits": dict(
        SIZES, model_type="olmoe", num_experts=4, num_experts_per_tok=4, clip_qkv=0.5,
        norm_topk_prob=True,
    ),
}  # fmt: skip

GROUPS = dict(
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2
)
LATENT = dict(
    SIZES, **GROUPS, model_type="deepseek_v3", num_key_value_heads=4, kv_lora_rank=16,
    qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
CASES |= {
    "qwen3_moe in turns": dict(QWEN3, num_hidden_layers=4, decoder_sparse_step=2),
    "qwen3_moe with a dense block": dict(QWEN3, mlp_only_layers=[1]),
    "qwen2_moe": dict(
        SIZES, model_type="qwen2_moe", moe_intermediate_size=12, num_experts=6,
        num_experts_per_tok=3, shared_expert_intermediate_size=20, mlp_only_layers=[0],
    ),
    "qwen2_moe without biases": dict(
        SIZES, model_type="qwen2_moe", moe_intermediate_size=12, num_experts=4, qkv_bias=False,
        norm_topk_prob=True,
    ),
    "glm4_moe": dict(
        SIZES, **GROUPS, model_type="glm4_moe", head_dim=8, use_qk_norm=True, attention_bias=True,
        routed_scaling_factor=1.7,
    ),
    "glm4_moe of one group": dict(
        SIZES, model_type="glm4_moe", head_dim=8, moe_intermediate_size=12, n_routed_experts=4,
        num_experts_per_tok=2, first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=2,
    ),
    "deepseek_v3": dict(
        LATENT, q_lora_rank=16, first_k_dense_replace=1,
        rope_scaling=dict(
            rope_type="yarn", factor=8.0, original_max_position_embeddings=8, mscale=1.0,
            mscale_all_dim=0.7, beta_fast=32, beta_slow=1, rope_theta=500.0,
        ),
    ),
    "deepseek_v2": {
        **LATENT, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy",
        "q_lora_rank": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
        "num_experts_per_tok": 3,
    },
    "deepseek_v2 without groups": {
        **LATENT, "model_type": "deepseek_v2", "q_lora_rank": None, "n_group": None,
        "topk_group": None, "v_head_dim": 12,
    },
    "glm4_moe_lite": {
        **LATENT, "model_type": "glm4_moe_lite", "q_lora_rank": 16, "v_head_dim": 12,
        "num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "granitemoe": dict(
        SIZES, model_type="granitemoe", num_local_experts=4, num_experts_per_tok=2,
        embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=1.5,
        attention_multiplier=0.2,
    ),
    "granitemoe_swa": dict(
        SIZES, model_type="granitemoe_swa", num_local_experts=4, num_experts_per_tok=2,
        attention_multiplier=0.2, sliding_window=4, num_hidden_layers=5,
    ),
    "mellum": dict(
        SIZES, model_type="mellum", head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=12, sliding_window=4, attention_bias=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["sparse", "dense", "sparse"],
        rope_parameters={
            "full_attention": dict(
                rope_type="yarn", factor=8.0, original_max_position_embeddings=8, rope_theta=500.0
            ),
            "sliding_attention": dict(rope_type="default", rope_theta=300.0),
        },
    ),
    "mellum by default": dict(
        SIZES, model_type="mellum", head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=12, norm_topk_prob=False,
    ),
    "ernie4_5_moe": dict(
        SIZES, model_type="ernie4_5_moe", moe_num_experts=6, moe_k=3, moe_intermediate_size=12,
    ),
    "ernie4_5_moe in turns": dict(
        SIZES, model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=12,
        moe_num_shared_experts=0, moe_layer_interval=2, moe_layer_start_index=0,
        moe_layer_end_index=4, num_hidden_layers=5, tie_word_embeddings=False,
    ),
    "flex_olmo": dict(SIZES, model_type="flex_olmo", num_experts=4, num_experts_per_tok=2),
    "dots1": dict(
        SIZES, **GROUPS, model_type="dots1", head_dim=8, n_shared_experts=1, sliding_window=4,
        first_k_dense_replace=1, max_window_layers=2, attention_bias=True,
    ),
    "exaone_moe": {
        **SIZES, **GROUPS, "model_type": "exaone_moe", "head_dim": 8, "num_experts": 8,
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "solar_open": dict(SIZES, **GROUPS, model_type="solar_open", head_dim=8, attention_bias=True),
    "deepseek_v3 with plain queries": dict(
        {**LATENT, "v_head_dim": 12}, q_lora_rank=None, first_k_dense_replace=2,
        rope_interleave=False, attention_bias=True,
    ),
}  # fmt: skip
NEWER = (
    "granitemoe", "granitemoe_swa", "mellum", "ernie4_5_moe", "ernie4_5_moe in turns", "flex_olmo",
    "dots1", "exaone_moe", "solar_open",
)  # fmt: skip
ONE_EACH = ("mixtral with a window", "qwen3_moe", "olmoe with limits", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case", [c if c in ONE_EACH else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_logits_are_transformers(saved, case):
    check_logits(saved, PLACE, case)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["mixtral with a window", "qwen3_moe", "olmoe", "gpt_oss", "qwen3_moe in turns", "qwen2_moe",
     "glm4_moe", "deepseek_v3", "deepseek_v2", "glm4_moe_lite", *NEWER],
)  # fmt: skip
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["mixtral", "olmoe", "gpt_oss", "qwen3_moe in turns", "deepseek_v3"]
)
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case",
    [
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        "gpt_oss without scaling",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                "qwen3_moe in turns",
                "qwen2_moe",
                "glm4_moe",
                "deepseek_v3",
                "deepseek_v2",
                "glm4_moe_lite",
                *NEWER,
            )  # fmt: skip
        ),
    ],
)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    check_saved_again(saved, PLACE, case, tmp_path)


def adapted(model, **fields):
    """Adapters that change the logits, as `lora.split` gives them."""
    config = lora.LoraConfig(rank=2, alpha=4, **fields)
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    trainable, frozen = lora.split(lora.init(jax.random.key(1), plan, model.params))
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.03 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved), frozen


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, QuantConfig(block_size=16)])
def test_adapters_stay_low_rank_and_train(saved, quantize):
    """Logits and gradients equal those of the weights added up, expert by expert."""
    model = models.load(saved("mixtral")[1], quantize=quantize)
    trainable, frozen = adapted(model, target_modules="all-linear")
    plain = models.load(saved("mixtral")[1])
    tokens, mask = texts("left")
    seen = jnp.asarray(mask)

    def added_up(params):
        return jax.tree.map(
            lambda x: dense(x.w) + delta(x) if is_lora(x) else x, params, is_leaf=is_lora
        )

    def loss(trainable, prepare, apply):
        logits = apply(prepare(lora.combine(trainable, frozen)), tokens, mask=seen)
        return jnp.where(seen[..., None], jnp.sin(logits), 0.0).sum(), logits

    grad = quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    (_, got), slopes = grad(trainable, lambda x: x, lora.lorafy(model.apply, strict=True))
    (_, want), expected = grad(trainable, added_up, plain.apply)
    np.testing.assert_allclose(got[seen], want[seen], atol=TOLERANCE)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    # float32 sums of hundreds of terms, against the largest slope.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * size), slopes, expected)


CHOICES = {
    "spread": np.random.default_rng(0).permuted(np.tile(np.arange(5), (40, 1)), axis=1)[:, :2],
    "one expert takes all": np.tile([3, 1], (40, 1)),
    "few tokens": np.array([[4, 0]]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_both_products_are_those_of_each_row_alone(case):
    experts = jnp.asarray(CHOICES[case])
    draw = np.random.default_rng(1)
    rows = jnp.asarray(draw.normal(size=(experts.size, 6)), "float32")
    weights = jnp.asarray(draw.normal(size=(5, 6, 7)), "float32")
    order = sort_by_expert(experts, 5)
    at = np.asarray(order.source)
    want = np.einsum("mi,mio->mo", rows[at], weights[np.asarray(experts).reshape(-1)[at]])
    for product in (ragged, tiled):
        np.testing.assert_allclose(product(rows[at], weights, order), want, atol=1e-5)
    np.testing.assert_array_equal(at[np.asarray(order.place)], np.arange(experts.size))


@pytest.mark.parametrize("tokens", [1, 16, 4096])
@pytest.mark.parametrize("experts", [4, 64])
def test_filling_adds_a_quarter_to_the_rows(tokens, experts):
    rows = 2 * tokens
    computed = tile_size(rows, experts) * tile_count(rows, experts)
    assert computed >= rows
    # In small batches a tile is a row; there each row may begin a tile.
    assert computed <= max(1.5 * rows, 2 * rows if tile_size(rows, experts) == 1 else 0)


def training_step(experts: int, chosen: int):
    """The gradient of a loss on adapters of a model of this many experts, and its arguments."""
    config = config_from_hf(
        dict(SIZES, model_type="mixtral", num_local_experts=experts, num_experts_per_tok=chosen)
    )
    model = models.init(jax.random.key(0), config)
    trainable, frozen = adapted(model, target_modules="all-linear")
    tokens = jnp.zeros((2, 64), jnp.int32)

    def loss(trainable, frozen):
        return jnp.sin(lora.lorafy(model.apply)(lora.combine(trainable, frozen), tokens)).sum()

    return loss, trainable, frozen


def test_the_cost_of_a_step_grows_with_the_experts_chosen():
    """And not with those there are, of which it has eight times as many."""
    few, many, more = (
        training_flops(*training_step(*counts)) or 0 for counts in ((4, 2), (32, 2), (32, 4))
    )
    # The router and the filling of tiles grow.
    assert 0 < many < 1.2 * few
    assert more > 1.3 * many


@pytest.mark.slow
def test_the_compiled_step_has_no_product_with_all_experts():
    def flops(*counts):
        loss, *inputs = training_step(*counts)
        return jax.jit(jax.grad(loss)).lower(*inputs).compile().cost_analysis()["flops"]

    assert flops(32, 2) < 1.2 * flops(4, 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts": 5}, "are two numbers, {4, 5}|are two numbers, {5, 4}"),
        ({"num_experts_per_tok": 5}, "`num_experts_per_tok` is 5, of only 4 experts"),
        ({"router_jitter_noise": 0.1}, "`router_jitter_noise` = 0.1 is not supported"),
        (
            {"num_local_experts": 0},
            "`num_local_experts` must be a whole number from 1 to 1",
        ),
    ],
)
def test_experts_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**CASES["mixtral"], **fields})


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_the_width_of_an_expert_is_written(family):
    config = config_from_hf(dict(CASES[family]))
    wide = dataclasses.replace(config, moe_intermediate_size=20)
    assert config_from_hf(wide.to_hf()).expert_size == 20


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(QWEN3, mlp_only_layers=[0, 1, 2]), "`decoder_sparse_step` leave no block with exp"),
        (dict(LATENT, first_k_dense_replace=3), "`first_k_dense_replace` leaves no block with"),
        (dict(LATENT, n_group=3), "`n_group` 3 must divide `n_routed_experts` 8 into groups of"),
        (dict(LATENT, topk_method="greedy"), "`topk_method` = 'greedy' is not supported"),
        ({**LATENT, "model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "is not one of gre"),
        ({**LATENT, "v_head_dim": 20}, "`v_head_dim` 20 is above the size of a key"),
    ],
)
def test_blocks_and_groups_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(fields)


@pytest.mark.parametrize(
    "kinds, groups",
    [
        ("aaaa", ["0:4"]),
        ("dsdsds", ["0:6:2", "1:6:2"]),
        ("llfllf", ["0:6:3", "1:6:3", "2:6:3"]),
        ("dss", ["0:1", "1:3"]),
        ("dsdsd", ["0:1", "1:5:2", "2:5:2"]),
        ("dds", ["0:2", "2:3"]),
        # llama.cpp's Q4_K_M of 32 blocks.
        ("6666446446446446446446446446" + "6666", ["0:3", "27:32", "3:27:3", "4:27:3", "5:27:3"]),
    ],
)
def test_blocks_of_one_kind_are_stacked(kinds, groups):
    assert sorted(slice_of(numbers) for numbers in groups_of(kinds)) == groups
    assert all(len({kinds[i] for i in numbers}) == 1 for numbers in groups_of(kinds))
    assert sorted(i for group in groups for i in numbers_of(group) or ()) == [*range(len(kinds))]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, QuantConfig(block_size=16)])
@pytest.mark.parametrize("case", ["glm4_moe", "deepseek_v3"])
def test_adapters_of_blocks_of_two_kinds(saved, case, quantize):
    """Adapters on every linear layer; those of one block alone change no other."""
    model = models.load(saved(case)[1], quantize=quantize)
    tokens, mask = texts("left")
    run = quick_jit(lora.lorafy(model.apply, strict=True))
    one = dict(target_modules=("o_proj", "up_proj", "down_proj"), layers_to_transform=(1,))
    for fields in (one, dict(target_modules="all-linear")):
        params = lora.combine(*adapted(model, **fields))
        got = np.asarray(run(params, tokens, mask=jnp.asarray(mask)))
        merged = np.asarray(run(lora.merge(params), tokens, mask=jnp.asarray(mask)))
        # Logits of about 10 in float32.
        np.testing.assert_allclose(got[mask], merged[mask], atol=5e-4)


def test_layers_that_predict_further_tokens_are_not_loaded(saved, tmp_path):
    directory = saved("glm4_moe")[1]
    shutil.copytree(directory, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    more = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
    save_file({**load_file(file), **more}, file)
    model, plain = (models.load(folder) for folder in (tmp_path / "model", directory))
    jax.tree.map(np.testing.assert_array_equal, model.params, plain.params)
    fields = json.loads((directory / "config.json").read_text())
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**fields, "num_nextn_predict_layers": 1}))
    with pytest.warns(UserWarning, match="which predict further tokens, are not loaded: what is"):
        models.save_merged(tmp_path / "merged", models.load(path.parent), plain.params)
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["num_nextn_predict_layers"] == 0
    models.load(tmp_path / "merged")
    path.write_text(json.dumps({**fields, "num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"1 not part of the model: `model.layers.3.eh_proj"):
        models.load(tmp_path / "model")


@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_heads_begin_with_what_is_rotated_and_values_are_as_wide(interleaved):
    raw = {**CASES["deepseek_v3 with plain queries"], "v_head_dim": 6}
    config = config_from_hf({**raw, "rope_interleave": interleaved})
    net = LatentAttention(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    x, heads = jax.random.normal(jax.random.key(0), (1, 3, config.hidden_size)), []

    def attend(q, k, v, *, stored, block):
        heads.extend((k, v))
        return v, stored

    net(x, attend, None, jnp.int32(0))
    k, v = heads
    assert k.shape == v.shape and not v[..., 6:].any() and v[..., :6].all()
    turned = net.kv_a_proj_with_mqa(x)[..., 16:][..., [0, 2, 1, 3] if interleaved else slice(None)]
    for head in range(4):
        np.testing.assert_allclose(k[:, :, head, :4], turned, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt_oss", "helium", "llama", "cohere"])
def test_where_norms_round_in_16_bits(kind):
    fields = CASES["gpt_oss"] if kind == "gpt_oss" else SIZES
    config = config_from_hf({**fields, "model_type": kind})
    norm: Any = norm_of(config, 8, jnp.bfloat16)
    x, scale = jax.random.normal(jax.random.key(0), (2, 64, 8), jnp.bfloat16)
    norm.scale.set_value(scale[0])
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True) * (kind == "cohere")
    eps = config.rms_norm_eps
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    once = (normal * scale[0].astype(jnp.float32)).astype(jnp.bfloat16)
    twice = normal.astype(jnp.bfloat16) * scale[0]
    assert (once != twice).any()
    np.testing.assert_array_equal(norm(x), twice if kind == "llama" else once)


@pytest.mark.parametrize("case", CHOICES)
def test_a_device_computes_its_own_experts_alone(case, monkeypatch):
    """The sums of two devices are those of one, which has as many tiles as both."""
    chosen = jnp.asarray(CHOICES[case])
    draw = np.random.default_rng(1)
    rows = jnp.asarray(draw.normal(size=(chosen.size, 6)), "float32")
    weights = jnp.asarray(draw.normal(size=(6, 6, 7)), "float32")
    computed, look_up = [], jax.lax.dynamic_index_in_dim

    def counted(w, expert, **options):
        jax.debug.callback(lambda e: computed.append(int(e)), expert)
        return look_up(w, expert, **options)

    monkeypatch.setattr(jax.lax, "dynamic_index_in_dim", counted)

    def product(first, own):
        order = sort_by_expert(chosen - first, 6, own=own)
        out = tiled(rows[order.source], weights[first : first + own], order)[order.place]
        np.testing.assert_allclose(
            ragged(rows[order.source], weights[first : first + own], order)[order.place],
            out,
            atol=1e-5,
        )
        jax.effects_barrier()
        return out

    whole = product(0, 6)
    computed.clear()
    parts = [product(first, 3) for first in (0, 3)]
    size = tile_size(chosen.size, 6)
    needed = -(-np.bincount(np.asarray(chosen).reshape(-1), minlength=6) // size)
    # By their own numbers: 0 to 2 on either device.
    assert sorted(computed) == sorted(e % 3 for e in range(6) for _ in range(needed[e]))
    np.testing.assert_allclose(sum(parts), whole, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_two_devices_have_the_sums_of_one(rows):
    """Each has half of the experts; of one row both have all tokens, of two rows each its own."""
    draw = np.random.default_rng(0)
    x, logits, down = (
        jnp.asarray(draw.normal(size=shape), "float32")
        for shape in ((rows, 5, 6), (rows, 5, 4), (4, 6, 6))
    )

    def mixed(tokens, chosen, weights, first):
        own = jax.nn.one_hot(chosen.experts - first, len(weights["down_proj"]))  # (m, k, e)
        shares = (own * chosen.weights[..., None]).sum(1)
        return jnp.einsum("md,edf,me->mf", tokens, weights["down_proj"], shares)

    def run(x, logits, weights):
        choose = partial(choose_experts, count=2, normalized=True)
        flat = lambda y: choose(y.reshape(-1, 4))  # noqa: E731
        shaped = lambda y: Chosen(*(z.reshape(*y.shape[:2], 2) for z in flat(y)))  # noqa: E731
        return over_experts(mixed, shaped, x, logits, weights)

    want = run(x, logits, {"down_proj": down})
    with jax.set_mesh(models.make_mesh(expert=2, devices=jax.devices()[:2])):
        got = jax.jit(run)(x, logits, {"down_proj": down})
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_load_is_that_of_real_tokens():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, 5, 4)).astype(np.float32)
    real = np.arange(10).reshape(2, 5) % 3 > 0
    experts = np.argsort(-logits, axis=-1)[..., :2]
    load = load_of(jnp.asarray(logits), jnp.asarray(experts), jnp.asarray(real))
    np.testing.assert_array_equal(load.chosen, np.bincount(experts[real].reshape(-1)))
    shares = np.exp(logits[real]) / np.exp(logits[real]).sum(-1, keepdims=True)
    np.testing.assert_allclose(load.likely, shares.sum(0), rtol=1e-5)


def test_the_balance_is_the_papers_and_its_tokens_are_a_constant():
    chosen, likely = np.array([[3, 1, 0, 2], [1.5, 0.5, 0.4, 0.6]], np.float32)
    value, slope = jax.value_and_grad(lambda x: balance(Load(jnp.asarray(chosen), x)))(likely)
    assert float(value) == pytest.approx(4 * np.dot(chosen / 3, likely / 3))
    np.testing.assert_allclose(slope, 4 * chosen / 9, rtol=1e-5)


def test_experts_come_from_the_chosen_groups_whatever_the_bias():
    """All scores are below 0 here."""
    logits, bias = jnp.array([[0.0, 1.0, 2.0, -1.0]]), jnp.full(4, -3.0)
    found = choose_grouped(logits, bias, 2, Routing(groups=2, chosen=1, scale=1.5), normalized=True)
    shares = 1 / (1 + np.exp(-np.array([1.0, 0.0])))
    assert found.experts.tolist() == [[1, 0]]
    np.testing.assert_allclose(found.weights[0], 1.5 * shares / shares.sum(), rtol=1e-5)


def test_the_sum_of_a_tokens_experts_is_rounded_once():
    config = config_from_hf(CASES["mixtral"])
    experts = Experts(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 4)
    weights = {
        name: jax.random.normal(key, getattr(experts, name).get_value().shape, jnp.bfloat16)
        for key, name in zip(keys, ("gate_up_proj", "down_proj"), strict=False)
    }
    x = jax.random.normal(keys[2], (5, config.hidden_size), jnp.bfloat16)
    shares, numbers = jax.random.uniform(keys[3], (5, 2)), jnp.array([[0, 3]] * 5)
    got = experts.mixed(x, Chosen(numbers, shares), weights, 0)
    each = [experts.mixed(x, Chosen(numbers[:, i : i + 1], jnp.ones((5, 1))), weights, 0)
            for i in (0, 1)]  # fmt: skip
    want = sum(y.astype(jnp.float32) * shares[:, i : i + 1] for i, y in enumerate(each))
    np.testing.assert_array_equal(got, jnp.asarray(want).astype(jnp.bfloat16))


def test_a_config_of_solar_open_states_no_size_of_dense_blocks():
    fields = {name: x for name, x in CASES["solar_open"].items() if name != "intermediate_size"}
    assert config_from_hf(fields).intermediate_size == fields["moe_intermediate_size"]
