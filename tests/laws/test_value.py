"""Law: a lorafied model's outputs are the base model's with merged weights, eager and jitted."""

import re
import warnings

import jax
import pytest

import lora_jax as lora
from laws.cases import CASES, Case, assert_near, model, outputs

TEXT = re.compile(
    r"`(?P<path>[^`]+)` has no low-rank form in `(?P<primitive>\w+)` at (?P<line>.+?): "
)


def materialized(caught) -> frozenset:
    """The (path, primitive) pairs that warnings name; any other warning fails the test."""
    found = set()
    for warning in caught:
        assert issubclass(warning.category, lora.MaterializedWarning), warning.message
        match = TEXT.match(str(warning.message))
        assert match, warning.message
        found.add((match["path"], match["primitive"]))
    return frozenset(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_is_that_of_merged_weights(case: Case):
    made = model(case.name)
    want = outputs(made.fn(lora.merge(made.lora_params), *made.args))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lora.MaterializedWarning)
        eager = outputs(lora.lorafy(made.fn)(made.lora_params, *made.args))
        jitted = jax.jit(lora.lorafy(made.fn))(made.lora_params, *made.args)
    assert_near(eager, want, case.tolerance, f"{case} eager")
    assert_near(outputs(jitted), want, case.tolerance, f"{case} jitted")
    assert materialized(caught) == case.fallbacks
