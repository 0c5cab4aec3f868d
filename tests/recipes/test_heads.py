"""Heads of tasks from rows of data to a line on the terminal: `train`, `merge`, `generate`."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from tokenizers.processors import TemplateProcessing

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.models.saving import save_model
from lora_jax.recipes import export, finetune
from lora_jax.recipes.forms import read_trained
from lora_jax.train import TrainConfig, examples, record_of

from tests.support import tiny
from tests.support.gguf_files import tensors_of, tokenizer_keys, write_model
from tests.support.quantized_files import METHODS, in_blocks

pytestmark = pytest.mark.once

SIZES = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, initializer_range=0.2,
)  # fmt: skip
CONTEXT = "Anna booked a table for four at the inn by the sea. Tom came late."
ROWS = {
    "regression": [{"text": "Dinner", "label": 0.5}, {"text": "Cancel it", "label": -2}],
    "multi_label_classification": [
        {"text": "Dinner", "labels": ["a", "b"]}, {"text": "Cancel it", "labels": []},
    ],
    "token-classification": [
        {"tokens": ["Anna", "booked", "it"], "ner_tags": [1, 0, 0]},
        {"tokens": ["Cancel", "Tom's"], "labels": ["O", "P"]},
    ],
    "question-answering": [
        {"question": "Who came?", "context": CONTEXT,
         "answers": {"text": ["Tom"], "answer_start": [CONTEXT.index("Tom")]}},
        {"question": "Where?", "context": CONTEXT,
         "answers": [{"text": "the inn", "answer_start": CONTEXT.index("the inn")}]},
    ],
}  # fmt: skip
SETTINGS = {
    "regression": dict(problem="regression"),
    "multi_label_classification": dict(problem="multi_label_classification", labels=("a", "b")),
    "token-classification": dict(task="token-classification", labels=("O", "P")),
    "question-answering": dict(task="question-answering"),
}
SAYS = {
    "regression": "MSE", "multi_label_classification": "micro-F1",
    "token-classification": "accuracy", "question-answering": "exact match",
}  # fmt: skip


def closing(tokenizer):
    """A tokenizer that opens and closes texts and pairs of texts."""
    special = [(t, tokenizer.backend.token_to_id(t)) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=special,
    )
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Directories of a bare BERT and of a language model."""
    root = tmp_path_factory.mktemp("models")
    sizes = {**SIZES, "max_position_embeddings": 80}
    config = models.BertConfig.from_hf({**sizes, "model_type": "bert"})
    fresh = models.init(jax.random.key(0), config)
    model = models.Model(fresh.forward, fresh.params, closing(tiny.tiny_tokenizer()))
    save_model(root / "bert", model, model.params)
    wide: Any = dict(hidden_size=128, intermediate_size=128, head_dim=32, num_key_value_heads=4)
    model = tiny.tiny_model(**wide)
    write_model(
        root / "m.gguf", model.config, tensors_of(model), GGMLQuantizationType.Q8_0,
        keys=tokenizer_keys(model.tokenizer), eos=model.tokenizer.eos_id,
    )  # fmt: skip
    held = {
        kind: in_blocks(tiny.write_tiny(root / kind, **wide), *made)
        for kind, made in METHODS.items()
    }
    llama = tiny.write_tiny(root / "llama")
    return {"bert": root / "bert", "llama": llama, "gguf": root / "m.gguf", **held}


# A base is held in the blocks of its file where it has some.
EACH = [
    *((kind, goal) for kind in ("bert", "llama", "gguf") for goal in ROWS),
    ("fp8", "multi_label_classification"), ("gptq", "token-classification"),
    ("awq", "question-answering"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "goal"), EACH)
def test_a_head_learns_is_kept_and_answers(place, kind, goal, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS[goal])))
    quantize = None if kind in ("bert", "llama") else "file"
    job = finetune.FinetuneConfig(
        model=str(place[kind]), train_data=data, eval_data=data, quantize=quantize,
        **SETTINGS[goal],
    )  # fmt: skip
    run = TrainConfig(
        batch_size=2, steps=40, learning_rate=0.02, progress=False, tensorboard=False, buckets=1,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    lines = []
    config = lora.LoraConfig(rank=4, target_modules="all-linear")
    result = finetune.finetune(job, config, run, log=lines.append)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < 0.4 * losses[0]
    assert lines[-2].startswith(SAYS[goal]), lines[-2]
    adapter = tmp_path / "out" / "adapter"
    kept = read_trained(adapter)
    assert (kept.labels, kept.problem) == (
        SETTINGS[goal].get("labels", ("LABEL_0",) if goal == "regression" else ()),
        SETTINGS[goal].get("problem"),
    )
    export.merge_adapter(str(place[kind]), adapter, tmp_path / "merged", quantize=quantize)
    merged = models.load(tmp_path / "merged")
    assert merged.config.task == SETTINGS[goal].get("task", "sequence-classification")

    prompts = {
        "regression": "Dinner", "multi_label_classification": "Dinner",
        "token-classification": "Anna booked it",
        "question-answering": json.dumps({"question": "Who came?", "context": CONTEXT}),
    }  # fmt: skip
    capsys.readouterr()
    base = [str(place[kind]), *(("--quantize", quantize) if quantize else ())]
    assert main(["generate", *base, "--adapter", str(adapter), prompts[goal]]) == 0
    by_adapter = capsys.readouterr().out
    assert main(["generate", str(tmp_path / "merged"), prompts[goal]]) == 0
    assert capsys.readouterr().out == by_adapter
    words = by_adapter.split()
    if goal == "regression":
        assert abs(float(by_adapter) - 0.5) < 0.5
    elif goal == "multi_label_classification":
        assert words[0] == "a" and words[2] == "b"
    elif goal == "token-classification":
        row = merged.tokenizer.encoded_words(["Anna", "booked", "it"])
        z = merged.apply(merged.params, jnp.asarray([row.ids]))[0]
        firsts = [row.word_ids.index(number) for number in range(3)]
        assert words[::3] == ["Anna", "booked", "it"]
        assert words[1::3] == [merged.config.labels[z[at].argmax()] for at in firsts]
    else:
        assert by_adapter == "Tom\n"


def of(task: Any, labels=("O", "P"), **more):
    return models.BertConfig.from_hf(
        {**SIZES, "model_type": "bert", "id2label": dict(enumerate(labels)), **more}, task=task
    )


def test_the_first_token_of_a_word_has_its_class():
    tokenizer = closing(tiny.tiny_tokenizer())
    record = record_of({"tokens": ["Anna", "booked"], "labels": [1, -100]})
    (row,) = examples([record], tokenizer, max_length=64, config=of("token-classification"))
    # As transformers with `add_prefix_space`.
    words = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in ("Anna", "booked")]
    assert row.tokens.tolist()[1:-1] == [*words[0], *words[1]]
    assert np.flatnonzero(row.learned).tolist() == [1] and row.targets.tolist() == [1]


def test_an_answer_is_found_in_a_window_of_its_context():
    tokenizer = closing(tiny.tiny_tokenizer())
    record = record_of(ROWS["question-answering"][0])
    config = of("question-answering")
    (whole,) = examples([record], tokenizer, max_length=100, config=config)
    first, last = whole.targets[0]
    assert tokenizer.decode(whole.tokens[first : last + 1].tolist()).strip() == "Tom"
    assert whole.types.tolist() == [0] * (whole.types == 0).sum() + [1] * whole.types.sum()
    windows = examples([record], tokenizer, max_length=24, too_long="windows", config=config)
    assert len(windows) > 2 and all(len(each.tokens) <= 24 for each in windows)
    spans = [(each.tokens.tolist(), *np.asarray(each.targets)[0]) for each in windows]
    found = {tokenizer.decode(tokens[a : b + 1]).strip() for tokens, a, b in spans if a}
    assert found == {"Tom"}
    assert windows[0].targets.tolist() == [[0, 0]]
    with pytest.raises(ValueError, match='too_long="truncate" or'):
        examples([record], tokenizer, max_length=24, config=config)
    asked = record_of({**ROWS["question-answering"][0], "question": "Who? " * 9}, source="d:7")
    with pytest.raises(ValueError, match="^d:7: the question has .* in windows of 24: shorten it"):
        examples([asked], tokenizer, max_length=24, too_long="windows", config=config)
    moved = {**ROWS["question-answering"][0], "answers": {"text": ["Tom"], "answer_start": [3]}}
    with pytest.raises(ValueError, match='the answer "Tom" is not at character 3 of the context'):
        examples([record_of(moved)], tokenizer, max_length=100, config=config)


@pytest.mark.parametrize("question", ["?", "Who is it, and where?"])
def test_each_window_has_something_new_of_the_context(question):
    tokenizer = closing(tiny.tiny_tokenizer())
    context = " ".join(str(number) for number in range(40))
    whole = tokenizer.encoded(question, context)
    first, second = (whole.sequence_ids.count(number) for number in (0, 1))
    around = len(whole.ids) - first - second
    for window in range(first + around + 1, len(whole.ids) + 1):
        row, seen = tokenizer.encoded(question, context, window=window, stride=window // 3), []
        for each in (row, *row.overflowing):
            assert len(each.ids) <= window
            own = [each.offsets[i] for i, n in enumerate(each.sequence_ids) if n == 1]
            assert own[-1] not in seen
            seen += [place for place in own if place not in seen]
        assert seen == whole.offsets[-second - 1 : -1]
    with pytest.raises(ValueError, match=f"has {first} tokens, with {around} special ones no"):
        tokenizer.encoded(question, context, window=first + around)


def test_windows_have_whole_answers_or_none_behind_any_question():
    tokenizer = closing(tiny.tiny_tokenizer())
    answer = "table for four at the inn"
    row = {
        "question": "Who came so late to the inn by the sea?", "context": CONTEXT,
        "answers": {"text": [answer], "answer_start": [CONTEXT.index(answer)]},
    }  # fmt: skip
    count = len(tokenizer.encode(row["question"]))
    for more in (8, 40):  # tokens beside the question's: fewer than the answer has, and more
        windows = examples(
            [record_of(row)], tokenizer, max_length=count + more, too_long="windows",
            config=of("question-answering"),
        )  # fmt: skip
        assert len(windows) > 1
        spans = [(each.tokens.tolist(), *np.asarray(each.targets)[0]) for each in windows]
        found = {tokenizer.decode(tokens[a : b + 1]).strip() for tokens, a, b in spans if b}
        assert found == ({answer} if more > 8 else set())
    # At characters that the question has too.
    early = {**row, "answers": {"text": ["Anna"], "answer_start": [0]}}
    (whole,) = examples(
        [record_of(early)], tokenizer, max_length=200, config=of("question-answering")
    )
    first, last = np.asarray(whole.targets)[0]
    assert tokenizer.decode(whole.tokens[first : last + 1].tolist()).strip() == "Anna"


@pytest.mark.parametrize(
    ("labels", "want"),
    [([0, 1], [1, 1]), ([0.0, 1.0], [0, 1]), ([1], [0, 1]), (["P"], [0, 1]), ([], [0, 0])],
)
def test_several_classes_by_names_numbers_or_one_float_each(labels, want):
    config = of("sequence-classification", problem_type="multi_label_classification")
    record = record_of({"text": "a", "labels": labels})
    (row,) = examples([record], tiny.tiny_tokenizer(), max_length=64, config=config)
    assert np.asarray(row.targets).tolist() == [want]


@pytest.mark.parametrize(
    ("fields", "row", "match"),
    [
        (dict(problem_type="regression"), {"text": "a", "label": "x"}, "must be a list of 2 numb"),
        (dict(problem_type="multi_label_classification"), {"text": "a", "labels": ["O", 0]}, "twi"),
        (dict(problem_type="multi_label_classification"), {"text": "a", "label": "O"}, "a list of"),
        ({}, {"tokens": ["a"], "labels": [0]}, 'a classifier of texts reads "text"'),
    ],
)
def test_labels_of_another_kind_are_refused(fields, row, match):
    config = of("sequence-classification", **fields)
    with pytest.raises(ValueError, match=match):
        examples([record_of(row)], tiny.tiny_tokenizer(), max_length=64, config=config)


def test_rows_of_texts_may_have_columns_of_these_names():
    assert record_of({"text": "a", "tokens": 1, "context": "b", "question": "c"}).form == "text"
    both = {"text": "a b", "tokens": ["a", "b"], "ner_tags": [0, 1]}
    assert record_of(both, fields={"tokens": "tokens"}).form == "tokens"
    assert record_of({"text": "a", "text_pair": "b", "label": 1}).fields == ("a", "b")
