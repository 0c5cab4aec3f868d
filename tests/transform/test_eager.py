"""Calls outside `jit` compile once, and still see what the function closes over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.transform import eager

from tests.support.compilations import compilations
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.once

X = jax.random.normal(jax.random.key(1), (3, 8))


def scanned(p, x):
    def body(x, w):
        return jnp.tanh(x @ w), None

    return lax.scan(body, x, p["w"])[0]


def adapted(fn, **settings):
    params = {"w": jax.random.normal(jax.random.key(0), (4, 8, 8)) / 3}
    plan = lora.plan(lora.LoraConfig(rank=2, target_modules=("w",), **settings), fn, params, X)
    tree = lora.init(jax.random.key(2), plan, params)
    factors = jax.random.normal(jax.random.key(3), tree["w"].b.shape)
    return {"w": dataclasses.replace(tree["w"], b=factors)}


def test_a_second_call_compiles_nothing():
    tree, fn = adapted(scanned), lora.lorafy(scanned)
    first = fn(tree, X)
    other = X + 1
    assert compilations(lambda: (fn(tree, X), fn(tree, other))) == 0
    np.testing.assert_array_equal(first, fn(tree, X))
    np.testing.assert_allclose(fn(tree, other), jax.jit(fn)(tree, other), rtol=1e-5, atol=1e-6)


def test_another_function_of_the_same_program_compiles_nothing():
    tree = adapted(scanned)
    lora.lorafy(lambda p, x: scanned(p, x))(tree, X)
    assert compilations(lambda: lora.lorafy(lambda p, x: scanned(p, x))(tree, X)) == 0


@pytest.fixture
def hoisted_constants():
    """JAX's coming default: constants are hidden arguments, which the program's text lacks."""
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    yield
    jax.config.update("jax_use_simplified_jaxpr_constants", False)


def test_programs_that_differ_in_a_constant_alone(hoisted_constants):
    def plus(constant):
        return eager.call(lambda x: [lax.map(lambda y: y + constant, x)], jnp.zeros((2, 50)))[0]

    ones = jnp.ones(50)
    np.testing.assert_array_equal(plus(ones), np.ones((2, 50)))
    np.testing.assert_array_equal(plus(2 * ones), np.full((2, 50), 2))


def test_programs_that_differ_in_the_weight_they_leave_out():
    # Of equal shapes, so that the texts are equal where an unused argument is not in them.
    params = {"first": jnp.full((8, 8), 0.1), "second": jnp.full((8, 8), 0.2)}
    heads = {name: lambda p, x, name=name: jax.nn.relu(x @ p[name]) for name in params}

    def both(p, x):
        return [head(p, x) for head in heads.values()]

    plan = lora.plan(lora.LoraConfig(rank=2, target_modules="all-linear"), both, params, X)
    tree = lora.init(jax.random.key(2), plan, params)
    for head in heads.values():
        np.testing.assert_allclose(lora.lorafy(head)(tree, X), head(params, X), rtol=1e-5)


def test_programs_that_differ_in_the_python_function_they_call():
    result = jax.ShapeDtypeStruct((3, 8), "float32")
    for factor in (np.float32(2), np.float32(3)):

        def fn(p, x, factor=factor):
            return jax.pure_callback(lambda y: np.asarray(y) * factor, result, scanned(p, x))

        np.testing.assert_allclose(
            lora.lorafy(fn)(adapted(scanned), X), factor * lora.lorafy(scanned)(adapted(scanned), X)
        )


def test_trees_that_differ_in_their_dropout_alone():
    fn = lora.lorafy(scanned)
    first, second = (fn(adapted(scanned, dropout=rate), X) for rate in (0.0, 0.3))
    np.testing.assert_array_equal(first, second)


def test_what_a_function_closes_over_may_change():
    """The function runs in Python on every call, as in JAX without `jit`."""
    setting, calls = {"gain": 1.0}, []

    def fn(p, x):
        calls.append(1)
        return setting["gain"] * scanned(p, x)

    tree = adapted(fn)
    calls.clear()
    once = lora.lorafy(fn)(tree, X)
    setting["gain"] = 3.0
    np.testing.assert_allclose(lora.lorafy(fn)(tree, X), 3 * once, rtol=1e-6)
    assert len(calls) == 2


def test_python_branches_on_concrete_arguments_still_run():
    def fn(p, x, flag):
        return scanned(p, x) if flag else -scanned(p, x)

    tree = adapted(lambda p, x: fn(p, x, True))
    run = lora.lorafy(fn)
    np.testing.assert_allclose(run(tree, X, jnp.array(False)), -run(tree, X, jnp.array(True)))


def test_an_unchanged_weight_comes_out_as_itself():
    tree = adapted(scanned)
    out, same, name = lora.lorafy(lambda p, x: (scanned(p, x), p["w"], "name"))(tree, X)
    assert same is tree["w"] and name == "name" and out.shape == X.shape


def test_the_number_of_programs_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(eager, "MOST_PROGRAMS", 2)
    for k in range(4):
        eager.call(lambda x, k=k: [x + k], X)
    assert len(eager._programs) == 2


def test_the_program_used_longest_ago_is_dropped(monkeypatch):
    monkeypatch.setattr(eager, "MOST_PROGRAMS", 2)

    def add(k):
        return compilations(lambda: eager.call(lambda x: [x + k], X))

    for k in (10, 11, 10, 12):
        add(k)
    assert add(10) == 0 and add(11) > 0


def test_a_program_is_of_the_devices_of_its_arguments():
    tree, fn = adapted(scanned), lora.lorafy(scanned)
    want, (_, *others) = fn(tree, X), jax.devices()[:3]
    for device in others:
        there = fn(*jax.device_put((tree, X), device))
        with jax.default_device(device):
            # What is nowhere by choice goes to the default device, as under `jit`.
            moved = fn(tree, X)
        for got in (there, moved):
            assert got.devices() == {device}
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_happen_at_every_call(ordered):
    seen: list = []

    def noting(name):
        def fn(p, x):
            jax.debug.callback(lambda: seen.append(name), ordered=ordered)
            return scanned(p, x)

        return lora.lorafy(fn)

    tree = adapted(scanned)
    for name in "aba":
        noting(name)(tree, X).block_until_ready()
        jax.effects_barrier()
    assert seen == ["a", "b", "a"]


def test_a_mutable_array_is_written_at_every_call():
    count, tree = jax.new_ref(jnp.zeros(())), adapted(scanned)

    def counted(p, x):
        count[...] += 1
        return count[...] * scanned(p, x)

    for _ in range(2):
        last = lora.lorafy(counted)(tree, X)
    assert count[...] == 2
    np.testing.assert_allclose(last, 2 * lora.lorafy(scanned)(tree, X), rtol=1e-6)


@pytest.mark.parametrize("transform", ["call", "grad", "vmap"])
def test_a_library_model_compiles_once(transform):
    model = tiny_model()
    tokens = jnp.ones((2, 6), jnp.int32)
    run = {
        "call": lambda: model.apply(model.params, tokens),
        "grad": lambda: jax.grad(lambda p: model.apply(p, tokens).sum())(model.params),
        "vmap": lambda: jax.vmap(lambda t: model.apply(model.params, t[None]))(tokens),
    }[transform]
    first = run()
    assert compilations(run) == 0
    jax.tree.map(np.testing.assert_array_equal, first, run())
