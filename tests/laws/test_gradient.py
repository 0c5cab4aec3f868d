"""Laws: gradients for A and B are those through the merged weights, and finite differences'; what
`lora.init` gives is the base model; a second call compiles nothing.

Gradients are taken in float64, where two right formulas agree to ten digits: a float32 tolerance
would hide a term that is small. The second derivative is compared where JAX has one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_vjp

import lora_jax as lora

from tests.laws.cases import (
    QUARTER,
    QUICK,
    REVERSIBLE,
    WHOLE,
    Case,
    assert_near,
    loss,
    marked,
    model,
)

# float64 against float64: roundings alone.
FLOAT64 = 1e-9


def wide(tree):
    """float32 arrays as float64; narrower ones stay, they are the model's choice."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if getattr(x, "dtype", None) == jnp.float32 else x, tree
    )


def derivatives(*fns, second: bool):
    """Jitted: value and gradient for the trainable half of each function; for the first one the
    gradient of the gradient's half square as well."""

    def value(fn):
        return lambda trainable, frozen, *args: loss(fn(lora.combine(trainable, frozen), *args))

    def half_square(*given):
        return sum(jnp.sum(g * g) / 2 for g in jax.tree.leaves(jax.grad(value(fns[0]))(*given)))

    def run(*given):
        first = [jax.value_and_grad(value(fn))(*given) for fn in fns]
        return first, jax.grad(half_square)(*given) if second else ()

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("case", marked(REVERSIBLE, slow=lambda name: name not in QUARTER))
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
def test_gradient(case: Case):
    made = model(case.name)
    second = case.name in WHOLE
    with jax.enable_x64(case.numerical):
        widen = wide if case.numerical else lambda tree: tree
        trainable, frozen = lora.split(widen(made.lora_params))
        args = widen(made.args)
        # Without rules of its own for the backward pass the derivative is JAX's, of a value that
        # another law checks: one or more cases of every kind will do.
        fns = [lora.lorafy(made.fn, reverse_only=True)]
        fns = [lora.lorafy(made.fn), *fns] if second else fns
        adapted = derivatives(*fns, second=second)
        gradients, got_second = adapted(trainable, frozen, *args)
        merged = derivatives(lambda p, *a: made.fn(lora.merge(p), *a), second=second)
        (want,), want_second = merged(trainable, frozen, *args)
        # In lower precisions a gradient sums roundings over every position.
        tolerance = FLOAT64 if case.numerical else 4 * case.tolerance
        for got in gradients:
            assert_near(got, want, tolerance, str(case))
        assert_near(got_second, want_second, 10 * tolerance, f"{case} second derivative")
        start = lora.split(widen(at_init(made)))[0]
        value = adapted(start, frozen, *args)[0][0][0]
        base = merged(jax.tree.map(jnp.zeros_like, start), frozen, *args)[0][0][0]
        assert_near(value, base, tolerance, f"{case} at init")
        assert adapted._cache_size() == 1
        if case.numerical:
            check_numerically(adapted, trainable, frozen, args)


def at_init(made):
    """What `lora.init` gives."""
    init = jax.jit(lambda p: lora.init(jax.random.key(2), made.plan, p), compiler_options=QUICK)
    return init(made.params)


def check_numerically(adapted, trainable, frozen, args):
    """The gradient along a random direction against central differences of the value."""

    def value(t):
        return adapted(t, frozen, *args)[0][0][0]

    def vjp(t):
        out, gradient = adapted(t, frozen, *args)[0][0]
        return out, lambda g: (jax.tree.map(lambda x: g * x, gradient),)

    # Central differences in float64: six digits, less one for models of strong curvature.
    check_vjp(value, vjp, (trainable,), atol=1e-4, rtol=1e-4)


def test_finite_differences_would_notice():
    """The check itself: a gradient that is 1 % off fails."""
    with jax.enable_x64(True):
        x = jnp.arange(3.0)
        with pytest.raises(AssertionError):
            check_vjp(jnp.sum, lambda x: (jnp.sum(x), lambda g: (np.full(3, 1.01) * g,)), (x,),
                      atol=1e-5, rtol=1e-5)  # fmt: skip
