"""Sweeps of language models: their losses, their BLEU, and `lora-jax sweep` from end to end."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import sacrebleu

from lora_jax import LoraConfig, models, train
from lora_jax.analysis.sweep.config import SweepConfig
from lora_jax.cli import main
from lora_jax.models import loading
from lora_jax.recipes import completions, finetune, sweep
from lora_jax.recipes.generate import generate_texts
from lora_jax.recipes.settings import GenerateConfig
from lora_jax.train import TrainConfig
from lora_jax.train.jsonl import record_of

from tests.support.tiny import tiny_tokenizer, write_tiny

pytestmark = pytest.mark.once

LINES = [
    {"prompt": "area : city centre", "completion": " a place in the city centre ."},
    {"prompt": "area : riverside", "completion": " by the river there is a pub ."},
    {"prompt": "area : riverside", "completion": " it is at the riverside ."},
    {"prompt": "price : cheap | food : English", "completion": " cheap English food ."},
    {"prompt": "food : French", "completion": " a French place ."},
]
RECORDS = [record_of(line, source=f"lines:{i}") for i, line in enumerate(LINES)]
CONFIG = TrainConfig(steps=2, batch_size=2, buckets=1, progress=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(directory):
    return finetune.load_model(str(directory))


def task(model, metric="loss", **options):
    return sweep.language_task(model, RECORDS, RECORDS, RECORDS, CONFIG, metric=metric, **options)


def test_the_loss_is_that_of_training(model):
    made = task(model, answers=GenerateConfig(batch_size=2))
    values = made.score(model.params)
    data = train.examples(RECORDS, model.tokenizer, max_length=256)
    assert values.shape == (5, 2)
    assert sorted(values[:, 1]) == sorted(e.learned.sum() for e in data)
    mean = train.evaluate(model, model.params, data)
    assert made.reduce(values) == pytest.approx(mean, rel=1e-5)
    assert made.tuning is not None
    assert made.tuning(model.params) == pytest.approx(mean, rel=1e-5)
    for values_of_one, example in zip(
        sorted(map(tuple, values)),
        sorted((train.evaluate(model, model.params, [e]) * e.learned.sum(), e.learned.sum())
               for e in data), strict=True,
    ):  # fmt: skip
        assert values_of_one == pytest.approx(example, rel=1e-4)
    batch = next(iter(made.batches(0)))
    assert float(made.loss(model.params, batch)) > 0


def test_bleu_is_sacrebleus_of_the_corpus():
    hypotheses = ["a place in the city .", "it is at the river", "French food ."]
    references = [["a place in the city centre ."], ["by the river", "it is at the riverside ."],
                  ["a French place with food ."]]  # fmt: skip
    values = np.stack([completions.bleu_counts(h, r) for h, r in
                       zip(hypotheses, references, strict=True)])  # fmt: skip
    # sacrebleu wants streams of first and of second references.
    streams = [[r[0] for r in references], [r[-1] for r in references]]
    expected = sacrebleu.corpus_bleu(hypotheses, streams)
    assert completions.bleu_of(values) == pytest.approx(expected.score, abs=1e-9)


def test_records_with_one_prompt_are_references_of_one_example(model):
    made = task(model, "exact", answers=GenerateConfig(max_new_tokens=4))
    values = made.score(model.params)
    assert values.shape == (4,)
    (said,) = generate_texts(
        model, model.params, ["area : riverside"], GenerateConfig(max_new_tokens=4)
    )
    records = [*RECORDS, record_of({"prompt": "area : riverside", "completion": said}, source="x")]
    made = sweep.language_task(
        model, RECORDS, RECORDS, records, CONFIG, metric="exact",
        answers=GenerateConfig(max_new_tokens=4),
    )  # fmt: skip
    assert made.score(model.params)[1] == 1


def test_what_a_sweep_of_text_refuses(model):
    with pytest.raises(ValueError, match="one of loss, exact, bleu"):
        task(model, "rouge")
    with pytest.raises(ValueError, match="batch_size"):
        sweep.language_task(model, RECORDS, RECORDS, RECORDS, TrainConfig(steps=1, accumulation=2))
    with pytest.raises(ValueError, match="the dataset is empty"):
        sweep.language_task(model, RECORDS, RECORDS, [], CONFIG)
    plain = [record_of({"text": "only text"}, source="lines:9")]
    with pytest.raises(ValueError, match="lines:9: completions are generated"):
        sweep.language_task(model, RECORDS, RECORDS, plain, CONFIG, metric="bleu")


@pytest.mark.slow
def test_the_command_from_end_to_end(directory, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES * 3), "utf-8")
    out = tmp_path / "out"
    arguments = [
        "sweep", "--model", str(directory), "--train-data", str(data), "--eval-data", str(data),
        "--metric", "bleu", "--ranks", "1", "2", "--learning-rates", "1e-3", "1e-2",
        "--full-learning-rates", "1e-2", "--together", "4", "--steps", "2", "--batch-size", "4",
        "--buckets", "1", "--max-new-tokens", "4", "--no-progress", "--output-dir", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    # Two steps of a random model: no 4-gram is right.
    assert "tells no ranks apart" in said and "trained 1 (0.001), 1 (0.01), 2 (0.001)" in said
    result = json.loads((out / "result.json").read_text())
    assert [row["rank"] for row in result["rows"]] == ["base", 1, 2, "full"]
    assert (out / "sweep.png").stat().st_size > 1000
    assert (out / "table.txt").read_text().startswith("rank")
    # Once more: nothing is trained, nothing is scored.
    assert main([*arguments, "--resume"]) == 0
    assert "trained 1" not in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text()) == result


def test_the_data_is_checked_before_weights_are_read(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_fill", lambda *arguments: pytest.fail("weights are read"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a b"}\n' * 20, "utf-8")
    config = dataclasses.replace(CONFIG, output_dir=tmp_path / "out")

    def run(**fields):
        job = sweep.LanguageSweepConfig(
            model=str(directory), train_data=data, eval_data=data, **fields
        )
        sweep.sweep_language_model(job, SweepConfig(ranks=(1,)), LoraConfig(), config)

    with pytest.raises(ValueError, match="data.jsonl:1: completions are generated here"):
        run(metric="exact")
    with pytest.raises(ValueError, match="data.jsonl:1: .*max_length"):
        run(max_length=2)
    with pytest.raises(ValueError, match="mesh"):
        run(mesh={"data": 3})


def test_a_training_file_too_small_to_hold_a_tenth_out(tmp_path):
    with pytest.raises(ValueError, match="give `tuning_data`"):
        sweep._held_out(RECORDS, tmp_path / "train.jsonl")


def _made(config, tokenizer):
    return dataclasses.replace(models.init(jax.random.key(0), config), tokenizer=tokenizer)


def _small(kind):
    """A model of the kind, its records, and examples whose lengths differ."""
    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = dict(vocab_size=320, hidden_size=16, intermediate_size=32)
    heads: dict[str, Any] = dict(num_hidden_layers=1, num_attention_heads=2)
    if kind == "t5":
        config: Any = models.T5Config(**sizes, **heads, head_dim=8, num_decoder_layers=1)
        return _made(config, tokenizer), RECORDS
    if kind == "bert":
        config = models.BertConfig(**sizes, **heads, task="sequence-classification",
                                   labels=("a", "b"), max_position_embeddings=64)  # fmt: skip
        rows = [{"text": line["prompt"], "label": "ab"[i % 2]} for i, line in enumerate(LINES)]
        return _made(config, tokenizer), list(map(record_of, rows))
    sizes = {**sizes, "image_size": (8, 8), "patch_size": (4, 4)}
    del sizes["vocab_size"]
    pixels = np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)
    records = [record_of({"image": x, "label": "a"}) for x in pixels]
    config = models.ViTConfig(**sizes, **heads, labels=("a", "b"))
    return models.init(jax.random.key(0), config), records


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_sweeps_read_what_training_reads(kind):
    """The loss is that of `train.evaluate`: of no padding, of the encoder's text and of images."""
    model, records = _small(kind)
    made = sweep.language_task(model, records, records, records, CONFIG)
    if kind == "vit":
        data = train.image_examples(records, model)
    else:
        data = train.examples(records, model.tokenizer, max_length=64, config=model.config)
    alone = [train.evaluate(model, model.params, [e], batch_size=1) for e in data]
    counts = [e.count for e in data]
    mean = np.average(alone, weights=counts)
    assert made.tuning is not None
    assert made.tuning(model.params) == pytest.approx(mean, rel=1e-5)  # float32
    assert made.reduce(made.score(model.params)) == pytest.approx(mean, rel=1e-5)
    batch = next(iter(made.batches(0)))
    assert float(made.loss(model.params, batch)) > 0
