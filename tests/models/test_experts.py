"""Mixtures of experts: Mixtral, Qwen3-MoE and OLMoE against transformers, and the cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.array import delta, dense, is_lora
from lora_jax.models import config_from_hf
from lora_jax.models.experts import ragged, sort_by_expert, tile_count, tile_size, tiled
from lora_jax.models.layers import RMSNorm
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

ONE_EACH = ("mixtral with a window", "qwen3_moe", "olmoe with limits", "gpt_oss")


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
@pytest.mark.parametrize("case", ["mixtral with a window", "qwen3_moe", "olmoe", "gpt_oss"])
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "olmoe", "gpt_oss"])
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "gpt_oss", "gpt_oss without scaling"])
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


def test_qwen3_blocks_without_experts_are_refused():
    with pytest.raises(ValueError, match="`mlp_only_layers` = .* some blocks would have experts"):
        config_from_hf({**QWEN3, "mlp_only_layers": [0]})


@pytest.mark.parametrize("kind", ["gpt_oss", "helium", "llama"])
def test_where_norms_round_in_16_bits(kind):
    fields = CASES["gpt_oss"] if kind == "gpt_oss" else SIZES
    config = config_from_hf({**fields, "model_type": kind})
    norm = RMSNorm(8, eps=1e-6, param_dtype=jnp.bfloat16, wide=config.norm_wide)
    x, scale = jax.random.normal(jax.random.key(0), (2, 64, 8), jnp.bfloat16)
    norm.scale.set_value(scale[0])
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    once = (normal * scale[0].astype(jnp.float32)).astype(jnp.bfloat16)
    twice = normal.astype(jnp.bfloat16) * scale[0]
    assert (once != twice).any()
    np.testing.assert_array_equal(norm(x), twice if kind == "llama" else once)
