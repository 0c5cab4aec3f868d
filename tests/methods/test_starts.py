"""Starts: the weight is the one given, and the factors have the spread that PEFT gives them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

pytestmark = pytest.mark.once

RANK = 8
W = jax.random.normal(jax.random.key(0), (96, 80))


def start(name, **options):
    config = lora.LoraConfig(
        rank=RANK, alpha=24, target_modules=("w",), init=name, use_rslora=True, **options
    )
    plan = lora.plan(config, lambda p, x: x @ p["w"], {"w": W}, jnp.ones((1, 96)))
    return lora.init(jax.random.key(1), plan, {"w": W})["w"]


@pytest.mark.parametrize("name", ["olora", "pissa"])
def test_a_start_that_changes_the_base_takes_out_what_it_puts_in(name):
    leaf = start(name)
    assert float(leaf.scale) == pytest.approx(24 / RANK**0.5)  # neither 1 nor 1/r
    assert np.abs(leaf.w - W).max() > 0.1
    np.testing.assert_allclose(leaf.w + leaf.scale * leaf.a @ leaf.b, W, atol=2e-5)


@pytest.mark.parametrize("name, dtype", [("olora", "bfloat16"), ("pissa", "float8_e4m3fn")])
def test_a_base_that_a_start_changes_keeps_its_dtype(name, dtype):
    base = {"w": W.astype(dtype)}
    config = lora.LoraConfig(rank=RANK, target_modules=("w",), init=name)
    plan = lora.plan(config, lambda p, x: x @ p["w"], base, jnp.ones((1, 96), dtype))
    leaf = lora.init(jax.random.key(1), plan, base)["w"]
    assert leaf.w.dtype == dtype and leaf.a.dtype == jnp.float32


@pytest.mark.parametrize("name", ["default", "gaussian", "random", "orthogonal", "pissa", "olora"])
def test_factors_of_a_double_base_are_double(name):
    with jax.enable_x64(True):
        base = {"w": jnp.asarray(W, jnp.float64)}
        config = lora.LoraConfig(rank=RANK, target_modules=("w",), init=name)
        plan = lora.plan(config, lambda p, x: x @ p["w"], base, jnp.ones((1, 96), jnp.float64))
        leaf = lora.init(jax.random.key(1), plan, base)["w"]
        assert leaf.a.dtype == leaf.b.dtype == leaf.w.dtype == jnp.float64


@pytest.mark.parametrize("name", ["olora", "pissa"])
def test_a_quantized_base_is_not_changed(name):
    base = lora.quantize({"w": W}, ["w"], block_size=32)
    config = lora.LoraConfig(rank=RANK, target_modules=("w",), init=name)
    plan = lora.plan(config, lambda p, x: x @ p["w"], base, jnp.ones((1, 96)))
    with pytest.raises(ValueError, match="`w` is quantized, and this `init` changes the base"):
        lora.init(jax.random.key(1), plan, base)


def test_oloras_base_lacks_the_scaled_product():
    """PEFT: `W ← W − scaling · B·A`, with A and B from the QR decomposition as they are."""
    leaf = start("olora")
    q, r = np.linalg.qr(np.asarray(W).T)
    np.testing.assert_allclose(np.abs(leaf.b), np.abs(q[:, :RANK].T), atol=2e-5)
    taken = leaf.scale * (q[:, :RANK] @ r[:RANK]).T
    np.testing.assert_allclose(leaf.w, W - taken, atol=5e-5)


@pytest.mark.parametrize(
    "name, part, spread",
    [
        ("gaussian", "a", 1 / RANK),  # a standard deviation
        ("default", "a", 1 / (3 * 96) ** 0.5),  # of U(±1/√fan_in)
        ("random", "a", 1 / (3 * 96) ** 0.5),
        ("random", "b", 1 / (3 * RANK) ** 0.5),
    ],
)
def test_the_spread_of_a_start(name, part, spread):
    values = np.asarray(getattr(start(name), part))
    # 640 to 768 numbers: the deviation is known to 3 %; a wrong power of r or fan_in is far off.
    assert np.std(values) == pytest.approx(spread, rel=0.12)
    assert abs(np.mean(values)) < 0.2 * spread
    if name != "random":
        np.testing.assert_array_equal(start(name).b, 0)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora", "orthogonal"])
def test_a_table_starts_with_a_of_zeros(init):
    """As PEFT's embeddings: A is looked up, and B is drawn."""
    config = lora.LoraConfig(rank=RANK, target_modules=("w",), init=init)
    plan = lora.plan(config, lambda p, i: p["w"][i], {"w": W}, jnp.zeros(2, int))
    leaf = lora.init(jax.random.key(1), plan, {"w": W})["w"]
    np.testing.assert_array_equal(leaf.a, 0)
    np.testing.assert_array_equal(leaf.w, W)
    assert np.std(leaf.b) == pytest.approx(1, rel=0.12)


def test_tables_of_scanned_layers_have_their_own_ranks():
    """What fills up a smaller rank is zero in both factors: it never trains."""
    params = {"layers": {"table": {"embedding": jnp.ones((2, 9, 6))}}}
    config = lora.LoraConfig(
        rank=4, target_modules=("table",), roles={"layers.table.embedding": "sio"},
        rank_pattern={"layers.1.table": 2},
    )  # fmt: skip

    def fn(p, i):
        tables = p["layers"]["table"]["embedding"]
        return jax.lax.scan(lambda c, w: (c + w[i], None), jnp.zeros((2, 6)), tables)

    plan = lora.plan(config, fn, params, jnp.zeros(2, int))
    leaf = lora.init(jax.random.key(0), plan, params)["layers"]["table"]["embedding"]
    assert (leaf.b[0] != 0).all() and (leaf.b[1, :2] != 0).all()
    np.testing.assert_array_equal(leaf.b[1, 2:], 0)
    np.testing.assert_array_equal(leaf.a, 0)


def test_the_spread_of_each_layers_own_rank():
    """With ranks by pattern, a layer's deviation is one over its own rank."""
    params = {"layers": {"proj": {"kernel": jnp.ones((2, 512, 16))}}}
    config = lora.LoraConfig(
        rank=2,
        target_modules=("proj",),
        init="gaussian",
        roles={"layers.proj.kernel": "sio"},
        rank_pattern={"layers.1.proj": 8},
    )

    def fn(p, x):
        w = p["layers"]["proj"]["kernel"]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    plan = lora.plan(config, fn, params, jnp.ones((1, 512)))
    a = lora.init(jax.random.key(0), plan, params)["layers"]["proj"]["kernel"].a
    assert np.std(a[0, :, :2]) == pytest.approx(1 / 2, rel=0.1)
    np.testing.assert_array_equal(a[0, :, 2:], 0)  # padding, which must stay zero
    plan = lora.plan(dataclasses.replace(config, init="random"), fn, params, jnp.ones((1, 512)))
    leaf = lora.init(jax.random.key(0), plan, params)["layers"]["proj"]["kernel"]
    np.testing.assert_array_equal(leaf.a[0, :, 2:], 0)
    np.testing.assert_array_equal(leaf.b[0, 2:], 0)
    assert (leaf.b[1] != 0).all()
    assert np.std(a[1]) == pytest.approx(1 / 8, rel=0.1)


def stacked_and_apart(init):
    """Three layers of the ranks 4, 2 and 0: as one leaf, and each of its own."""
    w = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    ranks = {"1.proj": 2}
    config = lora.LoraConfig(
        rank=4, alpha=6, target_modules=("proj",), init=init, rank_pattern=ranks,
        layers_to_transform=(0, 1),
    )  # fmt: skip
    stack = {"model": {"layers": {"proj": {"kernel": jnp.asarray(w)}}}}
    each = {f"{i}": {"proj": {"kernel": jnp.asarray(w[i])}} for i in range(3)}
    apart = {"model": {"layers": each}}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["model"]["layers"]["proj"]["kernel"])

    def one(p, x):
        return [x @ p["model"]["layers"][f"{i}"]["proj"]["kernel"] for i in range(3)]

    return [
        lora.init(jax.random.key(0), lora.plan(config, f, params, jnp.ones((1, 8))), params)
        for f, params in ((fn, stack), (one, apart))
    ]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_decomposition_has_each_layers_own_rank(init):
    stacked, apart = stacked_and_apart(init)
    leaf = stacked["model"]["layers"]["proj"]["kernel"]
    for i, rank in enumerate((4, 2)):
        own = apart["model"]["layers"][f"{i}"]["proj"]["kernel"]
        # Two programs for the decomposition round differently.
        np.testing.assert_allclose(leaf.w[i], own.w, atol=2e-5)
        np.testing.assert_allclose(leaf.a[i, :, :rank], own.a, atol=2e-5)
        np.testing.assert_array_equal(leaf.a[i, :, rank:], 0)
        np.testing.assert_array_equal(leaf.b[i, rank:], 0)
    np.testing.assert_array_equal(leaf.w[2], apart["model"]["layers"]["2"]["proj"]["kernel"])
    np.testing.assert_array_equal(leaf.a[2], 0)


def test_the_orthogonal_start_needs_one_rank_for_the_whole_stack():
    params = {"layers": {"proj": {"kernel": jnp.ones((2, 8, 8))}}}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"]["proj"]["kernel"])  # noqa: E731
    ranks = {"layers.1.proj": 2}
    config = lora.LoraConfig(
        rank=4, target_modules=("proj",), init="orthogonal", rank_pattern=ranks
    )
    plan = lora.plan(config, fn, params, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match=r"needs one rank for the whole stack .* got ranks \[2, 4"):
        lora.init(jax.random.key(0), plan, params)


@pytest.mark.parametrize("alpha", [2, 6])
def test_pissa_takes_the_best_change_of_its_rank_out_whatever_the_scale(alpha):
    w = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    config = lora.LoraConfig(rank=2, alpha=alpha, init="pissa", target_modules=("w",))
    fn = lambda p, x: x @ p["w"]["kernel"]  # noqa: E731
    params = {"w": {"kernel": jnp.asarray(w)}}
    plan = lora.plan(config, fn, params, jnp.ones((1, 7)))
    leaf = lora.init(jax.random.key(0), plan, params)["w"]["kernel"]
    u, s, vt = np.linalg.svd(w)
    np.testing.assert_allclose(w - leaf.w, u[:, :2] * s[:2] @ vt[:2], atol=1e-5)


def test_uniform_starts_fill_their_bounds():
    leaf = start("random")
    # Drawn apart: of one key they would begin alike. 640 numbers are alike by 0.04.
    a, b = (np.asarray(x).reshape(-1)[:640] for x in (leaf.a, leaf.b))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.2
    # Of 640 uniform numbers the largest is within 5 % of the bound; 96 is not 80.
    plain = start("default")
    for factor, bound in ((leaf.a, 96**-0.5), (leaf.b, RANK**-0.5), (plain.a, 96**-0.5)):
        assert 0.95 * bound < float(jnp.abs(factor).max()) <= bound


def test_the_orthogonal_start_needs_an_even_rank():
    ranks = {"w": 3}
    config = lora.LoraConfig(rank=4, target_modules=("w",), init="orthogonal", rank_pattern=ranks)
    plan = lora.plan(config, lambda p, x: x @ p["w"], {"w": W}, jnp.ones((1, 96)))
    with pytest.raises(ValueError, match='init="orthogonal" needs an even rank, got 3 for `w`'):
        lora.init(jax.random.key(1), plan, {"w": W})


def test_the_orthogonal_start_has_two_factors_whose_product_is_zero():
    leaf = start("orthogonal")
    np.testing.assert_allclose(leaf.a @ leaf.b, np.zeros((96, 80)), atol=1e-6)
    # Half of the rank each, drawn apart.
    assert np.linalg.matrix_rank(np.hstack([leaf.a[:80], leaf.b.T]), tol=1e-4) == RANK
    # Normal numbers times half of an orthogonal matrix, and PEFT's 1/10.
    for factor in (leaf.a, leaf.b):
        np.testing.assert_allclose(float(jnp.std(factor)), 0.5**0.5 / 10, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_float64_of_numpy_is_what_jax_makes_of_it(options):
    rng = np.random.default_rng(0)
    params, x = {"up": rng.normal(size=(8, 6))}, np.ones((2, 8), np.float32)
    model = lora.lorafy(lambda p, x: x @ p["up"])
    config = lora.LoraConfig(rank=2, target_modules=("up",), **options)
    # Warnings, such as JAX's of a dtype that it does not have, are errors.
    tree = lora.init(jax.random.key(0), lora.plan(config, model, params, x), params)
    assert tree["up"].a.dtype == np.float32
    np.testing.assert_allclose(model(tree, x), x @ params["up"], atol=1e-5)  # float32
    merged = lora.merge(tree)
    np.testing.assert_allclose(merged["up"], params["up"], atol=1e-6)
    np.testing.assert_allclose(lora.unmerge(merged, tree)["up"], tree["up"].w, atol=1e-6)
