"""Laws of precision: a 16-bit base stays 16-bit under float32 adapters; float64 is kept."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora

from tests.laws.case import equations, normal
from tests.laws.cases import CASES, Case, adapted, by_name, config_of, model, outputs

pytestmark = pytest.mark.once

LOW = jnp.bfloat16


def low(tree):
    return jax.tree.map(
        lambda x: x.astype(LOW) if getattr(x, "dtype", None) == jnp.float32 else x, tree
    )


# JAX has no FFT and no complex numbers of bfloat16, so these base models do not run.
FULL = ("block_fourier_kernel", "block_implicit_filter", "complex_of_two")
HALF_CASES = [case for case in CASES if case.name not in FULL]


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
def test_outputs_keep_the_base_models_dtypes(case: Case):
    """In bfloat16 throughout, each output has the dtype and shape that the base model gives it."""
    made = model(case.name)
    params, args = low(made.params), low(made.args)
    half = jax.tree.map(
        lambda x, w: lora.LoraArray(w, x.a, x.b, x.scale, None, x.roles)
        if isinstance(x, lora.LoraArray) else w,
        made.lora_params, params, is_leaf=lora.is_lora)  # fmt: skip
    base = jax.eval_shape(lambda p, *a: outputs(made.fn(p, *a)), params, *args)
    mine = jax.eval_shape(lambda p, *a: outputs(lora.lorafy(made.fn)(p, *a)), half, *args)
    assert [(x.shape, x.dtype) for x in mine] == [(x.shape, x.dtype) for x in base]


def _mlp(p, x):
    return jax.nn.silu(x @ p["up"]) @ p["down"]


def _low_model():
    params = low({"up": normal(1, 8, 12), "down": normal(2, 12, 8)})
    x = normal(3, 2, 5, 8).astype(LOW)
    config = lora.LoraConfig(rank=2, target_modules="all-linear")
    return adapted(lora.plan(config, _mlp, params, x), params), x


def test_adapters_are_float32_over_a_bfloat16_base():
    params = {"w": normal(1, 8, 6).astype(LOW)}
    config = lora.LoraConfig(rank=2, target_modules=("w",))
    plan = lora.plan(config, lambda p, x: x @ p["w"], params, normal(2, 3, 8).astype(LOW))
    leaf = lora.init(jax.random.key(0), plan, params)["w"]
    assert (leaf.w.dtype, leaf.a.dtype, leaf.b.dtype) == (LOW, jnp.float32, jnp.float32)


def test_base_matmuls_stay_bfloat16():
    """Each product with a base weight takes and gives bfloat16; none of its operands is cast."""
    lora_params, x = _low_model()
    jaxpr = jax.make_jaxpr(lora.lorafy(_mlp))(lora_params, x).jaxpr
    shapes = {(8, 12), (12, 8)}
    with_weight = [
        e for e in equations(jaxpr)
        if e.primitive.name == "dot_general" and e.invars[1].aval.shape in shapes
    ]  # fmt: skip
    assert len(with_weight) == 2
    for eqn in with_weight:
        assert {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)} == {jnp.dtype(LOW)}
    casts = [e for e in equations(jaxpr) if e.primitive.name == "convert_element_type"]
    assert not [e for e in casts if e.invars[0].aval.shape in shapes]


def test_saved_activations_stay_bfloat16():
    """What the backward pass keeps of the size of an activation is bfloat16."""
    lora_params, x = _low_model()
    trainable, frozen = lora.split(lora_params)
    _, back = jax.vjp(lambda t: lora.lorafy(_mlp)(lora.combine(t, frozen), x), trainable)
    kept = [r for r in jax.tree.leaves(back) if hasattr(r, "dtype") and r.ndim == 3]
    large = [r for r in kept if r.shape[-1] > 2]
    assert large and {r.dtype for r in large} == {jnp.dtype(LOW)}


def test_gradients_have_the_adapters_dtype():
    lora_params, x = _low_model()
    trainable, frozen = lora.split(lora_params)
    gradient = jax.grad(
        lambda t: jnp.sum(lora.lorafy(_mlp)(lora.combine(t, frozen), x).astype(jnp.float32))
    )(trainable)
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_near_the_float32_merge():
    """The bfloat16 model against the float32 model with float32 merged weights."""
    lora_params, x = _low_model()
    got = lora.lorafy(_mlp)(lora_params, x).astype(jnp.float32)
    full = {name: v.w.astype(jnp.float32) + lora.delta(v) for name, v in lora_params.items()}
    want = _mlp(full, x.astype(jnp.float32))
    # Two products and three sums, each rounded to 8 bits.
    assert float(jnp.max(jnp.abs(got - want))) <= 2e-2 * float(jnp.max(jnp.abs(want)))


@pytest.mark.parametrize("name", ["dot_matmul", "divided_by_a_number", "norm_frobenius"])
def test_float64_is_kept(name: str):
    with jax.enable_x64(True):
        case = by_name(name)
        fn, params, args = case.build()
        params, args = jax.tree.map(lambda x: x.astype(jnp.float64), (params, args))
        plan = lora.plan(config_of(case), fn, params, *args)
        lora_params = adapted(plan, params)
        leaf = lora_params["w"]
        assert (leaf.a.dtype, leaf.b.dtype) == (jnp.float64, jnp.float64)
        got = lora.lorafy(fn)(lora_params, *args)
        want = fn({"w": params["w"] + leaf.scale * (leaf.a @ leaf.b)}, *args)
        assert got.dtype == jnp.float64
        assert float(jnp.max(jnp.abs(got - want))) < 1e-14 * float(jnp.max(jnp.abs(want))) * 10


def test_weak_types_are_kept():
    """A Python number does not widen a bfloat16 model."""
    params = {"w": normal(1, 8, 6).astype(LOW)}
    x = normal(2, 3, 8).astype(LOW)

    def fn(p, x, factor):
        return (x @ p["w"]) * factor

    plan = lora.plan(lora.LoraConfig(rank=2, target_modules=("w",)), fn, params, x, 2.0)
    lora_params = adapted(plan, params)
    assert jax.jit(lora.lorafy(fn))(lora_params, x, 2.0).dtype == LOW
