"""`rebase`: an adapter whose start changed the base, over the base as it was."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

from tests.support.oracle import seeded

pytestmark = pytest.mark.once


def model(params, x):
    return jnp.tanh(jnp.einsum("bi,iho->bho", x, params["up"])).sum(1) @ params["down"].T


def layers(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["up"])[0]


CASES: dict[str, tuple[Any, dict, dict]] = {
    "pissa": (model, {"up": (6, 2, 8), "down": (7, 8)}, dict(init="pissa")),
    "olora": (model, {"up": (6, 2, 8), "down": (7, 8)}, dict(init="olora", use_rslora=True)),
    "with DoRA": (model, {"up": (6, 2, 8), "down": (7, 8)}, dict(init="pissa", use_dora=True)),
    "layers": (
        layers,
        {"layers": {"up": (3, 6, 6)}},
        dict(init="pissa", rank_pattern={"layers.1.up": 2}, alpha_pattern={"layers.2.up": 3}),
    ),
}  # fmt: skip


def trained(case, dtype="float32"):
    """The base, an adapter whose factors have moved since its start, the config and an input."""
    fn, shapes, options = CASES[case]
    params = jax.tree.map(
        lambda shape: jnp.asarray(seeded(str(shape), shape), dtype),
        shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    config = lora.LoraConfig(rank=3, alpha=6, **options)
    x = jnp.asarray(seeded("x", (4, 6)), dtype)
    tree = lora.init(jax.random.key(0), lora.plan(config, fn, params, x), params)
    moving, frozen = lora.split(tree)
    # Zeros stay zeros: they fill a layer's factors up to the rank of the others.
    moving = jax.tree.map(lambda v: v + 0.1 * v * seeded("step", v.shape), moving)
    return fn, params, lora.combine(moving, frozen), config, x


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_model_over_the_base_that_was(case):
    fn, params, tree, config, x = trained(case)
    plain, found = lora.rebase(tree, params, config)
    for leaf, w in zip(jax.tree.leaves(plain, is_leaf=lora.is_lora), jax.tree.leaves(params),
                       strict=True):  # fmt: skip
        assert leaf.w is w and leaf.rank == 6
    want = lora.lorafy(fn)(tree, x)
    moved = float(jnp.abs(fn(params, x) - want).max())
    np.testing.assert_allclose(lora.lorafy(fn)(plain, x), want, atol=1e-4 * moved)
    assert (found.init, found.rank) == ("default", 6)
    # A plan of the new config makes such leaves, with these scales.
    again = lora.init(jax.random.key(1), lora.plan(found, fn, params, x), params)
    for ours, theirs in zip(jax.tree.leaves(plain, is_leaf=lora.is_lora),
                            jax.tree.leaves(again, is_leaf=lora.is_lora), strict=True):  # fmt: skip
        np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-6)
        assert (ours.a.shape, ours.b.shape) == (theirs.a.shape, theirs.b.shape)


@pytest.mark.parametrize("case", ["pissa", "layers"])
def test_its_file_is_read_without_the_start(tmp_path, case):
    fn, params, tree, config, x = trained(case)
    plain, found = lora.rebase(tree, params, config)
    lora.hf.save_peft(tmp_path / "plain", plain, found)
    assert (
        json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["init_lora_weights"]
        is True
    )
    back, _ = lora.hf.load_peft(tmp_path / "plain", fn, params, x)
    want = lora.lorafy(fn)(tree, x)
    np.testing.assert_allclose(
        lora.lorafy(fn)(back, x), want, atol=1e-4 * float(jnp.abs(want).max())
    )


def test_it_stacks_beside_an_adapter_of_the_base():
    fn, params, tree, config, x = trained("pissa")
    other = dataclasses.replace(config, init="default", rank=6)
    beside = lora.init(jax.random.key(3), lora.plan(other, fn, params, x), params)
    with pytest.raises(ValueError, match="lora.rebase"):
        lora.stack([tree, beside])
    stacked = lora.stack([lora.rebase(tree, params, config)[0], beside])
    got = lora.lorafy(fn)(stacked, x, adapter_ids=jnp.array([0, 0, 1, -1]))
    np.testing.assert_allclose(got[:2], lora.lorafy(fn)(tree, x)[:2], rtol=1e-4)
    np.testing.assert_allclose(got[3], fn(params, x)[3], rtol=1e-5)


def test_what_is_no_such_base_is_refused():
    _, params, tree, config, _ = trained("pissa")
    other = jax.tree.map(lambda w: w + 0.1 * jnp.eye(*w.shape[:2])[..., None][..., : w.shape[-1]]
                         if w.ndim == 3 else w + jnp.eye(*w.shape), params)  # fmt: skip
    with pytest.raises(ValueError, match="more than a matrix of rank 3"):
        lora.rebase(tree, other, config)
    with pytest.raises(ValueError, match="loftq"):
        lora.rebase(tree, params, dataclasses.replace(config, init="loftq"))
    with pytest.raises(ValueError, match="1 leaves"):
        lora.rebase(tree, {"up": params["up"]}, config)


def test_bfloat16_is_off_by_its_rounding():
    fn, params, tree, config, x = trained("pissa", "bfloat16")
    plain, _ = lora.rebase(tree, params, config)
    want = lora.lorafy(fn)(tree, x).astype("float32")
    got = lora.lorafy(fn)(plain, x).astype("float32")
    # 2^-8 a number, summed over 6 and 16 of them.
    np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))
