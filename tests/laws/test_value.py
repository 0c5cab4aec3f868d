"""Law: a lorafied model's outputs are the base model's with merged weights.

Under vmap inside jit, or jit alone; eager for a case or more of every kind of rule. Jit alone is
in the law of gradients too, which has the cases that are left out here where the clock runs.
"""

import warnings

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora

from tests.laws.cases import (
    CASES,
    QUARTER,
    QUICK,
    WHOLE,
    Case,
    assert_near,
    marked,
    materialized,
    model,
    outputs,
)


@pytest.mark.parametrize("case", marked(CASES, slow=lambda name: name in QUARTER))
def test_value_is_that_of_merged_weights(case: Case):
    made = model(case.name)
    adapted = lora.lorafy(made.fn)
    merged = jax.jit(
        lambda p, *args: outputs(made.fn(lora.merge(p), *args)), compiler_options=QUICK
    )
    want = merged(made.lora_params, *made.args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lora.MaterializedWarning)
        if case.name in WHOLE:
            eager = outputs(adapted(made.lora_params, *made.args))
            assert_near(eager, want, case.tolerance, f"{case} eager")
        else:
            jax.eval_shape(adapted, made.lora_params, *made.args)
    assert materialized(caught) == case.fallbacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.MaterializedWarning)
        if case.mapped:
            check_mapped(case, adapted, merged, want)
        else:
            run = jax.jit(adapted, compiler_options=QUICK)
            assert_near(outputs(run(made.lora_params, *made.args)), want, case.tolerance, "jitted")


def check_mapped(case: Case, adapted, merged, first):
    """Two examples at once, jitted, against each by itself."""
    made = model(case.name)
    other = [x[::-1] if x.ndim else x for x in made.args]
    both = [jnp.stack(pair) for pair in zip(made.args, other, strict=True)]

    def mapped(p, *args):
        return jax.vmap(lambda *xs: outputs(adapted(p, *xs)))(*args)

    got = jax.jit(mapped, compiler_options=QUICK)(made.lora_params, *both)
    second = merged(made.lora_params, *other)
    want = [jnp.stack(pair) for pair in zip(first, second, strict=True)]
    assert_near(got, want, case.tolerance, f"{case} jitted and vmapped")
