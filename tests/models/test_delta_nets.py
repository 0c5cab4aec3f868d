"""Gated delta nets: the rule itself, and decoders with them, against transformers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lora_jax import models
from lora_jax.models import config_from_hf
from lora_jax.models import delta_rule as delta_rules
from lora_jax.models.attention import Kept
from lora_jax.models.delta_net import among, first_states, recurrence
from lora_jax.models.delta_rule import CHUNK, DeltaSizes, convolved

from tests.support.decoder_checks import (
    check_blocks_apart,
    check_greedy_text,
    check_logits,
    check_saved_again,
    quick_jit,
)
from tests.support.oracle import oracle
from tests.support.torch_models import DECODER_SIZES, TOLERANCE, saver, texts

# Called with as many arrays as tests have.
delta_rule: Any = delta_rules.delta_rule
pytestmark = pytest.mark.once

PLACE = "models/delta_nets"
# Longer than a chunk of the rule.
LENGTHS = (75, 70, 3)
SIZES = dict(
    DECODER_SIZES, pad_token_id=0, head_dim=8, max_position_embeddings=128, num_hidden_layers=4,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=6,
    # The norms of delta nets enlarge the rounding of what they read: with weights of 0.3, the two
    # forms of transformers differ by 2e-3.
    initializer_range=0.1,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
    shared_expert_intermediate_size=16,
)  # fmt: skip
LINEAR, FULL = "linear_attention", "full_attention"
CASES = {
    "qwen3_next": dict(SIZES, **EXPERTS, model_type="qwen3_next"),
    "qwen3_next in turns": dict(
        SIZES, **EXPERTS, model_type="qwen3_next", layer_types=[LINEAR, FULL] * 2,
        linear_num_value_heads=2, linear_conv_kernel_dim=3, attention_bias=True,
        norm_topk_prob=False,
    ),
    "qwen3_next with dense blocks": dict(
        SIZES, **EXPERTS, model_type="qwen3_next", mlp_only_layers=[1], num_hidden_layers=3,
        layer_types=[FULL, LINEAR, LINEAR], tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32,
            partial_rotary_factor=0.5, rope_theta=500.0,
        ),
    ),
    "qwen3_5_moe": dict(
        {k: v for k, v in SIZES.items() if k != "intermediate_size"}, **EXPERTS,
        model_type="qwen3_5_moe_text", linear_num_value_heads=2,
    ),
    "qwen3_5_moe with a tied head": dict(
        SIZES, **EXPERTS, model_type="qwen3_5_moe_text", tie_word_embeddings=True,
        num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR], attention_bias=True,
    ),
    "qwen3_5": dict(
        SIZES, model_type="qwen3_5_text", linear_num_value_heads=2,
        rope_parameters=dict(
            rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5,
            mrope_section=[1, 1, 0], mrope_interleaved=True,
        ),
    ),
    "qwen3_5 with a tied head": dict(
        SIZES, model_type="qwen3_5_text", tie_word_embeddings=True, num_hidden_layers=3,
        layer_types=[LINEAR, FULL, LINEAR], attention_bias=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case", [c if c == "qwen3_next" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_logits_are_transformers(saved, case):
    check_logits(saved, PLACE, case, LENGTHS)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    check_blocks_apart(saved, case)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    check_saved_again(saved, PLACE, case, tmp_path)


def drawn(count, *, rows=2, keys=2, heads=4, seed=0) -> Any:
    """q, k, v, decay, beta and a state, of `count` tokens."""
    draw = np.random.default_rng(seed)
    over = rows, count
    return (
        *(draw.normal(size=(*over, keys, 5)).astype(np.float32) for _ in range(2)),
        draw.normal(size=(*over, heads, 3)).astype(np.float32),
        -draw.exponential(0.3, size=(*over, heads)).astype(np.float32),
        draw.uniform(size=(*over, heads)).astype(np.float32),
        draw.normal(size=(rows, heads, 5, 3)).astype(np.float32),
    )


@pytest.mark.oracle
def test_the_rule_is_both_of_transformers():
    def theirs():
        import torch
        from transformers.models.qwen3_next import modeling_qwen3_next as there

        q, k, v, decay, beta, state = map(torch.tensor, drawn(150))
        answers = []
        for form in (there.torch_chunk_gated_delta_rule, there.torch_recurrent_gated_delta_rule):
            out, after = form(
                q, k, v, g=decay, beta=beta, initial_state=state, output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            answers.append([out.numpy(), after.numpy()])
        return answers

    inputs = drawn(150)
    # At once, in runs that are no divisor, and token by token.
    ours = [jax.jit(delta_rule, static_argnames="chunk")(*inputs, chunk=n) for n in (CHUNK, 7, 1)]
    for want in oracle(f"{PLACE}/rule", theirs):
        for got in ours:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), [*got], want)


def test_the_rule_goes_on_where_it_stopped():
    *inputs, state = drawn(90)
    whole, last = delta_rule(*inputs, state)
    parts = []
    for begin, end in ((0, 65), (65, 66), (66, 90)):
        out, state = delta_rule(*(x[:, begin:end] for x in inputs), state)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)


TEXTS = np.repeat([3, 9, 4, 5], [60, 1, 20, 69])[None].repeat(2, 0)


# A text begins with the fourth chunk of 20.
@pytest.mark.parametrize("chunk", [CHUNK, 20])
def test_texts_side_by_side_are_read_alone(chunk):
    *inputs, _ = drawn(150)
    state = np.zeros((2, 4, 5, 3), np.float32)
    got, after = delta_rule(*inputs, state, texts=TEXTS, chunk=chunk)
    last = None
    for text in (3, 9, 4, 5):
        at = np.flatnonzero(TEXTS[0] == text)
        own, last = delta_rule(*(x[:, at] for x in inputs), state)
        np.testing.assert_allclose(got[:, at], own, atol=2e-6)
    np.testing.assert_allclose(after, last, atol=2e-6)


@pytest.mark.parametrize("text", [3, 9, 4, 5])
def test_a_changed_text_changes_no_number_of_its_neighbours(text):
    *inputs, _ = drawn(150)
    state = np.zeros((2, 4, 5, 3), np.float32)
    places = TEXTS == text

    @jax.jit
    def slopes(*inputs):
        def total(*inputs):
            out = delta_rule(*inputs, state, texts=TEXTS)[0]
            return jnp.sum(jnp.sin(out) * ~places[..., None, None]), out

        return jax.grad(total, argnums=range(5), has_aux=True)(*inputs)

    others = drawn(150, seed=1)[:-1]
    changed = [
        np.where(places.reshape(*places.shape, *[1] * (x.ndim - 2)), y, x)
        for x, y in zip(inputs, others, strict=True)
    ]
    one, two = slopes(*inputs), slopes(*changed)
    assert not np.array_equal(one[1][places], two[1][places])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[~places], b[~places]), one, two)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [None, np.repeat([1, 2], [5, 4])[None]])
def test_slopes_of_the_rule(texts):
    rule = jax.jit(partial(delta_rule, chunk=4, texts=texts))
    # Differences of float32.
    check_grads(rule, drawn(9, rows=1, keys=1, heads=2), 1, atol=2e-2, rtol=2e-2)


def test_the_memory_of_the_rule_grows_with_the_row():
    def held(count):
        *inputs, state = drawn(count, rows=1)
        step = jax.jit(jax.grad(lambda *x: delta_rule(*x, state)[0].sum(), argnums=range(5)))
        return step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert held(4096) < 5 * held(1024)


def test_padding_is_passed_over_wherever_it_is():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(3, 12, 4)).astype(np.float32)
    kernel = draw.normal(size=(4, 1, 4)).astype(np.float32)
    before = draw.normal(size=(3, 3, 4)).astype(np.float32)
    mask = draw.uniform(size=(3, 12)) < np.array([[0.6], [0.2], [0.0]])
    got, after = convolved(x, kernel, before, mask=jnp.asarray(mask))
    for row, keep in enumerate(mask):
        one = slice(row, row + 1)
        want, last = convolved(x[one, keep], kernel, before[one])
        np.testing.assert_allclose(got[one, keep], want, atol=1e-6)
        np.testing.assert_array_equal(after[one], last)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_of_a_cache_are_the_full_pass(saved, case, side):
    """With padding that the next tokens follow."""
    model = models.load(saved(case)[1])
    tokens, mask = texts(side, LENGTHS)
    more = np.random.default_rng(0).integers(0, 97, (3, 5))
    every, kept = np.hstack((tokens, more)), np.hstack((mask, np.ones((3, 5), bool)))
    run = quick_jit(model.apply)
    cache = model.init_cache(3, every.shape[1])
    parts = []
    for begin, end in ((0, 66), (66, 75), (75, 76), (76, 80)):
        seen = kept[:, begin:end] if end <= 75 else None
        out, cache = run(model.params, every[:, begin:end], mask=seen, cache=cache)
        parts.append(np.asarray(out))
    got = np.concatenate(parts, axis=1)
    for row, keep in enumerate(kept):
        want = run(model.params, every[row, keep][None])[0]
        np.testing.assert_allclose(got[row, keep], want, atol=TOLERANCE)


NET = DeltaSizes(taps=3, key_heads=1, value_heads=2, key_dim=4, value_dim=3, fused=False)
NET_KERNEL = np.random.default_rng(0).normal(size=(3, 1, 14))


def net_heads(mixed):
    q, k, v = jnp.split(mixed, (4, 8), axis=-1)
    return q[:, :, None], k[:, :, None], v.reshape(*v.shape[:2], 2, 3)


def net_inputs():
    draw = np.random.default_rng(1)
    x, decay, beta = draw.normal(size=(2, 8, 14)), -draw.uniform(size=(2, 8, 2)), np.ones((2, 8, 2))
    return tuple(map(jnp.float32, (x, decay, beta)))


def test_a_nets_state_has_its_place_among_the_nets():
    place = among([False, True, False, True])
    assert [int(place(block)) for block in (1, 3)] == [0, 1]
    recur = recurrence(None, None, sizes=NET, place=lambda block: 1 - block, over=None)
    stored = Kept(None, None, *first_states(NET, 2, 2, jnp.float32))
    parts: Any = dict(kernel=NET_KERNEL, heads=net_heads, stored=stored, block=jnp.int32(0))
    _, after = recur(*net_inputs(), **parts)
    for array in (after.convs, after.states):
        assert not array[0].any() and array[1].any()


def test_a_net_whose_tokens_are_spread_reads_whole_rows():
    def run(over):
        recur = recurrence(None, None, sizes=NET, place=lambda block: block, over=over)
        parts: Any = dict(kernel=NET_KERNEL, heads=net_heads, stored=None, block=0)
        return lambda *inputs: recur(*inputs, **parts)[0]

    rows = jax.P(None, "context")
    spread = jax.shard_map(
        run("context"), mesh=models.make_mesh(context=2, devices=jax.devices()[:2]),
        in_specs=rows, out_specs=rows, check_vma=False,
    )  # fmt: skip
    # float32 of another program.
    np.testing.assert_allclose(jax.jit(spread)(*net_inputs()), run(None)(*net_inputs()), atol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(linear_num_value_heads=3), "`linear_num_value_heads` 3 is not a multiple of `linea"),
        (dict(layer_types=[LINEAR] * 3), "3 `linear_layers` for 4"),
        (dict(layer_types=["sliding_attention"] * 4), "has `sliding_attention`, which is neither"),
        (dict(linear_conv_kernel_dim=0), "`linear_conv_kernel_dim` must be a whole number from 1"),
        (dict(mlp_only_layers=[0, 1, 2, 3]), "leave no block with experts"),
    ],
)
def test_nets_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**CASES["qwen3_next"], **fields})
