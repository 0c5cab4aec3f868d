"""Rows whose tokens are spread over devices: values and gradients of one device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import models
from lora_jax.models import mixing
from lora_jax.models.bert_parts import Attending, both_ways

from tests.support.decoders import FAMILIES, family, packed
from tests.support.mesh_runs import adapted
from tests.support.tiny import SMALL

pytestmark = pytest.mark.once

SIZES: dict[str, Any] = dict(data=2, context=2, tensor=2)
CASES = [
    *((kind, "segments", None) for kind in FAMILIES),
    ("gemma2", "mask", None),
    ("llama", "mask", None),
    # By heads, and by some queries.
    ("llama", "segments", 800),
    ("gemma3_text", "segments", 800),
]


def spread(forward, **options):
    return dataclasses.replace(forward, rows=("data",), tokens="context", **options)


def close(got, want, gradients, wanted):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3)


def check_spread(model, tokens, real, **inputs):
    """Values at real tokens, and gradients, with tokens spread and on one device."""
    check_on(models.make_mesh(**SIZES), model, spread(model.forward), tokens, real, **inputs)


def check_on(mesh, model, forward, tokens, real, **inputs):
    """As `check_spread`, for `forward` on a mesh."""

    def of(forward):
        def loss(params):
            out = forward.apply(params, tokens, **inputs)
            return jnp.sum(jnp.sin(out) * real[..., None]), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
        return np.asarray(out)[real], gradient

    want, wanted = of(model.forward)
    with jax.set_mesh(mesh):
        got, gradient = of(forward)
    close(got, want, gradient, wanted)


def cases():
    for case in CASES:
        quick = case in (("gemma3_text", "segments", 800), ("gemma2", "mask", None))
        yield pytest.param(*case, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "others", "scores"), cases())
def test_a_decoder_computes_as_on_one_device(kind, others, scores, monkeypatch):
    if scores is not None:
        monkeypatch.setattr(mixing, "MOST_SCORES", scores)
    model = family(kind, remat="projections" if others == "segments" else False)
    tokens, segments, _ = packed(lengths=((7, 1, 5, 9), (16, 6)))
    real = segments > 0
    inputs = {"segments": segments} if others == "segments" else {"mask": real}

    check_spread(model, tokens, real, **inputs)


@pytest.mark.parametrize("model_type", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_an_encoder_computes_as_on_one_device(model_type):
    config = models.config_from_hf(
        {
            "model_type": model_type, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24,
            "pad_token_id": 1,
        }
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 2, 64)
    mask = jnp.arange(16) < jnp.array([[16], [11]])

    check_spread(model, tokens, mask, mask=mask, return_hidden=True)


def test_windows_on_both_sides_are_counted_in_the_whole_row():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 2, 4))
    mask = jnp.arange(16) < jnp.array([[16], [11]])

    def of(over):
        by = Attending(mask=mask, over=over)
        run = jax.jit(lambda *xs: both_ways(*xs, by=by, near=lambda back: abs(back) <= 3))
        return np.asarray(run(q, k, v))

    want = of(None)
    with jax.set_mesh(models.make_mesh(data=2, context=4)):
        got = of("context")
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
def test_adapters_for_each_token_compute_as_on_one_device():
    model = models.init(jax.random.key(0), SMALL)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, SMALL.vocab_size)
    config, first = adapted(model, {"init": "random"})
    plan = lora.plan(config, model.apply, model.params, tokens)
    stack = lora.stack([first, lora.init(jax.random.key(7), plan, model.params)])
    ids = jnp.arange(32).reshape(2, 16) % 3 - 1

    def of(forward):
        return np.asarray(jax.jit(lora.lorafy(forward.apply))(stack, tokens, adapter_ids=ids))

    want = of(model.forward)
    with jax.set_mesh(models.make_mesh(**SIZES)):
        got = of(spread(model.forward))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("others", ["segments", pytest.param("mask", marks=pytest.mark.slow)])
def test_inside_a_shard_map_each_device_has_its_own_tokens(others):
    model = family("llama")
    tokens, segments, _ = packed(lengths=((7, 1, 5, 9), (16, 6)))
    inputs = {"segments": segments} if others == "segments" else {"mask": segments > 0}
    forward = dataclasses.replace(model.forward, tokens="context")

    def own(params, tokens, inputs):
        return forward.apply(params, tokens, **inputs)

    apart = P(None, "context")
    with jax.set_mesh(models.make_mesh(context=8)):
        mapped = jax.shard_map(own, in_specs=(P(), apart, apart), out_specs=apart, check_vma=False)
        got = jax.jit(mapped)(model.params, tokens, inputs)
    want = jax.jit(model.apply)(model.params, tokens, **inputs)
    real = segments > 0
    assert np.abs(got - want)[real].max() <= 1e-5 * np.abs(want).max()


def test_tokens_that_the_devices_cannot_share_are_refused():
    model = models.init(jax.random.key(0), SMALL)
    forward = dataclasses.replace(model.forward, tokens="context")
    with jax.set_mesh(models.make_mesh(data=2, context=4)):
        with pytest.raises(ValueError, match=r"`tokens` has rows of 6 tokens, which the 4 devices"):
            forward.apply(model.params, jnp.zeros((2, 6), jnp.int32))
    with pytest.raises(ValueError, match=r"under jax.set_mesh\(mesh\)"):
        forward.apply(model.params, jnp.zeros((2, 8), jnp.int32))


def test_a_kernel_for_whole_rows_is_replaced_by_xlas_with_a_warning():
    model = models.init(jax.random.key(0), SMALL, attention="splash")
    forward = dataclasses.replace(model.forward, tokens="context")
    tokens = jnp.zeros((1, 256), jnp.int32)
    mesh = models.make_mesh(context=8)
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match='"xla" takes its place'):
        jax.eval_shape(forward.apply, model.params, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if "experts" in str(FAMILIES[kind])])
def test_experts_on_devices_of_their_own_compute_as_on_one(kind):
    """Values, and gradients of every weight, of tokens that go to their experts and back."""
    model = family(kind)
    count = 2 if model.config.num_experts % 2 == 0 else 3
    tokens, segments, _ = packed(lengths=((7, 1, 5), (11, 6)) * count)
    sizes = dict(data=2, expert=count)
    with_rows = dataclasses.replace(model.forward, rows=("data", "expert"))
    check_on(
        models.make_mesh(**sizes, devices=jax.devices()[: 2 * count]),
        model,
        with_rows,
        tokens,
        segments > 0,
        segments=segments,
    )
