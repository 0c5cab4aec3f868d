"""Rows of several texts side by side: each text's numbers are those of the text alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models import mixing
from lora_jax.models.attention import starts_of
from lora_jax.models.registry import ARCHITECTURES, CAUSAL_LM
from lora_jax.models.wrapped import WRAPPERS

from tests.support.decoders import FAMILIES, LATER, LENGTHS, family, packed
from tests.support.tiny import SMALL

pytestmark = pytest.mark.once


def alone(texts):
    """Each text in a row of its own, with a mask of its tokens."""
    width = max(map(len, texts))
    rows = np.stack([np.pad(t, (0, width - len(t)), constant_values=60) for t in texts])
    return rows, np.arange(width) < np.array([[len(t)] for t in texts])


def test_every_decoder_is_tested():
    # A decoder inside a vision-language model is one of these.
    kinds = {k for k, a in ARCHITECTURES.items() if a.kind == CAUSAL_LM} - set(WRAPPERS)
    assert set(FAMILIES) == kinds


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in LATER else k for k in FAMILIES]
)
def test_packed_texts_have_the_losses_and_gradients_of_single_ones(kind):
    model = family(kind)
    tokens, segments, texts = packed()
    rows, mask = alone(texts)

    def of_rows(params):
        logits = model.apply(params, rows)
        return jnp.sum(jnp.sin(logits) * mask[..., None]), logits

    def of_packed(params):
        logits = model.apply(params, tokens, segments=segments)
        return jnp.sum(jnp.sin(logits) * (segments > 0)[..., None]), logits

    (_, want), wanted = jax.jit(jax.value_and_grad(of_rows, has_aux=True))(model.params)
    (_, got), gradient = jax.jit(jax.value_and_grad(of_packed, has_aux=True))(model.params)
    # Boolean indexing goes row by row, and so through the texts in their order.
    want, got = np.asarray(want)[mask], np.asarray(got)[segments > 0]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3)


# Attention without a kernel at once, by heads, by five of the 24 queries, and in four runs of six.
# The scores have 27,648 bytes.
IMPLEMENTATIONS = {
    "at once": ("llama", None),
    "by heads": ("llama", 14_000),
    "by queries": ("llama", 3000),
    "sliding, by queries": ("mistral", 3000),
    "soft caps": ("gemma2", None),
    "soft caps, by queries": ("gemma2", 3000),
    "mixed": ("gemma3_text", None),
    "mixed, by queries": ("gemma3_text", 3000),
    "learned positions": ("gpt2", None),
    "in runs": ("llama", None),
    "sliding, in runs": ("mistral", None),
    "mixed, in runs, by queries": ("gemma3_text", 800),
    "delta nets": ("qwen3_5_text", None),
}


@pytest.mark.parametrize("case", IMPLEMENTATIONS)
def test_a_changed_text_changes_no_number_of_its_neighbours(case, monkeypatch):
    kind, scores = IMPLEMENTATIONS[case]
    if scores is not None:
        monkeypatch.setattr(mixing, "MOST_SCORES", scores)
    if "in runs" in case:
        monkeypatch.setattr(mixing, "SHORTEST_RUN", 6)
    model = family(kind, remat="projections")
    tokens, segments, _ = packed()
    changed = tokens.copy()
    # The second text of the first row and the first of the second.
    places = np.zeros(tokens.shape, bool)
    places[0] |= segments[0] == 2
    places[1] |= segments[1] == 1
    changed[places] = (tokens[places] + 7) % 61

    @jax.jit
    def hidden_and_gradient(params, tokens):
        """Hidden states, and the gradient of the other texts alone, for the input tokens' rows."""
        others = ((segments > 0) & ~places)[..., None]

        def total(params):
            hidden = model.apply(params, tokens, segments=segments, return_hidden=True)
            return jnp.sum(jnp.sin(hidden) * others), hidden

        (_, hidden), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return hidden, gradient

    before, one = hidden_and_gradient(model.params, tokens)
    after, two = hidden_and_gradient(model.params, changed)
    before, after = np.asarray(before), np.asarray(after)
    assert np.abs(before - after)[places].min(axis=-1).max() > 0
    np.testing.assert_array_equal(before[~places], after[~places])
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_positions_begin_anew_in_every_text():
    segments = jnp.array([[1, 1, 2, 3, 3, 3, 0, 0], [4, 4, 4, 4, 1, 1, 1, 1], [0] * 8])
    want = [[0, 0, 2, 3, 3, 3, 6, 6], [0, 0, 0, 0, 4, 4, 4, 4], [0] * 8]
    assert starts_of(segments).tolist() == want


def test_the_mask_is_not_kept_for_the_backward_pass():
    """Between forward and backward no array of all pairs of tokens is held for the mask."""
    config = dataclasses.replace(SMALL, num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    config = dataclasses.replace(config, num_hidden_layers=4, max_position_embeddings=512)
    model = models.init(jax.random.key(0), config, remat="projections")
    rows = jax.ShapeDtypeStruct((4, 512), jnp.int32)

    def temporaries(packed):
        def loss(params, tokens):
            segments = tokens if packed else None
            return jnp.sum(model.apply(params, tokens, segments=segments, return_hidden=True))

        compiled = jax.jit(jax.grad(loss)).lower(model.params, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Of bools: one mask for each of the four layers would be four times as much.
    assert temporaries(True) - temporaries(False) <= 1.5 * 4 * 512 * 512


@pytest.mark.parametrize("kind, scores", [("llama", 2**28), ("llama", 3000), ("gpt2", 2**28)])
def test_an_adapter_for_each_text_of_a_row(kind, scores, monkeypatch):
    monkeypatch.setattr(mixing, "MOST_SCORES", scores)
    model = family(kind)
    targets = ("c_attn", "c_fc") if kind == "gpt2" else "all-linear"
    config = lora.LoraConfig(rank=2, target_modules=targets, init="random")
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    trees = [lora.init(jax.random.key(i), plan, model.params) for i in range(3)]
    stacked = lora.stack(trees)
    tokens, segments, texts = packed()
    own = np.arange(len(texts)) % 4 - 1  # -1 is the base
    ids, start = np.full(tokens.shape, -1, np.int32), 0
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            ids[row, segments[row] == number + 1] = own[start + number]
        start += len(lengths)
    run = jax.jit(lora.lorafy(model.apply))
    got = run(stacked, tokens, segments=jnp.asarray(segments), adapter_ids=jnp.asarray(ids))
    rows, mask = alone(texts)
    want = np.asarray(run(stacked, rows, adapter_ids=jnp.asarray(own)))[mask]
    got = np.asarray(got)[segments > 0]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(segments=jnp.ones((2, 3), jnp.int32)), r"`segments` must be .*\(2, 4\), got int32"),
        (dict(segments=jnp.ones((2, 4))), "`segments` must be integers .* got float32"),
        (
            dict(segments=jnp.ones((2, 4), jnp.int32), mask=jnp.ones((2, 4), bool)),
            "`segments` came with a `mask`: mark padding by segment 0",
        ),
    ],
)  # fmt: skip
def test_wrong_segments(options, message):
    model = models.init(jax.random.key(0), SMALL)
    with pytest.raises(ValueError, match=message):
        model.apply(model.params, jnp.ones((2, 4), jnp.int32), **options)


def test_segments_beside_a_cache_are_refused():
    model = models.init(jax.random.key(0), SMALL)
    ones = jnp.ones((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="`segments` came with a `cache`"):
        model.apply(model.params, ones, segments=ones, cache=model.init_cache(2, 4))
