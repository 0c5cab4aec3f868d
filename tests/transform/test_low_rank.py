"""The dtype of the thin products: that of the wider operand."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.transform.low_rank import compute_dtype

pytestmark = pytest.mark.once

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (3, 64))
LEAF = lora.LoraArray(
    jax.random.normal(KEYS[1], (64, 8)),
    jax.random.normal(KEYS[2], (64, 4)),
    jax.random.normal(KEYS[3], (4, 8)),
    jnp.float32(0.5),
)


def model(params, x):
    """A product of operands of two dtypes, as a mixed-precision model writes it."""
    w = params["w"]
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def leaf(dtype):
    return lora.LoraArray(LEAF.w.astype(dtype), LEAF.a, LEAF.b, LEAF.scale)


def error(y, x, tree):
    """Of the whole product, relative to the adapter's part in float64."""
    x, w, a, b = (np.asarray(v, np.float64) for v in (x, tree["w"].w, tree["w"].a, tree["w"].b))
    change = 0.5 * x @ a @ b
    return np.abs(y - (x @ w + change)).max() / np.abs(change).max()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("x_dtype, w_dtype", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_thin_products_have_the_precision_of_the_wider_operand(x_dtype, w_dtype, many):
    x, tree = X.astype(x_dtype), {"w": leaf(w_dtype)}
    if many:
        ids = jnp.zeros(3, int)
        for strategy in ("gathered", "grouped", "ragged"):
            run = lora.lorafy(model, adapter_strategy=strategy)
            assert error(run(lora.stack([tree]), x, adapter_ids=ids), x, tree) < 1e-5
    else:
        assert error(lora.lorafy(model)(tree, x), x, tree) < 1e-5


def test_a_bfloat16_model_has_thin_products_in_bfloat16():
    x, tree = X.astype("bfloat16"), {"w": leaf("bfloat16")}
    assert 1e-4 < error(lora.lorafy(model)(tree, x), x, tree) < 3e-2


def test_an_8_bit_model_has_thin_products_in_bfloat16():
    """With 3 bits of mantissa instead of 8 the change would be 5 % off."""
    x, tree = X.astype("float8_e4m3fn"), {"w": leaf("float8_e4m3fn")}
    assert error(lora.lorafy(model)(tree, x), x, tree) < 2e-2


def test_thin_products_have_sixteen_bits_at_least():
    narrow: Any = SimpleNamespace(dtype=jnp.dtype(jnp.float8_e4m3fn))
    weight: Any = SimpleNamespace(dtype=narrow.dtype, a=narrow, b=narrow)
    assert compute_dtype(narrow, weight) == jnp.bfloat16


def test_the_scale_comes_before_the_thin_array_is_rounded():
    """257 has nine bits and 1/257 no end: in bfloat16 their product is 255/256."""
    one = jnp.ones((1, 1), "bfloat16")
    a, b = jnp.array([[256.0], [1.0]], "bfloat16"), one.astype("float32")
    narrow = lora.LoraArray(jnp.zeros((2, 1), "bfloat16"), a, b, jnp.float32(1 / 257))
    assert lora.lorafy(model)({"w": narrow}, jnp.ones((1, 2), "bfloat16")) == 1


TURNS = jnp.exp(1j * jnp.arange(8.0))


@pytest.mark.parametrize("fn", [  # of a weight with DoRA's gain, a stack, and rows
    lambda w, s, x: x @ jnp.broadcast_to(w, (3, 64, 8)).sum(0),
    lambda w, s, x: x @ s.sum(0),
    lambda w, s, x: x @ jnp.cumsum(w, axis=1),
    lambda w, s, x: x[:, 1:] @ lax.pad(w, 0.0, ((-1, 0, 0), (0, 2, 0))),
    lambda w, s, x: x @ (lax.complex(s[0], s[1]) * TURNS).real,
    lambda w, s, x: lax.scan(lambda c, v: (c + x @ v, None), 0 * x[:, :8],
                             jnp.zeros((3, 64, 8)).at[1].set(w))[0],
], ids=["copies", "scales", "gains added up", "rows cut off", "complex factors", "a layer placed"]
)  # fmt: skip
def test_forms_of_weights_whose_scales_or_gains_differ(fn):
    keys = jax.random.split(jax.random.key(1), 4)
    stack = lora.LoraArray(
        jnp.stack([LEAF.w, 2 * LEAF.w]), jax.random.normal(keys[0], (2, 64, 2)),
        jax.random.normal(keys[1], (2, 2, 8)), jnp.array([0.5, 2.0]), roles="sio",
    )  # fmt: skip
    dora = lora.LoraArray(LEAF.w, LEAF.a, LEAF.b, LEAF.scale, m=jnp.arange(1.0, 9.0))
    tree = {"w": dora, "s": stack}

    def run(p, x):
        return fn(p["w"], p["s"], x)

    got, want = lora.lorafy(run, strict=True)(tree, X), run(lora.merge(tree), X)
    # float32 of sums of 64 in another order.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
