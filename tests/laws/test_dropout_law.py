"""Laws of dropout: off without a key, else fresh wherever it should be and the same under remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.transform.low_rank import at_places

from tests.laws.case import normal
from tests.laws.cases import CASES, QUICK, Case, assert_near, model, outputs, with_dropout

pytestmark = pytest.mark.once

KEY = jax.random.key(11)
D = 32
ONES = jnp.ones((6, D))


def masks_of(stack: tuple[int, ...] = (), rate: float = 0.5) -> lora.LoraArray:
    """A leaf whose output column is the sum over kept inputs: it shows the mask that was drawn."""
    roles = "s" * len(stack) + "io"
    return lora.LoraArray(
        w=jnp.zeros((*stack, D, D)),
        a=jnp.ones((*stack, D, 2)),
        b=jnp.ones((*stack, 2, D)),
        scale=jnp.ones(stack, jnp.float32),
        roles=roles,
        dropout=rate,
    )


def drawn(fn, params, key=KEY):
    """The sums that `fn` returns, `(uses, 6, D)`, one column of each."""
    out = jax.jit(lora.lorafy(fn), compiler_options=QUICK)(params, ONES, lora_key=key)
    return np.asarray(out)[..., 0]


def distinct(rows) -> int:
    return len({tuple(row) for row in rows})


def _uses(p, x):
    return jnp.stack([x @ p["w"], x @ p["w"], x @ p["w"]])


def _scan_layers(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]


def _scan_constant(p, x):
    return lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=4)[1]


def _scan_carry(p, x):
    return lax.scan(lambda w, _: (w, x @ w), p["w"], None, length=4)[1]


def _while(p, x):
    def body(c):
        return c[0] + 1, c[1].at[c[0]].set(x @ p["w"])

    return lax.while_loop(lambda c: c[0] < 4, body, (0, jnp.zeros((4, 6, D))))[1]


def _fori(p, x):
    return lax.fori_loop(0, 4, lambda i, o: o.at[i].set(x @ p["w"]), jnp.zeros((4, 6, D)))


def _nested(p, x):
    def outer(c, ws):
        return c, lax.scan(lambda c, w: (c, x @ w), 0, ws)[1]

    return lax.scan(outer, 0, p["w"])[1].reshape(-1, 6, D)


_product = jax.jit(lambda w, x: x @ w)
_remat_product = jax.checkpoint(lambda w, x: x @ w)


def _inner_jit(p, x):
    return jnp.stack([_product(p["w"], x), _product(p["w"], x), x @ p["w"], _product(p["w"], x)])


def _jit_of_layers(p, x):
    return jnp.stack([_product(p["w"][i], x) for i in (0, 1, 0)])


def _remat_twice(p, x):
    return jnp.stack([_remat_product(p["w"], x), _remat_product(p["w"], x), x @ p["w"]])


def _scan_two_uses(p, x):
    return lax.scan(lambda c, w: (c, jnp.stack([x @ w, x @ w])), 0, p["w"])[1].reshape(-1, 6, D)


def _scan_inner_jit(p, x):
    def body(c, w):
        return c, jnp.stack([_product(w, x), _product(w, x)])

    return lax.scan(body, 0, p["w"])[1].reshape(-1, 6, D)


def _static_layers(p, x):
    return jnp.stack([x @ p["w"][i] for i in (0, 1, 2, 1)])


def _gathered(p, x):
    w = p["w"][jnp.array([0, 2, 1])]
    return lax.scan(lambda c, w: (c, x @ w), 0, w)[1]


def _concatenated(p, x):
    both = jnp.concatenate([p["w"], p["v"]], 1)
    return jnp.stack([x @ both, x @ both])


def _switched(p, x):
    branch = lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 0 * x @ w, p["w"])
    return jnp.stack([branch, x @ p["w"]])


FRESH = {
    "two uses": (_uses, (), 3),
    "scanned layers": (_scan_layers, (4,), 4),
    "constant of a scan": (_scan_constant, (), 4),
    "carry of a scan": (_scan_carry, (), 4),
    "while": (_while, (), 4),
    "fori": (_fori, (), 4),
    "nested scans": (_nested, (2, 3), 6),
    "two uses in a scan": (_scan_two_uses, (3,), 6),
    "a jitted function called again": (_inner_jit, (), 4),
    "a jitted function on layers": (_jit_of_layers, (3,), 3),
    "a jitted function in a scan": (_scan_inner_jit, (3,), 6),
    "checkpoint called again": (_remat_twice, (), 3),
    "layers by static index": (_static_layers, (3,), 4),
    "gathered layers": (_gathered, (3,), 3),
    "a branch and a use after it": (_switched, (), 2),
}


@pytest.mark.parametrize("name", FRESH)
def test_masks_are_fresh(name: str):
    """Every use draws its own mask; the same key draws the same again, another key others."""
    fn, stack, uses = FRESH[name]
    params = {"w": masks_of(stack)}
    rows = drawn(fn, params)
    assert rows.shape[0] == uses and distinct(rows) == uses
    # Within one use, each row of the batch is masked by itself.
    assert all(distinct(row.reshape(-1, 1)) > 1 for row in rows)
    run = jax.jit(lora.lorafy(fn), compiler_options=QUICK)
    again, other = (run(params, ONES, lora_key=k)[..., 0] for k in (KEY, jax.random.key(12)))
    np.testing.assert_array_equal(rows, again)
    assert not np.array_equal(rows, other)


@pytest.mark.parametrize("name", FRESH)
def test_without_a_key_nothing_is_dropped(name: str):
    fn, stack, uses = FRESH[name]
    run = jax.jit(lora.lorafy(fn), compiler_options=QUICK)
    out = run({"w": masks_of(stack)}, ONES)
    np.testing.assert_array_equal(np.asarray(out), np.full((uses, 6, D), 2.0 * D))


@pytest.mark.parametrize("name", ["two uses", "scanned layers", "a jitted function in a scan"])
def test_gradients_see_the_masks_of_the_forward(name: str):
    """With `W = 0` the output is linear in A and in B: `<grad A, A> = <grad B, B> = value`."""
    fn, stack, _ = FRESH[name]
    trainable, frozen = lora.split({"w": masks_of(stack)})

    def value(reverse_only):
        adapted = lora.lorafy(fn, reverse_only=reverse_only)
        return jax.value_and_grad(
            lambda t: jnp.sum(adapted(lora.combine(t, frozen), ONES, lora_key=KEY)) / 1000
        )

    def both(t):
        return value(False)(t), value(True)(t)

    (total, plain), (same, reverse) = jax.jit(both, compiler_options=QUICK)(trainable)
    assert_near((same, reverse), (total, plain), 1e-5, name)
    # Sums of some ten thousand float32 numbers.
    for factor in ("a", "b"):
        inner = jnp.vdot(getattr(plain["w"], factor), getattr(trainable["w"], factor))
        assert float(jnp.abs(inner - total)) <= 1e-4 * float(total)


def test_kept_inputs_are_scaled_up():
    """Each output is the count of kept inputs over 1 - p; the mean over many is the whole sum."""
    params = {"w": masks_of(rate=0.25)}
    x = jnp.ones((2000, D))
    out = jax.jit(lora.lorafy(lambda p, x: x @ p["w"]))(params, x, lora_key=KEY)[:, 0]
    kept = np.asarray(out) * 0.75 / 2
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    # Standard error of the mean of 2000 sums of 32 coins: 2·√(32·0.25/0.75/2000) = 0.15.
    assert abs(float(out.mean()) - 2 * D) < 0.7


def test_masks_at_places_are_the_places_own():
    """Whatever rows are computed together, and in whatever order."""
    places = jnp.array([4, 9, 0, 2, 7, 5])
    run = lora.lorafy(lambda p, x, places: x @ at_places(p, places)["w"])
    whole = run({"w": masks_of()}, ONES, places, lora_key=KEY)
    assert distinct(whole.tolist()) > 1
    some = run({"w": masks_of()}, ONES[:3], places[3:], lora_key=KEY)
    np.testing.assert_array_equal(some, whole[3:])


def test_concatenated_weights_are_dropped_out():
    params = {"w": masks_of(), "v": masks_of()}
    rows = np.asarray(jax.jit(lora.lorafy(_concatenated))(params, ONES, lora_key=KEY))
    assert distinct(rows[..., 0]) == 2
    assert 0 < rows.min() < rows.max()


def test_leaves_of_one_tree_draw_apart():
    params = {"w": masks_of(), "v": masks_of()}
    rows = drawn(lambda p, x: jnp.stack([x @ p["w"], x @ p["v"]]), params)
    assert distinct(rows) == 2


def test_old_style_keys_work():
    params = {"w": masks_of((3,))}
    rows = drawn(_scan_layers, params, jax.random.PRNGKey(3))
    np.testing.assert_array_equal(rows, drawn(_scan_layers, params, jax.random.key(3)))
    assert distinct(rows) == 3


@pytest.mark.parametrize(
    "policy",
    [None, "dots_saveable", pytest.param("everything_saveable", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("where", ["block", "scan body", "inner jit"])
def test_remat_changes_neither_value_nor_gradient(where: str, policy: str | None):
    """The recomputed forward draws the very masks of the first one, bit for bit."""
    stacked = where != "inner jit"
    leaf = lora.LoraArray(
        normal(1, *((3,) if stacked else ()), D, D, scale=0.1),
        normal(2, *((3,) if stacked else ()), D, 2),
        normal(3, *((3,) if stacked else ()), 2, D),
        jnp.ones((3,) if stacked else (), jnp.float32),
        roles="sio" if stacked else "io",
        dropout=0.5,
    )
    saved = getattr(jax.checkpoint_policies, policy) if policy else None

    def model_with(wrap):
        def layer(c, w):
            return jnp.tanh(c @ w) + jnp.sin(c @ w), None

        def block(c, w):
            return layer(c, w)[0]

        if where == "scan body":
            return lambda p, x: lax.scan(wrap(layer), x, p["w"])[0]
        if where == "inner jit":
            return lambda p, x: wrap(jax.jit(block))(wrap(jax.jit(block))(x, p["w"]), p["w"])

        def loop(p, x):
            for i in range(3):
                x = wrap(block)(x, p["w"][i])
            return x

        return loop

    def run(wrap):
        trainable, frozen = lora.split({"w": leaf})

        def value(t):
            full = lora.combine(t, frozen)
            return jnp.sum(lora.lorafy(model_with(wrap))(full, ONES, lora_key=KEY) ** 2)

        return jax.jit(jax.value_and_grad(value), compiler_options=QUICK)(trainable)

    plain = run(lambda f: f)
    remat = run(lambda f: jax.checkpoint(f, policy=saved))
    # Not bit for bit only because XLA may fuse a recomputed product otherwise.
    assert_near(remat, plain, 1e-5, where)


def test_vmap_inside_draws_for_every_example_and_outside_once():
    params = {"w": masks_of()}
    inside = drawn(lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), params)
    assert len(set(inside.tolist())) > 2
    outside = jax.vmap(lambda x: lora.lorafy(lambda p, x: x @ p["w"])(params, x, lora_key=KEY))
    assert len(set(np.asarray(outside(ONES))[:, 0].tolist())) == 1
    keys = jax.random.split(KEY, 6)
    each = jax.vmap(lambda x, k: lora.lorafy(lambda p, x: x @ p["w"])(params, x, lora_key=k))
    assert len(set(np.asarray(each(ONES, keys))[:, 0].tolist())) > 2


DROPPING = tuple(c for c in CASES if c.dropout and not c.fallbacks)[::8]


@pytest.mark.parametrize("case", DROPPING, ids=str)
def test_a_vanishing_rate_is_no_dropout(case: Case):
    """Every eighth case: with a key and a rate that keeps all, the outputs are those without."""
    made = model(case.name)
    tiny = with_dropout(made.lora_params, 1e-12)
    run = jax.jit(lora.lorafy(made.fn), compiler_options=QUICK)
    want = outputs(run(made.lora_params, *made.args))
    assert_near(outputs(run(tiny, *made.args, lora_key=KEY)), want, case.tolerance, str(case))
