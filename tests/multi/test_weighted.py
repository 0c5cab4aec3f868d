"""Weighted combinations against the dense sum, and against PEFT's where PEFT's are right."""

from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import multi
from lora_jax.multi.weighted import _JOINS, Method

from tests.support.oracle import oracle

pytestmark = pytest.mark.once
IN, OUT = 10, 8


def base():
    rng = np.random.default_rng(0)
    return {
        "up": {"kernel": jnp.asarray(rng.normal(size=(IN, OUT)), jnp.float32)},
        "layers": {"down": {"kernel": jnp.asarray(rng.normal(size=(2, OUT, OUT)), jnp.float32)}},
    }


def fn(params, x):
    x = x @ params["up"]["kernel"]
    layers = params["layers"]["down"]["kernel"]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]


def make(seed, **config):
    params = base()
    config = {"target_modules": ("up", "down"), "rank": 3, "alpha": 5} | config
    plan = lora.plan(lora.LoraConfig(**config), fn, params, jnp.ones((2, IN)))
    trainable, frozen = lora.split(lora.init(jax.random.key(seed), plan, params))
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return lora.combine(jax.tree.unflatten(tree, moved), frozen)


def changes(tree):
    merged = lora.merge(tree)
    return jax.tree.map(lambda x, y: np.asarray(x - y, np.float64), merged, base())


def weighted(adapters, weights):
    each = [changes(x) for x in adapters]
    return jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *each)


def assert_close(got, want, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), got, want)


def test_cat_is_the_sum_whatever_ranks_alphas_targets_and_scalings():
    adapters = [
        make(1, alpha_pattern={"layers.1.down": 20}),
        make(2, rank=5, alpha=16, use_rslora=True),
        make(3, target_modules=("up",)),
    ]
    weights = [0.7, -0.3, 1.5]
    both = multi.add_weighted_adapter(adapters, weights)
    assert multi.common_rank(both) == 11
    assert_close(changes(both), weighted(adapters, weights))
    exact = multi.add_weighted_adapter(adapters, weights, method="svd", rank=8)
    assert_close(changes(exact), weighted(adapters, weights))  # 8 is all the rank there can be


def test_svd_is_the_best_of_its_rank():
    adapters, weights = [make(1), make(2, rank=4)], [1.0, 0.5]
    got = changes(multi.add_weighted_adapter(adapters, weights, rank=2))
    want = weighted(adapters, weights)

    def best(w):
        u, s, v = np.linalg.svd(w, full_matrices=False)
        return (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]

    assert_close(got, jax.tree.map(best, want))
    assert multi.common_rank(multi.add_weighted_adapter(adapters, weights, method="svd")) == 4


def peft_model(adapters, rslora=False):
    """A torch model of one linear layer with the adapters of `up` in PEFT."""
    import peft
    import torch

    linear: Any = torch.nn.Sequential()
    linear.add_module("up", torch.nn.Linear(IN, OUT, bias=False))
    with torch.no_grad():
        linear.up.weight.copy_(torch.from_numpy(np.asarray(base()["up"]["kernel"]).T.copy()))
    model: Any = None
    for number, tree in enumerate(adapters):
        leaf = tree["up"]["kernel"]
        rank = leaf.rank
        alpha = float(leaf.scale) * (rank**0.5 if rslora else rank)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["up"],
                                 use_rslora=rslora)  # fmt: skip
        if model is None:
            model = peft.get_peft_model(linear, config, adapter_name=f"a{number}")
        else:
            model.add_adapter(f"a{number}", config)
        layer = model.base_model.model.up
        with torch.no_grad():
            layer.lora_A[f"a{number}"].weight.copy_(torch.from_numpy(np.array(leaf.a.T)))
            layer.lora_B[f"a{number}"].weight.copy_(torch.from_numpy(np.array(leaf.b.T)))
    return model


def peft_change(model, weights, kind, **options):
    names = [f"a{number}" for number in range(len(weights))]
    model.add_weighted_adapter(names, weights, "sum", combination_type=kind, **options)
    return model.base_model.model.up.get_delta_weight("sum").detach().numpy().T


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("svd", {"rank": 2}),
        ("linear", {}),
        ("magnitude_prune_svd", {"rank": 3, "density": 0.5}),
        ("ties_svd", {"rank": 3, "density": 0.4}),
        ("ties_svd", {"rank": 3, "density": 0.6, "majority_sign": "frequency"}),
        ("magnitude_prune", {"density": 0.5}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.6, "majority_sign": "frequency"}),
    ],
    ids=str,
)
def test_what_peft_gives(method, options: dict[str, Any]):
    adapters = [make(seed, target_modules=("up",)) for seed in (1, 2, 3)]
    weights = [0.7, 0.3, -0.4] if "ties" not in method else [0.7, 0.3, 0.4]
    got = changes(multi.add_weighted_adapter(adapters, weights, method=method, **options))["up"][
        "kernel"
    ]
    renamed: dict[str, str] = {"rank": "svd_rank", "majority_sign": "majority_sign_method"}
    spelled: dict[str, Any] = {renamed.get(k, k): v for k, v in options.items()}
    leaves = [tree["up"]["kernel"] for tree in adapters]
    factors = [np.asarray(x) for leaf in leaves for x in (leaf.a, leaf.b)]

    def ask():
        change = peft_change(peft_model(adapters), weights, method, **spelled)
        return {"of": factors, "change": change}

    name = "-".join([method, *map(str, options.values())])
    want = oracle(f"multi/weighted/{name}", ask)
    # What was recorded is PEFT's sum of these very adapters.
    assert_close(want["of"], factors, 1e-6)
    np.testing.assert_allclose(got, want["change"], atol=3e-5)


def test_rslora_is_scaled_right_where_peft_is_not():
    adapters = [make(seed, target_modules=("up",), use_rslora=True) for seed in (1, 2)]
    got = changes(multi.add_weighted_adapter(adapters, [0.5, 0.5]))["up"]["kernel"]
    np.testing.assert_allclose(got, weighted(adapters, [0.5, 0.5])["up"]["kernel"], atol=2e-5)


def test_dare_keeps_the_mean_and_the_key_decides():
    adapters = [make(1, target_modules=("up",))]
    want = weighted(adapters, [1.0])["up"]["kernel"]

    def one(seed):
        key = jax.random.key(seed)
        tree = multi.add_weighted_adapter(
            adapters, [1.0], method="dare_linear_svd", rank=OUT, density=0.5, key=key
        )
        return changes(tree)["up"]["kernel"]

    np.testing.assert_array_equal(one(0), one(0))
    kept = np.abs(one(0)) > 1e-4
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(one(0)[kept], 2 * want[kept], atol=1e-4)
    mean = np.mean([one(seed) for seed in range(60)], axis=0)
    # The standard error of 60 draws of an entry that is 0 or twice itself is |entry| / sqrt(60).
    assert (np.abs(mean - want) < 5 * np.abs(want) / np.sqrt(60) + 1e-4).all()
    elected = multi.add_weighted_adapter([*adapters, make(2, target_modules=("up",))], [1.0, 1.0],
                            method="dare_ties", density=0.5, key=jax.random.key(0))  # fmt: skip
    assert np.isfinite(changes(elected)["up"]["kernel"]).all()


def test_a_density_keeps_whole_numbers_rounded_down():
    """As PEFT's `int(density · size)`: of 80 numbers 0.495 are 39."""
    adapter = make(1, target_modules=("up",))
    pruned = multi.add_weighted_adapter(
        [adapter], [1.0], method="magnitude_prune_svd", density=0.495, rank=8
    )
    kept = np.abs(changes(pruned)["up"]["kernel"]) > 1e-5
    assert kept.sum() == 39


def test_dare_of_factors_drops_none_at_density_one_and_other_places_in_both():
    adapters = [make(1), make(2)]
    options: dict[str, Any] = dict(key=jax.random.key(0))
    whole = multi.add_weighted_adapter(adapters, [1, -1], method="dare_linear", **options)
    assert_close(
        changes(whole), changes(multi.add_weighted_adapter(adapters, [1, -1], method="linear"))
    )
    half = multi.add_weighted_adapter(
        adapters[:1], [1.0], method="dare_linear", density=0.5, **options
    )
    was, leaf = adapters[0]["layers"]["down"]["kernel"], half["layers"]["down"]["kernel"]
    every = [np.abs(x) > 0 for factor in (leaf.a, leaf.b) for x in factor]
    assert all(0.2 < kept.mean() < 0.8 for kept in every)
    # In both factors of both layers.
    assert len({kept.tobytes() for kept in every}) == 4
    kept = np.abs(leaf.a) > 0
    root = np.sqrt(was.scale)[:, None, None]
    np.testing.assert_allclose(leaf.a[kept], (2 * root * was.a)[kept], rtol=1e-5)


def test_dare_drops_other_places_in_each_leaf():
    params = {name: {"kernel": jnp.zeros((IN, OUT))} for name in ("one", "two")}
    config = lora.LoraConfig(rank=3, init="random", target_modules=("one", "two"))
    both = lambda p, x: x @ p["one"]["kernel"] + x @ p["two"]["kernel"]  # noqa: E731
    plan = lora.plan(config, both, params, jnp.ones((2, IN)))
    tree = multi.add_weighted_adapter(
        [lora.init(jax.random.key(0), plan, params)], [1.0],
        method="dare_linear_svd", rank=OUT, density=0.5, key=jax.random.key(0),
    )  # fmt: skip
    one, two = (np.abs(x["kernel"]) > 1e-6 for x in lora.merge(tree).values())
    assert 0.3 < one.mean() < 0.7 and 0.2 < (one != two).mean() < 0.8


def test_dare_drops_other_places_in_each_layer():
    options: dict[str, Any] = dict(method="dare_linear_svd", rank=OUT, density=0.5)
    tree = multi.add_weighted_adapter([make(1)], [1.0], key=jax.random.key(0), **options)
    one, two = np.abs(changes(tree)["layers"]["down"]["kernel"]) > 1e-4
    assert 0.3 < one.mean() < 0.7 and 0.2 < (one != two).mean() < 0.8


def test_the_result_exports(tmp_path):
    adapters = [make(1), make(2, rank=2)]
    both = multi.add_weighted_adapter(adapters, [0.5, 0.5])
    rank = multi.common_rank(both)
    config = lora.LoraConfig(rank=rank, alpha=rank, target_modules=("up", "down"))
    lora.hf.save_peft(tmp_path / "sum", both, config)
    back, _ = lora.hf.load_peft(tmp_path / "sum", fn, base(), jnp.ones((2, IN)))
    assert_close(changes(back), weighted(adapters, [0.5, 0.5]))


def test_leaves_of_two_ranks_have_no_common_one():
    with pytest.raises(ValueError, match=r"have ranks \[2, 3\], expected one"):
        multi.common_rank(make(1, rank_pattern={"up": 2}))


@pytest.mark.wrong_types
def test_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match="`method` must be one of cat, svd"):
        multi.add_weighted_adapter([make(1)], [1.0], method=cast(Any, "best"))


def test_clear_errors():
    one, two = make(1), make(2, rank=2)
    with pytest.raises(ValueError, match="got 2 `adapters` and 1 `weights`"):
        multi.add_weighted_adapter([one, two], [1.0])
    with pytest.raises(ValueError, match='method="linear" needs adapters of one rank'):
        multi.add_weighted_adapter([one, two], [1.0, 1.0], method="linear")
    with pytest.raises(ValueError, match='`key` is needed for method="dare_linear"'):
        multi.add_weighted_adapter([one], [1.0], method="dare_linear", density=0.5)
    with pytest.raises(ValueError, match=r"`density` must be in \(0, 1\], got 0"):
        multi.add_weighted_adapter([one], [1.0], method="ties", density=0)
    with pytest.raises(ValueError, match="`up.kernel` has DoRA's magnitude"):
        multi.add_weighted_adapter([make(1, use_dora=True, target_modules=("up",))], [1.0])
    with pytest.raises(ValueError, match="`up.kernel` has an adapter's bias"):
        multi.add_weighted_adapter([make(1, lora_bias=True, target_modules=("up",))], [1.0])
    saved = make(1, modules_to_save=("up",), target_modules=("down",))
    with pytest.raises(ValueError, match="`up.kernel` trains whole in 1 .* has factors in 1"):
        multi.add_weighted_adapter([saved, one], [1.0, 1.0])


def test_the_annotations_name_every_method():
    assert get_args(Method) == tuple(_JOINS)
