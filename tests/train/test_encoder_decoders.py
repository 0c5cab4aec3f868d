"""Encoder-decoders that learn answers: by `fit`, from the command line, over nf4 and on a mesh."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.hf.tokenizer import from_directory
from lora_jax.models.registry import inputs_of
from lora_jax.models.saving import save_model
from lora_jax.train import TrainConfig, evaluate, examples, fit, iterate, loader, record_of

from tests.support.oracle import oracle
from tests.support.their_tokenizers import NAMES, around, backend_of, transformers_reads
from tests.support.tiny import tiny_tokenizer
from tests.support.torch_models import load

pytestmark = [pytest.mark.once, pytest.mark.oracle]

ROWS = (
    ("how are you today", "fine"),
    ("name", "a longer answer than that"),
    ("sum of two and three plus one", "six"),
    ("the end", "no end at all"),
)
FIELDS = dict(
    model_type="t5", d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, eos_token_id=1,
    feed_forward_proj="gated-gelu", decoder_start_token_id=0, initializer_range=0.1,
)  # fmt: skip


# The axes of the mesh that a kind is trained on below; mT5 and UMT5 have the same modules.
SPREAD = {"t5": ("data", "fsdp", "tensor")}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place, tokenizer = tmp_path_factory.mktemp("t5") / "model", tiny_tokenizer()
    config = models.config_from_hf({**FIELDS, "vocab_size": tokenizer.vocab_size})
    fresh = models.init(jax.random.key(0), config)
    model = models.Model(fresh.forward, fresh.params, tokenizer)
    save_model(place, model, model.params)
    return place


def data_of(model, rows=ROWS, **options):
    records = [record_of({"prompt": a, "completion": b}) for a, b in rows]
    return examples(records, model.tokenizer, max_length=64, config=model.config, **options)


def adapted(model):
    config = lora.LoraConfig(rank=2, target_modules="all-linear")
    plan = lora.plan(config, model.apply, model.params, *inputs_of(model.config))
    return config, lora.init(jax.random.key(0), plan, model.params)


def their_loss(directory, data):
    """The mean over all labels, each text alone."""
    import torch

    model, total = load(directory), 0.0
    for each in data:
        labels = torch.tensor(each.tokens[1:])[None].long()
        with torch.no_grad():
            loss = model(input_ids=torch.tensor(each.read)[None].long(), labels=labels).loss
        total += float(loss) * labels.shape[1]
    return total / sum(len(each.tokens) - 1 for each in data)


def test_the_loss_is_transformers_and_falls(directory):
    model = models.load(directory)
    data = data_of(model)
    assert all(each.tokens[0] == 0 and each.tokens[-1] == 1 for each in data)
    want = oracle("train/encoder_decoders/loss", lambda: their_loss(directory, data))
    for batch_size in (1, 3):
        # float32 sums in another order.
        assert abs(evaluate(model, model.params, data, batch_size=batch_size) - want) <= 1e-5
    config, params = adapted(model)
    settings = TrainConfig(steps=20, batch_size=2, learning_rate=1e-2, progress=False, buckets=2)
    result = fit(model, params, data, data, settings, lora_config=config)
    losses = [record["eval_loss"] for record in result.history if record["kind"] == "eval"]
    assert abs(losses[0] - want) <= 1e-5
    assert losses[1] < losses[0] - 0.1


def test_long_texts_are_cut_before_their_ends(directory):
    model = models.load(directory)
    records = [record_of({"prompt": "a b c d e f g h", "completion": "i j k l m n o p"})]
    with pytest.raises(ValueError, match="more than `max_length`, 6"):
        examples(records, model.tokenizer, max_length=6, config=model.config)
    (one,) = examples(
        records, model.tokenizer, max_length=6, config=model.config, too_long="truncate"
    )
    assert one.read is not None
    assert (len(one.read), len(one.tokens), one.learned.sum()) == (6, 7, 6)
    for row, form in (({"text": "a"}, "text"), ({"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}]}, "messages")):  # fmt: skip
        with pytest.raises(ValueError, match=f'learns "completion" from "prompt", got "{form}"'):
            examples([record_of(row)], model.tokenizer, max_length=6, config=model.config)


TEXTS = (
    ("The quick brown fox doesn't jump", "it's lazy 123"),
    ("  two  spaces and <extra_id_0> a tab ", "<extra_id_0> two words </s>"),
    ("a", "Grün ist die Heide — 猫 and longer than the window is"),
)
KINDS = {
    "t5": ("T5Tokenizer", {"extra_ids": 7}, "$A </s>"),
    "mt5": ("T5Tokenizer", {}, "$A </s>"),
    "umt5": ("T5Tokenizer", {}, "$A </s>"),
    # AutoTokenizer follows the file, which puts nothing behind a text.
    "umt5, open": ("PreTrainedTokenizerFast", {}, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [64, 9])
def test_rows_are_those_of_text_target(tmp_path, kind, most):
    """Also its collator's labels, whose padding is -100."""
    name, settings, single = KINDS[kind]
    backend = backend_of("unigram")
    if single is not None:
        backend.post_processor = around(single)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": name, **NAMES, **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind.partition(",")[0]}))
    tokenizer = from_directory(tmp_path)

    def run(theirs):
        from transformers import DataCollatorForSeq2Seq

        cut = dict(max_length=most, truncation=True)
        rows = [theirs(text, text_target=target, **cut) for text, target in TEXTS]
        batch = DataCollatorForSeq2Seq(theirs, return_tensors="np")([dict(row) for row in rows])
        return {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}

    theirs = transformers_reads(f"text_target/{kind}.{most}", tmp_path, run)
    ends = [tokenizer.eos_id] * (tokenizer.closing == 0)
    config = models.config_from_hf({**FIELDS, "vocab_size": 400, "decoder_start_token_id": 3})
    records = [record_of({"prompt": a, "completion": b}) for a, b in TEXTS]
    data = examples(records, tokenizer, max_length=most, config=config, too_long="truncate")
    layout = loader(data, batch_size=len(data), buckets=1)
    (item,) = list(iterate(layout, 1))
    reads, learned = item.batch.reads[0], item.batch.weights[0] > 0
    labels = np.full(item.batch.tokens[0].size, -100)
    labels[item.batch.positions[0][learned]] = item.batch.targets[0][learned]
    labels = labels.reshape(item.batch.tokens[0].shape)
    order = [[d.read.tolist() for d in data].index(row[row >= 0].tolist()) for row in reads]
    for row, own, number in zip(reads, labels, order, strict=True):
        want = [x for x, m in zip(theirs["input_ids"][number], theirs["attention_mask"][number],
                                  strict=True) if m]  # fmt: skip
        assert row[row >= 0].tolist() == want
        # Without a closing token, theirs never learn to end.
        want = [x for x in theirs["labels"][number] if x != -100]
        if ends and want[-1:] != ends:
            want = [*want, *ends] if len(want) < most else [*want[:-1], *ends]
        assert own[own != -100].tolist() == want and (own[len(want) :] == -100).all()
        tokens = item.batch.tokens[0][reads.tolist().index(row.tolist())]
        assert tokens[: len(want)].tolist() == [3, *want[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--quantize", "nf4", "--quantize-block", "32")])
def test_the_command_line_trains_and_generates(more, directory, tmp_path, capsys):
    file, run = tmp_path / "data.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in ROWS))
    options = ["--model", str(directory), "--train-data", str(file), "--output-dir", str(run)]
    options += ["--steps", "150", "--batch-size", "4", "--learning-rate", "2e-2", *more]
    assert main(["train", *options, "--target-modules", "all-linear", "--rank", "8"]) == 0
    fields = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_2_SEQ_LM"
    capsys.readouterr()
    asked = ["generate", str(directory), "--adapter", str(run / "adapter")]
    assert main([*asked, ROWS[0][0], *more]) == 0
    assert ROWS[0][1] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("axis", SPREAD["t5"])
def test_a_mesh_learns_the_same(axis, directory):
    mesh = models.make_mesh(devices=jax.devices()[:2], **{axis: 2})
    found = []
    for place in (None, mesh):
        model = models.load(directory, mesh=place)
        config, params = adapted(model)
        settings = TrainConfig(steps=4, batch_size=2, learning_rate=1e-2, progress=False)
        result = fit(model, params, data_of(model), None, settings, lora_config=config)
        found.append([record["loss"] for record in result.history if record["kind"] == "train"])
    # float32 sums in another order.
    np.testing.assert_allclose(*found, atol=1e-5)
