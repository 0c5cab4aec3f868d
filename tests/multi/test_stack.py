"""Many adapters in one batch: each row is what it would be alone with its own adapter."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import lora_jax as lora
from lora_jax import multi

from tests.support.random_arrays import moved, normal

DIM, OUT = 12, 7


class Net(nn.Module):
    """A lookup table, a scanned pair of layers, a convolution over the sequence, a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, DIM, name="embed")(tokens)
        x = nn.Conv(DIM, (3,), name="conv")(x)

        def block(module, x, _):
            h = nn.LayerNorm(name="norm")(x)
            return x + nn.Dense(DIM, name="down")(jax.nn.gelu(nn.Dense(24, name="up")(h))), None

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return block(self, x, _)

        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(OUT, name="head")(x)


TOKENS = jnp.arange(20).reshape(5, 4) % 11
NET = Net()
PARAMS = NET.init(jax.random.key(0), TOKENS)

CONFIGS = {
    "plain": lora.LoraConfig(rank=2, target_modules=("up", "down")),
    "more": lora.LoraConfig(rank=4, alpha=3, use_rslora=True, target_modules=("up", "head")),
    "all": lora.LoraConfig(rank=3, target_modules=("embed", "conv", "up", "down", "head")),
    "dora": lora.LoraConfig(rank=3, use_dora=True, target_modules=("embed", "conv", "down")),
    "beside dora": lora.LoraConfig(rank=2, target_modules=("embed", "down")),
    "saved": lora.LoraConfig(rank=1, target_modules=("up",), modules_to_save=("head",),
                             bias="lora_only"),
}  # fmt: skip


def make(name, seed=1):
    plan = lora.plan(CONFIGS[name], NET.apply, PARAMS, TOKENS)
    return moved(lora.init(jax.random.key(seed), plan, PARAMS), seed, 0.3)


# Compiled once for each form of adapter, for all tests.
RUN = jax.jit(lora.lorafy(NET.apply, strict=True))


def alone(adapters, ids):
    """Every row by itself, with its adapter or the plain base."""
    rows = []
    for row, number in enumerate(ids):
        one = TOKENS[row : row + 1]
        rows.append(RUN(PARAMS if number < 0 else adapters[number], one))
    return jnp.concatenate(rows)


@pytest.mark.parametrize("way", ["gathered", "grouped"])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("plain", "more"), marks=pytest.mark.slow, id="plain+more"),
        pytest.param(("dora", "more", "all"), id="dora+more+all"),
    ],
)
def test_each_row_is_what_it_is_alone(names, way):
    adapters = [make(name, seed) for seed, name in enumerate(names, start=1)]
    stacked = lora.stack(adapters)
    assert multi.count(stacked) == len(names)
    # The convolution takes each row's adapter out by itself, all else is sorted by adapter.
    run = jax.jit(lora.lorafy(NET.apply, strict=True, adapter_strategy=way))
    for ids in ([0] * 5, [-1] * 5, [k % (len(names) + 1) - 1 for k in (3, 0, 2, 1, 4)]):
        got = run(stacked, TOKENS, adapter_ids=jnp.array(ids))
        # Only the order of float32 additions differs.
        np.testing.assert_allclose(got, alone(adapters, ids), rtol=2e-5, atol=2e-5)
    assert run._cache_size() == 1
    base = run(stacked, TOKENS, adapter_ids=jnp.full((5,), -1))
    np.testing.assert_allclose(base, RUN(PARAMS, TOKENS), rtol=1e-5, atol=1e-5)


def test_saved_modules_and_biases_go_by_row_too():
    order = [make("saved", 1), make("saved", 3), make("plain", 2)]
    # The head of an adapter that does not train it is the base's.
    stacked = lora.stack(order, slots=4)
    ids = [2, 0, -1, 1, 3]
    got = RUN(stacked, TOKENS, adapter_ids=jnp.array(ids))
    expected = alone(order, [2, 0, -1, 1, -1])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_chosen_rows_run_again_without_ids():
    adapters = [make("all", 1), make("dora", 2)]
    stacked = lora.stack(adapters)
    ids = jnp.array([1, 0, -1, 1, 0])
    chosen = lora.select(stacked, ids)
    got = RUN(stacked, TOKENS, adapter_ids=ids)
    np.testing.assert_allclose(RUN(chosen, TOKENS), got, rtol=2e-5, atol=2e-5)


def test_arguments_and_outputs_that_number_their_rows_elsewhere():
    w = normal(0, 4, 3)
    params = {"w": w}

    def fn(params, x, *, offset, flip):
        y = jnp.einsum("tbi,io->tbo", x, params["w"]) + offset
        return {"y": -y if flip else y, "mean": y.mean(), "offset": offset * 2, "name": "fn"}

    x = normal(1, 5, 6, 4)  # rows on axis 1
    plan = lora.plan(lora.LoraConfig(rank=2, target_modules=("w",)), fn, params, x, offset=1.0,
                     flip=True)  # fmt: skip
    adapters = [moved(lora.init(jax.random.key(k), plan, params), k, 0.3) for k in range(2)]
    stacked, ids = lora.stack(adapters), jnp.array([0, 1, 1, -1, 0, 1])
    run = lora.lorafy(
        fn,
        row_axes=((1,), {"offset": None, "flip": None}),
        out_axes={"y": 1, "mean": 0, "offset": None, "name": None},
    )
    out = run(stacked, x, offset=jnp.float32(0.5), flip=True, adapter_ids=ids)
    assert out["y"].shape == (5, 6, 3) and out["mean"].shape == (6,) and out["name"] == "fn"
    assert out["offset"] == 1.0
    for row, number in enumerate(ids.tolist()):
        tree = params if number < 0 else adapters[number]
        one = lora.lorafy(fn)(tree, x[:, row : row + 1], offset=0.5, flip=True)
        np.testing.assert_allclose(out["y"][:, row : row + 1], one["y"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out["mean"][row], one["mean"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"row_axes": (0,)}, ValueError, r"`row_axes` must be a prefix of `\(args, kwargs\)`, got"),
        ({"row_axes": "0"}, TypeError, "`row_axes` must hold integers or None, got `str` '0'"),
        ({"row_axes": True}, TypeError, "`row_axes` must hold integers or None, got `bool` True"),
        ({"row_axes": -4}, ValueError, "have that many along axis -4; pass `row_axes`"),
        ({"out_axes": {"y": 0}}, ValueError, "`out_axes` must be a prefix of the output, got"),
        ({"out_axes": 0.5}, TypeError, "`out_axes` must hold integers or None, got `float` 0.5"),
        ({"out_axes": -4}, ValueError, "no axis of size 1 at -4: set `out_axes`"),
    ],
)
def test_wrong_axes_of_rows_are_errors(fields, error, text):
    stacked = lora.stack([make("all", 1), make("all", 2)])
    with pytest.raises(error, match=text):
        lora.lorafy(NET.apply, **fields)(stacked, TOKENS, adapter_ids=jnp.zeros(5, int))


def test_experts_each_row_its_own():
    def fn(params, x):
        up = jnp.einsum("btd,edf->btef", x, params["up"])
        return jnp.einsum("btef,efd->btd", jax.nn.relu(up), params["down"])

    shapes = {"up": (3, 4, 6), "down": (3, 6, 4)}
    params = {n: normal(k, *s) for k, (n, s) in enumerate(shapes.items())}
    x = normal(2, 4, 5, 4)
    config = lora.LoraConfig(rank=2, target_modules=("up", "down"), roles={"down": "sio"})
    plan = lora.plan(config, fn, params, x)
    adapters = [moved(lora.init(jax.random.key(k), plan, params), k, 0.3) for k in range(3)]
    ids = [2, -1, 0, 1]
    got = lora.lorafy(fn)(lora.stack(adapters), x, adapter_ids=jnp.array(ids))
    for row, number in enumerate(ids):
        tree = params if number < 0 else adapters[number]
        one = lora.lorafy(fn)(tree, x[row : row + 1])
        np.testing.assert_allclose(got[row : row + 1], one, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["all", pytest.param("dora", marks=pytest.mark.slow)])
def test_training_moves_each_rows_own_adapter_only(name):
    adapters = [make(name, k) for k in range(3)]
    stacked = lora.stack(adapters, train=True)
    trainable, frozen = lora.split(stacked)
    targets = normal(9, 5, 4, OUT)
    ids = jnp.array([0, 2, 0, -1, 2])

    def loss(trainable, ids):
        y = lora.lorafy(NET.apply)(lora.combine(trainable, frozen), TOKENS, adapter_ids=ids)
        return jnp.sum((y - targets) ** 2)

    grads = jax.jit(jax.grad(loss))(trainable, ids)

    def own(number):
        """The gradient of adapter `number` by itself on its own rows."""
        part, rest = lora.split(adapters[number])
        rows = jnp.flatnonzero(ids == number)

        def loss(part):
            y = lora.lorafy(NET.apply)(lora.combine(part, rest), TOKENS[rows])
            return jnp.sum((y - targets[rows]) ** 2)

        return jax.jit(jax.grad(loss))(part)

    def check(got, want):
        # The gradients reach 1e5, and the order of their sums is another: by the largest.
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5 * float(jnp.abs(want).max()))

    whole = lora.combine(grads, frozen)
    for number in (0, 2):
        jax.tree.map(check, lora.split(multi.adapter(whole, number))[0], own(number))
    untouched = lora.split(multi.adapter(whole, 1))[0]
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(untouched))

    tx = lora.masked(optax.adam(1e-2))
    state = tx.init(stacked)
    sizes = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * sizes


def test_gradients_by_finite_differences():
    adapters = [make("plain", 1), make("more", 2)]
    trainable, frozen = lora.split(lora.stack(adapters, train=True))

    def loss(trainable):
        lp = lora.combine(trainable, frozen)
        y = lora.lorafy(NET.apply)(lp, TOKENS[:3], adapter_ids=jnp.array([1, 0, 1]))
        return jnp.mean(jnp.sin(y))

    check_grads(jax.jit(loss), (trainable,), order=1, modes=("rev",), atol=2e-2, rtol=2e-2)


def test_dropout_differs_by_row_and_is_off_without_a_key():
    config = lora.LoraConfig(rank=2, target_modules=("w",), dropout=0.5)
    params = {"w": jnp.eye(16)}
    x = jnp.ones((2, 3, 16))

    def fn(p, x):
        return x @ p["w"]

    adapter = lora.init(jax.random.key(0), lora.plan(config, fn, params, x), params)
    adapter = moved(adapter, 1, 0.3)
    stacked, ids = lora.stack([adapter], train=True), jnp.zeros((2,), int)
    run = lora.lorafy(fn)
    plain = run(stacked, x, adapter_ids=ids)
    np.testing.assert_array_equal(plain[0], plain[1])
    noisy_rows = run(stacked, x, adapter_ids=ids, lora_key=jax.random.key(3))
    assert not np.allclose(noisy_rows[0], noisy_rows[1])
    again = run(stacked, x, adapter_ids=ids, lora_key=jax.random.key(3))
    np.testing.assert_array_equal(noisy_rows, again)
    served = run(lora.stack([adapter]), x, adapter_ids=ids, lora_key=jax.random.key(3))
    np.testing.assert_array_equal(served, plain)  # it is not trained


def test_a_slot_is_replaced_without_compiling():
    first, second = make("plain", 1), make("more", 2)
    stacked = lora.stack([first, make("all", 3)], slots=3, rank=4)
    ids = jnp.array([0, 1, 2, 0, -1])
    RUN(stacked, TOKENS, adapter_ids=ids)
    compiled = RUN._cache_size()
    swapped = lora.replace(stacked, 0, second)
    got = RUN(swapped, TOKENS, adapter_ids=ids)
    assert RUN._cache_size() == compiled
    expected = alone([second, make("all", 3)], [0, 1, -1, 0, -1])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    emptied = lora.replace(swapped, 0, PARAMS)
    np.testing.assert_allclose(
        RUN(emptied, TOKENS, adapter_ids=ids)[0], RUN(PARAMS, TOKENS[:1])[0], atol=2e-5
    )


@pytest.mark.parametrize("how", ["stacked", "replaced"])
def test_a_plain_adapter_beside_dora_ones_is_what_it_is_alone(how):
    dora, plain = make("dora", 1), make("beside dora", 2)
    if how == "stacked":
        stacked = lora.stack([dora, plain])
    else:
        # The slot held a DoRA adapter: its gains must not stay, nor become 0.
        stacked = lora.replace(lora.stack([dora, dora]), 1, plain)
    ids = jnp.array([1, 0, 1, -1, 0])
    got = RUN(stacked, TOKENS, adapter_ids=ids)
    expected = alone([dora, plain], ids.tolist())
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    emptied = lora.replace(stacked, 0, PARAMS)
    np.testing.assert_allclose(
        RUN(emptied, TOKENS, adapter_ids=ids)[1], RUN(PARAMS, TOKENS[1:2])[0], atol=2e-5
    )


def test_gains_have_the_precision_of_their_magnitudes():
    with jax.enable_x64(True):
        params = {"w": jnp.linspace(-1.0, 2.0, 24, dtype=jnp.float64).reshape(6, 4)}
        config = lora.LoraConfig(rank=2, use_dora=True, target_modules=("w",))
        plan = lora.plan(config, lambda p, x: x @ p["w"], params, jnp.ones((2, 6)))
        adapter = lora.init(jax.random.key(0), plan, params)["w"]
        adapter = dataclasses.replace(adapter, m=adapter.m / 3)
        gains = lora.stack([{"w": adapter}])["w"].gain
        assert gains.dtype == jnp.float64
        # B is 0: the norm is that which `m` was before.
        np.testing.assert_allclose(gains, 1 / 3, rtol=1e-14)  # some roundings of float64


def test_taking_an_adapter_out_again_gives_its_numbers():
    adapters = [make("plain", 1), make("more", 2), make("all", 3)]
    stacked = lora.stack(adapters)
    for number, adapter in enumerate(adapters):
        out = multi.adapter(stacked, number)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            lora.merge(out), lora.merge(adapter),
        )  # fmt: skip


def test_a_stack_is_as_wide_as_its_widest_adapter():
    wide = make("plain", 1)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.split(make("plain", 2))[0])
    narrow = lora.combine(narrow, lora.split(wide)[1])
    out = multi.adapter(lora.stack([narrow, wide]), 1)
    jax.tree.map(np.testing.assert_array_equal, lora.split(out)[0], lora.split(wide)[0])


def test_layers_that_do_not_train_have_the_bases_values_in_a_stack():
    w = jnp.arange(12.0).reshape(3, 2, 2)
    saved = lora.SavedArray(w, w + 100, only=((1,),))
    stacked = lora.stack([{"w": saved}])
    got = multi.adapter(stacked, 0)["w"].value
    np.testing.assert_array_equal(got, w.at[1].add(100))


def with_nan(lora_params):
    """An adapter whose last trained array holds NaN, as after a diverged run."""
    trainable, frozen = lora.split(lora_params)
    *arrays, last = jax.tree.leaves(trainable)
    damaged = [*arrays, last.at[(0,) * last.ndim].set(jnp.nan)]
    return lora.combine(jax.tree.unflatten(jax.tree.structure(trainable), damaged), frozen)


@pytest.mark.parametrize("kind", ["plain", "saved", "dora"])
def test_a_damaged_adapter_enters_no_stack(kind):
    good, bad = make(kind, 1), with_nan(make(kind, 2))
    with pytest.raises(ValueError, match="adapter 1 holds NaN or infinity in `.*` of `.*kernel"):
        lora.stack([good, bad])
    with pytest.raises(ValueError, match="the adapter holds NaN or infinity in `.*` of `"):
        lora.replace(lora.stack([good, good]), 1, bad)


def test_a_damaged_neighbour_does_not_reach_other_rows():
    good = make("plain", 1)
    bad = with_nan(make("plain", 2))
    # Traced, because `stack` refuses adapters that it sees are damaged.
    stacked = jax.jit(lambda *adapters: lora.stack(adapters))(bad, good)
    got = RUN(stacked, TOKENS, adapter_ids=jnp.array([0, 1, -1, 1, -1]))
    assert np.isnan(got[0]).all() and np.isfinite(got[1:]).all()


@pytest.mark.wrong_types
def test_clear_errors():
    one, other = make("plain", 1), make("more", 2)
    stacked = lora.stack([one, other])
    run = lora.lorafy(NET.apply)
    for join in (lora.stack, lambda tree: lora.multi.add_weighted_adapter(tree, [1.0])):
        with pytest.raises(
            TypeError, match=r"`adapters` must be a list of trees, got `dict`: pass"
        ):
            join(one)
    with pytest.raises(ValueError, match=r"`adapter_ids` has \[2\], but the stack has adapters"):
        run(stacked, TOKENS, adapter_ids=jnp.array([0, 2, 1, 0, 0]))
    with pytest.raises(ValueError, match="has 2 rows, but an argument of shape"):
        run(stacked, TOKENS, adapter_ids=jnp.array([0, 1]))
    with pytest.raises(ValueError, match="pass `adapter_ids`"):
        run(stacked, TOKENS)
    with pytest.raises(ValueError, match="`adapter_ids` is given, and the parameters hold no stac"):
        run(one, TOKENS, adapter_ids=jnp.array([0, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="merge one of them"):
        lora.merge(stacked)
    with pytest.raises(ValueError, match="`rank` is 1, but an adapter has rank 2"):
        lora.stack([one], rank=1)
    with pytest.raises(ValueError, match=r"`adapters\[1\]` has no LoRA leaf: .* adapter id -1"):
        lora.stack([one, lora.unmerge(lora.merge(other), other)])
    with pytest.raises(ValueError, match="`slots` is 1"):
        lora.stack([one, other], slots=1)
    with pytest.raises(ValueError, match="make the stack with a larger `rank`"):
        lora.replace(lora.stack([make("all", 1)]), 0, other)
    with pytest.raises(ValueError, match="which has no room for it"):
        lora.replace(lora.stack([one]), 0, make("all", 3))
    with pytest.raises(ValueError, match="slots 0 to 1"):
        lora.replace(stacked, 2, one)
    with pytest.raises(ValueError, match="`index` is 2, but the stack has slots 0 to 1"):
        lora.multi.adapter(stacked, 2)
    elsewhere = jax.tree.map(lambda x: x + 1, PARAMS)
    plan = lora.plan(CONFIGS["plain"], NET.apply, elsewhere, TOKENS)
    with pytest.raises(ValueError, match="the bases of adapter 0 and of adapter 1 differ"):
        lora.stack([one, lora.init(jax.random.key(0), plan, elsewhere)])
    with pytest.raises(ValueError, match="trains whole in one adapter"):
        lora.stack([make("saved", 1), make("all", 2)])
    dropped = jax.tree.map(
        lambda x: dataclasses.replace(x, dropout=0.5) if lora.is_lora(x) else x,
        one, is_leaf=lora.is_lora,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"adapters have dropout \[0.0, 0.5\]"):
        lora.stack([one, dropped], train=True)
    got = RUN(stacked, TOKENS, adapter_ids=jnp.array([0, 1, 7, -2, -1]))
    assert np.isfinite(got[jnp.array([0, 1, 4])]).all() and np.isnan(got[2:4]).all()


def test_adapters_on_other_devices_are_refused():
    base, x = {"w": jnp.ones((8, 8))}, jnp.ones((2, 8))
    plan = lora.plan(lora.LoraConfig(target_modules=("w",)), lambda p, x: x @ p["w"], base, x)
    adapters = [
        lora.init(jax.random.key(0), plan, jax.device_put(base, device))
        for device in jax.devices()[:2]
    ]
    with pytest.raises(ValueError, match="`w`: the adapters lie on different devices, .*place"):
        lora.stack(adapters)
