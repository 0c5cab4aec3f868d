"""Adapters on meshes of eight devices: specs that follow the weight's, values, collectives."""

import contextlib
import dataclasses
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import models
from lora_jax.array import RowsArray

from tests.support.random_arrays import normal

D = 64
TP = {"w1": P(None, "model"), "w2": P("model", None)}
FSDP = {"w1": P("data", None), "w2": P(None, "data")}
BOTH = {"w1": P("data", "model"), "w2": P("model", "data")}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def explicit_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def base():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (D, 2 * D)) / 8,
        "w2": jax.random.normal(keys[1], (2 * D, D)) / 11,
    }
    return params, jax.random.normal(keys[2], (16, D))


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def make(mesh, specs, fn=mlp):
    """Sharded LoRA parameters and input, and the merged parameters on one device."""
    params, x = base()
    params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    config = lora.LoraConfig(rank=4, target_modules=("w1", "w2"), init="random")
    plan = lora.plan(config, fn, params, x)
    return lora.init(jax.random.key(5), plan, params), x


def local(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def close(got, want):
    # float32 sums in another order over the shards of a 128-wide contraction
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-5, atol=2e-5)


def collectives(fn, *args) -> dict[str, int]:
    text = jax.jit(fn).lower(*args).compile().as_text()
    assert text
    counts = {c: len(re.findall(rf" {c}(?:-start)?\(", text)) for c in COLLECTIVES}
    return {c: n for c, n in counts.items() if n}


def loss(fn):
    return lambda trainable, frozen, x: jnp.sum(
        lora.lorafy(fn, strict=True)(lora.combine(trainable, frozen), x) ** 2
    )


def check(fn, lp, x, *, reference=mlp):
    """Value and gradient on the mesh equal those of the merged model on one device."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = jax.jit(lora.lorafy(fn, strict=True))(lp, x)
        grads = jax.jit(jax.grad(loss(fn)))(*lora.split(lp), x)
    alone = local(lp)
    close(got, reference(lora.merge(alone), local(x)))
    trainable, frozen = lora.split(alone)

    def merged_loss(trainable):
        weights = jax.tree.map(
            lambda v: v.w + lora.delta(v), lora.combine(trainable, frozen), is_leaf=lora.is_lora
        )
        return jnp.sum(reference(weights, local(x)) ** 2)

    want = jax.grad(merged_loss)(trainable)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        # float32 sums in another order, relative to the largest gradient of the array
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("specs", [TP, FSDP, BOTH], ids=["tp", "fsdp", "both"])
def test_factors_are_placed_as_their_weight_is(mesh, specs):
    lp, _ = make(mesh, specs)
    for name, spec in specs.items():
        rows, columns = spec
        assert lp[name].a.sharding.spec == P(rows, None)
        assert lp[name].b.sharding.spec == P(None, columns)
        assert lp[name].a.sharding.mesh == mesh


def test_factors_of_a_weight_on_one_device_stay_where_they_are():
    one = NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[1:2]), P())
    leaf = lora.LoraArray(
        jax.device_put(jnp.ones((8, 6)), one), jnp.ones((8, 2)), jnp.ones((2, 6)), jnp.float32(1)
    )
    assert lora.sharding.place_factors(leaf) is leaf


def test_partition_specs_of_a_stack(mesh):
    spec = P(None, "data", "model", None)
    shape = jax.ShapeDtypeStruct
    leaf = lora.LoraArray(
        w=shape((3, 8, 2, 6), "float32"),
        a=shape((3, 8, 4), "float32"),
        b=shape((3, 4, 2, 6), "float32"),
        scale=shape((3,), "float32"),
        m=shape((3, 2, 6), "float32"),
        roles="sioo",
    )
    got = lora.partition_specs({"q": leaf, "bias": shape((4,), "float32")},
                               {"q": spec, "bias": P("model")})  # fmt: skip
    assert got["q"].w == spec
    assert got["q"].a == P(None, "data", None)
    assert got["q"].b == P(None, None, "model", None)
    assert got["q"].m == P(None, "model", None)
    assert got["q"].scale == P(None)
    assert got["bias"] == P("model")


@pytest.mark.wrong_types
def test_partition_specs_of_scanned_layers_and_of_rows():
    """A stack's adapters come behind the layers, which may be sharded."""
    layers, x = {"w": normal(1, 4, 8, 6)}, jnp.ones((2, 8))
    config = lora.LoraConfig(rank=2, target_modules=("w",), roles={"w": "sio"})
    plan = lora.plan(config, lambda p, x: x @ p["w"][0], layers, x)
    many = lora.stack([lora.init(jax.random.key(k), plan, layers) for k in (1, 2)])
    specs = lora.partition_specs(many, {"w": P("data", None, "model")})["w"]
    assert specs.a == P("data", None, None, None) and specs.b == P("data", None, None, "model")
    assert specs.scale == P("data", None)
    for axis, features in ((0, "model"), (1, "data")):
        leaf = RowsArray(normal(2, 9, 6), jnp.ones((2, 6 if axis == 0 else 9)), (1, 3), axis)
        rows = lora.partition_specs({"t": leaf}, {"t": P("data", "model")})["t"].rows
        assert rows == P(None, features)


def test_specs_and_meshes_that_do_not_fit_are_errors(mesh):
    tree = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    with pytest.raises(ValueError, match="a `PartitionSpec` at each leaf; it differs at `b`$"):
        lora.partition_specs(tree, {"w": P()})
    with pytest.raises(ValueError, match="`specs` must have a `PartitionSpec` at `b`, got `str`"):
        lora.partition_specs(tree, {"w": P(), "b": "model"})
    rules: Any = "fsdp"
    with pytest.raises(
        TypeError, match=r"`rules` must be `Rules`, got `str` 'fsdp': call `lora.sh"
    ):
        lora.sharding.place(tree, mesh, rules)


@pytest.mark.parametrize("specs", [TP, FSDP, BOTH], ids=["tp", "fsdp", "both"])
def test_automatic_sharding(mesh, specs):
    check(mlp, *make(mesh, specs))


def test_tensor_parallel_adds_no_collective(mesh):
    lp, x = make(mesh, TP)
    plain = {k: v.w for k, v in lp.items()}
    assert collectives(lora.lorafy(mlp), lp, x) == collectives(mlp, plain, x)
    assert collectives(mlp, plain, x) == {"all-reduce": 1}


def test_fsdp_adds_at_most_the_adapters_own_gathers(mesh):
    lp, x = make(mesh, FSDP)
    plain = {k: v.w for k, v in lp.items()}
    extra = sum(collectives(lora.lorafy(mlp), lp, x).values())
    assert extra - sum(collectives(mlp, plain, x).values()) <= len(lp)


def test_constraint_on_a_weight(mesh):
    def fn(p, x):
        w1 = lax.with_sharding_constraint(p["w1"], NamedSharding(mesh, P(None, "model")))
        h = lax.with_sharding_constraint(jnp.tanh(x @ w1), NamedSharding(mesh, P("data", "model")))
        return h @ p["w2"]

    check(fn, *make(mesh, BOTH, fn=fn))


def test_shard_map_inside_with_the_weight_as_operand(mesh):
    def fn(p, x):
        return jax.shard_map(
            lambda w1, w2, x: lax.psum(jnp.tanh(x @ w1) @ w2, "model"),
            mesh=mesh,
            in_specs=(TP["w1"], TP["w2"], P("data")),
            out_specs=P("data"),
        )(p["w1"], p["w2"], x)

    check(fn, *make(mesh, TP, fn=fn))


def test_shard_map_inside_with_the_weight_closed_over(mesh):
    def fn(p, x):
        return jax.shard_map(
            lambda x: jnp.tanh(x @ p["w1"]) @ p["w2"],
            mesh=mesh,
            in_specs=(P("data"),),
            out_specs=P("data"),
        )(x)

    check(fn, *make(mesh, {"w1": P(), "w2": P()}, fn=fn))


def test_scan_inside_shard_map(mesh):
    def body(w1, w2, x):
        step = lambda c, _: (lax.psum(jnp.tanh(c @ w1) @ w2, "model"), None)  # noqa: E731
        return lax.scan(step, x, None, length=2)[0]

    def fn(p, x):
        specs = (TP["w1"], TP["w2"], P("data"))
        mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("data"))
        return mapped(p["w1"], p["w2"], x)

    check(fn, *make(mesh, TP, fn=fn), reference=lambda p, x: mlp(p, mlp(p, x)))


@pytest.mark.parametrize("inside", [True, False], ids=["psum inside fn", "psum around fn"])
def test_lorafy_inside_an_outer_shard_map(mesh, inside):
    lp, x = make(mesh, TP)
    specs = lora.partition_specs(lp, TP)
    if inside:
        body = lora.lorafy(lambda p, x: lax.psum(mlp(p, x), "model"))
    else:
        body = lambda p, x: lax.psum(lora.lorafy(mlp)(p, x), "model")  # noqa: E731
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    close(jax.jit(mapped)(lp, x), mlp(lora.merge(local(lp)), local(x)))


def test_inner_jit_with_shardings(mesh):
    def fn(p, x):
        shardings = (NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P("data")))
        first = jax.jit(lambda w, x: jnp.tanh(x @ w), in_shardings=shardings)(p["w1"], x)
        return first @ p["w2"]

    check(fn, *make(mesh, TP, fn=fn))


def test_scan_over_a_sharded_stack(mesh):
    spec = P(None, "data", "model")
    stack = jnp.stack([jnp.eye(D) * 0.5 + 0.01 * i for i in range(3)])
    params = {"s": jax.device_put(stack, NamedSharding(mesh, spec))}
    x = jax.device_put(base()[1], NamedSharding(mesh, P("data")))

    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["s"])[0]

    plan = lora.plan(lora.LoraConfig(rank=4, target_modules=("s",), init="random"), fn, params, x)
    lp = lora.init(jax.random.key(1), plan, params)
    assert lp["s"].a.sharding.spec == P(None, "data", None)
    close(jax.jit(lora.lorafy(fn, strict=True))(lp, x), fn(lora.merge(local(lp)), local(x)))


@pytest.mark.parametrize("case", ["batch", "column", "out_sharding"])
def test_explicit_mesh(explicit_mesh, case):
    def column(p, x):
        hidden = jax.sharding.reshard(jnp.tanh(x @ p["w1"]), P("data", None))
        return hidden @ p["w2"]

    def both(p, x):
        hidden = jnp.tanh(x @ p["w1"])
        return jnp.einsum("bf,fd->bd", hidden, p["w2"], out_sharding=P("data", None))

    fn, specs = {
        "batch": (mlp, {"w1": P(), "w2": P()}),
        "column": (column, {"w1": P(None, "model"), "w2": P()}),
        "out_sharding": (both, TP),
    }[case]
    with jax.set_mesh(explicit_mesh):
        lp, x = make(explicit_mesh, specs, fn=fn)
        got = jax.jit(lora.lorafy(fn, strict=True))(lp, x)
        grads = jax.jit(jax.grad(loss(fn)))(*lora.split(lp), x)
    want = mlp(lora.merge(local(lp)), local(x))
    close(got, want)
    reference = jax.grad(loss(mlp))(*lora.split(local(lp)), local(x))
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(reference), strict=True):
        # float32 sums in another order, relative to the largest gradient of the array
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), atol=1e-5 * np.abs(w).max())


def rows_loss(fn, ids):
    def of(trainable, frozen, x):
        y = lora.lorafy(fn)(lora.combine(trainable, frozen), x, adapter_ids=ids)
        return jnp.sum(jnp.sin(y)), y

    return jax.grad(of, has_aux=True)


# JAX finds no place for the scatter of a gather's gradient there; `jax.set_mesh` is the way out.
OUTSIDE = pytest.param(
    False,
    marks=pytest.mark.xfail(jax.__version_info__ >= (0, 12), reason="of JAX 0.12", strict=True),
)


@pytest.mark.parametrize("inside", [True, OUTSIDE])
@pytest.mark.parametrize("rows", [(), ("data",)])
def test_adapters_of_rows_on_an_explicit_mesh(explicit_mesh, rows, inside):
    def place(*spec):
        return NamedSharding(explicit_mesh, P(*spec))

    def fn(p, x):
        return jax.sharding.reshard(jnp.tanh(x @ p["w1"]), place(None, None)) @ p["w2"]

    params, x = base()
    where = {"w1": place(None, "model"), "w2": place()}
    params, ids = jax.tree.map(jax.device_put, params, where), np.arange(16) % 2
    with jax.set_mesh(explicit_mesh) if inside else contextlib.nullcontext():
        x = jax.device_put(x, place(*rows))
        config = lora.LoraConfig(rank=4, target_modules=("w1", "w2"), init="random")
        plan = lora.plan(config, fn, params, x)
        trees = [lora.init(jax.random.key(i), plan, params) for i in range(2)]
        halves = lora.split(lora.stack(trees))
        grads, traced = jax.jit(rows_loss(fn, ids))(*halves, x)
        eager = lora.lorafy(fn)(lora.combine(*halves), x, adapter_ids=ids)
    each = [mlp(lora.merge(local(tree)), local(x)) for tree in trees]
    for got in (traced, eager):
        close(got, np.where(ids[:, None], each[1], each[0]))
        assert got.sharding.is_equivalent_to(place(*rows), 2)
    want, _ = rows_loss(mlp, ids)(*map(local, halves), local(x))
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        # float32 sums in another order, relative to the largest gradient of the array
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), atol=1e-5 * np.abs(w).max())


def test_init_under_jit_on_an_explicit_mesh_shards_the_factors(explicit_mesh):
    with jax.set_mesh(explicit_mesh):
        params, x = base()
        params = {k: jax.device_put(v, NamedSharding(explicit_mesh, TP[k]))
                  for k, v in params.items()}  # fmt: skip
        config = lora.LoraConfig(rank=4, target_modules=("w1",))
        plan = lora.plan(config, mlp_out_sharded, params, x)
        lp = jax.jit(lambda p: lora.init(jax.random.key(0), plan, p))(params)
    assert lp["w1"].b.sharding.spec == P(None, "model")


def mlp_out_sharded(p, x):
    return jnp.einsum("bf,fd->bd", jnp.tanh(x @ p["w1"]), p["w2"], out_sharding=P(None, None))


def test_a_model_keeps_rows_where_their_tokens_are(mesh):
    """Unsaid, the width that the table is spread by would be the residual stream's too."""
    config = models.LlamaConfig(
        vocab_size=96, hidden_size=D, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (16, 12), 0, 96)
    specs = jax.tree.map(lambda x: P(), model.params)
    specs["model"]["embed_tokens"]["embedding"] = P(None, "data")
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs,
                          is_leaf=lambda s: isinstance(s, P))  # fmt: skip
    params = jax.device_put(model.params, places)

    def loss(forward):
        def fn(params, tokens):
            hidden = forward.apply(params, tokens, return_hidden=True)
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.jit(jax.value_and_grad(fn, has_aux=True))

    (_, hidden), want = loss(model.forward)(model.params, tokens)
    told = dataclasses.replace(model.forward, rows=("data",))
    spread = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        run = loss(told).lower(params, spread).compile()
    (_, got), grads = run(params, spread)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
    text = run.as_text()
    assert text is not None and "f32[4,12,64]" in text and "f32[16,12,64]" not in text
    close(got, hidden)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        # float32 sums in another order, through two blocks, relative to the largest of the array
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), atol=2e-4 * np.abs(w).max())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("name", ["row parallel", "table"])
def test_explicit_axes_without_a_mesh_context(name: str, settings, explicit_mesh):
    """plan, init and lorafy run wherever the base function runs: `jax.set_mesh` is not needed."""

    def place(*spec):
        return NamedSharding(explicit_mesh, P(*spec))

    def row_parallel(p, x):  # the contraction is over a sharded dim
        return jnp.einsum("bd,df->bf", x, p["w"], out_sharding=place("data"))

    def table(p, ids):
        return p["w"].at[ids].get(out_sharding=place("data", None))

    fn, x, spec = {
        "row parallel": (row_parallel, base()[1], ("model", None)),
        "table": (table, jnp.arange(16) % D, (None, "model")),
    }[name]
    w = jax.random.normal(jax.random.key(0), (D, 2 * D))
    params, x = {"w": jax.device_put(w, place(*spec))}, jax.device_put(x, place("data"))
    config = lora.LoraConfig(rank=4, target_modules=("w",), **({"init": "random"} | settings))
    plan = lora.plan(config, fn, params, x)
    tree = lora.init(jax.random.key(5), plan, params)
    traced = jax.jit(lambda p: lora.init(jax.random.key(5), plan, p))(params)
    assert traced["w"].a.sharding == tree["w"].a.sharding
    assert traced["w"].b.sharding == tree["w"].b.sharding
    got = jax.jit(lora.lorafy(fn))(tree, x)
    want = jax.jit(fn)(lora.merge(tree), x)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-4)
