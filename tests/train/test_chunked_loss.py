"""The loss by parts of the learned positions against the loss of all logits at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import lora_jax as lora
from lora_jax import models, train
from lora_jax.array import is_lora
from lora_jax.train.loss import Rows

pytestmark = pytest.mark.once

VOCAB, WIDTH = 65, 16
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 9)), jnp.int32)
# Seven positions of a part of four logits' bytes, the last part filled up.
POSITIONS = jnp.array([0, 1, 2, 5, 9, 12, 16])
TARGETS = jnp.array([3, 64, 0, 5, 5, 9, 1])
PART = 4 * VOCAB * 2


def decoder(**changes: Any) -> models.Model:
    config = models.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
        initializer_range=0.2, **changes,
    )  # fmt: skip
    return models.init(jax.random.key(0), config)


def adapted(model: models.Model, **fields: Any) -> Any:
    """Parameters with adapters that are not zero."""
    config = lora.LoraConfig(rank=2, init="random", **fields)
    plan = lora.plan(config, model.apply, model.params, TOKENS)
    return lora.init(jax.random.key(1), plan, model.params)


UNTIED = dict(tie_word_embeddings=False)
KINDS: dict[str, tuple[dict, dict]] = {
    "tied": (dict(tie_word_embeddings=True), dict(target_modules=("q_proj",))),
    "tied, adapted": (dict(tie_word_embeddings=True), dict(target_modules=("embed_tokens",))),
    "adapted": (UNTIED, dict(target_modules=("lm_head", "v_proj"))),
    "DoRA": (UNTIED, dict(target_modules=("lm_head",), use_dora=True)),
    "saved": (UNTIED, dict(target_modules=("q_proj",), modules_to_save=("lm_head",))),
    "soft cap": ({**UNTIED, "final_logit_softcapping": 3.0}, dict(target_modules=("lm_head",))),
    "quantized": (UNTIED, dict(target_modules=("lm_head", "up_proj"))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_change_no_number(kind: str):
    model_fields, lora_fields = KINDS[kind]
    model = decoder(**model_fields)
    if kind == "quantized":
        params = lora.quantize(model.params, r"lm_head.*", format="int8", block_size=16)
        model = dataclasses.replace(model, params=params)
        assert isinstance(params["lm_head"]["kernel"], lora.QuantArray)
    trainable, frozen = lora.split(adapted(model, **lora_fields))

    def value_and_grad(chunk_bytes: int) -> Any:
        losses = lora.lorafy(train.losses_of(model, chunk_bytes=chunk_bytes), reverse_only=True)

        def summed(t: Any) -> Any:
            each = losses(lora.combine(t, frozen), TOKENS, POSITIONS, TARGETS)
            return jnp.sum(each * jnp.arange(1, 8)), each

        return jax.jit(jax.value_and_grad(summed, has_aux=True))(trainable)

    ((_, parts), parts_grads), ((_, whole), whole_grads) = map(value_and_grad, (PART, 1 << 30))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    for part, want in zip(jax.tree.leaves(parts_grads), jax.tree.leaves(whole_grads), strict=True):
        largest = float(jnp.abs(want).max())
        np.testing.assert_allclose(part, want, rtol=1e-6, atol=1e-6 * largest)


STILL = {
    "tied": dict(tie_word_embeddings=True),
    "untied": UNTIED,
    "soft cap": {**UNTIED, "final_logit_softcapping": 3.0},
    "quantized": UNTIED,
}


@pytest.mark.parametrize("kind", STILL)
def test_a_frozen_head_is_applied_once(kind: str):
    """Its chunks give the gradient of its input, where another head is applied again."""
    model = decoder(**STILL[kind])
    if kind == "quantized":
        params = lora.quantize(model.params, r"lm_head.*", format="int8", block_size=16)
        model = dataclasses.replace(model, params=params)
    tree = adapted(model, target_modules=("q_proj", "down_proj"))
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: is_lora(x) or isinstance(x, lora.QuantArray))
    still = frozenset(i for i, x in enumerate(leaves) if not is_lora(x))
    trainable, frozen = lora.split(tree)

    def results(chunk_bytes: int, still: frozenset[int]) -> Any:
        made = train.losses_of(model, chunk_bytes=chunk_bytes, frozen=still)
        losses = lora.lorafy(made, reverse_only=True)

        def summed(t: Any) -> Any:
            each = losses(lora.combine(t, frozen), TOKENS, POSITIONS, TARGETS)
            return jnp.sum(each * jnp.arange(1, 8)), each

        run = jax.value_and_grad(summed, has_aux=True)
        products = str(jax.make_jaxpr(run)(trainable)).count(f"f32[1,2,{VOCAB}] = dot_general")
        return jax.jit(run)(trainable), products

    (((_, parts), parts_grads), once), (((_, whole), whole_grads), _) = (
        results(*case) for case in ((PART, still), (1 << 30, frozenset()))
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    for part, want in zip(jax.tree.leaves(parts_grads), jax.tree.leaves(whole_grads), strict=True):
        np.testing.assert_allclose(part, want, rtol=1e-6, atol=1e-6 * float(jnp.abs(want).max()))
    if kind != "quantized":  # whose products are others
        assert (once, results(PART, frozenset())[1]) == (1, 2)


@pytest.mark.parametrize("kind", ["tied, adapted", "adapted", "DoRA"])
def test_dropout_of_the_head_belongs_to_the_place(kind: str):
    """The same masks by parts, for some of the places, and in the logits."""
    model_fields, lora_fields = KINDS[kind]
    model = decoder(**model_fields)
    params, key = adapted(model, dropout=0.5, **lora_fields), jax.random.key(2)

    def losses(at: Any, chunk_bytes: int, key: Any = key) -> Any:
        each = jax.jit(lora.lorafy(train.losses_of(model, chunk_bytes=chunk_bytes)))
        return each(params, TOKENS, POSITIONS[at], TARGETS[at], lora_key=key)

    everywhere = jnp.arange(7)
    want = losses(everywhere, 1 << 30)
    np.testing.assert_allclose(losses(everywhere, PART), want, rtol=1e-6)
    for at in (jnp.array([2, 3, 6]), jnp.array([0, 4])):
        np.testing.assert_allclose(losses(at, PART), want[at], rtol=1e-6)
    logits = lora.lorafy(train.outputs_of(model))(params, TOKENS, POSITIONS, lora_key=key)
    of_logits = [-jax.nn.log_softmax(row)[t] for row, t in zip(logits, TARGETS, strict=True)]
    np.testing.assert_allclose(of_logits, want, rtol=1e-6)
    # Places have masks of their own, and keys have other masks.
    other = losses(everywhere, PART, jax.random.key(3))
    assert not np.any(np.isclose(other, want, rtol=1e-6))


def test_losses_are_those_of_the_logits():
    model = decoder(**UNTIED)
    logits = train.outputs_of(model)(model.params, TOKENS, POSITIONS)
    want = [-jax.nn.log_softmax(row)[t] for row, t in zip(logits, TARGETS, strict=True)]
    got = train.losses_of(model, chunk_bytes=PART)(model.params, TOKENS, POSITIONS, TARGETS)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1 << 30, PART], ids=["whole", "by parts"])
def test_each_device_has_the_losses_of_its_own_rows(chunk_bytes: int):
    """Two rows a device, at places in both; three positions in two chunks."""
    model, tokens = decoder(**UNTIED), jnp.concatenate([TOKENS, TOKENS[::-1] + 1]) % VOCAB
    positions, targets = jnp.array([0, 9, 16, 20, 27, 35]), TARGETS[:6]
    want = train.losses_of(model)(model.params, tokens, positions, targets)
    losses = train.losses_of(model, Rows(axes=("data",), parts=2), chunk_bytes=chunk_bytes)
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])):
        got = jax.jit(losses)(model.params, tokens, positions, targets)
    # A product of other shapes sums in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_logits_of_all_positions_are_never_held():
    """Temporaries of the compiled gradient: 32 MiB of logits in parts of 1 MiB."""
    vocabulary, width, places = 8192, 8, 1024

    class Head:
        def apply(self, params, tokens, return_hidden=False):
            return params["embed"][tokens]

        def head(self, params, hidden):
            return hidden @ params["head"]

    params = {"embed": jnp.ones((4, width)), "head": jnp.ones((width, vocabulary))}
    leaf = lora.LoraArray(
        params["head"], jnp.ones((width, 2)), jnp.ones((2, vocabulary)), jnp.float32(1)
    )
    trainable, frozen = lora.split({**params, "head": leaf})

    def temporaries(chunk_bytes: int) -> int:
        losses = lora.lorafy(train.losses_of(Head(), chunk_bytes=chunk_bytes), reverse_only=True)

        def loss(t, tokens, targets):
            at = jnp.arange(places)
            return jnp.sum(losses(lora.combine(t, frozen), tokens, at, targets))

        shapes = [jax.ShapeDtypeStruct(s, "int32") for s in ((1, places), (places,))]
        compiled = jax.jit(jax.grad(loss)).lower(trainable, *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = temporaries(1 << 30), temporaries(1 << 20)
    assert whole > 32 << 20
    assert parts < 5 << 20


def test_the_losses_come_before_their_gradients():
    """libtpu would otherwise leave them for the end, and hold the gathered head until then."""
    model = decoder(**UNTIED)
    losses = train.losses_of(model, chunk_bytes=PART)

    def loss(params: Any) -> Any:
        return jnp.sum(losses(params, TOKENS, POSITIONS, TARGETS))

    eqns = jax.make_jaxpr(jax.value_and_grad(loss))(model.params).eqns
    forward, backward = (e for e in eqns if e.primitive.name == "scan" and e.params["length"] == 4)
    made = {v for v in forward.outvars if v.aval.shape == (4, 2)}

    def reads(eqn: core.JaxprEqn) -> bool:
        return not made.isdisjoint(v for v in eqn.invars if isinstance(v, core.Var))

    for eqn in eqns[eqns.index(forward) + 1 : eqns.index(backward)]:
        if reads(eqn):
            made.update(eqn.outvars)
    assert made and reads(backward)
