"""Blocks in turns, and what is rounded where in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models.layers import RMSNorm, groups_of, logits_of, run_blocks
from lora_jax.paths import slice_of

pytestmark = pytest.mark.once


class Block(nnx.Module):
    def __init__(self, numbers):
        self.own = nnx.Param(jnp.asarray(numbers, jnp.float32))


@pytest.mark.parametrize("kinds", ["aaaa", "dsdsds", "llfllf", "aabcc"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("each", [(True, False, False, True, True, False), (True,) * 6])
def test_blocks_run_in_their_order_each_with_what_is_its_own(kinds, stacked, each):
    count = len(kinds)
    each, given = each[:count], jnp.arange(2.0, 2.0 + count)
    groups = groups_of(kinds)
    layers = nnx.Dict({slice_of(numbers): Block(numbers) for numbers in groups})
    if not stacked:
        layers = nnx.Dict({str(i): Block(i) for i in range(count)})
    elif len(groups) == 1:
        layers = Block(range(count))

    def call(block, carry, number, own, given):
        # Each of the four, and the blocks before, changes the result in a way of its own.
        return 2 * carry + block.own.get_value() + 10 * number + 100 * given + 1000 * own

    got = run_blocks(layers, 1.0, call, wrap=lambda f, several=0: f, each=each, given=given)
    want = 1.0
    for i in range(count):
        want = 2 * want + i + 10 * i + 100 * (2 + i) + 1000 * each[i]
    assert got == want


def test_logits_are_summed_in_float32():
    hidden, table = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in ((0, (1, 3, 64)), (1, (5, 64)))
    )
    want = hidden.astype("float32") @ table.astype("float32").T
    for tied, weight in ((True, table), (False, table.T)):
        got = logits_of(hidden, weight, tied=tied, dtype=jnp.bfloat16)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # another order of sums


@pytest.mark.parametrize("fields", [{"offset": True}, {"centered": True}])
def test_where_a_norm_rounds_in_16_bits(fields):
    norm = RMSNorm(8, eps=1e-6, param_dtype=jnp.bfloat16, **fields)
    x, scale = jax.random.normal(jax.random.key(0), (2, 64, 8), jnp.bfloat16)
    norm.scale.set_value(scale[0])
    wide = x.astype(jnp.float32)
    if "centered" in fields:
        wide = wide - wide.mean(-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    factor = scale[0].astype(jnp.float32) + ("offset" in fields)
    np.testing.assert_array_equal(norm(x), (normal * factor).astype(jnp.bfloat16))
