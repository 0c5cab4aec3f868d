"""Law: a lorafied model's outputs are the base model's with merged weights, eager and jitted."""

import warnings

import jax
import pytest

import lora_jax as lora
from laws.cases import CASES, QUICK, Case, assert_near, materialized, model, outputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_is_that_of_merged_weights(case: Case):
    made = model(case.name)
    merged = jax.jit(lambda p, *args: made.fn(lora.merge(p), *args), compiler_options=QUICK)
    want = outputs(merged(made.lora_params, *made.args))
    adapted = lora.lorafy(made.fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lora.MaterializedWarning)
        eager = outputs(adapted(made.lora_params, *made.args))
        jitted = jax.jit(adapted, compiler_options=QUICK)(made.lora_params, *made.args)
    assert_near(eager, want, case.tolerance, f"{case} eager")
    assert_near(outputs(jitted), want, case.tolerance, f"{case} jitted")
    assert materialized(caught) == case.fallbacks
