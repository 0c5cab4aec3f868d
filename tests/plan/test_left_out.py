"""What a config names and a plan leaves out is never silent; masks; stopped gradients."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.plan.decide import LeftOutWarning

from tests.support.random_arrays import normal

X = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
TRIANGLE = jnp.tril(jnp.ones((8, 8)))
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ALL = ("all-linear", ".*", ("w", "up"))


def two(form):
    """A model of two weights, the first of them used in `form(w, x)`."""
    return lambda p, x: form(p["w"], x) @ p["up"]


def planned(fn, params, targets: str | tuple[str, ...] = "all-linear", **options):
    config = lora.LoraConfig(rank=2, target_modules=targets, roles=options.pop("roles", {}))
    return lora.plan(config, fn, params, X, **options)


def merged_is_met(fn, params, plan, tolerance=2e-5):
    """Whether the adapted model computes what the merged one does."""
    tree = lora.init(jax.random.key(0), plan, params)
    trained, frozen = lora.split(tree)
    leaves, structure = jax.tree.flatten(trained)
    leaves = [0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)]
    tree = lora.combine(jax.tree.unflatten(structure, leaves), frozen)
    x = normal(9, *X.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.MaterializedWarning)
        got = lora.lorafy(fn)(tree, x)
    want = fn(lora.merge(tree), x)
    assert jnp.abs(got - want).max() < tolerance * max(1, float(jnp.abs(want).max()))


# Forms that show no roles: a linear solve, the larger of a weight and a constant, heads of vectors.
HIDDEN = {
    "solve": (lambda w, x: jnp.linalg.solve(w, x.mT).mT, (8, 8), "io"),
    "larger": (lambda w, x: x @ jnp.zeros((8, 9)).at[:, 1:].max(w), (8, 8), "io"),
    "chosen by data": (lambda w, x: x @ jnp.where(x[0, 0, 0] > 0, w, 0.0), (8, 8), "io"),
    "a filter of Fourier modes": (
        lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x, 10, 1) * jnp.fft.rfft(w, 10, 0), 10, 1)[:, :5],
        (5, 8),
        "io",
    ),
    "carried from the second step on": (
        lambda w, x: lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), w), None), (x, jnp.eye(8)), length=3
        )[0][0],
        (8, 8),
        "io",
    ),
    "vectors of heads": (
        lambda w, x: jnp.einsum("bthk,hk->bth", x.reshape(2, 5, 2, 4), w),
        (2, 4),
        "oi",
    ),
}


@pytest.mark.parametrize("targets", ALL, ids=str)
@pytest.mark.parametrize("name", HIDDEN)
def test_a_named_matrix_that_is_left_out_is_warned_of(name: str, targets):
    form, shape, roles = HIDDEN[name]
    fn, w = two(form), normal(1, *shape) + 3 * jnp.eye(*shape)
    params = {"w": w, "up": normal(2, jax.eval_shape(form, w, X).shape[-1], 6)}
    if isinstance(targets, tuple):
        with pytest.raises(ValueError, match=rf"entry .w. adapts nothing .*{{'w': '{roles}'}}"):
            planned(fn, params, targets)
    else:
        with pytest.warns(LeftOutWarning, match=rf"`w` .*set roles={{'w': '{roles}'}}"):
            plan = planned(fn, params, targets)
        assert [leaf.path for leaf in plan.left_out] == ["w"]
        assert "1 named matrix left out;" in str(plan).splitlines()[-1]
        with pytest.raises(ValueError, match=r"`w` .*roles=.*`strict=True` forbids that"):
            planned(fn, params, targets, strict=True)
    plan = planned(fn, params, targets, roles={"w": roles})
    assert len(plan.adapted) == 2 and not plan.left_out
    merged_is_met(fn, params, plan)


@pytest.mark.parametrize("targets", ["all-linear", ".*"])
def test_a_complex_matrix_is_warned_of(targets):
    fn = two(lambda w, x: jnp.abs(x @ w["kernel"] + w["bias"]))
    w = {"kernel": jnp.ones((8, 8), "complex64"), "bias": jnp.ones((1, 8), "complex64")}
    with pytest.warns(LeftOutWarning, match=r"`w.kernel` .*: hold its real and imaginary parts as"):
        plan = planned(fn, {"w": w, "up": normal(2, 8, 6)}, targets)
    assert [leaf.path for leaf in plan.left_out] == ["w.kernel"]


def test_biases_scales_and_prompts_are_no_matrices():
    def fn(p, x):
        h = jnp.einsum("btd,dnh->btnh", x, p["kernel"]) + p["bias"]
        h = jnp.einsum("btnh,nh->btnh", h, p["scale"]) * p["gain"]
        h = jnp.concatenate([jnp.broadcast_to(p["prompt"], (2, 3, 8)), h.reshape(2, 5, 8)], 1)
        return h + p["position"]

    params = {
        "kernel": jax.ShapeDtypeStruct((8, 2, 4), jnp.float32),
        **{n: jax.ShapeDtypeStruct((2, 4), jnp.float32) for n in ("bias", "scale", "gain")},
        "prompt": jax.ShapeDtypeStruct((3, 8), jnp.float32),
        "position": jax.ShapeDtypeStruct((8, 8), jnp.float32),
    }
    for targets in ("all-linear", ".*"):
        plan = planned(fn, params, targets, strict=True)
        assert [leaf.path for leaf in plan.adapted] == ["kernel"]


def test_a_matrix_spread_over_examples_is_a_weight_only_where_it_is_contracted():
    """A state-space model's A, an outer product with features, is no projection."""

    def state(w, x):
        return jnp.exp(x[..., None] * -jnp.exp(w)).sum(-1)

    params = {"w": normal(1, 8, 3), "up": normal(2, 8, 6)}
    assert not planned(two(state), params).left_out

    def normed(w, x):
        w = w * x.mean(1)[:, :, None]
        return jnp.einsum("btd,bdo->bto", x, w / jnp.sqrt((w * w).sum(1, keepdims=True)))

    params = {"w": normal(1, 8, 8), "up": normal(2, 8, 6)}
    plan = planned(two(normed), params)
    assert [leaf.roles for leaf in plan.adapted] == ["io", "io"]
    merged_is_met(two(normed), params, plan)


def test_scales_of_scanned_layers_are_no_matrices():
    def fn(p, x):
        return lax.scan(lambda x, w: ((x * w["scale"]) @ w["up"], None), x, p)[0]

    params = {"scale": jax.ShapeDtypeStruct((3, 8), "float32"),
              "up": jax.ShapeDtypeStruct((3, 8, 8), "float32")}  # fmt: skip
    assert [leaf.path for leaf in planned(fn, params, ".*", strict=True).adapted] == ["up"]


def test_a_stack_of_vectors_one_of_which_is_put_into_features_is_no_matrix():
    def fn(p, x):
        return (x.at[:, 0].set(p["vectors"][0]) @ p["vectors"][1])[..., None] + x @ p["w"]

    assert [leaf.path for leaf in planned(fn, {"vectors": W, "w": W}, ".*").adapted] == ["w"]


def test_an_unused_matrix_is_warned_of_where_it_is_named():
    params = {"w": W, "unused": W}

    def fn(p, x):
        return x @ p["w"]

    assert not planned(fn, params).left_out
    with pytest.warns(LeftOutWarning, match="`unused`.*the function does not use it"):
        planned(fn, params, ".*")


MASKED = {
    "outside": lambda w, x: x @ (w * TRIANGLE),
    "inside": lambda w, x: x @ (w * jnp.tril(jnp.ones((8, 8)))),
    "where": lambda w, x: x @ jnp.where(TRIANGLE > 0, w, 0),
    "transposed": lambda w, x: x @ (w.T * TRIANGLE.T),
    "shifted": lambda w, x: x @ (w + TRIANGLE),
}


@pytest.mark.parametrize("targets", ALL, ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_a_weight_under_a_constant_is_adapted(name: str, targets):
    fn, params = two(MASKED[name]), {"w": normal(1, 8, 8), "up": normal(2, 8, 6)}
    plan = planned(fn, params, targets, strict=True)
    assert {leaf.path for leaf in plan.adapted} == {"w", "up"}
    merged_is_met(fn, params, plan)


@pytest.mark.parametrize("kind", ["named", "boolean", "of zeros and ones", "unknown"])
@pytest.mark.parametrize("concrete", [True, False])
def test_a_mask_among_the_parameters(kind: str, concrete: bool):
    """A mask is never adapted by "all-linear", and the weight under it is."""
    name = "mask" if kind == "named" else "m"
    values = {"boolean": TRIANGLE > 0, "of zeros and ones": TRIANGLE}.get(kind, TRIANGLE * 0.5)

    def fn(p, x):
        return x @ (p["w"] * p[name].astype(jnp.float32)) @ p["up"]

    params = {"w": normal(1, 8, 8), name: values, "up": normal(2, 8, 6)}
    if not concrete:
        params = jax.eval_shape(lambda: params)
    known = kind in ("named", "boolean") or (concrete and kind == "of zeros and ones")
    if known:
        plan = planned(fn, params, strict=True)
        assert {leaf.path for leaf in plan.adapted} == {"w", "up"}
        return
    with pytest.warns(LeftOutWarning, match="either may be a mask.*roles={'w': 'io'}"):
        plan = planned(fn, params)
    assert {leaf.path for leaf in plan.adapted} == {"up"}
    plan = planned(fn, params, ("w", "up"), strict=True)
    assert {leaf.path for leaf in plan.adapted} == {"w", "up"}


SCALES = "scales or zero points: each goes with several elements of `w`"


@pytest.mark.parametrize("einsum", [False, True])
def test_scales_of_blocks_are_none_of_their_weights(einsum: bool):
    def scaled(p, x):
        blocks = p["w"].reshape(2, 4, 8)
        if einsum:
            return x @ jnp.einsum("gio,go->gio", blocks, p["scales"]).reshape(8, 8)
        return x @ (blocks * p["scales"][:, None]).reshape(8, 8)

    params = {"w": normal(1, 8, 8), "scales": normal(2, 2, 8)}
    plan = planned(scaled, params)
    assert [leaf.path for leaf in plan.adapted] == ["w"]
    assert plan.by_path()["scales"].reason == SCALES
    # Named, they are adapted.
    assert planned(scaled, params, ("scales",)).adapted[0].path == "scales"
    merged_is_met(scaled, params, plan)


def test_zero_points_of_blocks_are_no_weights():
    def shifted(p, x):
        return x @ (p["w"].reshape(2, 4, 8) - p["zeros"]).reshape(8, 8)

    params = {"w": normal(1, 8, 8), "zeros": normal(2, 2, 1, 8)}
    plan = planned(shifted, params)
    assert [leaf.path for leaf in plan.adapted] == ["w"]
    assert plan.by_path()["zeros"].reason == SCALES
    # What all experts have in common goes with several elements too, but is a matrix of its own.
    params = {"w": normal(1, 2, 8, 8), "shared": normal(2, 8, 8)}
    shared = planned(lambda p, x: jnp.einsum("btd,edf->btef", x, p["w"] - p["shared"]), params)
    assert len(shared.adapted) == 2


@pytest.mark.parametrize("targets", ALL[:2])
def test_matrices_in_a_flat_vector_are_warned_of(targets):
    def fn(p, x):
        return x @ p["w"][:64].reshape(8, 8) @ p["w"][64:].reshape(8, 4) @ p["up"]

    params = {"w": normal(1, 96), "up": normal(2, 4, 4)}
    with pytest.warns(LeftOutWarning, match=r"`w` \(96,\): .*let `fn` take them as leaves of a tr"):
        planned(fn, params, targets)
    with pytest.raises(ValueError, match=r"adapts nothing.*`ravel_pytree`'s second result"):
        planned(lambda p, x: fn(p | {"up": jnp.ones((4, 4))}, x), {"w": params["w"]}, "w")


def test_what_a_vector_is_repeated_to_is_no_matrix_in_it():
    rolled = (jnp.arange(8)[:, None] + jnp.arange(8)) % 8
    params = {"w": normal(1, 8), "up": normal(2, 8, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        planned(two(lambda w, x: x @ w[rolled]), params, ".*")


@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
def test_branches_chosen_for_each_example_are_followed():
    """`vmap` of a `switch` chooses between a weight and the weight without a gradient."""

    def fn(p, x):
        def one(i, v):
            branches = [
                lambda v: v @ p["w"],
                lambda v: v @ p["layers"][1],
                lambda v: v @ p["indexed"][i],
            ]
            return lax.switch(i, branches, v)

        return jax.vmap(one)(2 * jnp.arange(x.shape[0]) + (x[:, 0, 0] > 9), x)

    params = {"w": normal(1, 8, 8), "layers": normal(2, 3, 8, 8), "indexed": normal(3, 3, 8, 8)}
    plan = planned(fn, params)
    roles = {leaf.path: leaf.roles for leaf in plan.adapted}
    assert roles == {"w": "io", "layers": "sio", "indexed": "sio"}
    assert plan.adapted[0].fallbacks
    merged_is_met(fn, params, plan)


def test_matrices_multiplied_by_an_einsum_may_be_masks():
    params = {"w": normal(1, 8, 8), "mask": TRIANGLE}
    plan = planned(lambda p, x: x @ jnp.einsum("io,io->io", p["w"], p["mask"]), params)
    assert [leaf.path for leaf in plan.adapted] == ["w"]
    assert "a mask" in plan.by_path()["mask"].reason


def test_a_weight_that_starts_at_zero_is_no_mask():
    def fn(p, x):
        return x @ (p["w"] * p["gate"]) @ p["up"]

    params = {"w": jnp.zeros((8, 8)), "gate": normal(1, 8, 8), "up": normal(2, 8, 6)}
    with pytest.warns(LeftOutWarning, match="`w` .*either may be a mask"):
        planned(fn, params)


def test_stopped_gradients_are_in_the_plan():
    def fn(p, x):
        h = lax.stop_gradient(x @ p["encoder"])
        h = h @ lax.stop_gradient(p["frozen"])
        h = lax.scan(lambda c, _: (c @ p["looped"] + x, None), h, None, length=2)[0]
        return (h + lax.stop_gradient(h @ p["both"])) @ p["both"]

    names = ("encoder", "frozen", "looped", "both")
    plan = planned(fn, dict.fromkeys(names, W))
    stopped = {leaf.path for leaf in plan.adapted if "stop_gradient" in leaf.reason}
    assert stopped == {"encoder", "frozen"}
    assert "no gradient reaches it" in str(plan)


@pytest.mark.parametrize("place", [
    lambda w: jnp.zeros((6, 5)).at[2].set(w[1]),
    lambda w: jnp.zeros((6, 5)).at[2].add(w[1]).at[3].set(w[0]),
    lambda w: jnp.zeros((6, 5)).at[:, 1].set(w[:, 1]),
    lambda w: jnp.ones((6, 5)).at[2].mul(w[1]),
    lambda w: jnp.ones((6, 5)).at[2].max(w[1]),
    lambda w: jnp.zeros((6, 5)).at[2, 3].set(w[1, 1]),
])  # fmt: skip
def test_a_row_put_into_zeros_names_the_roles_that_adapt_it(place):
    def fn(params, x):
        return x @ place(params["w"])

    params, x = {"w": jnp.ones((6, 5))}, jnp.ones((3, 6))
    for targets in ("w", "all-linear"):
        with pytest.raises(ValueError, match="only `scatter.*set roles={'w': 'io'} to adapt it"):
            lora.plan(lora.LoraConfig(rank=2, target_modules=targets), fn, params, x)
    config = lora.LoraConfig(rank=2, target_modules="w", roles={"w": "io"})
    assert [leaf.kind for leaf in lora.plan(config, fn, params, x).leaves] == ["lora"]
