"""Laws of training: the base is left alone, has no state and comes back bit for bit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora

from tests.laws.cases import (
    CASES,
    QUICK,
    REVERSIBLE,
    Case,
    adapter_bytes,
    assert_near,
    loss,
    model,
    outputs,
)

pytestmark = pytest.mark.once

TX = optax.adamw(1e-2)


def _step(fn):
    """One optimizer step on the trainable half."""

    def value(trainable, frozen, *args):
        out = lora.lorafy(fn)(lora.combine(trainable, frozen), *args)
        return loss(out), outputs(out)

    def step(trainable, state, frozen, *args):
        gradient, out = jax.grad(value, has_aux=True)(trainable, frozen, *args)
        updates, state = TX.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, out

    return jax.jit(step, compiler_options=QUICK)


# Steps are taken in every ninth case: the gradients of all are another law's.
TRAINED = REVERSIBLE[::9]


@pytest.mark.parametrize("case", TRAINED, ids=str)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
def test_training_step(case: Case):
    """At init the model is the base; a step changes the adapters only; it compiles once."""
    made = model(case.name)
    init = jax.jit(lambda p: lora.init(jax.random.key(2), made.plan, p), compiler_options=QUICK)
    lora_params = init(made.params)
    trainable, frozen = lora.split(lora_params)
    state = TX.init(trainable)
    assert moment_bytes(state) == 2 * adapter_bytes(lora_params)

    step = _step(made.fn)
    after, state, at_init = step(trainable, state, frozen, *made.args)
    base = outputs(jax.jit(made.fn, compiler_options=QUICK)(made.params, *made.args))
    assert_near(at_init, base, 1e-6 if case.numerical else case.tolerance, f"{case} at init")
    # Through the host: what a mesh has spread over devices would be another compilation, JAX's own.
    after, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (after, state))
    _, _, later = step(after, state, frozen, *made.args)
    assert step._cache_size() == 1
    moved = [float(jnp.max(jnp.abs(x - y))) for x, y in zip(
        jax.tree.leaves(later), jax.tree.leaves(at_init), strict=True)]  # fmt: skip
    assert max(moved) > 0, "the adapters do not change the outputs"


def moment_bytes(state) -> int:
    """Bytes of an optimizer state apart from its scalar step count."""
    return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_then_unmerge_is_the_base_bit_for_bit(case: Case):
    made = model(case.name)
    back = jax.jit(lambda p: lora.unmerge(lora.merge(p), p), compiler_options=QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = back(made.lora_params)
    assert jax.tree.structure(params) == jax.tree.structure(made.params)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(made.params), strict=True):
        assert got.dtype == want.dtype
        if not jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_optimizer_has_no_state_for_the_base(case: Case):
    """`masked(adamw)` holds two moments an adapter and nothing else, abstractly."""
    made = model(case.name)
    state = jax.eval_shape(lora.masked(TX).init, made.lora_params)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    assert held == 2 * adapter_bytes(made.lora_params)
