"""Decoders that classify texts, against transformers, and trained on labels."""

import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import models
from lora_jax.models import config_from_hf
from lora_jax.models.classifier import labels_of
from lora_jax.models.saving import save_merged
from lora_jax.recipes import export, finetune
from lora_jax.train import TrainConfig, examples, fit, record_of

from tests.support import tiny
from tests.support.decoder_checks import (
    check_config_kept,
    positions_of,
    quick_jit,
    without_source,
)
from tests.support.decoders import DELTA, SHARED
from tests.support.oracle import oracle
from tests.support.torch_models import (
    DECODER_SIZES,
    TOLERANCE,
    both_paddings,
    load,
    saver,
    theirs,
    written,
)

pytestmark = pytest.mark.once

PLACE = "models/classifier"
# 96 is no token of the texts.
SIZES = dict(
    DECODER_SIZES, auto="AutoModelForSequenceClassification", num_labels=3, pad_token_id=96
)
NETS = {**DELTA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
GPT2 = {k: v for k, v in SIZES.items() if k in ("auto", "num_labels", "pad_token_id", "vocab_size")}
CASES = {
    "llama": dict(SIZES, model_type="llama", tie_word_embeddings=True),
    "qwen2": dict(SIZES, model_type="qwen2", num_labels=2),
    "qwen3": dict(SIZES, model_type="qwen3", head_dim=8),
    "gemma3": dict(SIZES, model_type="gemma3_text", head_dim=8, sliding_window=4),
    "gemma2": dict(SIZES, model_type="gemma2", head_dim=8, final_logit_softcapping=1.0),
    "mistral": dict(SIZES, model_type="mistral", sliding_window=4, problem_type="regression"),
    "mixtral": dict(SIZES, model_type="mixtral", num_local_experts=3, num_labels=1),
    "phi": dict(SIZES, model_type="phi"),
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    | {"model_type": "gpt_neox"},
    "qwen3_5": dict(SIZES, **NETS, model_type="qwen3_5_text"),
    "qwen3_next": dict(
        SIZES,
        **NETS,
        **SHARED,
        model_type="qwen3_next",
        mlp_only_layers=[1],
    ),
    "gpt2": dict(GPT2, model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
QUICK = ("llama", "gemma3", "gpt2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


def padded():
    """Texts with padding on both sides, all of whose other tokens are real."""
    tokens, mask = both_paddings()
    return np.where(mask, tokens % 96, 96), mask


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_classes_are_transformers(saved, case, tmp_path):
    """The logits with a mask and, of texts padded on the right, without; the files come back."""
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask = padded()
    places = positions_of(mask)
    want = oracle(f"{PLACE}/{case}.logits", lambda: theirs(there(), tokens, mask, places))
    run = quick_jit(model.apply)
    got = np.asarray(run(model.params, tokens, mask=jnp.asarray(mask)))
    assert got.shape == (len(tokens), CASES[case]["num_labels"]) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    np.testing.assert_allclose(run(model.params, tokens[3:]), want[3:], atol=TOLERANCE)
    assert config_from_hf(model.config.to_hf()) == model.config
    again = tmp_path / "again"
    check_config_kept(model, tmp_path / "kept")
    save_merged(again, without_source(model), model.params)

    def read():
        same = (theirs(load(again), tokens, mask, places) == want).all()
        return {"from": written(again), "same": bool(same)}

    assert oracle(f"{PLACE}/{case}.again", read) == {"from": written(again), "same": True}


def test_labels_are_in_the_order_of_their_numbers():
    names = {str(i): f"kind {i}" for i in reversed(range(12))}
    assert labels_of({"id2label": names}) == tuple(f"kind {i}" for i in range(12))
    assert labels_of({}) == ("LABEL_0", "LABEL_1")  # transformers' two


TEXTS = ("Table for two", "Dinner for 4 guests", "Cancel it", "Please cancel our table")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "model")


def fresh(directory):
    return models.load(directory, labels=("book", "cancel"), fresh_head=jax.random.key(1))


def test_a_language_model_gets_a_fresh_head(language_model, tmp_path):
    base, model = models.load(language_model), fresh(language_model)
    assert model.config.labels == ("book", "cancel")
    tokens = jnp.asarray([[5, 9, 3]])
    hidden = base.apply(base.params, tokens, return_hidden=True)[:, -1]
    np.testing.assert_allclose(
        model.apply(model.params, tokens), hidden @ model.params["score"]["kernel"], atol=1e-5
    )  # float32
    save_merged(tmp_path / "saved", model, model.params)
    again = models.load(tmp_path / "saved")
    with pytest.raises(ValueError, match=r'is a classifier, whose classes are its own \("book"'):
        fresh(tmp_path / "saved")
    assert again.config.labels == model.config.labels
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def losses(model, params, data):
    """The cross entropy of each text's class, text by text."""
    texts = [(jnp.asarray(each.tokens[None]), int(each.targets[0])) for each in data]
    run = lora.lorafy(model.apply)
    return [float(-jax.nn.log_softmax(run(params, text))[0, at]) for text, at in texts]


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_learns_the_classes(language_model, packing):
    """The loss is the mean cross entropy of classes, in padded and in packed rows."""
    model = fresh(language_model)
    records = [
        record_of({"text": text, "label": label})
        for text, label in zip(TEXTS, ("book", 0, "cancel", 1), strict=True)
    ]
    data = examples(records, model.tokenizer, max_length=64, config=model.config)
    config = lora.LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=("score",))
    plan = lora.plan(config, model.apply, model.params, jnp.zeros((1, 4), jnp.int32))
    params = lora.init(jax.random.key(0), plan, model.params)
    run = TrainConfig(
        steps=6, batch_size=4, learning_rate=0.01, packing=packing, progress=False, buckets=1
    )
    result = fit(model, params, data, None, run, lora_config=config)
    # float32, of a batch of another shape.
    np.testing.assert_allclose(
        result.history[0]["loss"], np.mean(losses(model, params, data)), atol=1e-4
    )
    assert max(losses(model, result.lora_params, data)) < 0.3


@pytest.mark.slow
def test_the_recipe_trains_and_writes_the_head(language_model, tmp_path):
    rows = [{"text": text, "label": i // 2} for i, text in enumerate(TEXTS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = finetune.FinetuneConfig(
        model=str(language_model), train_data=tmp_path / "data.jsonl", labels=("book", "cancel"),
        eval_data=tmp_path / "data.jsonl",
    )  # fmt: skip
    run = TrainConfig(
        steps=1, batch_size=2, progress=False, tensorboard=False, output_dir=tmp_path / "out"
    )
    finetune.finetune(job, lora.LoraConfig(rank=2), run, log=lambda line: None)
    adapter = tmp_path / "out" / "adapter"
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
    finetune.load_adapter(fresh(language_model), adapter)
    export.merge_adapter(str(language_model), adapter, tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    assert merged.config.labels == ("book", "cancel")
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    np.testing.assert_array_equal(merged.params["score"]["kernel"], head.T)
    with pytest.raises(ValueError, match="trains the head `score`, which this model does not have"):
        finetune.load_adapter(models.load(language_model), adapter)


def test_what_a_classifier_cannot_do_is_refused(language_model):
    model = fresh(language_model)
    record, named = (record_of({"text": "Table", "label": label}) for label in ("book", "eat"))
    with pytest.raises(ValueError, match='"label" must be one of "book", "cancel", .* got \'eat\''):
        examples([named], model.tokenizer, max_length=8, config=model.config)
    (long,) = examples(
        [record], model.tokenizer, max_length=2, too_long="truncate", config=model.config
    )
    assert (len(long.tokens), np.asarray(long.targets).tolist(), list(long.learned)) == (
        2,
        [0],
        [False, True],
    )
    with pytest.raises(
        ValueError, match="`model` has a head for sequence-classification, and writes nothing"
    ):
        models.generate(model, model.params, [[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="`segments` came for a classifier"):
        model.apply(model.params, jnp.ones((1, 2), jnp.int32), segments=jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="`labels`, .* and `fresh_head`, .* come together"):
        models.load(language_model, labels=("a",))


def test_a_text_is_no_list_of_names(tmp_path):
    with pytest.raises(TypeError, match='`labels` must be a list of names, got "ab": a text'):
        models.load(tmp_path, labels=cast(Any, "ab"), fresh_head=jax.random.key(0))
