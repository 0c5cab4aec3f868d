"""The loss, its gradient, the optimizer step and the schedule against equations written out."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from lora_jax.train import (
    Batch,
    Example,
    Programs,
    TrainConfig,
    cross_entropy,
    init_state,
    loader,
    losses_of,
    make_step,
    once,
    optimizer,
    schedule,
    summed_loss,
    total_steps,
)
from lora_jax.train.config import fixed_fields, steps_between_saves, warmup_steps
from lora_jax.train.evaluate import pad_id_of
from lora_jax.train.loss import pick

pytestmark = pytest.mark.once

VOCAB, WIDTH = 23, 6


class Toy(NamedTuple):
    """A causal model in two lines: the running mean of embeddings, and a tied head."""

    tokenizer: None = None

    def apply(self, params, tokens, return_hidden=False):
        embedded = params["embed"][tokens]
        hidden = jnp.cumsum(embedded, 1) / jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
        hidden = jnp.tanh(hidden @ params["mix"])
        return hidden if return_hidden else self.head(params, hidden)

    def head(self, params, hidden):
        return hidden @ params["embed"].T


def toy_params():
    rng = np.random.default_rng(0)
    embed, mix = rng.normal(size=(VOCAB, WIDTH)), rng.normal(size=(WIDTH, WIDTH)) * 0.5
    return {"embed": jnp.asarray(embed, jnp.float32), "mix": jnp.asarray(mix, jnp.float32)}


def data(lengths=(5, 9, 17, 30, 8, 3, 12), learned=3, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        mask = np.arange(n) >= max(1, n - learned)
        made.append(Example(rng.integers(0, VOCAB, n).astype(np.int32), mask, "e"))
    return made


def reference(params, examples):
    """Mean over learned tokens of -log softmax, in float64, one example at a time, no padding."""
    embed, mix = (np.asarray(params[name], np.float64) for name in ("embed", "mix"))
    total, count = 0.0, 0
    for e in examples:
        mean = np.cumsum(embed[e.tokens], 0) / np.arange(1, len(e.tokens) + 1)[:, None]
        logits = np.tanh(mean @ mix) @ embed.T
        for t in np.flatnonzero(e.learned):
            row = logits[t - 1]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[e.tokens[t]]
            count += 1
    return total / count


LOSS = summed_loss(lambda *inputs: losses_of(Toy())(*inputs[:-1]))


@jax.jit
def batch_mean(params, batch):
    parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.tokens))]
    return sum(LOSS(params, p, None) for p in parts) / batch.weights.sum()


value_and_grad = jax.jit(jax.value_and_grad(batch_mean))


@pytest.mark.parametrize("buckets", [(32,), (8, 16, 32)])
@pytest.mark.parametrize("learned", [1, 3, 99])
def test_loss_is_the_mean_over_learned_tokens(buckets, learned):
    params, examples = toy_params(), data(learned=learned)
    batches = once(loader(examples, batch_size=3, buckets=buckets))
    sums = [float(batch_mean(params, b) * b.weights.sum()) for b in batches]
    count = sum(e.learned.sum() for e in examples)
    # float32 sums of some hundred terms
    np.testing.assert_allclose(sum(sums) / count, reference(params, examples), rtol=2e-6)


def test_picking_places_out_changes_no_number():
    params, examples = toy_params(), data(lengths=(30, 28, 25, 31))
    (few,) = once(loader(examples, batch_size=4, buckets=(32,)))
    assert few.positions.shape[1] < 32
    every = loader(examples, batch_size=4, buckets=(32,))._replace(places={32: (128,)})
    (all_places,) = once(every)
    assert all_places.positions.shape[1] == 128
    got, expected = (value_and_grad(params, b) for b in (few, all_places))
    # Only the order of float32 additions differs.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_all_places_but_one_are_picked():
    hidden = jnp.arange(8.0).reshape(2, 2, 2)
    assert jnp.array_equal(
        pick(hidden, jnp.array([0, 1, 3])), hidden.reshape(4, 2)[jnp.array([0, 1, 3])]
    )


def test_padding_and_missing_rows_change_no_number():
    params, examples = toy_params(), data(lengths=(7, 7, 6))
    (tight,) = once(loader(examples, batch_size=3, buckets=(7,)))
    (loose,) = once(loader(examples, batch_size=5, buckets=(29,), pad_id=11))
    got, expected = (value_and_grad(params, b) for b in (loose, tight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_gradient_of_the_loss():
    (batch,) = once(loader(data(lengths=(6, 9, 9)), batch_size=3, buckets=(9,)))
    loss = jax.jit(lambda p: batch_mean(p, batch))
    check_grads(loss, (toy_params(),), order=1, modes=["rev"], rtol=2e-2)


def test_cross_entropy_is_float32_whatever_the_logits():
    logits = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    got = cross_entropy(logits, jnp.array([0]), jnp.ones(1))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.log(np.exp([1, 2, 3]).sum()) - 1, rtol=1e-6)


def split_loss(trainable, frozen, batch, key):
    return LOSS({**frozen, **trainable}, batch, key)


def one_step(batch, tx, params):
    state = init_state(jax.random.key(0), {"mix": params["mix"]}, tx)
    return jax.jit(make_step(split_loss, tx))(state, {"embed": params["embed"]}, batch)


def test_accumulation_changes_memory_and_not_the_step():
    params = toy_params()
    examples = data(lengths=(30, 9, 17, 30, 8, 3, 12, 5), learned=4)
    tx = optimizer(TrainConfig(learning_rate=1e-2, schedule="constant", warmup=0), 5)
    steps = []
    for rows, parts in ((8, 1), (2, 4)):
        (batch,) = once(loader(examples, batch_size=rows, accumulation=parts, buckets=(32,)))
        assert batch.tokens.shape == (parts, rows, 32)
        steps.append(one_step(batch, tx, params))
    (whole, whole_metrics), (parts, parts_metrics) = steps
    # Microbatches have different numbers of learned tokens; each token still weighs the same.
    np.testing.assert_allclose(whole_metrics.loss, reference(params, examples), rtol=2e-6)
    np.testing.assert_allclose(parts_metrics.loss, whole_metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(parts_metrics.grad_norm, whole_metrics.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(parts.trainable["mix"], whole.trainable["mix"], atol=1e-5)


def test_step_is_adamw_on_the_clipped_gradient_written_out():
    config = TrainConfig(learning_rate=0.1, schedule="constant", warmup=0, weight_decay=0.3,
                         clip=0.01, beta1=0.8, beta2=0.9, epsilon=1e-3)  # fmt: skip
    params, (batch,) = toy_params(), once(loader(data(), batch_size=7, buckets=(32,)))
    tx = optimizer(config, 9)
    step = jax.jit(make_step(split_loss, tx))
    state = init_state(jax.random.key(0), {"mix": params["mix"]}, tx)
    p, m, v = np.asarray(params["mix"], np.float64), 0.0, 0.0
    for k in range(1, 4):
        _, grads = value_and_grad({**params, "mix": jnp.asarray(p, jnp.float32)}, batch)
        g = np.asarray(grads["mix"], np.float64)
        norm = np.linalg.norm(g)
        g = g * min(1, 0.01 / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p = p - 0.1 * (m / (1 - 0.8**k) / (np.sqrt(v / (1 - 0.9**k)) + 1e-3) + 0.3 * p)
        state, metrics = step(state, {"embed": params["embed"]}, batch)
        np.testing.assert_allclose(state.trainable["mix"], p, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    assert int(state.step) == 3


def test_no_optimizer_state_for_what_is_frozen():
    params = toy_params()
    tx = optimizer(TrainConfig(), 5)
    state = init_state(jax.random.key(0), {"mix": params["mix"], "embed": None}, tx)
    shapes = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert shapes == [(WIDTH, WIDTH)] * 2


def test_one_program_for_each_shape_and_the_callers_arrays_stay():
    params, tx = toy_params(), optimizer(TrainConfig(), 5)
    programs = Programs(make_step(split_loss, tx), donate=(0,))
    state = init_state(jax.random.key(0), {"mix": params["mix"]}, tx)
    batches = once(loader(data(), batch_size=2, buckets=(8, 32)))
    assert len(batches) == 4
    for batch in [*batches, *batches]:
        state, _ = programs(state, {"embed": params["embed"]}, batch)
    assert [shape[:3] for shape in sorted(programs.compiled)] == [(1, 2, 8), (1, 2, 32)]
    assert not params["mix"].is_deleted() and np.isfinite(params["mix"]).all()
    # The same tokens at fewer places are another program.
    assert programs.has(batches[0])
    assert not programs.has(Batch(batches[0].tokens, *(x[:, :4] for x in batches[0][1:4])))


def test_gradients_of_microbatches_are_summed_in_float32():
    def loss(trainable, frozen, batch, key):
        return jnp.sum(trainable["w"] * batch.targets)

    tx = optax.sgd(1.0)
    state = init_state(jax.random.key(0), {"w": jnp.zeros(1, jnp.bfloat16)}, tx)
    none, parts = np.zeros((5, 1)), np.array([[256.0], [1.0], [1.0], [1.0], [1.0]])
    state, _ = make_step(loss, tx)(state, {}, Batch(none, none, parts, np.full((5, 1), 0.2)))
    # bfloat16 has no number between 256 and 258: the ones would be lost one by one.
    assert float(state.trainable["w"][0]) == -260.0


def test_a_batch_without_learned_tokens_changes_nothing():
    params, tx = toy_params(), optimizer(TrainConfig(), 5)
    (batch,) = once(loader(data(), batch_size=7, buckets=(32,)))
    state = init_state(jax.random.key(0), {"mix": params["mix"]}, tx)
    empty = batch._replace(weights=np.zeros_like(batch.weights))
    step = jax.jit(make_step(split_loss, tx))
    after, metrics = step(state, {"embed": params["embed"]}, empty)
    np.testing.assert_array_equal(after.trainable["mix"], params["mix"])
    assert [float(x) for x in metrics] == [0.0, 0.0, 0.0]


def test_dropout_key_differs_by_step_and_microbatch_and_repeats():
    def loss(trainable, frozen, batch, key):
        return jnp.sum(trainable["w"]) * jax.random.uniform(key)

    tx = optax.sgd(1.0)
    none = np.zeros((2, 1))
    batch = Batch(none, none, none, np.ones((2, 1)))
    step = jax.jit(make_step(loss, tx))

    def losses(steps):
        state = init_state(jax.random.key(5), {"w": jnp.ones(1)}, tx)
        for _ in range(steps):
            state = state._replace(trainable={"w": jnp.ones(1)})
            state, metrics = step(state, {}, batch)
            yield float(metrics.loss)

    first = list(losses(3))
    assert len(set(first)) == 3 and first == list(losses(3))
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), i) for i in range(2)]
    np.testing.assert_allclose(first[0], sum(jax.random.uniform(k) for k in keys) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.82, 0.64, 0.46, 0.28]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.914058, 0.689058, 0.410942, 0.185942]),
    ],
)
def test_schedules(name, expected):
    config = TrainConfig(schedule=name, learning_rate=0.5, warmup=4, final_learning_rate=0.1)
    rates = [float(schedule(config, 9)(k)) for k in range(9)]
    np.testing.assert_allclose(rates, np.array(expected) / 2, rtol=1e-5)
    last = 0.05 if name != "constant" else 0.5
    np.testing.assert_allclose(schedule(config, 9)(9), last, rtol=1e-5)


@pytest.mark.parametrize("pad, expected", [(0, 0), (7, 7), (None, 0)])
def test_padding_is_the_tokenizers_own(pad, expected):
    assert pad_id_of(SimpleNamespace(pad_id=pad)) == expected and pad_id_of(None) == 0


def test_counting_steps():
    assert total_steps(TrainConfig(epochs=2.5), 10) == 25
    assert total_steps(TrainConfig(epochs=0.01), 10) == 1
    assert total_steps(TrainConfig(epochs=0.07), 100) == 7  # their product is above 7
    assert total_steps(TrainConfig(epochs=2, steps=7), 10) == 7
    assert warmup_steps(TrainConfig(warmup=0.1), 50) == 5
    assert warmup_steps(TrainConfig(warmup=1), 50) == 1
    assert warmup_steps(TrainConfig(warmup=3), 50) == 3
    saves = [steps_between_saves(TrainConfig(), total) for total in (5, 25, 9000)]
    assert saves == [1, 3, 500] and steps_between_saves(TrainConfig(save_every=7), 5) == 7


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("steps", 0, "a whole number of at least 1, got 0"),
        ("batch_size", 1.5, "a whole number of at least 1, got 1.5"),
        ("accumulation", True, "a whole number of at least 1, got True"),
        ("epochs", 0, "a number above 0, got 0"),
        ("learning_rate", float("nan"), "a number above 0 and at most 1, got nan"),
        ("learning_rate", 1e9, "a number above 0 and at most 1, got 1000000000.0"),
        ("learning_rate", "1e-4", "a number above 0 and at most 1, got '1e-4'"),
        ("warmup", -0.1, "a number of at least 0, got -0.1"),
        ("beta2", 1.0, "at least 0 and below 1, got 1.0"),
        ("final_learning_rate", 2, "a share of the peak, 0 to 1, got 2"),
        ("clip", 0, "a number above 0, or `clip=None` for no clipping, got 0"),
        ("schedule", "cos", "one of cosine, linear, constant, got 'cos'"),
        ("seed", -1, r"a whole number from 0 to 2\*\*32 - 1, got -1"),
        ("keep", 0, "a whole number of at least 1, got 0"),
    ],
)
def test_bad_config(field, value, text):
    with pytest.raises(ValueError, match=f"^`{field}` must be {text}$"):
        TrainConfig(**{field: value})


def test_fixed_fields_leave_out_what_changes_no_number():
    make: Any = TrainConfig  # paths and lists as a JSON file has them
    one = fixed_fields(make(output_dir="a", save_every=3, progress=False, buckets=[8, 16]))
    free = dict(eval_every=2, keep=9, tensorboard=False, prefetch=5)
    two = fixed_fields(make(output_dir="b", resume=True, buckets=(8, 16), **free))
    assert one == two and one["buckets"] == [8, 16]
    assert fixed_fields(TrainConfig(seed=1)) != fixed_fields(TrainConfig(seed=2))
