"""Encoders that learn to classify texts: by `fit`, by the recipe, and on a mesh."""

import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.analysis import memory
from lora_jax.array import leaves_by_path
from lora_jax.cli import main
from lora_jax.models.saving import save_model
from lora_jax.quant.array import is_quant
from lora_jax.quant.loading import QuantConfig
from lora_jax.recipes import export, finetune
from lora_jax.recipes.classify import classify_texts, scores
from lora_jax.train import TrainConfig, evaluate, examples, fit, record_of
from lora_jax.train.evaluate import check_causal

from tests.support.tiny import tiny_tokenizer

pytestmark = pytest.mark.once

LABELS = ("book", "cancel")
CLASSES = SimpleNamespace(
    task="sequence-classification", labels=LABELS, problem_type=None, typed=False
)
TEXTS = ("Table for two", "Dinner for 4 guests", "Cancel it", "Please cancel our table")
SIZES = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, initializer_range=0.2,
)  # fmt: skip
KINDS = {
    "bert": {},
    "roberta": {},
    "distilbert": {},
    "electra": dict(embedding_size=16),
    "modernbert": dict(classifier_pooling="mean", local_attention=4),
    "deberta-v2": dict(
        relative_attention=True, position_buckets=8, share_att_key=True,
        pos_att_type="p2c|c2p", position_biased_input=False, norm_rel_ebd="layer_norm",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The directory of a kind's bare encoder, with a tokenizer."""

    def make(kind: str):
        place = tmp_path_factory.mktemp("bare") / kind
        config = models.BertConfig.from_hf({**SIZES, **KINDS.get(kind, {}), "model_type": kind})
        fresh = models.init(jax.random.key(0), config)
        model = models.Model(fresh.forward, fresh.params, tiny_tokenizer())
        save_model(place, model, model.params)
        return place

    return make


def head_of(directory, **options):
    return models.load(directory, labels=LABELS, fresh_head=jax.random.key(1), **options)


def data_of(model, texts=TEXTS):
    rows = [{"text": text, "label": i // 2 % 2} for i, text in enumerate(texts)]
    records = [record_of(row) for row in rows]
    return examples(records, model.tokenizer, max_length=64, config=model.config)


def adapted(model):
    config = finetune.with_head(model, lora.LoraConfig(rank=2))
    plan = lora.plan(config, model.apply, model.params, jnp.zeros((1, 4), jnp.int32))
    return config, lora.init(jax.random.key(0), plan, model.params)


def losses(model, params, data):
    """The cross entropy of each text's class, each text alone and without padding."""
    run = lora.lorafy(model.apply)
    texts = [(jnp.asarray(each.tokens[None]), int(each.targets[0])) for each in data]
    return [float(-jax.nn.log_softmax(run(params, text))[0, at]) for text, at in texts]


def settings(**more):
    return TrainConfig(batch_size=4, progress=False, tensorboard=False, buckets=1, **more)


@pytest.mark.parametrize(
    "kind", [k if k == "deberta-v2" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_the_loss_is_that_of_texts_alone(bare, kind):
    """No text attends to its class or to padding, and the classes are learned."""
    model = head_of(bare(kind))
    (config, params), data = adapted(model), data_of(model)
    assert config.extra["task_type"] == "SEQ_CLS" and "classifier" in config.modules_to_save
    run = settings(steps=8, learning_rate=0.01)
    result = fit(model, params, data, None, run, lora_config=config)
    want = losses(model, params, data)
    # float32, of a batch of another shape.
    np.testing.assert_allclose(result.history[0]["loss"], np.mean(want), atol=1e-4)
    np.testing.assert_allclose(
        evaluate(model, params, data, batch_size=3), np.mean(want), atol=1e-4
    )
    assert np.mean(losses(model, result.lora_params, data)) < 0.7 * np.mean(want)
    # More rows in a batch than a row has tokens.
    rows = max(len(each.tokens) for each in data) + 6
    found = evaluate(model, params, [data[2]] * (rows - 1) + [data[0]], batch_size=rows)
    np.testing.assert_allclose(found, (want[2] * (rows - 1) + want[0]) / rows, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_the_recipe_writes_the_whole_head(bare, kind, tmp_path, capsys):
    place = bare(kind)
    rows = [{"text": text, "label": LABELS[i // 2]} for i, text in enumerate(TEXTS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = finetune.FinetuneConfig(
        model=str(place), train_data=tmp_path / "data.jsonl", labels=LABELS,
        eval_data=tmp_path / "data.jsonl",
    )  # fmt: skip
    run, lines = settings(steps=2, output_dir=tmp_path / "out"), []
    result = finetune.finetune(job, lora.LoraConfig(rank=2), run, log=lines.append)
    adapter = tmp_path / "out" / "adapter"
    fields = json.loads((adapter / "adapter_config.json").read_text())
    more = {"bert": ["classifier", "pooler"], "modernbert": ["classifier", "head"]}[kind]
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", more)
    export.merge_adapter(str(place), adapter, tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    assert merged.config.labels == LABELS
    want = lora.merge(result.lora_params)
    # float32, summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params, want)

    found = classify_texts(merged, merged.params, TEXTS, batch_size=3)
    shares = [
        np.asarray(jax.nn.softmax(merged.apply(merged.params, jnp.asarray([row]))))[0]
        for row in map(merged.tokenizer.encode, TEXTS)
    ]
    assert [each.label for each in found] == [LABELS[share.argmax()] for share in shares]
    right = np.mean([each.label == LABELS[i // 2] for i, each in enumerate(found)])
    assert lines[-2] == f"accuracy {right:.3f} on the 4 texts of {job.eval_data}"
    np.testing.assert_allclose([x.probability for x in found], [x.max() for x in shares], atol=1e-5)
    with pytest.raises(ValueError, match="a text has 81 tokens, more than the model's context of"):
        classify_texts(merged, merged.params, ["9" * 81])
    capsys.readouterr()
    assert main(["generate", str(place), "--adapter", str(adapter), TEXTS[0]]) == 0
    label, share = capsys.readouterr().out.split()
    assert (label, float(share)) == (found[0].label, round(found[0].probability, 3))


HELD = [("bert", "int8"), ("bert", "uint4"), *((kind, "nf4") for kind in KINDS)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, form", HELD)
def test_a_quantized_base_trains_as_its_floats(bare, kind, form):
    model = head_of(bare(kind), quantize=QuantConfig(format=form, block_size=16))
    paths = {path: is_quant(leaf) for path, leaf in leaves_by_path(model.params).items()}
    head = ("classifier", "head", "pooler", "pre_classifier")
    inside = {p for p in paths if p.endswith("kernel") and not set(p.split(".")) & set(head)}
    assert {path for path, quantized in paths.items() if quantized} == inside
    floats = models.Model(model.forward, lora.dequantize(model.params), model.tokenizer)
    run, found = settings(steps=4, learning_rate=0.01), []
    for each in (model, floats):
        config, params = adapted(each)
        result = fit(each, params, data_of(each), None, run, lora_config=config)
        found.append([line["loss"] for line in result.history if "loss" in line])
        found[-1].append(evaluate(each, result.lora_params, data_of(each), batch_size=4))
        merged = lora.merge(result.lora_params)
        np.testing.assert_allclose(
            np.mean(losses(floats, merged, data_of(each))), found[-1][-1], atol=1e-4
        )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.slow
def test_a_quantized_encoder_from_rows_to_a_merged_model(bare, tmp_path, capsys):
    place, quantize = bare("bert"), ("--quantize", "nf4", "--quantize-block", "16")
    rows = [{"text": text, "label": LABELS[i // 2]} for i, text in enumerate(TEXTS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, merged = tmp_path / "out", [tmp_path / name for name in ("floats", "blocks")]
    data = str(tmp_path / "data.jsonl")
    run = ("--steps", "2", "--output-dir", str(out), "--labels", *LABELS, "--eval-data", data)
    assert main(["train", "--model", str(place), "--train-data", data, *run, *quantize]) == 0
    adapter = str(out / "adapter")
    assert main(["merge", str(place), adapter, str(merged[0]), *quantize]) == 0
    assert main(["merge", str(place), adapter, str(merged[1]), *quantize, "--requantize"]) == 0
    capsys.readouterr()
    assert main(["generate", str(place), "--adapter", adapter, *quantize, TEXTS[0]]) == 0
    want = capsys.readouterr().out
    assert main(["generate", str(merged[0]), TEXTS[0]]) == 0
    assert capsys.readouterr().out == want
    blocks = models.load(merged[1], quantize="file")
    held = [x for x in leaves_by_path(blocks.params).values() if is_quant(x)]
    assert len(held) == 6 and {x.format for x in held} == {"nf4"}
    fields = json.loads((merged[1] / "config.json").read_text())["quantization_config"]
    left = {"bert.pooler.dense", "classifier", "word_embeddings"}
    assert left <= set(fields["llm_int8_skip_modules"])
    wide = {**SIZES, "model_type": "bert", "hidden_size": 64, "intermediate_size": 128}
    floats, quantized = (
        memory(wide, adapter=lora.LoraConfig(rank=2), quantize=form, length=8).total
        for form in (None, "nf4")
    )
    assert quantized < floats


# The meshes, for the page of families. DeBERTa attends by distance in whole rows.
SPREAD: dict[str, Any] = {
    **dict.fromkeys([*KINDS, "camembert", "xlm-roberta"], dict(fsdp=2, context=2, tensor=2)),
    "deberta-v2": dict(fsdp=2, tensor=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPREAD)
def test_a_mesh_gives_the_losses_of_one_device(bare, kind):
    place, run = bare(kind), settings(steps=4, accumulation=2, learning_rate=0.01)
    found, sizes = [], SPREAD[kind]
    devices = jax.devices()[: math.prod(sizes.values())]
    for options in ({}, {"mesh": models.make_mesh(**sizes, devices=devices)}):
        model = head_of(place, **options)
        config, params = adapted(model)
        result = fit(model, params, data_of(model, TEXTS * 3), None, run, lora_config=config)
        found.append([line["loss"] for line in result.history if "loss" in line])
        # Of two classes the likelier one has more than half.
        each = np.array(losses(model, result.lora_params, data_of(model)))
        right = np.mean(each < np.log(2))
        assert scores(model, result.lora_params, data_of(model)) == {"accuracy": right}
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_classes_without_labels_are_not_lost_in_silence():
    record = record_of({"text": TEXTS[3], "label": 1})
    with pytest.warns(UserWarning, match='"label" is not learned, .*: name the classes in `labels'):
        examples([record], tiny_tokenizer(), max_length=64)


def test_the_end_of_a_long_text_is_kept(bare):
    """As transformers cuts a text: before the tokens that close it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[
            (t, tokenizer.backend.token_to_id(t)) for t in ("<|im_start|>", "<|im_end|>")
        ],
    )
    record = record_of({"text": TEXTS[3], "label": 1})
    (cut,) = examples([record], tokenizer, max_length=5, too_long="truncate", config=CLASSES)
    whole = tokenizer.encode(TEXTS[3])
    assert cut.tokens.tolist() == [*whole[:4], whole[-1]] and cut.targets.tolist() == [1]


def test_an_encoder_of_another_task_is_refused():
    config = models.BertConfig.from_hf({**SIZES, "model_type": "bert"}, task="masked-lm")
    with pytest.raises(ValueError, match="an encoder, .*: pass a decoder, name `labels` to classi"):
        check_causal(models.init(jax.random.key(0), config))
