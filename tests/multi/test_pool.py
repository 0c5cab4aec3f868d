"""The pool under threads and with adapters that cannot be used: right numbers, or an error."""

import dataclasses
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import is_lora
from lora_jax.multi import AdapterPool

pytestmark = pytest.mark.once

BASE = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
X = jnp.arange(4.0)[None]
FACTORS = 4 * 2 + 2 * 3 + 1 + 3 * 2 + 2 * 2 + 1  # numbers of an adapter of rank 2


def model(params, x):
    return x @ params["w"] @ params["v"]


def leaf(w, seed, rank=2):
    a, b = (jax.random.normal(jax.random.key(seed + i), s)
            for i, s in enumerate([(w.shape[0], rank), (rank, w.shape[1])]))  # fmt: skip
    return lora.LoraArray(w, a, b, jnp.float32(1.0))


def adapter(seed, rank=2):
    return {name: leaf(w, seed, rank) for name, w in BASE.items()}


def changed(tree, name="w", **fields):
    return {**tree, name: dataclasses.replace(tree[name], **fields)}


ADAPTERS = {f"a{i}": adapter(10 * i) for i in range(6)}
WANT = {name: np.asarray(model(lora.merge(tree), X)) for name, tree in ADAPTERS.items()}


@jax.jit
def run(stacked, ids):
    return lora.lorafy(model)(stacked, X, adapter_ids=ids)


def pool_of(load=ADAPTERS.__getitem__, slots=2, **options):
    return AdapterPool(adapter(0), load, byte_budget=slots * 4 * FACTORS, **options)


def check(pool, name):
    stacked, ids = pool.lookup([name])
    np.testing.assert_allclose(run(stacked, ids), WANT[name], rtol=1e-5, atol=1e-4)


def in_a_thread(fn, *args):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(fn, *args).result()


def test_threads_that_read_load_and_evict_get_their_own_adapters():
    pool = pool_of()
    assert pool.slots == 2
    check(pool, "a0")

    def work(seed):
        draw = random.Random(seed)
        for _ in range(25):
            check(pool, draw.choice(list(ADAPTERS)))
            if not seed:
                pool.evict(draw.choice(list(ADAPTERS)))
                pool.prefetch(draw.sample(list(ADAPTERS), 3))
                assert len(pool.resident()) <= 2

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


def test_a_stack_that_is_held_stays_and_one_that_is_dropped_is_written_in_place():
    pool = pool_of(slots=1)
    held, ids = pool.lookup(["a0"])
    check(pool, "a1")
    np.testing.assert_allclose(run(held, ids), WANT["a0"], rtol=1e-5, atol=1e-4)
    place = pool.lookup(["a1"])[0]["w"].a.unsafe_buffer_pointer()
    assert place != held["w"].a.unsafe_buffer_pointer()
    check(pool, "a2")
    assert pool.lookup(["a2"])[0]["w"].a.unsafe_buffer_pointer() == place


def test_the_slot_used_longest_ago_goes_first_and_one_to_keep_stays():
    pool = pool_of(slots=2)
    for name in ("a0", "a1", "a0", "a2"):
        check(pool, name)
    assert pool.resident() == ["a0", "a2"]
    pool.lookup(["a3"], keep=["a0", "a4"])  # the one that is not there needs no slot
    assert pool.resident() == ["a0", "a3"]
    with pytest.raises(ValueError, match="3 different adapters are needed at once, but .* holds 2"):
        pool.lookup(["a1", "a2", "a4", "a1", None])
    with pytest.raises(ValueError, match="3 different adapters"):
        pool.lookup(["a1", "a2"], keep=["a3"])
    assert pool.resident() == ["a0", "a3"]


def test_an_empty_slot_is_the_plain_base():
    dora = {name: dataclasses.replace(x, m=jnp.ones(x.shape[1])) for name, x in adapter(0).items()}
    pool = AdapterPool(dora, {"a0": dora}.__getitem__, byte_budget=2 * 4 * (FACTORS + 3 + 2))
    assert pool.slots == 2
    stacked, ids = pool.lookup(["a0"])
    np.testing.assert_allclose(run(stacked, 1 - ids), model(BASE, X), rtol=1e-6)


@pytest.mark.parametrize("host, calls", [(4, 4), (2, 6)])
def test_the_host_keeps_as_many_adapters_as_it_may(host, calls):
    loaded: list = []
    pool = pool_of(lambda name: loaded.append(name) or ADAPTERS[name], slots=1, host=host)
    for name in ("a0", "a1", "a2", "a3", "a1", "a0"):
        check(pool, name)
    assert len(loaded) == calls


def test_slots_and_stack_of_two_calls_are_one_threads():
    pool = pool_of(slots=1)
    ids = pool.ids(["a0"])
    np.testing.assert_allclose(run(pool.stacked, ids), WANT["a0"], rtol=1e-5, atol=1e-4)
    in_a_thread(pool.ids, ["a0"])  # changes nothing
    pool.stacked  # noqa: B018
    in_a_thread(pool.ids, ["a1"])
    with pytest.raises(RuntimeError, match=r"another thread put .* `stacked, ids = pool.lookup"):
        pool.stacked  # noqa: B018
    np.testing.assert_array_equal(pool.ids(["a1"]), [0])
    np.testing.assert_allclose(run(pool.stacked, ids), WANT["a1"], rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="where threads share a pool"):
        in_a_thread(lambda: pool.stacked)


GOOD = adapter(3)
BAD = {
    "no tree": (None, "`load` returned a tree without a LoRA leaf"),
    "the base": (BASE, "without a LoRA leaf, .* for the plain base use the name None"),
    "another tree": ({"w": GOOD["w"]}, "`adapter` is a tree of another structure"),
    "NaN": (changed(GOOD, b=GOOD["w"].b.at[0, 0].set(jnp.nan)), "`b` of `w` holds NaN"),
    "a scale": (changed(GOOD, "v", scale=jnp.float32(jnp.inf)), "`scale` of `v` holds NaN or an"),
    "infinity": (changed(GOOD, a=GOOD["w"].a.at[1, 1].set(-jnp.inf)), "`a` of `w` holds NaN or"),
    "rank": (adapter(1, rank=3), "has rank 3 .* ranks up to 2"),
    "A's shape": (changed(GOOD, a=GOOD["w"].a[:2]), r"`a` of `w` has shape \(2, 2\), expected"),
    "B's shape": (changed(GOOD, b=GOOD["w"].b.T), r"`b` of `w` has shape \(3, 2\), expected"),
    "B's rank": (changed(GOOD, b=GOOD["w"].b[:1]), r"`b` of `w` has shape \(1, 3\), expected"),
    "its scale": (changed(GOOD, scale=jnp.ones(2)), r"`scale` of `w` has shape \(2,\), expected"),
    "DoRA": (changed(GOOD, m=jnp.ones(3)), "`w` has DoRA's magnitude in the new adapter"),
    "another base": (changed(GOOD, w=BASE["w"] + 1), "bases of adapter 0 and of adapter 1 differ"),
    "roles": (changed(GOOD, a=GOOD["w"].a[:3], b=jnp.ones((2, 4)), roles="oi"), "roles `oi`"),
    "whole": ({**GOOD, "w": lora.SavedArray(BASE["w"], BASE["w"])}, "`w` trains whole"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_an_adapter_that_cannot_be_used_is_refused_by_name_and_changes_nothing(kind):
    tree, text = BAD[kind]
    pool = pool_of(lambda name: tree if name == "bad" else ADAPTERS[name])
    check(pool, "a0")
    with pytest.raises(ValueError, match=f"(?s)^adapter `bad` cannot be used: .*{text}"):
        pool.lookup(["a1", "bad"])
    assert pool.resident() == ["a0"]
    check(pool, "a1")
    check(pool, "a0")


def test_a_load_that_fails_raises_where_it_is_needed_and_is_tried_again():
    files = {}
    pool = pool_of(files.__getitem__)
    pool.prefetch(["a0"])["a0"].exception()  # nobody has needed it yet
    with pytest.raises(KeyError, match=r"adapter `a0` cannot be loaded: KeyError\('a0'\)"):
        pool.lookup(["a0"])
    files["a0"] = ADAPTERS["a0"]
    check(pool, "a0")

    def leave(name):
        raise SystemExit(f"no {name} today")

    with pytest.raises(RuntimeError, match=r"loading adapter `a1` ended with SystemExit\('no a1"):
        pool_of(leave).lookup(["a1"])


def test_the_place_of_an_evicted_adapter_is_free():
    pool = pool_of(slots=1)
    for name in ("a0", "a1", "a0"):
        check(pool, name)
        pool.evict(name)


def test_an_evicted_adapter_is_loaded_again_also_while_it_was_loading():
    files = {"a0": ADAPTERS["a1"]}
    begun, go_on = threading.Event(), threading.Event()

    def load(name):
        tree = files[name]
        begun.set()
        assert go_on.wait(60)
        return tree

    pool = pool_of(load)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(pool.lookup, ["a0"])
        assert begun.wait(60)
        files["a0"] = ADAPTERS["a0"]  # the file changes under the load
        pool.evict("a0")
        go_on.set()
        first.result()
    check(pool, "a0")
    held, ids = pool.lookup(["a0"])
    files["a0"] = changed(ADAPTERS["a0"], "v", scale=jnp.float32(0.0))
    check(pool, "a0")  # loaded already
    pool.evict("a0")
    pool.evict("never loaded")
    assert pool.resident() == []
    assert not np.allclose(run(*pool.lookup(["a0"])), WANT["a0"])
    np.testing.assert_allclose(run(held, ids), WANT["a0"], rtol=1e-5, atol=1e-4)


def test_threads_that_wait_for_one_adapter_load_it_once():
    calls: list = []
    go_on = threading.Event()

    def load(name):
        calls.append(name)
        assert go_on.wait(60)
        return ADAPTERS[name]

    pool = pool_of(load)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(pool.lookup, ["a0"]) for _ in range(3)]
        assert pool.resident() == []  # not held up by the load
        go_on.set()
        slots = [future.result()[1].tolist() for future in waiting]
    assert calls == ["a0"] and slots == [[0]] * 3


def test_every_leaf_of_a_handed_out_tree_is_watched():
    pool = pool_of(slots=1)
    stacked, _ = pool.lookup(["a0"])
    part = [x for x in jax.tree.leaves(stacked, is_leaf=is_lora) if is_lora(x)][-1]
    del stacked
    check(pool, "a1")
    assert not part.a.is_deleted()


@pytest.mark.parametrize(
    "options, text",
    [({"byte_budget": 2e6}, "`byte_budget` must be an integer of at least 1, got 2000000.0"),
     ({"byte_budget": "1GB"}, "`byte_budget` must be an integer"),
     ({"rank": 2.5}, "`rank` must be an integer of at least 1, got 2.5"),
     ({"host": -1}, "`host` must be an integer of at least 0, got -1"),
     ({"workers": 0}, "`workers` must be an integer of at least 1, got 0"),
     ({"load": ADAPTERS}, "`load` must be a function of a name, got `dict`")],
)  # fmt: skip
def test_wrong_settings_are_refused(options, text):
    given = {"load": ADAPTERS.__getitem__, "byte_budget": 1 << 20, **options}
    with pytest.raises((ValueError, TypeError), match=text):
        AdapterPool(adapter(0), given.pop("load"), **given)


@pytest.mark.parametrize("names", ["a", None, {"a"}, ["a", 3], [["a"]]])
def test_names_that_are_no_list_of_names_are_refused(names):
    pool = pool_of()
    for call in (pool.lookup, pool.ids, pool.prefetch):
        with pytest.raises(TypeError, match="`names` (must be a list|has .* neither an adapter's)"):
            call(names)
