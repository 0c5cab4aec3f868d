"""Full fine-tuning by the same loop, against the steps written out with optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import train

from tests.support.train_toys import (
    CONFIG,
    Toy,
    compiled_once,
    numbers,
    toy_config,
    toy_data,
    toy_lora,
    toy_params,
)

pytestmark = pytest.mark.once


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("cache")):
        yield


def fit(directory=None, params=None, **options):
    config = toy_config(directory, **{"steps": 6, "save_every": 3, "eval_every": 3, **options})
    params = toy_params() if params is None else params
    return train.fit(Toy(), params, toy_data(), toy_data()[:5], config, full=True)


def test_it_is_adamw_on_every_parameter():
    before = toy_params()
    kept = jax.tree.map(np.array, before)
    result = fit(params=before)
    jax.tree.map(np.testing.assert_array_equal, before, kept)  # the caller's tree is whole
    config = toy_config(steps=6)
    tx = train.optimizer(config, 6)
    layout = train.loader(
        toy_data(), batch_size=config.batch_size, buckets=config.buckets, epochs=1
    )
    params, state = before, tx.init(before)

    @jax.jit
    @jax.grad
    def gradient(p, batch):
        logits = train.outputs_of(Toy())(p, batch.tokens[0], batch.positions[0])
        nll = -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch.targets[0]]
        return jnp.sum(nll * batch.weights[0]) / jnp.sum(batch.weights[0])

    for item in train.iterate(layout, 6):
        updates, state = tx.update(gradient(params, item.batch), state, params)
        params = optax.apply_updates(params, updates)
    same = lambda got, want: np.testing.assert_allclose(got, want, atol=2e-6)  # noqa: E731
    jax.tree.map(same, result.lora_params, params)
    evals = [r["eval_loss"] for r in result.history if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.1
    assert evals[-1] == pytest.approx(train.evaluate(Toy(), params, toy_data()[:5]), abs=1e-5)
    size = (23 * 16 + 16 * 16) * 4
    assert (result.memory.base, result.memory.adapters) == (0, size)
    assert result.memory.optimizer == 2 * size + 8


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def stop(record):
        if record.get("step") == 5:
            raise RuntimeError("killed")

    config = toy_config(tmp_path, steps=6, save_every=3, eval_every=3)
    with pytest.raises(RuntimeError, match="killed"):
        train.fit(Toy(), toy_params(), toy_data(), toy_data()[:5], config, full=True,
                  hooks=train.Hooks(record=stop))  # fmt: skip
    resumed, whole = fit(tmp_path, resume=True), fit()
    jax.tree.map(np.testing.assert_array_equal, resumed.lora_params, whole.lora_params)
    assert numbers(resumed.history) == numbers(whole.history)
    with pytest.raises(ValueError, match="is of full fine-tuning: it holds whole weights"):
        lora.checkpoint.restore(tmp_path, Toy().apply, toy_params(), jnp.zeros((1, 2), "int32"))
    adapter = toy_config(tmp_path, steps=6, resume=True)
    with pytest.raises(ValueError, match="is of another run"):
        train.fit(Toy(), toy_lora(), toy_data(), None, adapter)


def test_a_config_of_another_adapter():
    other = dataclasses.replace(CONFIG, rank=CONFIG.rank + 1)
    with pytest.raises(
        ValueError, match="has rank .* and `config` gives it .*: pass the config that"
    ):
        train.fit(Toy(), toy_lora(), toy_data(), None, toy_config(), lora_config=other)


def test_what_cannot_train_whole_is_named():
    with pytest.raises(ValueError, match="`mix.kernel` has an adapter; merge it first"):
        fit(params=toy_lora())
    small = lora.quantize(toy_params(), ("mix",), format="nf4", block_size=16)
    with pytest.raises(ValueError, match=r"`mix.kernel` is quantized \(nf4\); load the model"):
        fit(params=small)
    with pytest.raises(ValueError, match="`count` holds int32, which has no gradient"):
        fit(params={**toy_params(), "count": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="`lora_params` has no leaves"):
        fit(params={})
    with pytest.raises(ValueError, match="leave `lora_config` out"):
        train.fit(Toy(), toy_params(), toy_data(), None, toy_config(), full=True,
                  lora_config=CONFIG)  # fmt: skip
