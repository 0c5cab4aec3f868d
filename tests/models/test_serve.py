"""The pool and the server: adapters come and go, every request's text is what it is alone."""

import re
import threading
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, multi
from lora_jax.models.serve import Server

from tests.support.tiny import adapter, tiny_model

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


@pytest.fixture(scope="module")
def merged(model, adapters):
    """Plain parameters by adapter: one program computes them all."""
    return {None: model.params} | {name: lora.merge(x) for name, x in adapters.items()}


def alone(model, merged, prompt, name, count, stops=()):
    return models.generate(
        model, merged[name], [prompt], max_new_tokens=count, stop_tokens=stops
    )[0]  # fmt: skip


def test_every_request_writes_what_it_would_alone(model, adapters, merged):
    rng = np.random.default_rng(0)
    names = [*RANKS, None]
    asked = [
        (rng.integers(1, 300, rng.integers(1, 25)).tolist(), names[k % 6], int(rng.integers(1, 14)))
        for k in range(11)
    ]
    stop = alone(model, merged, *asked[0][:2], 13)[-1]  # a token that does occur
    server = Server(model, pool_of(adapters, 3), rows=3, room=64, stop_tokens=(stop,))
    requests = [server.submit(p, adapter=n, max_new_tokens=c) for p, n, c in asked]
    late = None
    while server.step():
        if server.steps == 4:  # one that comes while others run
            late = server.submit(asked[1][0], adapter="dan", max_new_tokens=5)
    assert late is not None and late.done
    assert late.tokens == alone(model, merged, asked[1][0], "dan", 5, (stop,))
    for request, (prompt, name, count) in zip(requests, asked, strict=True):
        assert request.done
        assert request.tokens == alone(model, merged, prompt, name, count, (stop,))
    # Rows are filled as they come free: fewer steps than one batch after the other would take.
    assert server.steps < sum(count for _, _, count in asked)
    # Two buckets of prompts, one step.
    assert server._step._cache_size() == 1 and server._admit._cache_size() == 2


def test_refused_requests(model, adapters):
    server = Server(model, pool_of(adapters, 2), rows=2, room=32)
    for prompt, count, text in (
        ([], 4, "`prompt` is empty"),
        ([10**6], 4, "`prompt` has token 1000000, which is outside the vocabulary 0 to"),
        ([1, 2], 0, "`max_new_tokens` must be an integer of at least 1"),
        ([1] * 17, 4, "need 36 places, but a row has `room` for 32"),
    ):
        with pytest.raises(ValueError, match=text):
            server.submit(prompt, adapter="ann", max_new_tokens=count)


@pytest.mark.parametrize(
    "options, text",
    [({"rows": 0}, "`rows` must be an integer of at least 1, got 0"),
     ({"rows": True}, "`rows` must be an integer of at least 1, got True"),
     ({"room": 8.5}, "`room` must be an integer of at least 1, got 8.5"),
     ({"room": 257}, "`room` is 257, but the model's context is 256"),
     ({"stop_tokens": 2}, "`stop_tokens` must be a sequence of integers"),
     ({"stop_tokens": "ab"}, "`stop_tokens` must be a sequence of integers"),
     ({"stop_tokens": [1.0]}, "`stop_tokens` must be a sequence of integers"),
     ({"stop_tokens": [None]}, "`stop_tokens` must be a sequence of integers"),
     ({"pool": {}}, "`pool` must be an `AdapterPool`, got `dict`"),
     ({"model": None}, "`model` must be a `Model`, .* got `NoneType`")],
)  # fmt: skip
def test_a_server_of_wrong_arguments_is_refused(model, adapters, options, text):
    right = {"model": model, "pool": pool_of(adapters, 1), "rows": 1, "room": 8}
    given = {**right, **options}
    with pytest.raises((ValueError, TypeError), match=text):
        Server(given.pop("model"), given.pop("pool"), **given)


SMALL_PROMPT = [5, 6, 7]


def overflowing(tree):
    """Finite numbers that are too large for float32 when they meet."""
    trainable, frozen = lora.split(tree)
    return lora.combine(jax.tree.map(lambda x: jnp.full_like(x, 1e30), trainable), frozen)


class Files(dict):
    """Adapters by name, of which one takes its time."""

    go_on = threading.Event()

    def __getitem__(self, name):
        assert name != "slow" or self.go_on.wait(60)
        return dict.__getitem__(self, name)


@pytest.fixture(scope="module")
def shared(model, adapters, merged):
    """A server for the tests below, whose adapters are read from a dict that tests change."""
    files = Files(adapters)
    files["slow"] = adapters["ann"]
    server = Server(model, pool_of(files, 3), rows=2, room=32)
    want = {name: alone(model, merged, SMALL_PROMPT, name, 4) for name in (*RANKS, None)}
    return server, files, want


def submit(server, name, count=4):
    return server.submit(SMALL_PROMPT, adapter=name, max_new_tokens=count)


def with_nan(tree):
    trainable, frozen = lora.split(tree)
    leaves, structure = jax.tree.flatten(trainable)
    leaves[-1] = leaves[-1].at[0].set(jnp.nan)
    return lora.combine(jax.tree.unflatten(structure, leaves), frozen)


BAD = {
    "missing": (None, KeyError, "bad"),
    "no tree": (lambda model, ann: None, ValueError, "`load` returned a tree without a LoRA leaf"),
    "too large": (lambda model, ann: adapter(model, 1, rank=5, target_modules=("q_proj",)),
                  ValueError, "has rank 5"),
    "foreign": (lambda model, ann: adapter(model, 1, rank=2, target_modules=("o_proj",)),
                ValueError, "which has no room for it"),
    "another base": (lambda model, ann: adapter(models.Model(model.forward, jax.tree.map(
                        lambda x: x + 1, model.params), None), 1, rank=2,
                        target_modules=("q_proj",)), ValueError, "bases .* differ"),
    "NaN": (lambda model, ann: with_nan(ann), ValueError, "holds NaN or an infinity"),
    "overflow": (lambda model, ann: overflowing(ann), FloatingPointError, "logits are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_request_with_a_bad_adapter_fails_alone(model, adapters, shared, kind):
    server, files, want = shared
    make, error, text = BAD[kind]
    if make is not None:
        files["bad"] = make(model, adapters["ann"])
    names = ["ann", "bob", "bad", "cid", None, "bad", "dan"]
    requests = [submit(server, name) for name in names]
    server.run()
    for request, name in zip(requests, names, strict=True):
        assert request.done
        if name == "bad":
            assert request.tokens == [] and isinstance(request.error, error)
            assert re.search(text, str(request.error))
        else:
            assert request.error is None and request.tokens == want[name]
    server._pool.evict("bad")
    files.pop("bad", None)


def test_an_adapter_that_loads_slowly_is_passed_by(shared):
    server, files, want = shared
    slow = submit(server, "slow")
    others = [submit(server, name) for name in ("ann", "bob", None)]
    while not all(x.done for x in others):
        assert server.step()
    assert not slow.done and [x.tokens for x in others] == [want["ann"], want["bob"], want[None]]
    assert server.step()  # nothing to do yet
    files.go_on.set()
    server.run()
    assert slow.tokens == want["ann"]
    server._pool.evict("slow")


def test_cancelled_requests_make_room(shared):
    server, _, want = shared
    running, waiting, never = (submit(server, "ann", 9) for _ in range(3))
    last = submit(server, "bob")
    server.step()
    server.cancel(running)
    server.cancel(never)
    had = list(running.tokens)
    server.run()
    assert running.tokens == had and running.done and never.tokens == [] and never.done
    assert waiting.tokens[:4] == want["ann"] and len(waiting.tokens) == 9
    assert last.tokens == want["bob"]


def test_threads_submit_and_step_at_once(shared):
    server, _, want = shared

    def client(seed):
        names = list(np.random.default_rng(seed).permutation([*RANKS]))
        requests = [submit(server, str(name)) for name in names]
        server.run()
        while not all(x.done for x in requests):  # another thread's `run` may have the last ones
            server.step()
        return all(x.tokens == want[x.adapter] for x in requests)

    with futures.ThreadPoolExecutor(3) as threads:
        assert all(threads.map(client, range(3)))


@pytest.mark.parametrize("program", ["_step", "_admit"])
def test_a_failing_device_ends_the_running_requests_only(shared, program):
    server, _, want = shared
    first = submit(server, "ann", 9)
    server.step()

    def fail(base, state, *rest, **options):
        jax.tree.map(lambda x: x.delete(), state)  # as a donated argument is
        raise RuntimeError("RESOURCE_EXHAUSTED")

    second = submit(server, "bob")
    futures.wait(server._pool.prefetch(["bob"]).values())
    if program == "_step":
        server.step()
    good = getattr(server, program)
    setattr(server, program, fail)
    try:
        if program == "_step":
            with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
                server.step()
        else:
            server.step()
    finally:
        setattr(server, program, good)
    for request in (first, second):
        assert request.done and "RESOURCE_EXHAUSTED" in str(request.error)
    third = submit(server, "cid")
    server.run()
    assert third.tokens == want["cid"]


@pytest.mark.parametrize(
    "prompt, text",
    [([1.5, 2.0], "sequence of integers"), ("ab", "sequence of integers"), (7, "sequence of"),
     ([[1, 2]], "sequence of integers"), (np.zeros((2, 2), int), "sequence of integers"),
     ([None], "sequence of integers"), ([True], "sequence of integers"),
     ({5, 6}, "sequence of integers"), (b"ab", "sequence of integers"),
     ([-1], "has token -1, which is outside"),
     (np.array([], int), "is empty")],
)  # fmt: skip
def test_a_prompt_that_is_no_list_of_tokens_is_refused(shared, prompt, text):
    with pytest.raises(ValueError, match=f"`prompt` .*{text}"):
        shared[0].submit(prompt, adapter=None, max_new_tokens=1)


def test_other_refusals(model, adapters, shared):
    with pytest.raises(ValueError, match=r"`adapter` must be a name in the pool or None, got \['a"):
        shared[0].submit([1], adapter=["ann"], max_new_tokens=1)
    with pytest.raises(ValueError, match="`max_new_tokens` must be an integer .* got 2.5"):
        shared[0].submit([1], adapter=None, max_new_tokens=2.5)
    other = models.Model(model.forward, jax.tree.map(lambda x: x + 1, model.params), None)
    with pytest.raises(ValueError, match="`pool` and `model` must have one base"):
        Server(other, pool_of(adapters, 2), rows=1, room=8)
