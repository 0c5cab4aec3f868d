"""Leaves outside `lora.lorafy`: each use of an array is an error that names it; a repr is short."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lora_jax as lora
from lora_jax.array import LoraStack, SavedStack
from lora_jax.quant.encode import quantize_array

W, X = jnp.ones((4, 4)), jnp.ones((4, 4))
A, B = jnp.ones((4, 2)), jnp.ones((2, 4))

LEAVES = {
    "lora": lora.LoraArray(W, A, B, jnp.ones(())),
    "saved": lora.SavedArray(W, W),
    "rows": lora.RowsArray(W, W[:2], ids=(0, 1)),
    "stack": LoraStack(W, A[None], B[None], jnp.ones((1,))),
    "saved stack": SavedStack(W, W[None]),
    "quantized": quantize_array(W, format="int8", block_size=16, pad=True),
}
USES = {
    "x @ w": lambda w: X @ w,
    "numpy @ w": lambda w: np.ones((4, 4)) @ w,
    "w @ x": lambda w: w @ X,
    "x @ w in jit": lambda w: jax.jit(lambda x: x @ w)(X),
    "w.T": lambda w: X @ w.T,
    "w[0]": lambda w: w[0],
    "w[None]": lambda w: w[None],
    "2 * w": lambda w: 2 * w,
    "w + w": lambda w: w + w,
    "-w": lambda w: -w,
    "dot": lambda w: jnp.dot(X, w),
    "einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "tensordot": lambda w: jnp.tensordot(X, w, 1),
    "take": lambda w: jnp.take(w, 0, axis=0),
    "asarray": lambda w: jnp.asarray(w),
    "numpy": lambda w: np.asarray(w),
    "stack": lambda w: jnp.stack([w, w]),
    "where": lambda w: jnp.where(True, w, 0),
    "softmax": lambda w: jax.nn.softmax(w),
    "reshape": lambda w: w.reshape(-1),
    "iterated": lambda w: list(w),
    "len": lambda w: len(w),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_use_as_an_array_names_lorafy(leaf, use):
    with pytest.raises((TypeError, AttributeError), match=r"`lora\.lorafy\(model\)\(lora_params"):
        USES[use](LEAVES[leaf])


# From Python 3.13 on, an error inside the `PyObject_HasAttr` of jaxlib's C++ is also printed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_function_of_lax_names_lorafy_in_the_cause(leaf):
    w = LEAVES[leaf]
    dims = (((1,), (0,)), ((), ()))
    for use in (lambda w: jax.lax.dot(X, w), lambda w: jax.lax.dot_general(X, w, dims)):
        for call in (use, jax.jit(use)):
            with pytest.raises(TypeError, match="Error interpreting argument") as caught:
                call(w)
            assert "for `lora.lorafy(model)(lora_params, ...)`" in str(caught.value.__cause__)


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_a_tree_for_everything_that_takes_trees(leaf):
    x = LEAVES[leaf]
    assert hasattr(x, "dtype") and not hasattr(x, "T") and bool(x)
    assert jax.tree.structure(x) == jax.tree.structure(copy.deepcopy(x))
    again = pickle.loads(pickle.dumps(x))
    for mine, theirs in zip(jax.tree.leaves(x), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert jax.tree.leaves(jax.jit(lambda x: x)(x))
    optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), x))


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_repr_is_one_short_line(leaf):
    text = repr(LEAVES[leaf])
    assert len(text) < 220 and "\n" not in text
    assert type(LEAVES[leaf]).__name__ in text and "[" in text


def test_a_repr_shows_what_is_there():
    x = LEAVES["lora"]
    assert repr(x) == (
        "LoraArray(w=float32[4,4], a=float32[4,2], b=float32[2,4], scale=float32[], roles='io', "
        "dropout=0.0)"
    )
    trainable, frozen = lora.split(x)
    assert "w=" not in repr(trainable) and "a=" not in repr(frozen)


def test_a_linen_module_names_lorafy():
    module = nn.Dense(4)
    params = module.init(jax.random.key(0), X)
    config = lora.LoraConfig(rank=2, target_modules="all-linear")
    plan = lora.plan(config, module.apply, params, X)
    lora_params = lora.init(jax.random.key(1), plan, params)
    with pytest.raises(TypeError, match="lorafy"):
        module.apply(lora_params, X)
