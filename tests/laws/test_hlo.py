"""Laws on the optimized HLO of a gradient: as much as the same LoRA written by hand, no more.

No dot makes dW, nothing adds W + s·A·B, the number of dots and the temporary memory are those of
hand-written LoRA. Nothing here is a time.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lora

from tests.laws.case import normal
from tests.laws.cases import adapted

LAYERS, D, HIDDEN, RANK, SCALE = 3, 32, 48, 4, 1.5
SHAPES = {"up": (D, HIDDEN), "gate": (D, HIDDEN), "down": (HIDDEN, D)}
X = normal(9, 2, 40, D)


def block(dense, x):
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + dense("down", jax.nn.silu(dense("gate", h)) * dense("up", h))


def base_layer(p, x):
    return block(lambda name, h: h @ p[name], x)


def written_layer(p, x):
    """The same layer with LoRA written by hand: `p[name]` is `(w, a, b)`."""

    def dense(name, h):
        w, a, b = p[name]
        return h @ w + ((h @ a) * SCALE) @ b

    return block(dense, x)


def unrolled(layer):
    def fn(p, x):
        for i in range(LAYERS):
            x = layer(p[f"layer_{i}"], x)
        return x

    return fn


def scanned(layer, remat: bool = False):
    def step(x, p):
        return layer(p, x), None

    return lambda p, x: lax.scan(jax.checkpoint(step) if remat else step, x, p)[0]


def _unrolled_params():
    return {
        f"layer_{i}": {n: normal(10 * i + j, *s) for j, (n, s) in enumerate(SHAPES.items())}
        for i in range(LAYERS)
    }


def _stacked_params():
    return {n: normal(j, LAYERS, *s) for j, (n, s) in enumerate(SHAPES.items())}


MODELS = {
    "unrolled": (unrolled, _unrolled_params),
    "scanned": (scanned, _stacked_params),
    "scanned_remat": (functools.partial(scanned, remat=True), _stacked_params),
}


@functools.cache
def compiled(name: str):
    """The compiled gradients: lorafied and by hand, both for A and B alone."""
    make, params = MODELS[name]
    params = params()
    config = lora.LoraConfig(rank=RANK, alpha=SCALE * RANK, target_modules="all-linear")
    plan = lora.plan(config, make(base_layer), params, X)
    lora_params = adapted(plan, params)
    trainable, frozen = lora.split(lora_params)

    def mine(t, f, x):
        out = lora.lorafy(make(base_layer))(lora.combine(t, f), x)
        return jnp.sum(jnp.sin(out))

    def factors(x):
        return x.a, x.b

    pairs = jax.tree.map(factors, lora_params, is_leaf=lora.is_lora)

    def theirs(ab, base, x):
        full = jax.tree.map(lambda w, pair: (w, *pair), base, ab)
        return jnp.sum(jnp.sin(make(written_layer)(full, x)))

    got = jax.jit(jax.grad(mine)).lower(trainable, frozen, X).compile()
    want = jax.jit(jax.grad(theirs)).lower(pairs, params, X).compile()
    return got, want, got(trainable, frozen, X), want(pairs, params, X)


def dots(text: str | None) -> int:
    assert text
    return len(re.findall(r"= \S+ dot\(", text))


def of_weight_shape(text: str | None) -> list[str]:
    """Operations that make an array of a kernel's shape (or its transpose, or of the stack's)."""
    assert text
    sizes = "|".join([f"{D},{HIDDEN}", f"{HIDDEN},{D}"])
    return re.findall(rf"= f32\[(?:{LAYERS},)?(?:{sizes})\]\S* (?:dot|add|multiply)\(", text)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_lora_written_by_hand(name: str):
    _, _, mine, theirs = compiled(name)
    for got, want in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        # The same products in the same order: float32 roundings of sums over 80 tokens.
        assert float(jnp.max(jnp.abs(got - want))) <= 1e-4 * float(jnp.max(jnp.abs(want)))


@pytest.mark.parametrize("name", MODELS)
def test_as_many_dots_as_by_hand(name: str):
    got, want, *_ = compiled(name)
    assert dots(want.as_text()) > 0
    assert dots(got.as_text()) == dots(want.as_text())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_weights_shape_is_computed(name: str):
    got, *_ = compiled(name)
    assert of_weight_shape(got.as_text()) == []


@pytest.mark.parametrize("name", MODELS)
def test_temporary_memory_is_that_of_lora_written_by_hand(name: str):
    got, want, *_ = compiled(name)
    mine = got.memory_analysis().temp_size_in_bytes
    theirs = want.memory_analysis().temp_size_in_bytes
    assert mine <= 1.05 * theirs, (mine, theirs)


def test_full_gradient_would_be_noticed():
    """The patterns themselves: full fine-tuning and a merged forward have what they look for."""
    params = _unrolled_params()
    full = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(unrolled(base_layer)(p, X)))))
    assert len(of_weight_shape(full.lower(params).compile().as_text())) >= 3 * LAYERS

    def merged(a, b):
        return jnp.sum(jnp.sin(X @ (params["layer_0"]["up"] + a @ b)))

    a, b = normal(1, D, RANK), normal(2, RANK, HIDDEN)
    assert of_weight_shape(jax.jit(merged).lower(a, b).compile().as_text())


def test_scan_saves_no_dense_stack():
    """The jaxpr of a scanned gradient holds the weights' stack as an input only."""
    params = _stacked_params()
    config = lora.LoraConfig(rank=RANK, target_modules="all-linear")
    fn = scanned(base_layer)
    lora_params = adapted(lora.plan(config, fn, params, X), params)
    trainable, frozen = lora.split(lora_params)

    def value(t):
        return jnp.sum(lora.lorafy(fn)(lora.combine(t, frozen), X))

    jaxpr = str(jax.make_jaxpr(jax.grad(value))(trainable))
    made = re.findall(rf":f32\[{LAYERS},(?:{D},{HIDDEN}|{HIDDEN},{D})\] = (?!scan)\w+", jaxpr)
    assert made == []
