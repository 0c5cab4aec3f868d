"""Attention in parts is attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis, models
from lora_jax.models import attention, mixing
from lora_jax.models.registry import forward_of

from tests.support.tiny import SMALL

pytestmark = pytest.mark.once


def test_heads_in_parts_give_the_same_logits_and_gradients(monkeypatch):
    config = models.LlamaConfig.from_hf(
        {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "vocab_size": 64, "max_position_embeddings": 64, "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        }
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    mask = jnp.arange(8) >= jnp.array([[0], [3]])

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, tokens, mask=mask)) * mask[..., None])

    want = jax.jit(jax.value_and_grad(loss))(model.params)
    monkeypatch.setattr(mixing, "MOST_SCORES", 4 * 2 * 8 * 8 * 8 // 2)  # two heads of four
    got = jax.jit(lambda p: jax.value_and_grad(loss)(p))(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=3),
    "gemma2": dict(sliding_window=3, head_dim=8, query_pre_attn_scalar=9,
                   attn_logit_softcapping=2.0, hidden_activation="gelu_pytorch_tanh"),
    "gemma3_text": dict(sliding_window=3, head_dim=8, sliding_window_pattern=2),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "runs"), [("llama", 1), *((kind, 3) for kind in FAMILIES)])
def test_some_queries_at_a_time_give_the_same_logits_and_gradients(kind, runs, monkeypatch):
    fields = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=16,
    )  # fmt: skip
    config = models.config_from_hf({"model_type": kind, **fields, **FAMILIES[kind]})
    model = models.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 61)
    mask = jnp.arange(13) >= jnp.array([[0], [3]])

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, tokens, mask=mask)) * mask[..., None])

    want = jax.jit(jax.value_and_grad(loss))(model.params)
    # Key heads one by one, each in four pieces of four queries, of which the last has one.
    monkeypatch.setattr(mixing, "MOST_SCORES", 4 * 2 * 4 * 13 * 13 // 2 // 4 + 1)
    monkeypatch.setattr(mixing, "SHORTEST_RUN", 13 // runs)
    got = jax.jit(lambda p: jax.value_and_grad(loss)(p))(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("window, share", [(None, 0.625), (32, 0.341)])
def test_most_pairs_behind_the_mask_take_no_products(window, share, monkeypatch):
    """Of 256 queries in four runs: 64, 128, 192 and 256 keys, or 64 and three times 95."""
    by = mixing.Mixing(slides=(window is not None,), window=window)
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)

    def mixed(q):
        attend_of, _, _ = attention.attention(
            jnp.zeros((1, 256), jnp.int32), None, None, mixing=by, turns=lambda _: None
        )
        return attend_of(by.slides[0])(q, q, q, stored=None, block=jnp.int32(0))[0]

    def flops():
        costs = jax.jit(lambda q: mixed(q)).lower(q).compile().cost_analysis()
        return costs["flops"]

    found = flops()
    monkeypatch.setattr(mixing, "MOST_RUNS", 1)
    np.testing.assert_allclose(found / flops(), share, rtol=0.01)  # elementwise ones


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_memory_grows_with_the_length_of_a_row(softcap, monkeypatch):
    """Of a gradient through packed rows; the square of the length is 16 times as large."""
    monkeypatch.setattr(mixing, "MOST_SCORES", 2**20)
    by = mixing.Mixing(slides=(False,), softcap=softcap)

    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, segments):
            attend_of, _, _ = attention.attention(
                segments, None, None, segments=segments, mixing=by, turns=lambda _: None
            )
            return jnp.sum(attend_of(False)(q, q, q, stored=None, block=jnp.int32(0))[0] ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(q, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) <= 5 * temporaries(2048)


def test_a_scan_over_blocks_holds_no_mask_of_all_pairs(monkeypatch):
    monkeypatch.setattr(mixing, "MOST_SCORES", 2**20)

    def temporaries(length):
        config = dataclasses.replace(SMALL, max_position_embeddings=length)
        model = models.init(jax.random.key(0), config, remat=True)

        def loss(params, rows):
            return jnp.sum(model.apply(params, rows, segments=rows, return_hidden=True))

        rows = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(model.params, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) <= 5 * temporaries(2048)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_mask_is_kept_for_the_backward_pass(remat):
    """A choice by it would be, for each head: 80 MiB for 8B."""
    config = dataclasses.replace(SMALL, max_position_embeddings=128)
    forward = forward_of(config, remat=remat)
    rows = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(params, rows):
        return jnp.sum(forward.apply(params, rows, segments=rows))

    (backward,) = (
        eqn
        for eqn in jax.make_jaxpr(jax.grad(loss))(forward.shapes(), rows).eqns
        if eqn.primitive.name == "scan" and eqn.params["reverse"]
    )
    arrays = [v.aval for v in backward.invars]
    # Of two runs of 64 queries each.
    assert not [x for x in arrays if x.dtype == bool and x.shape[-2:] in ((64, 64), (64, 128))]


def test_a_query_that_attends_to_nothing_has_no_slope():
    """All keys have the same weight then, whatever the scores are."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 4, 2, 8)) for i in range(3))
    seen = jnp.tril(jnp.ones((1, 1, 4, 4), bool)).at[:, :, 0].set(False)
    slope = jax.grad(lambda q: jnp.sum(jnp.sin(mixing.mix(q, k, v, seen=seen, by=mixing.PLAIN))))(q)
    assert not slope[:, 0].any() and slope[:, 2:].all()


def test_a_block_that_is_computed_again_holds_the_scores_of_one_run(monkeypatch):
    """Of four runs, until the MLP is passed back; "none" computes nothing again."""

    def steps():
        full = analysis.memory("llama-3.1-8b", length=2048, remat="full").temporaries
        forward = forward_of(dataclasses.replace(SMALL, max_position_embeddings=128))
        rows = jax.ShapeDtypeStruct((1, 128), jnp.int32)
        loss = jax.grad(lambda params, rows: jnp.sum(forward.apply(params, rows)))
        return full, str(jax.make_jaxpr(loss)(forward.shapes(), rows))

    less, none = steps()
    monkeypatch.setattr(mixing, "MOST_SCORES", 2**40)
    more, same = steps()
    # Weights in float32 and bfloat16 of 32 heads, all but those of the last run.
    assert more - less > 6 * 32 * 512 * (512 + 1024 + 1536)
    assert none == same


def test_far_scores_and_sinks_are_finite():
    """A seen key counts however low its score, and a sink takes its share however high it is."""
    q, k = jnp.ones((1, 1, 1, 4)), jnp.array([-1e4, 1e4]).repeat(4).reshape(1, 2, 1, 4)
    v = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)
    seen = jnp.array([True, False]).reshape(1, 1, 1, 2)
    assert mixing.mix(q, k, v, seen=seen).item() == 1

    def mixed(sink):
        queries = attention.with_sinks(q, sink[None])
        return mixing.mix(queries, 0 * k, v, seen=None, by=mixing.Mixing((), sinks=True))[
            0, 0, 0, 0
        ]

    run = jax.jit(jax.value_and_grad(mixed))
    assert run(jnp.float32(150.0)) == (0, 0)
    shares = np.exp([0.0, 0.0, 1.5]) / np.exp([0.0, 0.0, 1.5]).sum()
    np.testing.assert_allclose(run(jnp.float32(1.5))[0], shares[:2] @ [1, 2], rtol=1e-6)
