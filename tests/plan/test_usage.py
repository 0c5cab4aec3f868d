"""The walk over a base jaxpr: how each leaf is used, dimension by dimension."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.plan import usage
from lora_jax.plan.leaf import Use
from lora_jax.plan.roles import inferred


def uses(fn, *shapes, x=(2, 5, 8), ids=None):
    """The uses of each leaf as (kind, contracted, stacked)."""
    leaves = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    given = jax.ShapeDtypeStruct(x, jnp.float32) if ids is None else ids
    found = usage.usage(fn, leaves, jax.tree.structure(leaves), args=(given,), kwargs={})
    return [[(u.kind, set(u.contracted), set(u.stacked)) for u in each] for each in found.uses]


IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def over(x, ws):
    return lax.scan(lambda c, w: (c @ w, None), x, ws)[0]


@pytest.mark.parametrize(
    ("fn", "shape", "want"),
    [
        (lambda p, x: x @ p[0], (8, 6), ("contract", {0}, set())),
        (lambda p, x: x @ p[0].T, (6, 8), ("contract", {1}, set())),
        (lambda p, x: jnp.einsum("btd,dhk->bthk", x, p[0]), (8, 2, 3), ("contract", {0}, set())),
        (lambda p, x: x @ p[0].reshape(8, 6), (2, 4, 6), ("contract", {0, 1}, set())),
        (lambda p, x: x @ p[0][1], (3, 8, 6), ("contract", {1}, {0})),
        (lambda p, x: x @ p[0][:, jnp.argmax(x) % 3], (8, 3, 6), ("contract", {0}, {1})),
        (lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p[0])[0], (3, 8, 8),
         ("contract", {1}, {0})),
        (lambda p, x: lax.scan(lambda c, ws: (over(c, ws), None), x, p[0])[0], (3, 2, 8, 8),
         ("contract", {2}, {0, 1})),
        (lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, jnp.moveaxis(p[0], 1, 0))[0],
         (8, 3, 8), ("contract", {0}, {1})),
        (lambda p, x: jax.vmap(lambda w, x: x @ w)(p[0], x), (2, 8, 6), ("contract", {1}, {0})),
        (lambda p, x: x @ (p[0] * 3.0), (8, 6), ("contract", {0}, set())),
        (lambda p, x: x @ p[0].reshape(8, 3, 2)[:, 1], (8, 6), ("contract", {0}, set())),
        (lambda p, x: jax.checkpoint(lambda x: jnp.sin(x @ p[0]))(x), (8, 6),
         ("contract", {0}, set())),
        (lambda p, x: lax.cond(x[0, 0, 0] > 0, lambda: x @ p[0], lambda: x), (8, 8),
         ("contract", {0}, set())),
        (lambda p, x: x * p[0], (8,), ("other", set(), set())),
        (lambda p, x: x + p[0][2], (3, 8), ("other", set(), set())),
    ],
)  # fmt: skip
def test_the_first_use(fn, shape, want):
    assert uses(fn, shape)[0][0] == want


def test_a_lookup_and_its_rows_contracted():
    """Rows looked up are a table's; contracted with features afterwards, they were a stack's."""
    assert uses(lambda p, i: p[0][i], (11, 8), ids=IDS)[0] == [("lookup", {0}, set())]
    tied = uses(lambda p, i: jnp.tanh(p[0][i]) @ p[0].T, (11, 8), ids=IDS)[0]
    assert [u[0] for u in tied] == ["lookup", "contract"]
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    chosen = uses(
        lambda p, i: jnp.einsum("nd,ndf->nf", jnp.sin(i[:, None] * jnp.ones(8)), p[0][i]),
        (3, 8, 6), ids=ids)[0]  # fmt: skip
    assert [u[0] for u in chosen] == ["picked", "contract"]
    assert chosen[1] == ("contract", {1}, {0})


def test_a_vector_that_scales_features_is_no_weight():
    """Features are contracted afterwards, and not the vector."""
    row = uses(lambda p, x: (p[0][jnp.argmax(x)] * x[0, 0]) @ p[1], (3, 8), (8, 6))
    vector = uses(lambda p, x: (p[0] * x[0, 0]) @ p[1], (8,), (8, 6))
    assert row == vector == [[("other", set(), set())], [("contract", {0}, set())]]


def test_a_weight_that_divides_data_is_no_weight_afterwards():
    assert uses(lambda p, x: x @ (p[0] / x[0, 0, 0]), (8, 6))[0] == [("contract", {0}, set())]
    assert uses(lambda p, x: x @ (x[0, 0, 0] / p[0]), (8, 6))[0] == [("other", set(), set())]


def test_a_constant_matrix_is_no_activation():
    """Resizing a patch kernel transforms it; what decides is the convolution after it."""

    def fn(p, x):
        kernel = jax.image.resize(p[0], (4, 4, 8, 6), "bilinear")
        return lax.conv_general_dilated(
            x[:, :, None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found = uses(fn, (2, 2, 8, 6))[0]
    assert [u[0] for u in found] == ["transform", "transform", "contract"]
    assert found[-1] == ("contract", {0, 1, 2}, set())


def test_a_kernel_of_fixed_positions_has_its_inputs_from_the_first_product():
    found = uses(lambda p, x: x @ (jnp.tri(5, 8) @ p[0]).T, (8, 6), x=(2, 5, 6))[0]
    assert found == [("transform", {0}, set()), ("contract", {0}, set())]


def test_unused_and_dead_leaves():
    def fn(p, x):
        dead = x @ p[1]
        del dead
        return x @ p[0]

    first, second, third = uses(fn, (8, 6), (8, 6), (8, 6))
    assert len(first) == 1 and len(second) == 1 and third == []


def test_integers_and_scalars_are_no_weights():
    assert not usage.is_weight(jax.ShapeDtypeStruct((), jnp.float32))
    assert not usage.is_weight(jax.ShapeDtypeStruct((2,), jnp.int8))
    assert not usage.is_weight(3.0)
    assert usage.is_weight(jax.ShapeDtypeStruct((2,), jnp.bfloat16))


def test_lines_are_the_models():
    leaves = [jax.ShapeDtypeStruct((8, 6), jnp.float32)]

    def fn(p, x):
        return jax.jit(lambda w, x: x @ w)(p[0], x)

    given = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    found = usage.usage(fn, leaves, jax.tree.structure(leaves), args=(given,), kwargs={})
    assert found.uses[0][0].line.startswith("test_usage.py:")


def test_a_contraction_with_an_argument_decides_before_one_with_a_constant():
    constant = Use("dot_general", "", "contract", frozenset({1}), constant=True)
    argument = Use("dot_general", "", "contract", frozenset({0}))
    assert inferred([constant, argument], (8, 6), set())[0] == "io"


def test_an_axis_that_leaves_no_outputs_is_none_of_experts():
    use = Use("dot_general", "", "contract", frozenset({1}))
    assert inferred([use], (3, 8, 6), {0})[0] == "sio"
    for shape in ((3, 8), (3, 8, 1)):
        assert inferred([use], shape, {0})[0] == "oio"[: len(shape)]


def roles_of(fn, w):
    config = lora.LoraConfig(rank=2, target_modules=("w",))
    params = {"w": w, "other": jnp.ones((8, 4))}
    plan = lora.plan(config, lambda p, x: (fn(p["w"], x), x @ p["other"]), params, jnp.ones((2, 8)))
    return plan.by_path()["w"].roles


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ jnp.roll(w, 1, axis=1),
        lambda w, x: (x @ w[:, :1], x @ w[:, 1:]),
        lambda w, x: x @ jnp.concatenate([w[:, -1:], w[:, :-1]], axis=1),
    ],
)
def test_one_output_apart_is_no_index_of_layers(fn):
    assert roles_of(fn, jnp.ones((8, 6))) == "io"


def test_what_a_counter_takes_is_a_layers_own_and_no_table():
    def fn(p, x):
        def body(x, i):
            kernel, bias = (jnp.take(p[name], i, axis=0) for name in ("kernel", "bias"))
            heads = jnp.einsum("bi,iho->bho", x, kernel) + bias
            return x + heads.reshape(x.shape), None

        # As many positions as the example has: one.
        return lax.scan(body, x + p["positions"][jnp.arange(1)], jnp.arange(3))[0]

    shapes = {"kernel": (3, 8, 2, 4), "bias": (3, 2, 4), "positions": (16, 8)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    plan = lora.plan(lora.LoraConfig(target_modules="all-linear"), fn, params, jnp.ones((2, 8)))
    roles = {leaf.path: leaf.roles for leaf in plan.leaves}
    assert roles == {"kernel": "sioo", "bias": "", "positions": "io"}


def test_a_weight_that_a_loop_carries_beside_features_is_none_of_them():
    def looped(p, x):
        def step(carry, _):
            x, base = carry
            return (jnp.tanh(x @ (base - p["w"])), base / 2), None

        return lax.scan(step, (x, p["base"]), None, length=2)[0][0]

    params = {"base": jnp.ones((8, 8)), "w": jnp.ones((8, 8))}
    plan = lora.plan(lora.LoraConfig(target_modules=".*"), looped, params, jnp.ones((2, 8)))
    assert [leaf.roles for leaf in plan.adapted] == ["io", "io"]


def test_an_index_of_layers_may_keep_its_dim():
    w = jnp.ones((3, 8, 6))
    assert roles_of(lambda w, x: jnp.einsum("bi,lio->blo", x, w[1:2]), w) == "sio"
    assert roles_of(lambda w, x: x @ w[1:2].reshape(8, 6), w) == "sio"


def test_an_array_that_a_function_closes_over_is_data_where_it_has_no_arguments():
    ids, leaf = jnp.array([1, 2]), jax.ShapeDtypeStruct((11, 8), jnp.float32)
    tree = jax.tree.structure([leaf])

    def kinds(fn, *args):
        return [u.kind for u in usage.usage(fn, [leaf], tree, args=args, kwargs={}).uses[0]]

    assert kinds(lambda p: p[0][ids]) == ["lookup"]
    assert kinds(lambda p, x: p[0][ids] + x, jnp.ones(8))[0] == "rows"


@pytest.mark.parametrize(
    ("fn", "shape", "want"),
    [
        # Rows of a memory, weighted and summed.
        (lambda p, ids: jnp.einsum("bt,btd->bd", ids * 0.5, p[0][ids]), (11, 8), "lookup"),
        # Rows contracted with features, as items with a user.
        (
            lambda p, ids: jnp.einsum("btd,bd->bt", p[0][ids], jnp.tile(ids, 2)[:, :8] * 0.5),
            (11, 8),
            "rows",
        ),
        # Rows that a vector of gains multiplies, by an einsum that sums nothing.
        (lambda p, ids: jnp.einsum("btd,d->btd", p[0][ids], jnp.arange(8.0)), (11, 8), "lookup"),
        # A mixture of the chosen experts' weights.
        (lambda p, ids: jnp.einsum("bt,btdf->bdf", ids * 0.5, p[0][ids]), (11, 8, 6), "picked"),
    ],
)
def test_what_is_made_of_looked_up_rows(fn, shape, want):
    assert uses(fn, shape, ids=IDS)[0][0][0] == want


@pytest.mark.parametrize(
    "weight",
    [lambda g, v: g * v / jnp.sqrt(jnp.sum(v**2, 1, keepdims=True)), lambda g, v: g + v],
    ids=["gains", "shifts"],
)
def test_a_dim_of_size_one_that_grows_is_contracted_by_nobody(weight):
    """The gains of a weight norm, (out, 1) as torch keeps them, are a vector of the outputs."""
    params = {"g": jnp.ones((6, 1)), "v": jnp.ones((6, 8))}
    call = lambda p, x: x @ weight(p["g"], p["v"]).T  # noqa: E731
    plan = lora.plan(lora.LoraConfig(rank=1), call, params, jnp.ones((2, 8)))
    assert [(leaf.path, leaf.roles) for leaf in plan.adapted] == [("v", "oi")]
