"""What third-party models showed, reduced to a few lines of plain JAX, with values and gradients.

Each case names the model it was met in. No package of models is needed here.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

from tests.laws.case import features, normal
from tests.laws.cases import adapted, assert_near, loss, outputs

# Two products rounded apart against one, a few layers deep.
TOLERANCE = 2e-5


def planned(fn, params, *args, **config) -> dict[str, str]:
    """Roles of the leaves that a config adapts."""
    plan = lora.plan(_config(**config), fn, params, *args)
    return {leaf.path: leaf.roles for leaf in plan.adapted}


def _config(**config) -> lora.LoraConfig:
    return lora.LoraConfig(**({"rank": 2, "alpha": 3, "target_modules": "all-linear"} | config))


def check(fn, params, *args, fallbacks: int = 0, **config) -> lora.Plan:
    """Output and gradients of a jitted lorafied function are those through merged weights."""
    plan = lora.plan(_config(**config), fn, params, *args)
    trainable, frozen = lora.split(adapted(plan, params))

    def run(trainable, *args):
        out = lora.lorafy(fn)(lora.combine(trainable, frozen), *args)
        return loss(out), outputs(out)

    def reference(trainable, *args):
        out = fn(lora.merge(lora.combine(trainable, frozen)), *args)
        return loss(out), outputs(out)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = jax.jit(jax.value_and_grad(run, has_aux=True))(trainable, *args)
    want = jax.jit(jax.value_and_grad(reference, has_aux=True))(trainable, *args)
    assert_near(got[0][1], want[0][1], TOLERANCE, "output")
    assert_near(got[1], want[1], 10 * TOLERANCE, "gradient")
    warned = [w for w in caught if issubclass(w.category, lora.MaterializedWarning)]
    assert len(warned) == len(caught) == fallbacks, [str(w.message) for w in caught]
    assert sum(len(leaf.fallbacks) for leaf in plan.adapted) == fallbacks
    return plan


def _resized_positions(p, x):
    """DINOv2: a table of positions resized to the image, and added to the patches."""
    scale = jnp.array([1.5, 1.5], jnp.float32)
    table = jax.image.scale_and_translate(
        p["positions"], (3, 3, 8), (0, 1), scale, jnp.array([0.0, 0.0]), "bicubic"
    )
    return (x + table.reshape(9, 8)) @ p["w"]


RESIZED = {"positions": normal(1, 2, 2, 8), "w": normal(2, 8, 6)}


def test_resized_positions_are_no_linear_layer():
    x = features(2, 9, 8)
    plan = check(_resized_positions, RESIZED, x)
    assert {leaf.path for leaf in plan.adapted} == {"w"}
    assert "mixed with a constant" in plan.by_path()["positions"].reason


def test_resized_positions_can_be_targeted():
    plan = check(_resized_positions, RESIZED, features(2, 9, 8), target_modules=("positions",))
    assert plan.by_path()["positions"].kind == "lora"


def _fixed_positions(p, x):
    """Transformer-XL: a kernel that maps fixed sinusoids, its result contracted with queries."""
    angles = jnp.arange(5)[:, None] / jnp.array([1.0, 3.0, 9.0, 27.0])
    r = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) @ p["r"]["kernel"] + p["r"]["bias"]
    scores = jnp.einsum("btd,sd->bts", x @ p["q"]["kernel"], r)
    return jax.nn.softmax(scores) @ x


def test_kernel_of_fixed_positions():
    params = {
        "r": {"kernel": normal(1, 8, 6), "bias": normal(2, 6)},
        "q": {"kernel": normal(3, 8, 6)},
    }
    plan = check(_fixed_positions, params, features(2, 5, 8))
    assert {x.path: x.roles for x in plan.adapted} == {"r.kernel": "io", "q.kernel": "io"}


def _learned_positions(p, x):
    """GPT-2: rows of a table of positions, by indices that no argument feeds."""
    rows = jnp.take(p["wpe"]["embedding"], jnp.arange(x.shape[1])[None], axis=0)
    return (x + rows) @ p["w"]


def test_learned_positions_are_an_embedding():
    params = {"wpe": {"embedding": normal(1, 7, 8)}, "w": normal(2, 8, 6)}
    x = features(2, 5, 8)
    plan = check(_learned_positions, params, x, target_modules=("wpe", "w"))
    assert plan.by_path()["wpe.embedding"].roles == "io"
    assert plan.by_path()["wpe.embedding"].lookup
    assert planned(_learned_positions, params, x) == {"w": "io"}


def _decoder(p, tokens):
    x = p["embed"][tokens]
    x = x + jax.nn.silu(x @ p["up"]) @ p["down"]
    return x @ (p["out"] if "out" in p else p["embed"].T)


DECODER = {"embed": normal(1, 12, 8), "up": normal(2, 8, 12), "down": normal(3, 12, 8)}
TOKENS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])


def test_hidden_size_equal_to_vocabulary_is_no_head():
    plan = check(_decoder, DECODER, TOKENS)
    assert {leaf.path for leaf in plan.adapted} == {"up", "down"}


def test_head_without_a_head_name():
    plan = check(_decoder, DECODER | {"out": normal(4, 8, 12)}, TOKENS)
    assert {leaf.path for leaf in plan.adapted} == {"up", "down"}
    assert "output head" in plan.by_path()["out"].reason


def _routed(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    return jnp.einsum("bted,bte->btd", jnp.einsum("btd,edf->btef", x, p["experts"]), gates)


def test_router_smaller_than_the_rank():
    """Qwen3-MoE, ELECTRA's one output: "all-linear" leaves them out with a warning."""
    params = {"router": normal(1, 8, 3), "experts": normal(2, 3, 8, 6)}
    with pytest.warns(
        lora.LeftOutWarning, match=r"`router` .*lower `rank`, or set rank_pattern={'"
    ):
        plan = check(_routed, params, features(2, 5, 8), rank=4)
    assert {leaf.path: leaf.roles for leaf in plan.adapted} == {"experts": "oio"}
    assert "`rank` 4 is above the smallest dimension 3" in plan.by_path()["router"].reason
    for config in ({"target_modules": ("router",)}, {"rank": 9}):
        with pytest.raises(ValueError, match=r"above the smallest dimension 3 of `router`"):
            lora.plan(_config(**({"rank": 4} | config)), _routed, params, features(2, 5, 8))
    np.testing.assert_equal(plan.trainable, 4 * (8 + 3 * 6))


def _spectral_norm(p, x):
    """flax's SpectralNorm: the kernel meets a stored vector before it meets features."""
    u = jnp.asarray(np.linspace(0.5, 1.0, 6, dtype=np.float32))[None]
    v = u @ p["w"].T
    v = jax.lax.stop_gradient(v / jnp.linalg.norm(v))
    return x @ (p["w"] / jnp.sum(v @ p["w"] * u))


def test_roles_are_those_that_features_show():
    plan = check(_spectral_norm, {"w": normal(1, 8, 6)}, features(2, 8))
    assert plan.by_path()["w"].roles == "io"


def _vmapped_lookup(p, tokens):
    """Equinox's Embedding: one row by a scalar index, under vmap over positions."""

    def row(i):
        return p["embed"]["weight"][(i,)]

    return jnp.tanh(jax.vmap(jax.vmap(row))(tokens)) @ p["w"]


def test_vmapped_lookup():
    params = {"embed": {"weight": normal(1, 12, 8)}, "w": normal(2, 8, 6)}
    plan = check(_vmapped_lookup, params, TOKENS, target_modules=("embed", "w"))
    assert plan.by_path()["embed.weight"].roles == "io" and plan.by_path()["embed.weight"].lookup
    assert planned(_vmapped_lookup, params, TOKENS) == {"w": "io"}


def test_vmapped_lookup_of_layers():
    def fn(p, x):
        def layer(i):
            return jnp.tanh(x @ jax.lax.dynamic_index_in_dim(p["w"], i, keepdims=False))

        return jax.vmap(layer)(jnp.array([2, 0]))

    plan = check(fn, {"w": normal(1, 3, 8, 6)}, features(2, 8))
    assert plan.by_path()["w"].roles == "sio"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """penzai's named array: the leaf is one attribute further down."""

    data_array: jax.Array


def test_names_of_other_libraries():
    params = {
        "attention.query.weights": Named(normal(1, 8, 6)),
        "multi_head_attention/key": {"w": normal(2, 6, 6)},
        "embed": {"embeddings": normal(3, 12, 8)},
        "gru": {"weight_ih": normal(4, 6, 6)},
    }

    def fn(p, tokens):
        h = jnp.tanh(p["embed"]["embeddings"][tokens] @ p["attention.query.weights"].data_array)
        return jnp.tanh(h @ p["multi_head_attention/key"]["w"]) @ p["gru"]["weight_ih"].T

    plan = check(fn, params, TOKENS, target_modules=("query", "key", "embed", "gru"))
    assert {leaf.path: leaf.roles for leaf in plan.adapted} == {
        "attention.query.weights": "io",
        "multi_head_attention.key.w": "io",
        "embed.embeddings": "io",
        "gru.weight_ih": "oi",
    }
    with pytest.raises(
        ValueError, match="entry .quary. matches no module; nearest: `attention.query`"
    ):
        lora.plan(_config(target_modules=("quary",)), fn, params, TOKENS)


def _modulated(p, x):
    """StyleGAN2: a kernel is scaled for each example before its convolution."""
    w = p["w"][None] * (1 + x.mean((1, 2)))[:, None, None, :, None]
    w = w.transpose(1, 2, 3, 0, 4).reshape(3, 3, 4, 12)
    x = x.transpose(1, 2, 0, 3).reshape(1, 5, 5, 8)
    y = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    return jnp.tanh(y) @ p["out"]


def test_kernel_modulated_for_each_example():
    params = {"w": normal(1, 3, 3, 4, 6), "out": normal(2, 12, 5)}
    x = features(2, 5, 5, 4)
    assert planned(_modulated, params, x) == {"out": "io", "w": "iiio"}
    plan = check(_modulated, params, x, fallbacks=1, target_modules=("w",))
    assert "mixes dims of roles i/o" in plan.by_path()["w"].fallbacks[0].fallback


def test_layers_stacked_under_an_unknown_name():
    """nn.scan's default name: which of the stack's indices are layers is not known."""

    def fn(p, x):
        stack = p["ScanBlock_0"]["dense"]["kernel"]
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0]

    params = {"ScanBlock_0": {"dense": {"kernel": normal(1, 3, 8, 8)}}}
    config = {"target_modules": ("dense",)}
    assert planned(fn, params, features(2, 8), **config) == {"ScanBlock_0.dense.kernel": "sio"}
    with pytest.raises(ValueError, match="stacked under a name that does not show it"):
        lora.plan(_config(**config, layers_to_transform=[1]), fn, params, features(2, 8))


def test_projection_as_wide_as_there_are_positions():
    """CLIP: an unnamed last projection is no head because it has a table of positions' shape."""
    params = {"wpe": {"embedding": normal(1, 7, 8)}, "w": normal(2, 8, 7)}
    assert planned(_learned_positions, params, features(2, 5, 8)) == {"w": "io"}
