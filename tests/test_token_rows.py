"""`trainable_token_indices`: some rows of a table train, absolute values, the others stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.array import RowsArray

from tests.support.random_arrays import normal

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
V, D = 11, 4
IDS = (7, 2, 9)
TOKENS = jnp.array([[2, 3, 7, 7], [0, 9, 10, 2]])


PARAMS = {
    "embed_tokens": {"embedding": normal(1, V, D)},
    "types": {"embedding": normal(2, 3, D)},
    "proj": {"kernel": normal(3, D, D)},
    "lm_head": {"kernel": normal(4, D, V)},
}


def features(params, tokens):
    x = params["embed_tokens"]["embedding"][tokens] + params["types"]["embedding"][tokens % 3]
    return jnp.tanh(x @ params["proj"]["kernel"])


def tied(params, tokens):
    return features(params, tokens) @ params["embed_tokens"]["embedding"].T


def untied(params, tokens):
    return features(params, tokens) @ params["lm_head"]["kernel"]


def adapted(fn, ids, **fields):
    config = lora.LoraConfig(
        rank=2, target_modules=("proj",), trainable_token_indices=ids, init="random", **fields
    )
    plan = lora.plan(config, fn, PARAMS, TOKENS)
    tree = lora.init(KEY, plan, PARAMS)

    def move(x):
        return dataclasses.replace(x, rows=x.rows + 1) if isinstance(x, RowsArray) else x

    return jax.tree.map(move, tree, is_leaf=lora.is_lora), plan


@pytest.mark.parametrize("fn", [tied, untied])
def test_rows_are_replaced_and_a_tied_head_follows(fn):
    tree, plan = adapted(fn, IDS)
    leaf = tree["embed_tokens"]["embedding"]
    assert (leaf.ids, leaf.axis, leaf.rows.shape) == (IDS, 0, (3, D))
    assert plan.trainable == 3 * D + 2 * (D + D) and "3 trainable rows" in str(plan)
    expected = np.array(PARAMS["embed_tokens"]["embedding"])
    expected[list(IDS)] += 1
    merged = lora.merge(tree)
    np.testing.assert_allclose(merged["embed_tokens"]["embedding"], expected, atol=1e-6)
    got = jax.jit(lora.lorafy(fn, strict=True))(tree, TOKENS)  # strict: nothing is added up
    np.testing.assert_allclose(got, fn(merged, TOKENS), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, lora.unmerge(merged, tree), PARAMS)


def test_gradients_and_optimizer_state_are_of_the_rows_only():
    tree, _ = adapted(tied, IDS)
    trainable, frozen = lora.split(tree)

    def loss(trainable):
        return jnp.sum(jnp.sin(lora.lorafy(tied)(lora.combine(trainable, frozen), TOKENS)))

    def plain(rows):
        table = PARAMS["embed_tokens"]["embedding"].at[jnp.array(IDS)].set(rows)
        return jnp.sum(jnp.sin(tied({**lora.merge(tree), "embed_tokens": {"embedding": table}},
                                    TOKENS)))  # fmt: skip

    got = jax.grad(loss)(trainable)["embed_tokens"]["embedding"].rows
    expected = jax.grad(plain)(tree["embed_tokens"]["embedding"].rows)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    state = lora.masked(optax.adam(1e-3)).init(tree)
    assert {x.shape for x in jax.tree.leaves(state) if x.ndim} == {(3, D), (D, 2), (2, D)}


def test_nothing_as_large_as_the_table_is_made():
    """The jaxpr of a step holds no (V, D) array but the table: rows are looked up and added."""
    tree, _ = adapted(tied, IDS)
    trainable, frozen = lora.split(tree)

    def loss(trainable, frozen):
        return jnp.sum(lora.lorafy(tied)(lora.combine(trainable, frozen), TOKENS))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable, frozen)
    table_sized = [
        eqn.primitive.name
        for eqn in jaxpr.eqns
        for v in eqn.outvars
        if getattr(v.aval, "shape", ()) in ((V, D), (D, V))
    ]
    assert set(table_sized) <= {"transpose", "stop_gradient"}, table_sized


def test_specs_follow_the_tables():
    P = jax.sharding.PartitionSpec
    tree, _ = adapted(untied, {"lm_head": IDS, "embed_tokens": (1,)}, lora_bias=True)
    specs = jax.tree.map(lambda w: P("model", None), PARAMS)
    specs["lm_head"]["kernel"] = P(None, "model")
    specs["proj"]["kernel"] = P("data", "model")
    found = lora.partition_specs(tree, specs)
    table, head = found["embed_tokens"]["embedding"], found["lm_head"]["kernel"]
    assert (table.w, table.rows) == (P("model", None), P(None, None))
    assert (head.w, head.rows) == (P(None, "model"), P(None, None))
    assert found["proj"]["kernel"].bias == P("model")


def test_inside_an_nnx_module():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, rngs=rngs)
            self.proj = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.proj(self.embed(tokens)))

    net = Net(nnx.Rngs(0))
    config = lora.LoraConfig(
        rank=2, target_modules=("proj",), trainable_token_indices=IDS, lora_bias=True
    )
    model = lora.nnx.adapt(net, config, TOKENS, key=KEY)
    np.testing.assert_allclose(model(TOKENS), net(TOKENS), atol=1e-6)
    rows = model.adapters["embed/embedding"]["rows"]
    rows.set_value(rows.get_value() + 1)
    model.adapters["proj/kernel"]["bias"].set_value(jnp.arange(D, dtype=jnp.float32))
    np.testing.assert_allclose(lora.nnx.merged(model)(TOKENS), model(TOKENS), atol=1e-5)


def test_a_head_of_its_own_by_name():
    tree, _ = adapted(untied, {"lm_head": IDS, "embed_tokens": (1,)})
    head = tree["lm_head"]["kernel"]
    assert (head.axis, head.rows.shape) == (1, (3, D))
    got = lora.lorafy(untied, strict=True)(tree, TOKENS)
    np.testing.assert_allclose(got, untied(lora.merge(tree), TOKENS), atol=1e-5)


def test_bfloat16_tables_keep_their_dtype_and_rows_are_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    config = lora.LoraConfig(rank=2, target_modules=("proj",), trainable_token_indices=IDS)
    tree = lora.init(KEY, lora.plan(config, tied, params, TOKENS), params)
    assert tree["embed_tokens"]["embedding"].rows.dtype == jnp.float32
    assert lora.merge(tree)["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(lora.lorafy(tied)(tree, TOKENS), tied(params, TOKENS))


@pytest.mark.parametrize(
    "ids, fields, text",
    [
        ((11,), {}, "`embed_tokens.embedding` has 11 rows, so token 11 is not one of them"),
        ({"embed": (1,)}, {}, "`embed` matches no table; nearest: `embed_tokens`"),
        ({"embed_tokens": (1,), "tokens": (2,)}, {}, "two of the names .* mean one table"),
        (
            IDS,
            {"target_modules": ("embed_tokens",)},
            "`embed_tokens.embedding` has an adapter alre",
        ),
        (IDS, {"modules_to_save": ("tokens",)}, "`embed_tokens.embedding` trains whole already"),
        (
            {"embed_tokens": IDS},
            {"modules_to_save": ("embed_tokens",)},
            "is in `modules_to_save` and",
        ),
        ((1, 1), {}, r"must be token ids from 0, each once, got \[1, 1\]"),
        ((-1,), {}, "must be token ids from 0"),
        (5, {}, "must be a list of token ids, got 5"),
        ({"embed_tokens": "ab"}, {}, r"trainable_token_indices\['embed_tokens'\]` must be a list"),
    ],
)
def test_refused(ids, fields, text):
    fields = {"target_modules": ("proj",), **fields}
    with pytest.raises((ValueError, TypeError), match=text):
        config = lora.LoraConfig(rank=2, trainable_token_indices=ids, **fields)
        lora.plan(config, untied, PARAMS, TOKENS)


def test_rows_of_a_tied_head_name_its_table():
    config = lora.LoraConfig(
        rank=2, target_modules=("proj",), trainable_token_indices={"lm_head": IDS}
    )
    with pytest.raises(ValueError, match="head is tied to the embedding: name `embed_tokens.embe"):
        lora.plan(config, tied, PARAMS, TOKENS)
