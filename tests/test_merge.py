"""Merging and taking adapters out again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora


def leaf(dtype=jnp.float32, seed: int = 0) -> lora.LoraArray:
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    return lora.LoraArray(
        numbers(3, 8, 6).astype(dtype), numbers(3, 8, 2), numbers(3, 2, 6),
        jnp.asarray([0.5, 1.0, 2.0]), roles="sio")  # fmt: skip


def exact(x: lora.LoraArray) -> np.ndarray:
    w, a, b, s = (np.asarray(v, np.float64) for v in (x.w, x.a, x.b, x.scale))
    return w + s[:, None, None] * (a @ b)


def test_merge_is_w_plus_scaled_product():
    x = leaf()
    tree = {"w": x, "bias": jnp.ones(6)}
    merged = lora.merge(tree)
    np.testing.assert_allclose(merged["w"], exact(x), rtol=1e-6, atol=1e-6)
    assert merged["bias"] is tree["bias"]


def test_merge_of_a_narrow_base_is_rounded_once():
    """float32 all the way, then one rounding: the nearest bfloat16 to the exact sum."""
    x = leaf(jnp.bfloat16)
    merged = lora.merge({"w": x})["w"]
    assert merged.dtype == jnp.bfloat16
    nearest = jnp.asarray(exact(x).astype(np.float32)).astype(jnp.bfloat16)
    different = float(jnp.mean(merged != nearest))
    assert different < 0.01  # ties of the float32 sum only


def test_saved_values_take_the_originals_place():
    w = jnp.ones(3)
    assert lora.merge({"b": lora.SavedArray(w, 2 * w)})["b"].tolist() == [2, 2, 2]
    assert lora.unmerge({"b": 2 * w}, {"b": lora.SavedArray(w, 2 * w)})["b"] is w


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_unmerge_gives_the_base_bit_for_bit(dtype):
    tree = {"w": leaf(dtype), "bias": jnp.ones(6)}
    back = lora.unmerge(lora.merge(tree), tree)
    assert back["w"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(back["w"]), np.asarray(tree["w"].w))


def test_unmerge_of_weights_trained_since_takes_the_same_change_off():
    tree = {"w": leaf()}
    moved = {"w": lora.merge(tree)["w"] + 1}
    np.testing.assert_allclose(lora.unmerge(moved, tree)["w"], tree["w"].w + 1, atol=2e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_merge_that_is_not_finite_is_an_error_that_names_the_leaves(bad):
    x = leaf()
    broken = dataclasses.replace(x, a=x.a.at[1, 2, 0].set(bad))
    tree = {"good": {"kernel": leaf(seed=1)}, "bad": {"kernel": broken}}
    with pytest.raises(ValueError, match=r"not finite .* at `bad.kernel`; .* train it again"):
        lora.merge(tree)


def test_a_base_may_hold_infinities_where_nothing_is_merged():
    mask = jnp.array([0.0, -jnp.inf])
    merged = lora.merge({"w": leaf(), "mask": mask})
    np.testing.assert_array_equal(merged["mask"], mask)


def test_overflow_of_a_narrow_base_is_an_error():
    """A finite float32 sum can still be infinite in float16."""
    x = dataclasses.replace(leaf(jnp.float16), scale=jnp.full(3, 1e6))
    with pytest.raises(ValueError, match="not finite"):
        lora.merge({"w": x})


def test_merge_under_jit():
    tree = {"w": leaf()}
    np.testing.assert_allclose(jax.jit(lora.merge)(tree)["w"], lora.merge(tree)["w"], rtol=1e-6)


def test_unmerge_of_another_tree_is_an_error():
    tree = {"w": leaf()}
    with pytest.raises(ValueError, match="different structures, at `"):
        lora.unmerge({"v": tree["w"].w}, tree)
    with pytest.raises(ValueError, match=r"`w` has shape \(2, 2\) in `params`, expected \(3, 8, 6"):
        lora.unmerge({"w": jnp.ones((2, 2))}, tree)


def test_a_tree_without_adapters_is_itself():
    tree = {"w": jnp.ones(3)}
    assert lora.merge(tree)["w"] is tree["w"]
    assert lora.unmerge(tree, tree)["w"] is tree["w"]
