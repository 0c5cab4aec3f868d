"""Laws of materialization: none where none is expected, and else a warning or an error."""

import warnings

import jax
import pytest

import lora_jax as lora

from tests.laws.cases import CASES, Case, by_name, config_of, model, with_dropout

EXACT = tuple(case for case in CASES if not case.fallbacks)
FALLING = tuple(case for case in CASES if case.fallbacks)


def trace(fn, made, **kwargs):
    """Traces a call without computing it."""
    return jax.make_jaxpr(lambda p, *a: jax.tree.leaves(lora.merge(fn(p, *a, **kwargs))))(
        made.lora_params, *made.args
    )


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_strict_passes_where_nothing_is_materialized(case: Case):
    made = model(case.name)
    trace(lora.lorafy(made.fn, strict=True), made)


@pytest.mark.parametrize("case", FALLING, ids=str)
def test_strict_names_leaf_primitive_and_line(case: Case):
    made = model(case.name)
    with pytest.raises(ValueError, match=r"strict=True") as caught:
        trace(lora.lorafy(made.fn, strict=True), made)
    text = str(caught.value)
    assert any(f"`{path}` has no low-rank form in `{name}` at " in text
               for path, name in case.fallbacks)  # fmt: skip
    assert ".py:" in text.partition(" at ")[2]


def test_warning_text_in_full():
    made = model("weight_masked")
    with pytest.warns(lora.MaterializedWarning) as caught:
        trace(lora.lorafy(made.fn), made)
    [warning] = caught
    head, _, rest = str(warning.message).partition(" at cases_structure.py:")
    assert head == "`w` has no low-rank form in `select_n`"
    line, _, rest = rest.partition(" ")
    assert int(line) > 0
    assert rest == (
        "(_masked): the operation has no rule. W + s·A·B is materialized for this operation: "
        "the result is exact, the saving is lost"
    )


def test_a_fallback_warns_once():
    """The same line in a loop of layers warns once for each leaf, not once a layer."""
    made = model("weight_masked")

    def twice(p, x):
        return sum(made.fn(p, x) for _ in range(3))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.make_jaxpr(lora.lorafy(twice))(made.lora_params, *made.args)
    assert len(caught) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dropout_adds_no_materialization(case: Case):
    """With a key, what was exact stays so."""
    made = model(case.name)
    made = made._replace(lora_params=with_dropout(made.lora_params, 0.5))
    strict = case.dropout and not case.fallbacks
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore", lora.MaterializedWarning)
        trace(lora.lorafy(made.fn, strict=strict), made, lora_key=jax.random.key(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strict_promotion(case: Case):
    """What the base model does under strict dtype promotion, the lorafied one does too."""
    made = model(case.name)
    with jax.numpy_dtype_promotion("strict"):
        try:
            jax.make_jaxpr(lambda p, *a: jax.tree.leaves(made.fn(p, *a)))(made.params, *made.args)
        except Exception as error:  # the base itself promotes: there is no law to keep
            assert "promotion" in str(error).lower()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lora.MaterializedWarning)
            jax.make_jaxpr(lambda p, *a: jax.tree.leaves(lora.lorafy(made.fn)(p, *a)))(
                made.lora_params, *made.args)  # fmt: skip


def test_plan_prints_what_would_be_materialized():
    case = by_name("reshape_mixes")
    fn, params, args = case.build()
    text = str(lora.plan(config_of(case), fn, params, *args))
    assert "MATERIALIZED for reshape (6, 8) -> (8, 6) mixes dims of roles i/o" in text
