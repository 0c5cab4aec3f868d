"""LoraArray: shapes of the factors, the change of weight in any dimension order, matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import spread_outputs, widened
from lora_jax.dims import a_dims, b_dims, factor_shapes, from_matrix, sizes, to_matrix

LETTERS = "pqstu"


def numbers(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def leaf(shape: tuple[int, ...], roles: str, rank: int = 2) -> lora.LoraArray:
    a, b = factor_shapes(shape, roles, rank)
    stack = sizes(shape, roles)[0]
    return lora.LoraArray(
        numbers(0, *shape), numbers(1, *a), numbers(2, *b), 1 + jnp.abs(numbers(3, *stack)),
        roles=roles)  # fmt: skip


@pytest.mark.parametrize("roles", ["io", "oi", "sio", "iso", "ios", "ioo", "iio", "isio", "osis"])
def test_delta_is_the_einsum_of_its_factors(roles: str):
    """`scale·A·B` as one einsum over letters, in the weight's own dimension order."""
    shape = (2, 3, 4, 5)[: len(roles)]
    x = leaf(shape, roles)
    name = dict(enumerate(LETTERS))
    stack = "".join(name[d] for d, r in enumerate(roles) if r == "s")
    ins = "".join(name[d] for d, r in enumerate(roles) if r == "i")
    outs = "".join(name[d] for d, r in enumerate(roles) if r == "o")
    whole = "".join(name[d] for d in range(len(roles)))
    equation = f"{stack}{ins}r,{stack}r{outs},{stack}->{whole}"
    want = np.einsum(equation, *(np.asarray(v, np.float64) for v in (x.a, x.b, x.scale)))
    assert x.a.shape == tuple(shape[d] for d in a_dims(roles)) + (2,)
    np.testing.assert_allclose(lora.delta(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("roles", ["io", "oi", "iso", "ois", "iosi"])
def test_to_matrix_and_back(roles: str):
    w = numbers(4, *(2, 3, 4, 5)[: len(roles)])
    matrix = to_matrix(w, roles)
    stack, fan_in, fan_out = sizes(w.shape, roles)
    assert matrix.shape == (*stack, fan_in, fan_out)
    np.testing.assert_array_equal(from_matrix(matrix, w.shape, roles), w)


def test_spread_outputs_puts_each_number_at_its_output():
    x = leaf((3, 4, 2), "ois")
    gain = numbers(5, 2, 3)  # stack, out
    spread = spread_outputs(gain, x)
    assert spread.shape == (3, 1, 2)
    np.testing.assert_array_equal(spread[:, 0, :], gain.T)
    assert b_dims("ois") == [2, 0]


def test_it_is_a_frozen_pytree_whose_roles_are_static():
    x = leaf((3, 4), "io")
    assert len(jax.tree.leaves(x)) == 4
    doubled = jax.tree.map(lambda v: 2 * v, x)
    assert (doubled.roles, doubled.dropout) == ("io", 0.0)
    np.testing.assert_array_equal(doubled.a, 2 * x.a)
    assert jax.tree.structure(x) != jax.tree.structure(leaf((3, 4), "oi"))
    with pytest.raises(AttributeError):
        x.w = x.a


def test_its_fields_have_names_in_paths():
    paths = [str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(leaf((3, 4), "io"))]
    assert paths == [".w", ".a", ".b", ".scale"]


def test_shape_dtype_and_rank_are_the_weights():
    x = leaf((3, 4, 5), "sio", rank=3)
    assert (x.shape, x.ndim, x.dtype, x.rank) == ((3, 4, 5), 3, jnp.float32, 3)
    saved = lora.SavedArray(x.w, x.w + 1)
    assert (saved.shape, saved.dtype) == ((3, 4, 5), jnp.float32)
    assert lora.is_lora(x) and lora.is_lora(saved) and not lora.is_lora(x.w)


def test_delta_of_narrow_factors_is_computed_in_float32():
    x = leaf((64, 8), "io")
    a, b = x.a.astype(jnp.bfloat16), x.b.astype(jnp.bfloat16)
    narrow = lora.LoraArray(x.w, a, b, x.scale)
    exact = np.asarray(narrow.a, np.float64) @ np.asarray(narrow.b, np.float64) * float(x.scale)
    got = lora.delta(narrow)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)


def test_widened_needs_no_promotion():
    with jax.numpy_dtype_promotion("strict"):
        assert widened(jnp.bfloat16, jnp.float32) == jnp.float32
        # JAX holds NumPy's float64 in float32 unless it is told otherwise.
        assert widened(jnp.bfloat16, jnp.float64) == jnp.float32
        with jax.enable_x64(True):
            assert widened(jnp.bfloat16, jnp.float64) == jnp.float64


@pytest.mark.parametrize("x", [jnp.ones((4, 4)), {"w": leaf((8, 4), "io")}], ids=["array", "tree"])
@pytest.mark.wrong_types
def test_the_delta_of_no_leaf_is_an_error(x):
    with pytest.raises(TypeError, match="`x` must be one leaf, a `LoraArray`, got `"):
        lora.delta(x)
