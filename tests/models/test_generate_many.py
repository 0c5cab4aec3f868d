"""Writing on with an adapter for each prompt: every row's text is what it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models

from tests.support.tiny import adapter, tiny_model

pytestmark = pytest.mark.once

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3], [11, 12, 13, 14]]
TARGETS = {
    "attention": {"rank": 2, "target_modules": ("q_proj", "v_proj")},
    "all": {"rank": 4, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"rank": 3, "use_dora": True, "target_modules": ("o_proj", "down_proj")},
    "table": {"rank": 2, "target_modules": ("embed_tokens", "up_proj")},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapters(model):
    return [adapter(model, k, **config) for k, config in enumerate(TARGETS.values())]


@pytest.fixture(scope="module")
def alone(model, adapters):
    """Plain parameters with each adapter merged, the base last: one program computes them all."""
    return [*map(lora.merge, adapters), model.params]


def write(model, params, prompts, **options):
    return models.generate(model, params, prompts, max_new_tokens=9, **options)


def test_every_row_writes_what_it_would_alone(model, adapters, alone):
    stacked = lora.stack(adapters)
    texts = [[write(model, params, [prompt])[0] for params in alone] for prompt in PROMPTS]
    for ids in ([0, 1, 2, 3], [-1, 3, -1, 1], [2, 2, 0, -1]):
        got = write(model, stacked, PROMPTS, adapter_ids=ids)
        assert got == [texts[row][number] for row, number in enumerate(ids)]
    # The adapters matter: a row's texts differ.
    assert len(set(map(tuple, texts[1]))) > 2


def test_other_ids_compile_nothing_and_sampling_stays_by_row(model, adapters):
    from lora_jax.models import decoding

    stacked, key = lora.stack(adapters), jax.random.key(3)
    first = write(model, stacked, PROMPTS, adapter_ids=[0, 1, 2, 3], temperature=1.0, key=key)
    before = decoding.read._cache_size(), decoding.write._cache_size()
    second = write(model, stacked, PROMPTS, adapter_ids=[0, 0, 2, -1], temperature=1.0, key=key)
    assert (decoding.read._cache_size(), decoding.write._cache_size()) == before
    assert first[0] == second[0] and first[2] == second[2]


@pytest.mark.slow
def test_a_quantized_base_serves_them_too(model):
    names = ("q_proj", "down_proj", "up_proj")
    base = lora.quantize(model.params, names, format="int8", block_size=16)
    quantized = models.Model(model.forward, base, model.tokenizer)
    some = [adapter(quantized, k, rank=2, target_modules=("q_proj", "down_proj")) for k in (1, 2)]
    got = write(quantized, lora.stack(some), PROMPTS, adapter_ids=[1, -1, 0, 1])
    for row, number in enumerate([1, -1, 0, 1]):
        params = base if number < 0 else some[number]
        assert got[row] == write(quantized, params, [PROMPTS[row]])[0]


def test_the_decode_step_moves_no_cache(model, adapters):
    """A step with chosen adapters holds one cache, not copies of it in another order."""
    from lora_jax.models.decoding import runner

    rows, slots = 16, 256
    chosen = lora.select(lora.stack(adapters[:2]), jnp.zeros(rows, int))

    def step(chosen, tokens, cache):
        return runner(model.forward, chosen, rows, slots).apply(tokens, None, cache)

    cache = jax.eval_shape(lambda: runner(model.forward, chosen, rows, slots).cache)
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=(2,)).lower(chosen, tokens, cache).compile()
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in (cache.keys, cache.values))
    # One layer's keys and values are read out, none of the whole cache is copied.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * size


def test_refused(model, adapters):
    stacked = lora.stack(adapters)
    with pytest.raises(ValueError, match="are chosen for 3 rows, but there are 4 prompts"):
        write(model, stacked, PROMPTS, adapter_ids=[0, 1, 2])
    with pytest.raises(ValueError, match=r"`adapter_ids` has \[9\]"):
        write(model, stacked, PROMPTS, adapter_ids=[0, 1, 2, 9])
