"""Law: the plan reads the roles off the model, and foresees every materialization."""

import jax
import pytest

import lora_jax as lora

from tests.laws.cases import CASES, Case, config_of, model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_roles(case: Case):
    plan = model(case.name).plan
    assert {leaf.path: leaf.roles for leaf in plan.adapted} == dict(case.roles)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fallbacks_are_foreseen(case: Case):
    plan = model(case.name).plan
    foreseen = {(leaf.path, use.primitive) for leaf in plan.adapted for use in leaf.fallbacks}
    assert foreseen == case.fallbacks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_linear(case: Case):
    made = model(case.name)
    shapes = jax.eval_shape(lambda x: x, (made.params, made.args))
    expected = set(case.roles if case.linear is None else case.linear)
    config = config_of(case, target_modules="all-linear")
    if not expected:
        with pytest.raises(ValueError, match="all-linear"):
            lora.plan(config, made.fn, shapes[0], *shapes[1])
        return
    plan = lora.plan(config, made.fn, shapes[0], *shapes[1])
    assert {leaf.path for leaf in plan.adapted} == expected
