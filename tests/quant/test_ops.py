"""Operations on a quantized weight: the same as on the weight decoded, kept as codes or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax import quant
from lora_jax.quant import ops

from tests.support.random_arrays import normal

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::lora_jax.DecodedWarning")]

D = 16


def weights(*shape):
    return normal(sum(shape), *shape)


X = weights(7, D)
ROWS = jnp.array([3, 0, 39])
OUTSIDE = jnp.array([-1, 2, 99])


def filled(w, fill):
    return w.at[OUTSIDE].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def narrow(w):
    wide = jnp.float32
    return lax.dot_general(X.astype("bfloat16"), w, (((1,), (0,)), ((), ())), None, wide)


# Name: the weight's shape and roles, the function, and options of its quantization.
CASES: dict[str, tuple] = {
    "narrow activations": ((D, 8), "io", narrow, {}),
    "experts of the same tokens": ((3, D, 8), "sio", lambda w: jnp.einsum("md,edh->emh", X, w), {}),
    "rows": ((48, 8), "io", lambda w: w[ROWS], {"format": "uint4"}),
    "columns": ((48, D), "oi", lambda w: w[ROWS], {"format": "uint4"}),
    "columns of a filled-up weight": ((48, 20), "oi", lambda w: w[ROWS], {"pad": True}),
    "filled with NaN": ((48, 8), "io", lambda w: filled(w, None), {}),
    "filled with a number": ((48, 8), "io", lambda w: filled(w, 7.0), {}),
    "columns with a stack behind": ((48, D, 3), "ois", lambda w: w[ROWS], {}),
    "one of two input dims": ((4, 8, 8), "iio", lambda w: w[jnp.array([2, 0])], {}),
    "input dims in another order": (
        (4, 8, 8),
        "iio",
        lambda w: weights(7, 32) @ w.transpose(1, 0, 2).reshape(32, 8),
        {},
    ),
    "every second matrix": ((5, D, 8), "sio", lambda w: X @ w[::2], {}),
    "four of five matrices": ((5, D, 8), "sio", lambda w: X @ w[:4:2], {}),
    "some outputs": ((D, 8), "io", lambda w: X @ w[:, 2:6], {}),
    "matrices by index": ((5, D, 8), "sio", lambda w: X @ w[jnp.array([4, 1])], {}),
    "matrices filled": ((5, D, 8), "sio", lambda w: X @ filled(w, 0.0), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_that_of_the_decoded_weight(name):
    shape, roles, fn, options = CASES[name]
    chosen: dict[str, Any] = {"block_size": 16, "roles": roles} | options
    q = quant.quantize_array(weights(*shape), **chosen)
    got = jax.jit(lora.lorafy(lambda p: fn(p["w"])))({"w": q})
    np.testing.assert_allclose(got, jax.jit(fn)(q.dequantize()), rtol=2e-5, atol=2e-5)


def test_what_would_mix_codes_is_left_to_the_caller():
    q = quant.quantize_array(weights(4, 8, 8), block_size=16, roles="iio")
    assert ops.reshape(q, (4, 64)) is None and ops.transpose(q, (1, 0, 2)) is None
    whole = q.dequantize()
    np.testing.assert_array_equal(ops.take(q, jnp.array([3, 1]), 0), whole[jnp.array([3, 1])])
