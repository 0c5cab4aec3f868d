"""Trees of adapters: init, split and combine, masks, optimizers, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora


def fn(p, x, ids):
    h = p["embed"]["embedding"][ids] + x
    h = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, p["layers"]["up"]["kernel"])[0]
    return h @ p["out"]["kernel"] + p["out"]["bias"]


PARAMS = {
    "embed": {"embedding": jnp.ones((11, 8))},
    "layers": {"up": {"kernel": jnp.ones((3, 8, 8))}},
    "out": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)},
}
ARGS = (jnp.ones((2, 5, 8)), jnp.zeros((2, 5), jnp.int32))


def planned(**fields) -> lora.Plan:
    fields = {"rank": 2, "target_modules": ("embed", "up", "out")} | fields
    return lora.plan(lora.LoraConfig(**fields), fn, PARAMS, *ARGS)


def made(key=0, **fields):
    return lora.init(jax.random.key(key), planned(**fields), PARAMS)


def test_init_default_is_pefts():
    """`A` uniform in ±1/√fan_in and `B` zero; for a table `A` zero and `B` normal."""
    tree = made()
    up, embed = tree["layers"]["up"]["kernel"], tree["embed"]["embedding"]
    assert float(jnp.abs(up.a).max()) <= 8**-0.5
    assert float(jnp.abs(up.a).max()) > 0.9 * 8**-0.5 and float(up.a.std()) > 0.15
    assert not up.b.any() and not embed.a.any() and embed.b.std() > 0.3
    assert (up.a.shape, up.b.shape, up.scale.shape) == ((3, 8, 2), (3, 2, 8), (3,))
    assert up.scale.tolist() == [8.0] * 3
    assert tree["out"]["bias"] is PARAMS["out"]["bias"]
    assert up.w is PARAMS["layers"]["up"]["kernel"]


def test_init_depends_on_the_key_and_the_path_alone():
    one, same, other = made(1), made(1), made(2)
    few = made(1, target_modules=("up",))
    a = [t["layers"]["up"]["kernel"].a for t in (one, same, few, other)]
    np.testing.assert_array_equal(a[0], a[1])
    np.testing.assert_array_equal(a[0], a[2])
    assert not np.array_equal(a[0], a[3])
    layers = a[0]
    assert not np.array_equal(layers[0], layers[1])


def test_init_under_jit_and_eval_shape():
    plan = planned()
    key = jax.random.key(0)
    eager = lora.init(key, plan, PARAMS)
    jitted = jax.jit(lambda k, p: lora.init(k, plan, p))(key, PARAMS)
    shapes = jax.eval_shape(lambda p: lora.init(key, plan, p), PARAMS)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(shapes)
    for x, y, s in zip(*map(jax.tree.leaves, (eager, jitted, shapes)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
        assert (x.shape, x.dtype) == (s.shape, s.dtype)


def test_init_of_another_tree_is_an_error():
    plan = planned()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`params` has no leaf `embed.embedding`, which was plan"):
        lora.init(key, plan, {k: v for k, v in PARAMS.items() if k != "embed"})
    wrong = PARAMS | {"embed": {"embedding": jnp.ones((12, 8))}}
    with pytest.raises(ValueError, match=r"`embed.embedding` with shape \(12, 8\), planned was"):
        lora.init(key, plan, wrong)
    with pytest.raises(ValueError, match=r"already has an adapter at `embed.embedding`"):
        lora.init(key, plan, made())


def test_layers_left_out_and_smaller_ranks_are_zero_and_stay_so():
    """Layer 0 is left out; the stack has the largest rank, padding never trains."""
    plan = planned(target_modules=("up",), layers_to_transform=(1, 2), layers_pattern="layers",
                   init="random", rank=4)  # fmt: skip
    kernel = lora.init(jax.random.key(0), plan, PARAMS)["layers"]["up"]["kernel"]
    assert not kernel.a[0].any() and not kernel.b[0].any() and kernel.a[1:].all()
    assert kernel.scale.tolist() == [0.0, 4.0, 4.0]
    plan = planned(target_modules=("up",), rank=2, alpha=4, init="random",
                   rank_pattern={r"layers\.1\.up": 4})  # fmt: skip
    tree = lora.init(jax.random.key(0), plan, PARAMS)
    kernel = tree["layers"]["up"]["kernel"]
    assert kernel.rank == 4 and kernel.scale.tolist() == [2.0, 1.0, 2.0]
    assert not kernel.a[0, :, 2:].any() and not kernel.b[2, 2:].any() and kernel.a[1].all()
    trainable, frozen = lora.split(tree)
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(lora.lorafy(fn)(lora.combine(t, frozen), *ARGS))))(
        trainable
    )["layers"]["up"]["kernel"]
    assert not grads.a[0, :, 2:].any() and not grads.b[2, 2:].any()


def test_split_of_a_base_warns_of_the_empty_half():
    base = {"w": jnp.ones((2, 3))}
    with pytest.warns(UserWarning, match=r"`lora_params` has no adapter.*`lora.init\(key, plan"):
        trainable, frozen = lora.split(base)
    assert not jax.tree.leaves(trainable) and frozen == base
    assert lora.split({}) == ({}, {})


def test_split_and_combine_are_inverse():
    tree = made(modules_to_save=("out",), target_modules=("up",))
    trainable, frozen = lora.split(tree)
    held = [x.shape for x in jax.tree.leaves(trainable)]
    assert sorted(held) == sorted([(3, 8, 2), (3, 2, 8), (8, 4), (4,)])
    back = lora.combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (back, tree)), strict=True))


def test_combine_of_what_does_not_belong_together_is_an_error():
    tree = made()
    trainable, frozen = lora.split(tree)
    with pytest.raises(ValueError, match="not two halves of .* differ at `layers.up.kernel`"):
        lora.combine({"embed": trainable["embed"]}, frozen)
    with pytest.raises(ValueError, match=r"results of `lora.split` \(at `.*` both have a value"):
        lora.combine(tree, tree)
    for whole, half in ((tree, frozen), (trainable, tree)):
        with pytest.raises(ValueError, match=r"\(at `.*` both have a value of `\w+`\)"):
            lora.combine(whole, half)
    swapped = {**frozen, "layers": {**frozen["layers"], "up": {"kernel": jnp.ones(3)}}}
    with pytest.raises(ValueError, match="at `layers.up.kernel` one has a `LoraArray`, the other"):
        lora.combine(trainable, swapped)


def test_mask_marks_what_trains():
    tree = made(target_modules=("up",), modules_to_save=("out",))
    mask = lora.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    up, saved = mask["layers"]["up"]["kernel"], mask["out"]["bias"]
    assert (up.w, up.a, up.b, up.scale) == (False, True, True, False)
    assert (saved.w, saved.value) == (False, True) and mask["embed"]["embedding"] is False


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_masked_trains_the_adapters_as_adamw_alone_would(whole: bool):
    """Through the whole tree or through its trainable half: the same steps, the base untouched."""
    tree = made(init="random")
    trainable, frozen = lora.split(tree)
    tx, plain = lora.masked(optax.adamw(0.1)), optax.adamw(0.1)

    def loss(t, f):
        return jnp.mean(jnp.square(lora.lorafy(fn)(lora.combine(t, f), *ARGS)))

    state, want_state = tx.init(tree), plain.init(trainable)
    current, want = tree if whole else trainable, trainable
    for _ in range(3):
        t = lora.split(current)[0] if whole else current
        grads = jax.grad(loss)(t, frozen)
        given = lora.combine(grads, jax.tree.map(jnp.zeros_like, frozen)) if whole else grads
        updates, state = tx.update(given, state, current)
        current = optax.apply_updates(current, updates)
        updates, want_state = plain.update(jax.grad(loss)(want, frozen), want_state, want)
        want = optax.apply_updates(want, updates)
    t, f = lora.split(current) if whole else (current, frozen)
    for x, y in zip(jax.tree.leaves(t), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    for x, y in zip(jax.tree.leaves(f), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(x, y)


def test_optax_masked_with_the_mask_holds_no_state_for_the_base():
    tree = made()
    state = optax.masked(optax.adam(0.1), lora.trainable_mask).init(tree)
    sizes = {x.shape for x in jax.tree.leaves(state) if x.ndim}
    assert (3, 8, 8) not in sizes and (3, 8, 2) in sizes


def test_counts_are_pefts():
    tree = made(target_modules=("up",))
    adapters = 3 * (8 * 2 + 2 * 8)
    base = 11 * 8 + 3 * 64 + 32 + 4
    assert lora.count_parameters(tree) == lora.Count(adapters, adapters + base)
    assert lora.format_trainable_parameters(tree) == (
        f"trainable params: 96 || all params: 412 || trainable%: {100 * 96 / 412:.4f}"
    )
    assert lora.count_parameters(PARAMS) == lora.Count(0, base)
    assert lora.count_parameters(jax.eval_shape(lambda: tree)) == lora.count_parameters(tree)


def test_bias_of_adapted_modules_trains():
    tree = made(target_modules=("out",), bias="lora_only")
    assert isinstance(tree["out"]["bias"], lora.SavedArray)
    assert isinstance(tree["out"]["kernel"], lora.LoraArray)
    trainable, frozen = lora.split(tree)
    grads = jax.grad(lambda t: jnp.sum(lora.lorafy(fn)(lora.combine(t, frozen), *ARGS)))(trainable)
    np.testing.assert_allclose(grads["out"]["bias"].value, [10.0] * 4)
    moved = jax.tree.map(lambda x: x + 1, trainable)
    merged = lora.merge(lora.combine(moved, frozen))
    assert merged["out"]["bias"].tolist() == [1.0] * 4
