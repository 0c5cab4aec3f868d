"""`lorafy` as a function transformation: what it passes through, and what it composes with."""

import concurrent.futures
import dataclasses

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import batching, mlir

import lora_jax as lora
from lora_jax.transform import dora

D = 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, D)).astype(np.float32))


def leaf(seed: int = 0, shape=(D, D), roles: str = "io") -> lora.LoraArray:
    rng = np.random.default_rng(seed)

    def numbers(*s):
        return jnp.asarray((0.4 * rng.normal(size=s)).astype(np.float32))

    stack = shape[:-2]
    return lora.LoraArray(
        numbers(*shape), numbers(*stack, shape[-2], 2), numbers(*stack, 2, shape[-1]),
        jnp.full(stack, 1.5), roles=roles)  # fmt: skip


PARAMS = {"w": leaf(1), "v": leaf(2), "b": jnp.ones(D)}


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


WANT = mlp(lora.merge(PARAMS), X)


def close(got, want=WANT):
    # Float32 roundings of two products apart against one.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_without_adapters_it_is_the_function_itself():
    seen = []

    def fn(p, x):
        seen.append((type(p["w"]), type(x)))
        return x @ p["w"]

    lora.lorafy(fn)({"w": np.ones((3, 3))}, np.ones(3))
    assert seen == [(np.ndarray, np.ndarray)]
    text = jax.jit(lora.lorafy(mlp)).lower(lora.merge(PARAMS), X).as_text()
    assert text == jax.jit(mlp).lower(lora.merge(PARAMS), X).as_text()


def test_name_and_docstring_are_the_functions():
    assert lora.lorafy(mlp).__name__ == "mlp"


def test_python_arguments_stay_python():
    def fn(p, x, flag, *, mode, scale=1.0):
        assert flag is True and mode == "up" and isinstance(scale, float)
        return scale * (x @ p["w"])

    got = lora.lorafy(fn)(PARAMS, X, True, mode="up", scale=2.0)
    close(got, 2 * (X @ lora.merge(PARAMS)["w"]))


def test_any_output_comes_back():
    def fn(p, x):
        return {"y": x @ p["w"], "tag": "text", "none": None, "n": 3, "p": p}

    out = lora.lorafy(fn)(PARAMS, X)
    assert (out["tag"], out["none"], out["n"]) == ("text", None, 3)
    assert out["p"]["w"] is PARAMS["w"], "a weight handed back is the adapter itself"
    close(out["y"], X @ lora.merge(PARAMS)["w"])


def test_saved_arrays_are_used_whole():
    saved = lora.SavedArray(jnp.zeros((D, D)), jnp.eye(D))
    tree = {"w": saved, "v": PARAMS["v"], "b": jnp.zeros(D)}
    close(lora.lorafy(mlp)(tree, X), jnp.tanh(X) @ lora.merge(PARAMS)["v"])


def test_adapters_may_be_shared_by_vmap():
    """Many adapters over one base: the base is not batched."""
    trainable, frozen = lora.split(PARAMS)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), trainable)

    def run(t, x):
        return lora.lorafy(mlp)(lora.combine(t, frozen), x)

    got = jax.vmap(run, in_axes=(0, None))(several, X)
    for i, factor in enumerate((1, 2, -1)):
        one = lora.combine(jax.tree.map(lambda x, f=factor: f * x, trainable), frozen)
        close(got[i], mlp(lora.merge(one), X))
    text = str(jax.make_jaxpr(jax.vmap(run, in_axes=(0, None)))(several, X))
    assert f"f32[3,{D},{D}]" not in text


def test_a_jitted_block_is_lowered_once():
    block = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def fn(p, x):
        for _ in range(4):
            x = block(p["w"], x)
        return x

    text = jax.jit(lora.lorafy(fn)).lower(PARAMS, X).as_text()
    base = jax.jit(fn).lower(lora.merge(PARAMS), X).as_text()
    assert text.count("func.func") == base.count("func.func")


def test_a_jitted_block_is_made_anew_for_other_roles():
    """The arrays of both weights have the same shapes; their factors own other dims."""
    block = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def fn(p, x):
        return block(block(x, p["w"]), p["v"])

    turned = {"w": leaf(1), "v": leaf(2, roles="oi")}
    close(lora.lorafy(fn, strict=True)(turned, X), fn(lora.merge(turned), X))


def test_a_checkpoint_keeps_its_policy():
    def products(policy):
        fn = jax.checkpoint(lambda p, x: jnp.sin(mlp(p, x)), policy=policy)
        loss = jax.grad(lambda x: lora.lorafy(fn)(PARAMS, x).sum())
        return str(jax.make_jaxpr(loss)(X)).count("dot_general")

    policies = jax.checkpoint_policies
    assert products(policies.everything_saveable) < products(policies.nothing_saveable)


@pytest.mark.parametrize("order", [1, -1])
def test_a_weight_that_one_branch_changes_is_another_afterwards(order):
    branches = [lambda w: w, lambda w: 2.0 * w][::order]

    def fn(p, x):
        return x @ lax.cond(x[0, 0] > 0, *branches, p["w"])

    run = jax.jit(lora.lorafy(fn, strict=True))
    for x in (X, -X):
        close(run(PARAMS, x), fn(lora.merge(PARAMS), x))


@pytest.mark.parametrize("name", ["ragged_dot", "convolution"])
def test_experts_and_kernels_are_dropped_out(name):
    fn, x = {
        "ragged_dot": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1, 2])),
                       leaf(3, (3, D, D), "sio")),
        "convolution": (lambda p, x: lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
                        lora.LoraArray(jnp.ones((1, D, D)), jnp.ones((1, D, 2)), jnp.ones((2, D)),
                                       jnp.float32(1), roles="iio")),
    }[name]  # fmt: skip
    run, p = lora.lorafy(fn, strict=True), {"w": dataclasses.replace(x, dropout=0.5)}
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = lax.map(lambda key: run(p, X, lora_key=key), keys)
    plain = run(p, X)
    assert not np.allclose(drawn[0], plain) and not np.allclose(drawn[0], drawn[1])
    # Six standard errors of 64 draws.
    most = 6 * drawn.std(0) / 8 + 1e-4
    assert (np.abs(drawn.mean(0) - plain) < most).all()


def test_weights_of_different_dropout_are_not_joined():
    p = {"w": leaf(1), "v": dataclasses.replace(leaf(2), dropout=0.5)}

    def fn(p, x):
        return x @ jnp.concatenate([p["w"], p["v"]], 1)

    with pytest.warns(lora.MaterializedWarning, match="weights with different dropout"):
        close(lora.lorafy(fn)(p, X, lora_key=jax.random.key(0)), fn(lora.merge(p), X))


def test_a_magnitude_does_not_scale_what_is_padded():
    x = dataclasses.replace(leaf(1), m=jnp.full(D, 3.0))

    def fn(p, x):
        return x @ jnp.pad(p["w"], ((0, 0), (1, 0)), constant_values=1.0)

    close(lora.lorafy(fn, strict=True)({"w": x}, X), fn(lora.merge({"w": x}), X))


def test_blocks_of_different_leaves_warn_for_each():
    block = jax.jit(lambda w, x: x @ jnp.abs(w))

    def fn(p, x):
        return block(p["v"], block(p["w"], x))

    with pytest.warns(lora.MaterializedWarning) as caught:
        close(lora.lorafy(fn)(PARAMS, X), fn(lora.merge(PARAMS), X))
    assert {str(w.message).split("`")[1] for w in caught} == {"v", "w"}


def test_name_scopes_are_kept():
    def fn(p, x):
        with jax.named_scope("my_block"):
            return x @ p["w"]

    # The tests' cache of compiled programs would give an equal program without the scope.
    named = "jax_compilation_cache_include_metadata_in_key"
    jax.config.update(named, True)
    try:
        text = jax.jit(lora.lorafy(fn)).lower(PARAMS, X).compile().as_text()
    finally:
        jax.config.update(named, False)
    assert [line for line in text.splitlines() if "dot(" in line and "my_block" in line]


def test_precision_is_the_base_dots():
    with jax.default_matmul_precision("highest"):
        text = str(jax.make_jaxpr(lora.lorafy(mlp))(PARAMS, X))
    assert text.count("Precision.HIGHEST") == 2 * text.count("dot_general")


def test_large_constants_are_not_copied_into_the_jaxpr():
    big = jnp.ones((500, D))
    jaxpr = jax.make_jaxpr(lora.lorafy(lambda p, x: x @ p["w"] + big[:5]))(PARAMS, X)
    assert sum(c.size == big.size for c in jaxpr.consts) == 1


def test_inside_other_transformations():
    adapted = lora.lorafy(mlp)
    close(lax.scan(lambda c, _: (c, adapted(PARAMS, X)), 0, None, length=2)[1][1])
    close(jax.checkpoint(adapted)(PARAMS, X))
    close(jax.vmap(adapted, in_axes=(None, 0))(PARAMS, X))
    close(lax.cond(True, adapted, lambda p, x: x, PARAMS, X))
    close(jax.linearize(lambda x: adapted(PARAMS, x), X)[0])
    tangent = jax.jvp(lambda x: adapted(PARAMS, x), (X,), (X,))[1]
    close(tangent, jax.jvp(lambda x: mlp(lora.merge(PARAMS), x), (X,), (X,))[1])


def test_per_example_gradients():
    trainable, frozen = lora.split(PARAMS)

    def loss(fn):
        return lambda t, x: jnp.sum(jnp.sin(fn(lora.combine(t, frozen), x)))

    def each(fn):
        return jax.vmap(jax.grad(loss(fn)), in_axes=(None, 0))(trainable, X)

    got, want = each(lora.lorafy(mlp)), each(lambda p, x: mlp(lora.merge(p), x))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_differentiating_the_whole_tree():
    """The base's gradient is the usual one; the scale's is not zero, which gives the use away."""
    grads = jax.grad(lambda p: jnp.sum(lora.lorafy(mlp)(p, X)))(PARAMS)
    assert float(grads["w"].scale) != 0.0
    want = jax.grad(lambda p: jnp.sum(mlp(p, X)))(lora.merge(PARAMS))
    np.testing.assert_allclose(grads["w"].w, want["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mode", [pytest.param("leaks", marks=pytest.mark.slow), "disable_jit", "nans", "checks"]
)
def test_under_jaxs_debugging_modes(mode: str):
    def fn(p, x):
        def layer(c, _):
            return jax.nn.relu(jax.jit(jnp.matmul)(c, p["w"])), None

        return jax.checkpoint(lambda x: lax.scan(layer, x, None, length=2)[0])(x)

    context = {
        "leaks": jax.checking_leaks,
        "disable_jit": jax.disable_jit,
        "nans": lambda: jax.debug_nans(True),
        "checks": lambda: jax.enable_checks(True),
    }[mode]
    with context():
        close(lora.lorafy(fn)(PARAMS, X), fn(lora.merge(PARAMS), X))


def test_from_several_threads_at_once():
    def one(i):
        return jax.jit(lora.lorafy(lambda p, x: mlp(p, x) + i))(PARAMS, X)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for i, got in enumerate(pool.map(one, range(6))):
            close(got, WANT + i)


def test_export_with_a_symbolic_batch():
    symbol = jax.export.symbolic_shape(f"n,{D}")
    spec = jax.ShapeDtypeStruct(symbol, jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: lora.lorafy(mlp)(PARAMS, x)))(spec)
    close(exported.call(X))


def test_a_function_is_traced_once_for_two_calls():
    seen = []

    def fn(p, x):
        seen.append(1)
        return x @ p["w"]

    run = jax.jit(lora.lorafy(fn))
    run(PARAMS, X)
    run(PARAMS, 2 * X)
    assert len(seen) == 1


def test_a_primitive_without_a_row():
    """A right result and a warning; and none where it does not meet a weight."""
    unheard = jexc.Primitive("unheard_of")
    unheard.def_impl(lambda x: x * x)
    unheard.def_abstract_eval(lambda x: x)
    mlir.register_lowering(unheard, mlir.lower_fun(lambda x: x * x, multiple_results=False))
    batching.primitive_batchers[unheard] = lambda args, dims: (unheard.bind(*args), dims[0])

    def on_weight(p, x):
        return x @ unheard.bind(p["w"])

    with pytest.warns(lora.MaterializedWarning, match=r"`w` .* `unheard_of` at test_lorafy.py:\d+"):
        close(jax.jit(lora.lorafy(on_weight))(PARAMS, X), on_weight(lora.merge(PARAMS), X))

    def on_features(p, x):
        return unheard.bind(x @ p["w"])

    run = lora.lorafy(on_features, strict=True)
    close(jax.jit(run)(PARAMS, X), on_features(lora.merge(PARAMS), X))
    text = str(lora.plan(lora.LoraConfig(rank=2, target_modules=("w",)), on_weight,
                         lora.merge(PARAMS), X))  # fmt: skip
    assert "MATERIALIZED for the operation has no rule" in text


@pytest.mark.parametrize("name", ["matmul", "transposed", "scan", "gather", "conv", "heads"])
def test_dora(name: str):
    """`m·(W + sAB)/‖W + sAB‖`, the norm a constant of the gradient, against itself merged."""
    kernels = {"scan": ((3, D, D), "sio"), "transposed": ((6, D), "oi"), "gather": ((11, D), "io"),
               "conv": ((3, D, 6), "iio"), "heads": ((D, 2, 3), "ioo")}  # fmt: skip
    shape, roles = kernels.get(name, ((D, 6), "io"))
    from lora_jax.dims import factor_shapes

    a, b = factor_shapes(shape, roles, 2)
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray((0.4 * rng.normal(size=s)).astype(np.float32)) for s in (shape, a, b)]
    stack = tuple(n for n, r in zip(shape, roles, strict=True) if r == "s")
    x = lora.LoraArray(arrays[0], arrays[1], arrays[2], jnp.full(stack, 1.5), roles=roles)
    start = dora.magnitude(x)
    x = dataclasses.replace(x, m=1.5 * start)
    fn, given = {
        "matmul": (lambda p, x: x @ p["w"], X),
        "transposed": (lambda p, x: x @ p["w"].T, X),
        "scan": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], X),
        "gather": (lambda p, i: p["w"][i], jnp.array([1, 5, 5])),
        "conv": (lambda p, x: lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")), X),
        "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), X),
    }[name]  # fmt: skip
    tree = {"w": x}
    close(lora.lorafy(fn, strict=True)(tree, given), fn(lora.merge(tree), given))
    same = {"w": dataclasses.replace(x, m=start)}
    plain = {"w": dataclasses.replace(x, m=None)}
    close(lora.merge(same)["w"], lora.merge(plain)["w"])
    trainable, frozen = lora.split(tree)

    def loss(f):
        return jax.grad(lambda t: jnp.sum(jnp.sin(f(lora.combine(t, frozen)))))(trainable)

    got = loss(lambda p: lora.lorafy(fn)(p, given))
    want = loss(lambda p: fn(lora.merge(p), given))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)
