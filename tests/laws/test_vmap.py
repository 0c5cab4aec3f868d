"""Law: vmap of a lorafied model is the lorafied model example by example."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from laws.cases import CASES, QUICK, Case, assert_near, model, outputs

MAPPED = tuple(case for case in CASES if case.mapped)


@pytest.mark.parametrize("case", MAPPED, ids=str)
def test_vmap(case: Case):
    made = model(case.name)
    adapted = lora.lorafy(made.fn)
    other = [x[::-1] if x.ndim else x for x in made.args]
    both = [jnp.stack(pair) for pair in zip(made.args, other, strict=True)]

    def mapped(p, *args):
        return outputs(jax.vmap(lambda *xs: outputs(adapted(p, *xs)))(*args))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.MaterializedWarning)
        got = jax.jit(mapped, compiler_options=QUICK)(made.lora_params, *both)
    plain = jax.jit(lambda p, *args: outputs(made.fn(lora.merge(p), *args)), compiler_options=QUICK)
    first, second = (plain(made.lora_params, *args) for args in (made.args, other))
    want = [jnp.stack(pair) for pair in zip(first, second, strict=True)]
    assert_near(got, want, case.tolerance, f"{case} vmapped")
