"""The pool and the server: adapters come and go, every request's text is what it is alone."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, multi
from lora_jax.models.serve import Server

from tests.models.test_generate_many import adapter
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.once

# Few ranks: every one is a program of its own where an adapter runs alone.
RANKS = {"ann": 2, "bob": 4, "cid": 2, "dan": 2, "eve": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapters(model):
    return {
        name: adapter(model, seed, rank=rank, target_modules=("q_proj", "down_proj"))
        for seed, (name, rank) in enumerate(RANKS.items())
    }


def pool_of(adapters, slots, calls=None, **options):
    def load(name):
        if calls is not None:
            calls.append((name, threading.current_thread().name))
        return adapters[name]

    template = adapters["bob"]
    one = sum(x.nbytes for x in jax.tree.leaves(lora.split(template)[0]))
    # Scales come on top of the factors: two numbers a layer and target.
    return multi.AdapterPool(template, load, byte_budget=slots * (one + 64), **options)


def test_the_least_lately_used_goes_and_what_is_compiled_stays(model, adapters):
    calls: list = []
    pool = pool_of(adapters, 2, calls)
    assert pool.slots == 2 and pool.resident() == []
    run = jax.jit(lora.lorafy(model.apply))
    tokens = jnp.arange(15).reshape(3, 5)

    def check(names):
        ids = pool.ids(names)
        got = run(pool.stacked, tokens, adapter_ids=ids)
        for row, name in enumerate(names):
            params = model.params if name is None else adapters[name]
            alone = run(params, tokens[row : row + 1])[0]
            np.testing.assert_allclose(got[row], alone, rtol=2e-4, atol=2e-4)

    check(["ann", "bob", None])
    compiled = run._cache_size()  # with the rows alone: rank 2, rank 4, the plain base
    check(["bob", "bob", "cid"])  # ann goes
    assert pool.resident() == ["bob", "cid"] and pool.loads == 3
    check(["ann", None, "cid"])  # bob goes; ann is still in the host's memory
    assert pool.resident() == ["ann", "cid"] and pool.loads == 4
    assert [name for name, _ in calls] == ["ann", "bob", "cid"]
    assert all(thread.startswith("adapters") for _, thread in calls)
    assert run._cache_size() == compiled == 4
    with pytest.raises(ValueError, match="3 different adapters are needed at once, .* holds 2"):
        pool.ids(["ann", "bob", "dan"])
    with pytest.raises(ValueError, match="3 different adapters are needed at once"):
        pool.ids(["bob"], keep=["ann", "cid"])
    assert pool.resident() == ["ann", "cid"]


def test_the_hosts_memory_has_a_limit_too(adapters):
    calls: list = []
    pool = pool_of(adapters, 1, calls, host=2)
    for name in ("ann", "bob", "cid", "ann"):
        pool.ids([name])
    assert [name for name, _ in calls] == ["ann", "bob", "cid", "ann"]


def test_a_budget_below_one_adapter_and_an_adapter_that_does_not_fit(model, adapters):
    with pytest.raises(ValueError, match="`byte_budget` is 100 bytes, but one adapter"):
        multi.AdapterPool(adapters["bob"], adapters.get, byte_budget=100)
    pool = multi.AdapterPool(adapters["cid"], lambda name: adapters[name], byte_budget=1 << 20)
    with pytest.raises(ValueError, match="make the stack with a larger `rank`"):
        pool.ids(["bob"])
    assert pool.resident() == []
    np.testing.assert_array_equal(pool.ids(["cid", None]), [0, -1])


def alone(model, adapters, prompt, name, count, stops=()):
    params = model.params if name is None else adapters[name]
    return models.generate(
        model, params, [prompt], max_new_tokens=count, stop_tokens=stops
    )[0]  # fmt: skip


def test_every_request_writes_what_it_would_alone(model, adapters):
    rng = np.random.default_rng(0)
    names = [*RANKS, None]
    asked = [
        (rng.integers(1, 300, rng.integers(1, 25)).tolist(), names[k % 6], int(rng.integers(1, 14)))
        for k in range(11)
    ]
    stop = alone(model, adapters, *asked[0][:2], 13)[-1]  # a token that does occur
    server = Server(model, pool_of(adapters, 3), rows=3, room=64, stop_tokens=(stop,))
    requests = [server.submit(p, adapter=n, max_new_tokens=c) for p, n, c in asked]
    late = None
    while server.step():
        if server.steps == 4:  # one that comes while others run
            late = server.submit(asked[1][0], adapter="dan", max_new_tokens=5)
    assert late is not None and late.done
    assert late.tokens == alone(model, adapters, asked[1][0], "dan", 5, (stop,))
    for request, (prompt, name, count) in zip(requests, asked, strict=True):
        assert request.done
        assert request.tokens == alone(model, adapters, prompt, name, count, (stop,))
    # Rows are filled as they come free: fewer steps than one batch after the other would take.
    assert server.steps < sum(count for _, _, count in asked)
    # Two buckets of prompts, one step.
    assert server._step._cache_size() == 1 and server._admit._cache_size() == 2


def test_refused_requests(model, adapters):
    server = Server(model, pool_of(adapters, 2), rows=2, room=32)
    for prompt, count, text in (
        ([], 4, "`prompt` must be tokens"),
        ([10**6], 4, "`prompt` must be tokens"),
        ([1, 2], 0, "`max_new_tokens` must be at least 1"),
        ([1] * 17, 4, "need 36 places, but a row has `room` for 32"),
    ):
        with pytest.raises(ValueError, match=text):
            server.submit(prompt, adapter="ann", max_new_tokens=count)
    with pytest.raises(ValueError, match="`rows` and `room` must be at least 1"):
        Server(model, pool_of(adapters, 2), rows=0, room=8)
