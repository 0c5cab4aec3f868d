"""Loops of one's own on a mesh: several adapters in a stack, and a classifier."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import models
from lora_jax.models.sharding import ROWS, RULES

from tests.support.mesh_runs import adapted, make

pytestmark = pytest.mark.once

MESHES: dict[str, dict[str, Any]] = {
    "data=2,fsdp=4": dict(data=2, fsdp=4),
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "fsdp=4,tensor=2": dict(fsdp=4, tensor=2),
    "tensor=8": dict(tensor=8),
}
SIZES = pytest.mark.parametrize(
    "sizes",
    [pytest.param(m, marks=[] if i == 0 else pytest.mark.slow) for i, m in enumerate(MESHES)],
)
TOKENS = np.random.default_rng(0).integers(0, 128, (8, 12)).astype(np.int32)
IDS = np.arange(8) % 3
LABELS = np.arange(8) % 4
BERT = models.BertConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=32,
    task="sequence-classification",
    labels=("a", "b", "c", "d"),
)


def ten_steps(params: Any, loss: Callable) -> tuple[np.ndarray, list[np.ndarray]]:
    """The losses, and the trained arrays, of ten steps of Adam."""
    trainable, frozen = lora.split(params)
    tx = optax.adam(1e-2, eps=1e-3)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(lambda t: loss(lora.combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    values = []
    for _ in range(10):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
    return np.array(values), [np.asarray(x) for x in jax.tree.leaves(trainable)]


def on_mesh(model: models.Model, params: Any, sizes: str, loss_of: Callable) -> Any:
    mesh = models.make_mesh(**MESHES[sizes])
    rows = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    with jax.set_mesh(mesh):
        placed = lora.sharding.place(params, mesh, RULES)
        return ten_steps(placed, loss_of(dataclasses.replace(model.forward, rows=rows)))


def check(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert want[0][-1] < want[0][0]
    for x, y in zip(got[1], want[1], strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def stack_loss(forward: Any, tokens: Any = TOKENS[:, :-1]) -> Callable:
    learned = jax.nn.one_hot(TOKENS[:, 1:], 128)

    def loss(params: Any) -> jax.Array:
        logits = lora.lorafy(forward.apply)(params, tokens, adapter_ids=IDS)
        return optax.softmax_cross_entropy(logits, learned).mean()

    return loss


@cache
def stacked() -> tuple[models.Model, Any]:
    model = make()
    config, first = adapted(model, {"use_dora": True, "init": "random"})
    plan = lora.plan(config, model.apply, model.params, TOKENS)
    others = [lora.init(jax.random.key(seed), plan, model.params) for seed in (5, 6)]
    return model, lora.stack([first, *others])


@SIZES
def test_a_stack_of_adapters_trains_as_on_one_device(sizes):
    model, params = stacked()
    check(on_mesh(model, params, sizes, stack_loss), ten_steps(params, stack_loss(model.forward)))


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_stack_of_adapters_trains_where_rows_lie_on_explicit_axes(sizes, inside):
    model, params = stacked()
    shape = MESHES[sizes]
    axes = (AxisType.Explicit,) * len(shape)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axes)
    rows = tuple(axis for axis in ROWS if axis in shape)
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        placed = lora.sharding.place(params, mesh, RULES)
        tokens = jax.device_put(TOKENS[:, :-1], NamedSharding(mesh, PartitionSpec(rows)))
        forward = dataclasses.replace(model.forward, rows=rows)
        got = ten_steps(placed, stack_loss(forward, tokens))
    check(got, ten_steps(params, stack_loss(model.forward)))


def test_every_device_holds_its_part_of_all_adapters_of_a_stack():
    _, params = stacked()
    placed = lora.sharding.place(params, models.make_mesh(fsdp=8), RULES)
    leaf = placed["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.a.shape == (2, 3, 64, 4)
    assert leaf.a.addressable_shards[0].data.shape == (2, 3, 8, 4)


def classifier_loss(forward: Any) -> Callable:
    def loss(params: Any) -> jax.Array:
        logits = lora.lorafy(forward.apply)(params, TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    return loss


@SIZES
def test_a_classifier_trains_as_on_one_device(sizes):
    model = models.init(jax.random.key(0), BERT)
    targets = dict(target_modules=("query", "output.dense"), modules_to_save=("classifier",))
    _, params = adapted(model, targets)
    got = on_mesh(model, params, sizes, classifier_loss)
    check(got, ten_steps(params, classifier_loss(model.forward)))
