"""Law: weights made of weights keep their factors: nothing of a weight's size is made of them."""

import math

import jax
import pytest

import lora_jax as lora

from tests.laws import cases_low_rank
from tests.laws.case import equations
from tests.laws.cases import Case, model

pytestmark = pytest.mark.once

# Of one weight, of two, and of three experts. No base product of these models sums over as many
# and gives no features.
RANKS = frozenset({2, 4, 6})
# How many tokens the models take: features have them among their dims.
TOKENS = 5


def sums_over_ranks(jaxpr) -> list:
    """The shapes of all products that sum over a rank, or over several side by side."""
    found = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name != "dot_general":
            continue
        (summed, _), _ = eqn.params["dimension_numbers"]
        if {eqn.invars[0].aval.shape[d] for d in summed} & RANKS:
            found.append(eqn.outvars[0].aval.shape)
    return found


@pytest.mark.parametrize("case", cases_low_rank.CASES, ids=str)
def test_nothing_of_a_weights_size_is_made_of_its_factors(case: Case):
    """A product that sums over the rank has features on one side, or gives a vector."""
    made = model(case.name)
    jaxpr = jax.make_jaxpr(lora.lorafy(made.fn))(made.lora_params, *made.args).jaxpr
    weights = [made.params[path].size for path in case.roles]
    sizes = [math.prod(s) for s in sums_over_ranks(jaxpr) if TOKENS not in s]
    assert sums_over_ranks(jaxpr) and all(2 * n < min(weights) for n in sizes)


def test_a_materialized_weight_would_be_noticed():
    made = model("plus_a_constant")
    jaxpr = jax.make_jaxpr(lambda p: lora.merge(p))(made.lora_params).jaxpr
    assert sums_over_ranks(jaxpr) == [(8, 6)]
