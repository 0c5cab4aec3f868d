"""Both strategies for many adapters in one batch, and one adapter for each token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import extend, lax
from jax.experimental import checkify

import lora_jax as lora
from lora_jax.dims import factor_shapes
from lora_jax.models.decoding import runner
from lora_jax.transform.many import grouped

from tests.support.random_arrays import moved, normal
from tests.support.tiny import adapter, tiny_model

pytestmark = pytest.mark.once

DIM, VOCAB, LAYERS = 6, 11, 2
SHAPES = {"table": (VOCAB, DIM), "layers": (LAYERS, DIM, DIM), "experts": (3, DIM, DIM)}
PARAMS = {name: normal(k, *shape, scale=0.5) for k, (name, shape) in enumerate(SHAPES.items())}
ROLES = {"table": "io", "layers": "sio", "experts": "sio"}


def model(params, tokens):
    """A lookup, scanned and rematerialized layers with attention, experts, a tied head."""

    @jax.jit
    def mix(x, w):
        q = jnp.tanh(x @ w)
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, x), -1)
        return x + jnp.einsum("bts,bsd->btd", scores, q)

    x = params["table"][tokens]
    x, _ = lax.scan(lambda x, w: (jax.checkpoint(mix)(x, w), None), x, params["layers"])
    x = x + jnp.einsum("btd,edf->btef", x, params["experts"]).max(2)
    return x.reshape(*tokens.shape, 2, DIM // 2).reshape(x.shape) @ params["table"].T


def by_hand(stacked, tokens, ids):
    """The same with every token's weights materialized: `ids (b, t)`."""

    def own(name):
        x = stacked[name]
        delta = x.scale[..., None, None] * (x.a @ x.b)
        full = jnp.moveaxis(jnp.expand_dims(x.w, x.axis) + delta, x.axis, 0)
        if x.gain is not None:
            full = full * jnp.moveaxis(x.gain, x.axis, 0)[..., None, :]
        return jnp.concatenate([full, x.w[None]])[ids]  # (b, t, ...), -1 is the last

    table, layers, experts = own("table"), own("layers"), own("experts")
    x = jnp.take_along_axis(table, tokens[..., None, None], 2)[:, :, 0]
    for layer in range(LAYERS):
        q = jnp.tanh(jnp.einsum("btd,btdf->btf", x, layers[:, :, layer]))
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, x), -1)
        x = x + jnp.einsum("bts,bsd->btd", scores, q)
    x = x + jnp.einsum("btd,btedf->btef", x, experts).max(2)
    return jnp.einsum("btd,btvd->btv", x, table)


BY_HAND = jax.jit(by_hand)
TOKENS = jnp.arange(12).reshape(3, 4) % VOCAB
BY_TOKEN = jnp.array([[0, 1, 2, -1], [2, 2, -1, 0], [1, 1, 1, 1]])


def make(seed, params=PARAMS, **options):
    config = lora.LoraConfig(target_modules=tuple(SHAPES), roles=ROLES, **options)
    plan = lora.plan(config, model, params, TOKENS)
    return moved(lora.init(jax.random.key(seed), plan, params), seed, 0.3)


@pytest.fixture(scope="module")
def adapters():
    return [make(1, rank=2), make(2, rank=3, use_dora=True), make(3, rank=1, alpha=5)]


@pytest.fixture(scope="module")
def stacked(adapters):
    return lora.stack(adapters)


RUNS = {
    strategy: jax.jit(lora.lorafy(model, strict=True, adapter_strategy=strategy))
    for strategy in ("gathered", "grouped", "ragged")
}


@pytest.mark.parametrize("strategy", RUNS)
def test_each_row_and_each_token_has_its_own_adapter(stacked, strategy):
    run, want = RUNS[strategy], BY_HAND
    for ids in (jnp.array([2, -1, 1]), jnp.array([0, 0, 0])):
        got = run(stacked, TOKENS, adapter_ids=ids)
        expected = want(stacked, TOKENS, jnp.broadcast_to(ids[:, None], TOKENS.shape))
        # Only the order of float32 additions differs.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    for ids in (BY_TOKEN, jnp.sort(BY_TOKEN.reshape(-1)).reshape(3, 4)):
        got = run(stacked, TOKENS, adapter_ids=ids)
        np.testing.assert_allclose(got, want(stacked, TOKENS, ids), rtol=1e-4, atol=1e-4)
    assert run._cache_size() == 2  # one for rows, one for tokens, whatever the ids


def test_a_quantized_base_takes_them_too():
    """Rows and tokens, forward and backward, over codes that stay codes."""
    options: dict[str, Any] = dict(format="nf4", block_size=16, pad=True)
    base = lora.quantize(PARAMS, ("layers", "experts"), roles=ROLES, **options)
    some = [make(1, base, rank=2), make(2, base, rank=3)]
    trainable, frozen = lora.split(lora.stack(some, train=True))
    run = lora.lorafy(model, adapter_strategy="grouped")
    floats = lora.dequantize(base)

    def alone(tree):
        return {name: dataclasses.replace(x, w=floats[name]) for name, x in tree.items()}

    def loss(trainable, ids):
        return jnp.sin(run(lora.combine(trainable, frozen), TOKENS, adapter_ids=ids)).sum()

    def loss_by_hand(trainable, ids):
        stack = alone(lora.combine(trainable, frozen))
        return jnp.sin(by_hand(stack, TOKENS, ids)).sum()

    step, oracle = jax.jit(jax.value_and_grad(loss)), jax.jit(jax.value_and_grad(loss_by_hand))
    for ids in (jnp.array([1, -1, 0]), jnp.array([[0, 1, 1, -1], [1, 1, -1, 0], [0, 0, 0, 1]])):
        each = jnp.broadcast_to(ids.reshape(3, -1), TOKENS.shape)
        (got, grads), (want, expected) = step(trainable, ids), oracle(trainable, each)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4 * np.abs(y).max()),
            grads,
            expected,
        )
    # No layer's weight is kept in floats from forward to backward.
    text = str(jax.make_jaxpr(jax.grad(loss))(trainable, ids))
    assert f"u8[{LAYERS},16,{DIM}]" in text and f"f32[{LAYERS},32,{DIM}]" not in text


def test_ids_out_of_range_and_a_damaged_neighbour(stacked):
    broken = dict(stacked, layers=stacked["layers"].__class__(**{
        **vars(stacked["layers"]), "a": stacked["layers"].a.at[:, 1].set(jnp.nan)}))  # fmt: skip
    run = RUNS["grouped"]
    got = run(broken, TOKENS, adapter_ids=jnp.array([0, -1, 1]))
    assert np.isfinite(got[:2]).all() and np.isnan(got[2]).all()
    got = run(stacked, TOKENS, adapter_ids=jnp.array([0, 3, -2]))
    assert np.isfinite(got[0]).all() and np.isnan(got[1:]).all()
    with pytest.raises(
        ValueError, match=r"`adapter_ids` has \[3\], but the stack has adapters 0 to"
    ):
        lora.lorafy(model)(stacked, TOKENS, adapter_ids=BY_TOKEN.at[0, 0].set(3))


def _scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


# One use each, so that a row's NaN comes from it: (model, roles, shape of W, tokens).
USES = {
    "product": (lambda p, x: x @ p["w"], "io", (4, 4), False),
    "transposed": (lambda p, x: x @ p["w"].T, "oi", (4, 4), False),
    "lookup": (lambda p, x: p["w"][x], "io", (5, 4), True),
    "lookup of columns": (lambda p, x: p["w"].T[x], "oi", (4, 5), True),
    "scan": (_scanned, "sio", (2, 4, 4), False),
    "experts": (lambda p, x: jnp.einsum("btd,edf->btef", x, p["w"]), "sio", (3, 4, 4), False),
    "own adapter": (lambda p, x: x @ jnp.diag(jnp.diag(p["w"])), "io", (4, 4), False),
}


@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
@pytest.mark.parametrize(
    "use, strategy",
    [(use, "grouped") for use in USES] + [("product", "gathered"), ("scan", "ragged")],
)
def test_a_traced_id_that_is_no_adapters_gives_nan_in_its_place_alone(use, strategy):
    fn, roles, shape, tokens = USES[use]
    a, b = factor_shapes(shape, roles, 2)
    scale = jnp.ones(shape[:1] if "s" in roles else ())
    leaf = lora.LoraArray(jnp.ones(shape), jnp.ones(a), jnp.ones(b), scale, roles=roles)
    stacked = lora.stack([{"w": leaf}] * 3)
    x = jnp.arange(6).reshape(3, 2) % 5 if tokens else jnp.ones((3, 2, 4))
    run = jax.jit(lora.lorafy(fn, adapter_strategy=strategy))
    for outside in (3, -2, -9, 2**31 - 1, -(2**31)):
        rows = np.isnan(run(stacked, x, adapter_ids=jnp.array([0, outside, -1])))
        assert rows[1].all() and not rows[[0, 2]].any()
        if use == "own adapter":  # which is an error where each token has its own
            continue
        ids = jnp.array([[0, 1], [2, outside], [-1, -1]])
        by_token = np.isnan(run(stacked, x, adapter_ids=ids))
        assert by_token[1, 1].all() and not by_token[[0, 2]].any() and not by_token[1, 0].any()


@pytest.mark.parametrize("part", ["whole", "factors"])
def test_a_chosen_stack_has_nan_where_a_traced_id_is_no_adapters(part):
    w = jnp.ones((3, 2))
    leaves = {
        "whole": lora.SavedArray(w, w + 1),
        "factors": lora.LoraArray(w, jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.float32(1.0)),
    }
    stacked = lora.stack([{"w": leaves[part]}] * 2)
    chosen = jax.jit(lora.select)(stacked, jnp.array([0, -2, 2, -1]))
    y = lora.lorafy(lambda p, x: x @ p["w"])(chosen, jnp.ones((4, 3)))
    np.testing.assert_array_equal(np.isnan(y).all(1), [False, True, True, False])
    np.testing.assert_array_equal(y[3], [3, 3])


@pytest.mark.parametrize("outside", [3, -2])
def test_checkify_makes_a_traced_id_that_is_no_adapters_an_error(stacked, outside):
    run = jax.jit(checkify.checkify(lora.lorafy(model)))
    error, _ = run(stacked, TOKENS, adapter_ids=jnp.array([0, outside, -1]))
    with pytest.raises(
        checkify.JaxRuntimeError,
        match=rf"`adapter_ids` has \[ *0 +{outside} +-1\], but the stack has adapters 0 to 2 ",
    ):
        error.throw()
    error, _ = run(stacked, TOKENS, adapter_ids=jnp.array([0, 2, -1]))
    error.throw()


def test_training_moves_each_tokens_own_adapter(adapters):
    stack = lora.stack([adapters[0], adapters[2], adapters[0]], train=True)
    trainable, frozen = lora.split(stack)
    ids = jnp.array([[0, 2, 2, -1], [2, 2, -1, 0], [0, 0, 0, 2]])

    def grads(run):
        def loss(trainable):
            return jnp.sin(run(lora.combine(trainable, frozen))).sum()

        return jax.jit(jax.grad(loss))(trainable)

    want = grads(lambda tree: by_hand(tree, TOKENS, ids))
    for reverse_only in (False, True):
        run = lora.lorafy(model, adapter_strategy="grouped", reverse_only=reverse_only)
        got = grads(lambda tree, run=run: run(tree, TOKENS, adapter_ids=ids))
        jax.tree.map(
            # Sums of many products of size one, in another order.
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4 * np.abs(y).max()),
            got,
            want,
        )
        leaf = got["layers"].a
        assert (np.asarray(leaf[:, 1]) == 0).all() and np.abs(leaf[:, 0]).max() > 0


def test_no_factor_is_copied_for_every_row():
    rows, dim, rank = 48, 40, 5
    params = {"w": jnp.ones((dim, dim))}

    def fn(p, x):
        return x @ p["w"]

    x = jnp.ones((rows, 1, dim))
    plan = lora.plan(lora.LoraConfig(rank=rank, target_modules=("w",)), fn, params, x)
    stack = lora.stack([lora.init(jax.random.key(k), plan, params) for k in range(2)])
    copies = f"[{rows},{dim},{rank}]", f"[{rows},{rank},{dim}]"
    found = {}
    for strategy in ("gathered", "grouped", None):
        run = jax.jit(lora.lorafy(fn, adapter_strategy=strategy))
        text = run.lower(stack, x, adapter_ids=jnp.zeros(rows, int)).compile().as_text()
        assert text
        found[strategy] = any(shape in text for shape in copies)
    assert found == {"gathered": True, "grouped": False, None: False}


def test_the_strategy_follows_the_shape():
    # Decoding: few adapters for many rows are sorted, as many as rows are gathered.
    assert grouped.choose_strategy(64, 1, 8, 8) == "grouped"
    assert grouped.choose_strategy(64, 1, 2048, 8) == "gathered"
    # A prompt or a training row has more tokens than the rank.
    assert grouped.choose_strategy(8, 512, 4, 8) == "gathered"
    # An adapter for each token.
    assert grouped.choose_strategy(4096, 1, 8, 8) == "grouped"
    assert grouped.tile_size(4096, 8) == 64
    assert grouped.tile_size(1, 8) == 1


@pytest.mark.slow
def test_a_decoder_with_an_adapter_for_each_token():
    """Against the decoder with a cache, which reads the tokens one by one with their adapters."""
    decoder = tiny_model()
    configs = (
        {"rank": 2, "target_modules": ("q_proj", "down_proj", "embed_tokens")},
        {"rank": 3, "use_dora": True, "target_modules": ("v_proj", "o_proj")},
    )
    stack = lora.stack([adapter(decoder, k, **c) for k, c in enumerate(configs)])
    tokens = jnp.array([[5, 6, 7, 8, 9], [3, 1, 4, 1, 5]])
    ids = jnp.array([[0, 0, 1, -1, 1], [-1, 1, 0, 0, 1]])
    forward = decoder.forward
    run = jax.jit(lora.lorafy(lambda p, t: forward.apply(p, t, return_hidden=True)))
    got = run(stack, tokens, adapter_ids=ids)

    @jax.jit
    def step(ids, token, cache):
        return runner(forward, lora.select(stack, ids), 2, 8).apply(token, None, cache)

    cache = runner(forward, lora.select(stack, ids[:, 0]), 2, 8).cache
    for place in range(tokens.shape[1]):
        hidden, cache = step(ids[:, place], tokens[:, place : place + 1], cache)
        np.testing.assert_allclose(got[:, place], hidden[:, 0], rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("memory", [False, True], ids=["self", "cross"])
def test_tokens_are_followed_through_cudnns_attention(adapters, memory, monkeypatch):
    """Traced only: there is no cuDNN here, and JAX asks for its version."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    stacked = lora.stack([{"table": each["table"]} for each in adapters])

    def attending(params, tokens):
        x = params["table"][tokens].astype(jnp.bfloat16)[:, :, None]
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, 8 - DIM),))
        seen = jnp.broadcast_to(x.mean(1, keepdims=True), x.shape) if memory else x
        x = jax.nn.dot_product_attention(x, seen, seen, is_causal=True, implementation="cudnn")
        return x[:, :, 0, :DIM].astype(jnp.float32) @ params["table"].T

    def loss(stacked):
        return lora.lorafy(attending)(stacked, TOKENS, adapter_ids=BY_TOKEN).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(stacked))
    assert "dot_product_attention_fwd" in text and "dot_product_attention_bwd" in text


FLOATS = normal(5, 2, 3, DIM)
WEIGHT = {"w": normal(6, DIM, DIM, scale=0.3)}


def _scanned_inputs(p, x):
    # The tokens are on axis 1 of what is scanned, on axis 0 inside.
    def step(total, y):
        return total + y @ p["w"], y @ p["w"]

    total, each = lax.scan(step, jnp.zeros_like(x), jnp.stack([x, jnp.cos(x)]))
    return total + each[1]


def _carried_later(p, x):
    # The carry has the tokens from its second step on.
    step = lambda y, _: (jnp.tanh(y @ p["w"]) + x, None)  # noqa: E731
    return lax.scan(step, jnp.zeros(x.shape), None, length=3)[0]


def _turned_from_the_left(p, x):
    # The tokens are behind the features of a matrix on the left.
    mix = jnp.cos(jnp.arange(DIM * 2.0 * DIM)).reshape(DIM, 2, DIM)
    y = lax.dot_general(mix, x, (((2,), (2,)), ((), ())))
    return y.transpose(2, 3, 1, 0) @ p["w"]


def _shifted_in_place(p, x):
    return lax.pad(x, 0.0, [(0, 0, 0), (1, -1, 0), (0, 0, 0)]) @ p["w"]


def _reversed(p, x):
    return x[:, ::-1] @ p["w"]


def of_floats(fn):
    config = lora.LoraConfig(rank=1, target_modules=("w",), init="random")
    plan = lora.plan(config, fn, WEIGHT, FLOATS)
    adapters = [lora.init(jax.random.key(seed), plan, WEIGHT) for seed in (1, 2)]
    ids = jnp.array([[0, 1, -1], [1, 1, 0]])
    run = jax.jit(lora.lorafy(fn, strict=True))
    return adapters, ids, lambda: run(lora.stack(adapters), FLOATS, adapter_ids=ids)


@pytest.mark.parametrize("fn", [_scanned_inputs, _carried_later, _turned_from_the_left])
def test_tokens_are_followed_through_loops_and_products(fn):
    adapters, ids, run = of_floats(fn)
    # Position by position, a token is what it would be were its adapter that of all.
    each = jnp.stack([fn(lora.merge(tree), FLOATS) for tree in adapters] + [fn(WEIGHT, FLOATS)])
    chosen = ids.reshape(1, *ids.shape, *[1] * (each.ndim - 3)) % 3
    want = jnp.take_along_axis(each, chosen, 0)[0]
    np.testing.assert_allclose(run(), want, rtol=1e-5, atol=1e-5)


def test_each_token_draws_its_own_dropout():
    """In a sorted product, and where each token takes its adapter out."""
    tree, x = jax.tree.map(jnp.asarray, PARAMS), jnp.ones((1, 4, DIM))
    ids = jnp.array([[1, 1, 1, 1]])
    for name, fn in (
        ("layers", lambda p, x: x @ p["layers"][0]),
        ("experts", lambda p, x: jnp.einsum("btd,edf->btef", x, p["experts"])),
    ):
        config = lora.LoraConfig(rank=2, target_modules=(name,), roles={name: "sio"}, dropout=0.5)
        plan = lora.plan(dataclasses.replace(config, init="random"), fn, tree, x)
        many = lora.stack([lora.init(jax.random.key(s), plan, tree) for s in (1, 2)], train=True)
        run = lora.lorafy(fn, strict=True)
        got = run(many, x, adapter_ids=ids, lora_key=jax.random.key(0))[0]
        assert len(np.unique(np.asarray(got.reshape(4, -1)), axis=0)) == 4
        same = run(many, x, adapter_ids=ids)[0]
        np.testing.assert_allclose(same, jnp.broadcast_to(same[:1], same.shape), rtol=1e-5)


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.parametrize("by_token", [False, True])
def test_a_lookup_outside_a_table_is_the_bases(mode, by_token, stacked, adapters):
    tokens = jnp.array([[0, VOCAB + 2, 3], [-1, 2, 1]])

    def fn(params, tokens):
        where = params["table"].at[tokens]
        return where.get(mode=mode, fill_value=7.0, wrap_negative_indices=False)

    ids = jnp.array([2, 0])
    each = jnp.stack([fn(lora.merge(tree), tokens) for tree in adapters])
    got = lora.lorafy(fn, adapter_strategy="grouped")(
        stacked, tokens, adapter_ids=jnp.repeat(ids[:, None], 3, 1) if by_token else ids
    )
    np.testing.assert_allclose(got, each[ids, jnp.arange(2)], rtol=1e-5, atol=1e-5)


def test_outputs_that_number_no_row_are_refused(stacked):
    def fn(params, tokens):
        return params["table"][tokens].mean(0)

    with pytest.raises(
        ValueError, match=r"shape \(4, 6\) .* no axis of size 1 at 0: set `out_axes`"
    ):
        lora.lorafy(fn)(stacked, TOKENS, adapter_ids=jnp.array([0, 1, 2]))


@pytest.mark.parametrize("fn", [_shifted_in_place, _reversed])
def test_moved_tokens_have_no_adapter_of_their_own(fn):
    with pytest.raises(ValueError, match="the tokens' axis was lost in"):
        of_floats(fn)[-1]()


def test_what_cannot_be_per_token_is_an_error(adapters, stacked):
    def shaped(fn, *args, **options):
        return jax.eval_shape(
            lambda: lora.lorafy(fn, **options)(stacked, *args, adapter_ids=BY_TOKEN)
        )

    def shifted(params, tokens):
        x = params["table"][tokens]
        x = jnp.concatenate([x[:, 1:], x[:, :1]], 1)
        return x @ params["table"].T

    with pytest.raises(ValueError, match="`table` has no adapter for each token in `dot_general`"
                       r".*test_run.py:\d+ \(.*shifted\).*lost in `slice`"):  # fmt: skip
        shaped(shifted, TOKENS)

    def pooled(params, tokens):
        return params["table"][tokens].mean(1) @ params["table"].T

    with pytest.raises(ValueError, match="the tokens' axis was lost in `reduce_sum`"):
        shaped(pooled, TOKENS)

    def convolved(params, tokens):
        x = params["table"][tokens]
        return lax.conv_general_dilated(x, params["experts"], (1,), "SAME",
                                        dimension_numbers=("NTC", "TIO", "NTC"))  # fmt: skip

    with pytest.raises(ValueError, match="a convolution mixes the tokens under its window"):
        shaped(convolved, TOKENS)

    def together(params, tokens):
        return params["table"][tokens].sum(1) + tokens.sum()

    shaped(together, TOKENS)  # the lookup comes before the sum
    with pytest.raises(ValueError, match="no argument has 4 entries along the axis of its tokens"):
        shaped(model, TOKENS[:, :3])
    with pytest.raises(
        ValueError, match="does not have that many along axis 1, which `token_axes` names"
    ):
        shaped(model, TOKENS[:, :3], token_axes=((1,), {}))
    with pytest.raises(
        ValueError, match="`adapter_strategy` must be one of gathered, grouped, ragged"
    ):
        shaped(model, TOKENS, adapter_strategy="sorted")
    config = lora.LoraConfig(rank=1, target_modules=("layers",), modules_to_save=("table",),
                             roles={"layers": "sio"})  # fmt: skip
    plan = lora.plan(config, model, PARAMS, TOKENS)
    saved = lora.stack([lora.init(jax.random.key(0), plan, PARAMS)])
    with pytest.raises(ValueError, match="`table` trains whole in an adapter"):
        lora.lorafy(model)(saved, TOKENS, adapter_ids=jnp.zeros((3, 4), int))


@pytest.mark.parametrize(
    "change",
    [lambda w: w + jnp.cos(w.size), lambda w: jnp.tile(w, (1, 2)), lambda w: lax.complex(w, w.T)],
    ids=["sum", "copies", "complex"],
)
def test_each_token_has_its_adapter_in_a_weight_made_of_weights(change):
    def fn(p, x):
        return x @ change(p["w"])

    adapters, ids, run = of_floats(fn)
    each = jnp.stack([fn(lora.merge(tree), FLOATS) for tree in adapters] + [fn(WEIGHT, FLOATS)])
    want = jnp.take_along_axis(each, ids[None, ..., None] % 3, 0)[0]
    np.testing.assert_allclose(run(), want, rtol=1e-5, atol=1e-5)


def test_each_row_starts_a_loop_from_its_own_adapters_weight():
    """Fast weights, as of a delta rule: the state starts as the parameter, each step changes it."""

    def fn(p, x):
        def step(w, token):
            y = token @ w
            return w - 0.1 * token[:, None] * y, y

        return jax.vmap(lambda x: lax.scan(step, p["w"], x)[1])(x)

    adapters, _, _ = of_floats(lambda p, x: x @ p["w"])
    rows = [fn(tree, FLOATS[k : k + 1]) for k, tree in enumerate([lora.merge(adapters[1]), WEIGHT])]
    run = lora.lorafy(fn, adapter_strategy="grouped")
    with pytest.warns(lora.MaterializedWarning, match="in `scan`.*the loop changes it"):
        got = run(lora.stack(adapters), FLOATS[:2], adapter_ids=jnp.array([1, -1]))
    # Products rounded apart, five steps deep.
    np.testing.assert_allclose(got, jnp.concatenate(rows), rtol=1e-4, atol=1e-5)


def test_an_operation_that_jax_cannot_vmap_names_the_way_out():
    """As `jax.lax.ragged_dot` is on some releases."""
    unmapped = extend.core.Primitive("unmapped")
    unmapped.def_abstract_eval(lambda x: x)
    unmapped.def_impl(lambda x: x)

    def fn(params, x):
        return unmapped.bind(x) @ params["w"]

    params, x = {"w": normal(1, 4, 6)}, normal(2, 2, 4)
    plan = lora.plan(lora.LoraConfig(rank=2, target_modules="w"), fn, params, x)
    tree = lora.init(jax.random.key(0), plan, params)
    with pytest.raises(NotImplementedError, match=r"unmapped.*call it once for each adapter"):
        lora.lorafy(fn)(lora.stack([tree, tree]), x, adapter_ids=np.array([1, 0]))


def test_tokens_of_a_product_with_the_weight_on_the_left():
    """Heads are batched, so that each token's own factors are taken: `(h, o, b, t)`."""
    keys = jax.random.split(jax.random.key(0), 7)
    w = jax.random.normal(keys[0], (2, 3, 4))
    parts = [(jax.random.normal(keys[i], (2, 3, 2)), jax.random.normal(keys[i + 1], (2, 4)))
             for i in (1, 3)]  # fmt: skip
    leaves = [lora.LoraArray(w, a, b, jnp.float32(i + 1), roles="iio")
              for i, (a, b) in enumerate(parts)]  # fmt: skip
    x, ids = jax.random.normal(keys[5], (2, 5, 2, 3)), jnp.array([[0, 1, 1, -1, 0], [1] * 5])

    def heads(p, x):
        return lax.dot_general(p["w"], x, (((1,), (3,)), ((0,), (2,)))).transpose(2, 3, 0, 1)

    stacked = lora.stack([{"w": leaf} for leaf in leaves])
    got = lora.lorafy(heads)(stacked, x, adapter_ids=ids)
    every = jnp.stack([w, *(lora.merge({"w": leaf})["w"] for leaf in leaves)])
    want = jnp.einsum("bthk,bthko->btho", x, every[ids + 1])
    np.testing.assert_allclose(got, want, atol=1e-5)
