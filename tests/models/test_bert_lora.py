"""Encoders without torch: padding, blocks stacked or apart, files, and adapters on them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models.saving import save_model

from tests.support.random_arrays import moved

pytestmark = pytest.mark.once

SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    initializer_range=0.3,
)
CONFIGS = {
    "bert": models.BertConfig(task="sequence-classification", labels=("a", "b", "c"), **SIZES),
    "roberta": models.BertConfig(
        model_type="roberta",
        task="sequence-classification",
        pooler=False,
        pad_token_id=1,
        **SIZES,
    ),
    "words": models.BertConfig(task="masked-lm", pooler=False, hidden_act="relu", **SIZES),
}
TOKENS = np.array(jax.random.randint(jax.random.key(5), (2, 9), 2, 61))
MASK = np.arange(9) < np.array([[9], [5]])


def quick(fn):
    """Each case compiles anew and runs once: little optimization halves the time."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def adapted(model, targets):
    """The plan, and adapters that change the logits."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    config = lora.LoraConfig(rank=3, alpha=6, target_modules=targets)
    plan = lora.plan(config, model.apply, model.params, tokens)
    return plan, moved(lora.init(jax.random.key(1), plan, model.params), 2, 0.1)


# RoBERTa's head has two outputs, fewer than the rank.
@pytest.mark.filterwarnings("ignore:target_modules='all-linear' names:lora_jax.LeftOutWarning")
@pytest.mark.parametrize(
    "name, targets, options",
    [
        ("bert", "all-linear", {}),
        ("bert", ("query", "value"), {"scan": False}),
        ("roberta", "all-linear", {"remat": True}),
        ("words", ("word_embeddings", "dense"), {}),
    ],
)
def test_adapters_equal_merged_weights(name, targets, options):
    model = models.init(jax.random.key(0), CONFIGS[name], **options)
    _, params = adapted(model, targets)
    mask = jnp.asarray(MASK)
    got = quick(lora.lorafy(model.apply, strict=True))(params, TOKENS, mask=mask)
    apply = quick(model.apply)
    want = apply(lora.merge(params), TOKENS, mask=mask)
    base = apply(model.params, TOKENS, mask=mask)
    assert np.abs(want - base).max() > 0.01
    # Logits of about 10 in float32, through a norm after every block.
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_query_and_value_mean_what_users_think():
    model = models.init(jax.random.key(0), CONFIGS["bert"])
    plan, _ = adapted(model, ("query", "value"))
    assert [leaf.path for leaf in plan.adapted] == [
        "bert.encoder.layer.attention.self.query.kernel",
        "bert.encoder.layer.attention.self.value.kernel",
    ]
    plan, _ = adapted(model, ("bert.encoder.layer.1.attention.self.query",))
    assert plan.adapted[0].ranks == (0, 3)


def test_all_linear_leaves_out_tables_and_head():
    model = models.init(jax.random.key(0), CONFIGS["bert"])
    plan, _ = adapted(model, "all-linear")
    names = [leaf.path.removesuffix(".kernel") for leaf in plan.adapted]
    inside = "bert.encoder.layer."
    assert sorted(names) == sorted(
        [
            *(f"{inside}attention.self.{name}" for name in ("query", "key", "value")),
            f"{inside}attention.output.dense",
            f"{inside}intermediate.dense",
            f"{inside}output.dense",
            "bert.pooler.dense",
        ]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_stacking_change_nothing(name):
    model = models.init(jax.random.key(0), CONFIGS[name])
    pad = CONFIGS[name].pad_token_id
    assert pad is not None
    tokens = np.where(MASK, TOKENS, pad)
    apply = quick(model.apply)
    got = apply(model.params, tokens, mask=jnp.asarray(MASK))
    alone = apply(model.params, tokens[1:, :5])
    np.testing.assert_allclose(got[1:, :5] if got.ndim == 3 else got[1:], alone, atol=1e-5)
    apart = dataclasses.replace(model.forward, scan=False)
    outer = dict(model.params)
    prefix = CONFIGS[name].kind.prefix
    layers = outer[prefix]["encoder"]["layer"]
    numbered = {str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(2)}
    outer[prefix] = {**outer[prefix], "encoder": {"layer": numbered}}
    each = quick(apart.apply)(outer, tokens, mask=jnp.asarray(MASK))
    np.testing.assert_allclose(each, got, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    model = models.init(jax.random.key(0), CONFIGS[name])
    save_model(tmp_path / "a", model, model.params)
    loaded = models.load(tmp_path / "a")
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_an_encoder_writes_no_text():
    model = models.init(jax.random.key(0), CONFIGS["words"])
    with pytest.raises(ValueError, match="`model` is a `bert`, an encoder"):
        models.generate(model, model.params, [[1, 2]], max_new_tokens=1)


@pytest.mark.parametrize(
    "fields, text",
    [
        (dict(task="translation"), "task `translation` is not one of features, sequence-class"),
        (dict(task="sequence-classification", labels=()), "`labels` is empty"),
        (dict(task="sequence-classification", pooler=False), "needs `pooler` True, got False"),
        (dict(model_type="roberta", pad_token_id=None), "counts positions from `pad_token_id`"),
        (dict(hidden_size=0), "`hidden_size` must be a whole number from 1 to .*, got 0"),
    ],
)
def test_a_config_that_makes_no_sense(fields, text):
    with pytest.raises(ValueError, match=text):
        models.BertConfig(**{**SIZES, **fields})
