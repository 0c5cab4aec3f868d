"""Training with the tokens of a row spread over devices: the losses and adapters of one device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models.mesh import entered, model_on, placement
from lora_jax.models.sharding import RULES
from lora_jax.train.batches import by_place, make_batch
from lora_jax.train.buckets import Bucket
from lora_jax.train.examples import Example
from lora_jax.train.loss import TOGETHER, Rows, losses_of
from lora_jax.train.mesh import batch_on, rows_of
from lora_jax.train.preparation import layout

from tests.support.mesh_runs import KINDS, LLAMA, adapted, check_mesh, data, make, run

pytestmark = pytest.mark.once

MESHES: dict[str, dict[str, Any]] = {
    "context=8": dict(context=8),
    "data=2,context=4": dict(data=2, context=4),
    "fsdp=2,context=2,tensor=2": dict(fsdp=2, context=2, tensor=2),
}


def cases():
    for kind in KINDS:
        if kind in ("images", "answers of t5"):
            continue  # whole rows alone
        for mesh in MESHES:
            quick = (kind, mesh) == ("packed", "fsdp=2,context=2,tensor=2")
            yield pytest.param(kind, mesh, marks=[] if quick else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:every device holds all of")
@pytest.mark.parametrize(("kind", "mesh"), cases())
def test_the_losses_and_adapters_are_those_of_one_device(kind, mesh):
    check_mesh(kind, models.make_mesh(**MESHES[mesh]))


def test_a_long_row_takes_less_memory_on_each_device():
    config = dataclasses.replace(LLAMA, max_position_embeddings=1024)
    model = models.init(jax.random.key(0), config)
    tokens = np.arange(1024, dtype=np.int32) % 128
    rows = [Example(tokens, tokens >= 0, "a row")]

    def temporaries(devices: int) -> int:
        mesh = models.make_mesh(devices=jax.devices()[:devices], context=devices)
        there = dataclasses.replace(model, params=lora.sharding.place(model.params, mesh, RULES))
        job = train.TrainConfig(steps=1, batch_size=1, progress=False)
        memory = train.fit(there, adapted(there, {})[1], rows, None, job).memory
        assert memory is not None and memory.temporary is not None
        return memory.temporary

    # Keys and values of whole rows stay, and one device leaves out pairs behind the causal mask.
    assert temporaries(8) <= 0.22 * temporaries(1)


def test_evaluation_and_generation_give_the_numbers_of_one_device():
    model, mesh = make(), models.make_mesh(data=2, context=4)
    params = lora.sharding.place(model.params, mesh, RULES)
    want = train.evaluate(model, model.params, data(), batch_size=8)
    assert train.evaluate(model, params, data(), batch_size=8) == pytest.approx(want, rel=1e-5)
    prompts = [[1, 2, 3], [4, 5]]
    texts = [models.generate(model, p, prompts, max_new_tokens=4) for p in (model.params, params)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_loss_in_chunks_is_that_of_one_device():
    model = make()

    def of(params: Any, chunk: int) -> tuple[Any, Any]:
        at = placement(model, params)
        with entered(at):
            rows = rows_of(at, params)
            config = train.TrainConfig(batch_size=8, buckets=1, steps=1, progress=False)
            loader = layout(model, data(), config, rows).loader
            batch = batch_on(jax.tree.map(lambda x: x[0], train.once(loader)[0]), at)
            losses = losses_of(model_on(model, params, at), rows, chunk_bytes=chunk)

            def loss(params: Any) -> jax.Array:
                each = losses(params, batch.tokens, batch.positions, batch.targets)
                return (each * batch.weights).sum()

            return jax.jit(jax.value_and_grad(loss))(params)

    want, wanted = of(model.params, 2**27)
    mesh = models.make_mesh(fsdp=2, context=2, tensor=2)
    got, found = of(lora.sharding.place(model.params, mesh, RULES), 4 * 128 * 3)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def batch_of(lengths: Sequence[int], rows: Rows = TOGETHER) -> train.Batch:
    """The one batch of examples with tokens 1, 2, ... of which the later half is learned."""
    numbers = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    examples = [Example(x, x > len(x) // 2, "") for x in numbers]
    loader = train.loader(examples, batch_size=len(lengths), buckets=1, rows=rows)
    return make_batch(loader, Bucket(loader.ladder[0], np.arange(len(lengths))))


def test_places_follow_the_devices_that_hold_their_tokens():
    one, spread = batch_of((16, 9, 12, 5)), batch_of((16, 9, 12, 5), rows=Rows(parts=2, spans=4))
    assert spread.positions.shape == (1, 4 * 16)
    # Of two rows on two devices each, their four tokens.
    assert spread.positions[0, :8].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert spread.positions[0, 32:40].tolist() == [32, 33, 34, 35, 48, 49, 50, 51]
    for x, y in zip(by_place(one), by_place(spread), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (by_place(one)[1] >= 0).sum() == one.weights.sum()


def test_lengths_that_the_devices_do_not_divide():
    examples = [Example(np.arange(9, dtype=np.int32), np.ones(9, bool), "")]
    # By default rows are padded to a multiple.
    assert train.loader(examples, batch_size=1, rows=Rows(spans=3)).ladder == (24,)
    with pytest.raises(ValueError, match=r"`buckets` has rows of 10 .* take a multiple of 4"):
        train.loader(examples, batch_size=1, buckets=[10], rows=Rows(spans=4))
    mesh = models.make_mesh(data=2, context=4)
    with pytest.raises(ValueError, match=r"`packed_length` has rows of 18 .* a multiple of 4"):
        run(make(), {}, dict(packing=True, packed_length=18), mesh)


def test_a_model_that_cannot_spread_tokens_is_refused():
    mesh = models.make_mesh(data=2, context=4)

    @dataclasses.dataclass(frozen=True)
    class Own:
        model: models.Model
        tokenizer = None

        def apply(self, params, tokens, return_hidden=False):
            return self.model.apply(params, tokens, return_hidden=return_hidden)

        def head(self, params, hidden):
            return self.model.head(params, hidden)

    model = make()
    _, params = adapted(model, {})
    params = lora.sharding.place(params, mesh, RULES)
    job = train.TrainConfig(steps=1, batch_size=8, progress=False)
    with pytest.raises(ValueError, match='`mesh` has 4 devices along "context"'):
        train.fit(Own(model), params, data(), None, job)
