"""Gemma, Gemma 2, Gemma 3, Phi-3, GPT-2, and Qwen's mixed windows, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.array import delta, is_lora
from lora_jax.models.saving import save_merged

from tests.support.decoder_checks import (
    check_blocks_apart,
    check_greedy_text,
    check_logits,
    check_saved_again,
    positions_of,
    quick_jit,
    without_source,
)
from tests.support.oracle import oracle
from tests.support.torch_models import (
    DECODER_SIZES,
    TOLERANCE,
    greedy,
    load,
    saver,
    texts,
    theirs,
    written,
)

pytestmark = pytest.mark.once

PLACE = "models/families"

SIZES = dict(DECODER_SIZES, pad_token_id=0)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA2 = dict(SIZES, model_type="gemma2", head_dim=16, sliding_window=4, query_pre_attn_scalar=9)
GEMMA3 = dict(
    SIZES, model_type="gemma3_text", head_dim=16, sliding_window=4, query_pre_attn_scalar=24
)
PHI3 = dict(SIZES, model_type="phi3")
GPT2 = dict(
    model_type="gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 2.0, 3.0, 7.0],
)
MIXED = dict(use_sliding_window=True, sliding_window=4)
CASES = {
    "gemma": dict(SIZES, model_type="gemma", head_dim=16),
    "gemma with biases": dict(SIZES, model_type="gemma", head_dim=8, attention_bias=True),
    # Caps so low that they bite.
    "gemma2": dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2 without caps": dict(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": dict(GEMMA3, sliding_window_pattern=2),
    "gemma3 that reaches far": dict(
        GEMMA3,
        layer_types=[SLIDING, FULL, FULL],
        rope_scaling=dict(rope_type="linear", factor=8.0),
        rope_theta=500.0,
        rope_local_base_freq=20.0,
    ),
    "phi3": PHI3,
    "phi3 that rotates half": dict(PHI3, partial_rotary_factor=0.5, sliding_window=4),
    # 12 tokens are beyond the trained context, 40 are not.
    "phi3 long": dict(PHI3, rope_scaling=LONGROPE, original_max_position_embeddings=8),
    "phi3 short": dict(PHI3, rope_scaling=LONGROPE, original_max_position_embeddings=40),
    "qwen2 mixed": dict(SIZES, **MIXED, model_type="qwen2", max_window_layers=2),
    "qwen3 mixed": dict(
        SIZES, **MIXED, model_type="qwen3", head_dim=8, layer_types=[FULL, SLIDING, FULL]
    ),
    "gpt2": GPT2,
    "gpt2 with a head of its own": dict(
        GPT2, tie_word_embeddings=False, n_inner=40, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2 unscaled": dict(GPT2, scale_attn_weights=False, activation_function="relu"),
}
ONE_EACH = ["gemma", "gemma2", "gemma3", "phi3 that rotates half", "qwen2 mixed", "gpt2"]
LATER = ("gemma", "gemma2", "gpt2", "phi3 that rotates half")  # only among all tests


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(saved, case):
    check_logits(saved, PLACE, case)


@pytest.mark.oracle
def test_the_text_model_of_a_gemma3_that_sees_images(tmp_path_factory):
    text = {k: v for k, v in CASES["gemma3"].items() if k != "model_type"}
    vision = dict(
        model_type="siglip_vision_model", hidden_size=8, intermediate_size=8, image_size=8,
        num_hidden_layers=1, num_attention_heads=2, patch_size=4,
    )  # fmt: skip
    fields = dict(
        model_type="gemma3", auto="AutoModelForImageTextToText", text_config=text,
        vision_config=vision, mm_tokens_per_image=4, image_token_index=96,
        boi_token_index=95, eoi_token_index=94,
    )  # fmt: skip
    there, directory = saver(PLACE, {"with vision": fields}, tmp_path_factory)("with vision")
    model = models.load(directory)
    assert model.config.model_type == "gemma3_text"
    tokens, mask = texts("right")
    tokens = np.minimum(tokens, 93)
    positions = positions_of(mask)
    want = oracle(f"{PLACE}/vision.logits", lambda: theirs(there(), tokens, mask, positions))
    got = np.asarray(quick_jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    assert np.abs(got - want)[mask].max() <= TOLERANCE


@pytest.mark.oracle
@pytest.mark.parametrize("case", ONE_EACH[1:])
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case)


@pytest.mark.oracle
def test_a_text_that_outgrows_the_trained_context(saved):
    """LongRoPE changes every rotation at once, those of the tokens already seen too."""
    there, directory = saved("phi3 long")
    model = models.load(directory)
    prompt = np.array([[5, 9, 11, 3, 7]])  # 5 of 8 tokens
    ones = np.ones_like(prompt)
    want = oracle(f"{PLACE}/outgrown.greedy", lambda: greedy(there(), prompt, ones, 12))
    assert models.generate(model, model.params, prompt.tolist(), max_new_tokens=12) == want


def test_draws_are_counted_on_where_a_text_outgrows_the_trained_context(saved):
    """With equal logits a token depends on the key and its number alone."""
    model = models.load(saved("phi3 long")[1])
    params = jax.tree.map(jnp.zeros_like, model.params)
    outgrown, long = (
        models.generate(
            model, params, [prompt], max_new_tokens=12, temperature=1.0, key=jax.random.key(3)
        )
        for prompt in ([5, 9, 11, 3, 7], [5] * 9)  # 5 and 9 of 8 tokens
    )
    assert outgrown == long


@pytest.mark.parametrize("case", ["gemma3", "phi3", "gpt2"])
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTED = {
    "phi3 that rotates half": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


def adapted(model):
    """Adapters on every linear layer that change the logits, and the example batch."""
    config = lora.LoraConfig(rank=2, alpha=4, target_modules="all-linear")
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    trainable, frozen = lora.split(lora.init(jax.random.key(1), plan, model.params))
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.03 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved), frozen


def added_up(params):
    """Every weight with its change, in a way that can be differentiated."""
    return jax.tree.map(lambda x: x.w + delta(x) if is_lora(x) else x, params, is_leaf=is_lora)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c in LATER else c for c in ONE_EACH],
)
def test_adapters_stay_low_rank_and_train(saved, case, tmp_path):
    """Logits and gradients equal those of the weights added up; transformers loads the sum."""
    _, directory = saved(case)
    model = models.load(directory)
    trainable, frozen = adapted(model)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".kernel")
        for path, x in jax.tree_util.tree_leaves_with_path(
            lora.combine(trainable, frozen), is_leaf=is_lora
        )
        if is_lora(x)
    }
    wanted = ADAPTED.get(case, LINEAR)
    assert len(paths) == len(wanted) and all(p.endswith(wanted) for p in paths)
    tokens, mask = texts("left")
    seen = jnp.asarray(mask)
    run = lora.lorafy(model.apply, strict=True)

    def loss(trainable, prepare, apply):
        logits = apply(prepare(lora.combine(trainable, frozen)), tokens, mask=seen)
        return jnp.where(seen[..., None], jnp.sin(logits), 0.0).sum(), logits

    grad = quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    (_, got), slopes = grad(trainable, lambda x: x, run)
    (_, want), expected = grad(trainable, added_up, model.apply)
    np.testing.assert_allclose(got[seen], want[seen], atol=TOLERANCE)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    # float32 sums of hundreds of terms, against the largest slope.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * size), slopes, expected)

    merged = tmp_path / "merged"
    save_merged(merged, without_source(model), lora.combine(trainable, frozen))
    same = lora.merge(lora.combine(trainable, frozen))
    jax.tree.map(np.testing.assert_array_equal, models.load(merged).params, same)

    def read():
        return {
            "from": written(merged),
            "logits": theirs(load(merged), tokens, mask, positions_of(mask)),
        }

    there = oracle(f"{PLACE}/{case}.merged", read)
    assert there["from"] == written(merged)
    np.testing.assert_allclose(there["logits"][mask], got[seen], atol=TOLERANCE)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case", ["gemma3 that reaches far", "phi3 long", "qwen3 mixed", "gpt2 with a head of its own"]
)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    check_saved_again(saved, PLACE, case, tmp_path)
