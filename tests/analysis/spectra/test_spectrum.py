"""Spectra of changes whose singular values are known, and of adapters against the dense change."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.analysis import Spectrum, intruder_dimensions, overlap, spectrum
from lora_jax.analysis.spectra import changes
from lora_jax.analysis.spectra.spectrum import MatrixSpectrum

from tests.support.random_arrays import moved

pytestmark = pytest.mark.once


def orthogonal(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def change(values, shape=(9, 14), seed=0):
    """A matrix with these singular values."""
    u, v = orthogonal(shape[0], seed), orthogonal(shape[1], seed + 1)
    k = len(values)
    return (u[:, :k] * np.asarray(values)) @ v[:, :k].T


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers": {"up": {"kernel": jnp.asarray(rng.normal(size=(3, 9, 14)), jnp.float32)}},
        "head": {"kernel": jnp.asarray(rng.normal(size=(14, 6)), jnp.float32),
                 "bias": jnp.zeros(6)},
    }  # fmt: skip


def test_known_values_and_what_follows_from_them():
    before = params()
    sigma = [8.0, 4.0, 2.0, 1.0, 0.5]
    step = np.zeros((3, 9, 14), np.float32)
    step[1] = change(sigma)
    after = {**before, "layers": {"up": {"kernel": before["layers"]["up"]["kernel"] + step}}}
    found = spectrum(before, after, where=("up",))
    assert [m.name for m in found.matrices] == [f"layers.up.kernel[{i}]" for i in range(3)]
    layer = found.matrices[1]
    np.testing.assert_allclose(layer.values[:5], sigma, rtol=1e-5)
    energy = np.square(sigma)
    assert layer.energy_rank(0.9) == int(np.searchsorted(energy.cumsum() / energy.sum(), 0.9)) + 1
    assert layer.energy_rank(0.99) == 4 and layer.energy_rank(1.0) >= 5
    np.testing.assert_allclose(layer.stable_rank, energy.sum() / 64, rtol=1e-5)
    np.testing.assert_allclose(layer.norm, np.sqrt(energy.sum()), rtol=1e-5)
    np.testing.assert_allclose(layer.fall(4), 8, rtol=1e-4)
    np.testing.assert_allclose(
        layer.before, np.linalg.norm(before["layers"]["up"]["kernel"][1]), rtol=1e-5
    )
    np.testing.assert_allclose(layer.energy_share(2), energy[:2].sum() / energy.sum(), rtol=1e-5)
    assert layer.kind == "up" and list(found.by_kind()) == ["up"]
    # The others did not change: nothing is divided by zero.
    still = found.matrices[0]
    assert (still.norm, still.rank, still.energy_rank(0.9), still.fall()) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        layer.energy_rank(0)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapters_values_are_those_of_the_dense_change(dora):
    base = params()

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (x + (x @ w) @ w.T, None), x, p["layers"]["up"]["kernel"])
        return x

    plan = lora.plan(
        lora.LoraConfig(rank=3, alpha=5, use_dora=dora, target_modules=("up",)),
        fn, base, jnp.ones((2, 9)),
    )  # fmt: skip
    adapted = moved(lora.init(jax.random.key(0), plan, base), 1, 0.1)
    alone = spectrum(adapted)
    against = spectrum(base, lora.merge(adapted), where=("up",))
    both = spectrum(base, {**base, **{"layers": adapted["layers"]}}, where="layers.up")
    for mine, dense, mixed in zip(alone.matrices, against.matrices, both.matrices, strict=True):
        k = len(mine.values)
        assert k == (9 if dora else 3)
        np.testing.assert_allclose(mine.values[:3], dense.values[:3], rtol=1e-4)
        np.testing.assert_allclose(mine.values[:3], mixed.values[:3], rtol=1e-4)
        assert mine.rank == (9 if dora else 3) and mine.name == dense.name
        np.testing.assert_allclose(mine.before, dense.before, rtol=1e-6)


def test_table_json_and_plot(tmp_path):
    before = params()
    after = jax.tree.map(lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), before)
    found = spectrum(before, after)
    table = str(found).splitlines()
    assert table[0].split()[:2] == ["matrix", "shape"] and len(table) == 1 + 3 + 1
    assert "head.kernel" in str(found) and "14x6" in str(found)
    rows = json.loads(found.to_json())["matrices"]
    assert [r["name"] for r in rows] == [m.name for m in found.matrices]
    for row, m in zip(rows, found.matrices, strict=True):
        np.testing.assert_allclose(row["values"], m.values)
        assert row["rank_90"] == m.energy_rank(0.9)
    again = Spectrum.from_json(found.to_json())
    assert str(again) == str(found) and again.matrices[1].index == (0,)
    assert rows[0]["sigma_1_over_10"] is None  # the head has six values
    assert "inf" not in str(found) and table[1].split()[-3] == "-"
    found.plot(tmp_path / "fall.png")
    assert (tmp_path / "fall.png").read_bytes().startswith(b"\x89PNG")


def test_intruders_are_directions_that_were_not_there():
    size = 40
    u, v = orthogonal(size, 0), orthogonal(size, 1)
    values = np.linspace(2, 1, size)
    before = {"w": jnp.asarray((u * values) @ v.T, jnp.float32)}
    # A large change along a direction spread evenly over all old ones, and one along an old one.
    new = v @ np.full(size, 1 / np.sqrt(size))
    spread = {"w": before["w"] + 30 * jnp.asarray(np.outer(u[:, 3], new), jnp.float32)}
    along = {"w": before["w"] + 30 * jnp.asarray(np.outer(u[:, 3], v[:, 3]), jnp.float32)}
    assert intruder_dimensions(before, spread, top=1) == {"w": 1}
    assert intruder_dimensions(before, along, top=5) == {"w": 0}
    assert intruder_dimensions(before, before) == {"w": 0}


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_directions_are_those_of_a_decomposition(shape):
    """Also of the smallest values: float64's square keeps half of its sixteen digits."""
    matrix = change([8, 3, 1, 1e-3, 1e-4], shape)
    u, values, vt = np.linalg.svd(matrix)
    for top in (None, 3):
        found = changes.directions(matrix, top)
        k = len(found.values)
        assert k == (5 if top is None else 3)
        np.testing.assert_allclose(found.values, values[:k], rtol=1e-5)
        for mine, want in ((found.inputs, u[:, :k]), (found.outputs, vt[:k].T)):
            np.testing.assert_allclose(np.abs(np.sum(mine * want, axis=0)), 1, atol=1e-5)
    a, b = matrix @ vt[:3].T, vt[:3]
    factors = changes.directions(changes.Factors(a, b))
    np.testing.assert_allclose(factors.values, values[:3], rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(factors.inputs * u[:, :3], axis=0)), 1)
    assert len(changes.directions(np.zeros(shape)).values) == 0
    # Factors of rank 6 with a product of rank 3: rounding is no direction.
    twice = changes.Factors(np.hstack([a, a]), np.vstack([b, b]))
    np.testing.assert_allclose(changes.directions(twice).values, 2 * values[:3], rtol=1e-12)


def test_overlap_of_known_subspaces():
    u, v = orthogonal(12, 0), orthogonal(20, 1)
    before = {"w": {"kernel": jnp.asarray(change([1.0] * 12, (12, 20), seed=5), jnp.float32)}}

    def after(values, rows, columns):
        step = (u[:, rows] * np.asarray(values)) @ v[:, columns].T
        return {"w": {"kernel": before["w"]["kernel"] + jnp.asarray(step, jnp.float32)}}

    # Two of three inputs' directions are the same, and one of the outputs'.
    first = after([4, 3, 2, 1], [0, 1, 2, 3], [0, 1, 2, 3])
    second = after([5, 2, 1], [0, 1, 7], [0, 8, 9])
    (found,) = overlap(before, first, second, top=3)
    assert found.top == 3 and found.name == "w.kernel"
    np.testing.assert_allclose([found.inputs, found.outputs], [2 / 3, 1 / 3], atol=1e-5)
    np.testing.assert_allclose([found.chance_inputs, found.chance_outputs], [3 / 12, 3 / 20])
    np.testing.assert_allclose([found.captured, found.best], [16 / 30, 29 / 30], rtol=1e-5)
    # An adapter is compared by its factors; it is a change of its own as any other.
    plan = lora.plan(
        lora.LoraConfig(rank=2, alpha=3, target_modules=("w",)),
        lambda p, x: x @ p["w"]["kernel"], before, jnp.ones((1, 12)),
    )  # fmt: skip
    trainable, frozen = lora.split(lora.init(jax.random.key(0), plan, before))
    adapted = lora.combine(jax.tree.map(lambda x: x + 0.1 * jnp.cos(x + 1), trainable), frozen)
    (mine,) = overlap(before, first, adapted, top=2)
    (dense,) = overlap(before, first, lora.merge(adapted), top=2)
    # `B` is one row twice: the adapter has one direction.
    assert mine.top == dense.top == 1
    for name in ("inputs", "outputs", "captured", "best"):
        np.testing.assert_allclose(getattr(mine, name), getattr(dense, name), rtol=1e-3)
    (same,) = overlap(before, adapted, adapted, top=2)
    np.testing.assert_allclose([same.inputs, same.outputs, same.captured], 1, rtol=1e-6)
    with pytest.raises(ValueError, match="no matrix was changed by both"):
        overlap(before, first, before)
    with pytest.raises(ValueError, match="`top` must be at least 1, got 0"):
        overlap(before, first, second, top=0)


def test_norms_and_biases_of_a_stack_are_no_matrices():
    before = {**params(), "norm": {"scale": jnp.ones((3, 9))}}
    names = {m.path for m in spectrum(before, before).matrices}
    assert names == {"layers.up.kernel", "head.kernel"}
    assert len(spectrum(before, before, where=("norm",)).matrices) == 1


def test_clear_errors():
    before = params()
    with pytest.raises(ValueError, match=r"`head.kernel` has shape \(14, 6\) before and \(14, 7\)"):
        spectrum(before, {**before, "head": {"kernel": jnp.ones((14, 7)), "bias": jnp.zeros(6)}})
    with pytest.raises(ValueError, match="different structure: only `before` has `layers.up"):
        spectrum(before, {"head": before["head"]})
    with pytest.raises(ValueError, match="only `after` has `more`; pass the same model's"):
        spectrum(before, {**before, "more": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"no matrix to compare matches `where` = \('nose',\)"):
        spectrum(before, before, where=("nose",))
    with pytest.raises(ValueError, match="no matrix to compare"):
        spectrum(before)
    bad = {**before, "head": {**before["head"], "kernel": jnp.full((14, 6), jnp.nan)}}
    with pytest.raises(ValueError, match="`head.kernel`: the change is not finite"):
        spectrum(before, bad)
    with pytest.raises(ValueError, match="`top` must be at least 1"):
        intruder_dimensions(before, before, top=0)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1e-6, 3e7])
def test_an_energy_rank_does_not_turn_on_rounding(value):
    """n equal values: the share k/n is held by k of them, though sums round to just below it."""
    for count in range(1, 25):
        found = MatrixSpectrum("w", (), (24, 24), np.full(count, value), 1.0)
        ranks = [found.energy_rank(k / count) for k in range(1, count + 1)]
        assert ranks == list(range(1, count + 1))
