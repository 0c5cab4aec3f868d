"""JSON lines to examples: what is learned, and what is said about bad data."""

import json

import numpy as np
import pytest

from lora_jax.train import Record, examples, load_examples, load_jsonl, record_of

pytestmark = pytest.mark.once

BOS, EOS, PAD = 1, 2, 0
ROLES = {"system": 3, "user": 4, "assistant": 5}
NEWLINE = 6


class Tokenizer:
    """A letter a token; a template of the form `<role> text <eos> newline`."""

    eos_id, pad_id = EOS, PAD

    def __init__(self, bos=False):
        self.bos = bos

    def encode(self, text):
        return [BOS] * self.bos + [ord(c) for c in text]

    def apply_chat_template(self, messages, add_generation_prompt):
        tokens = []
        for m in messages:
            tokens += [ROLES[m["role"]], *map(ord, m["content"]), EOS, NEWLINE]
        return tokens + [ROLES["assistant"]] * add_generation_prompt


def learned_tokens(example):
    return example.tokens[example.learned].tolist()


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_completion_is_learned_with_its_end():
    record = record_of({"prompt": "ab", "completion": "cd", "id": 7})
    (example,) = examples([record], Tokenizer(), max_length=9)
    assert example.tokens.tolist() == [97, 98, 99, 100, EOS]
    assert learned_tokens(example) == [99, 100, EOS]


def test_tokenizer_that_opens_texts_opens_an_example_once():
    record = record_of({"prompt": "ab", "completion": "cd"})
    (example,) = examples([record], Tokenizer(bos=True), max_length=9)
    assert example.tokens.tolist() == [BOS, 97, 98, 99, 100, EOS]
    assert learned_tokens(example) == [99, 100, EOS]


def test_empty_prompt_keeps_the_opening_token_unlearned():
    record = record_of({"prompt": "", "completion": "cd"})
    (example,) = examples([record], Tokenizer(bos=True), max_length=9)
    assert learned_tokens(example) == [99, 100, EOS]


def test_text_is_learned_but_for_its_first_token():
    (example,) = examples([record_of({"text": "abc"})], Tokenizer(), max_length=9)
    assert example.tokens.tolist() == [97, 98, 99, EOS]
    assert learned_tokens(example) == [98, 99, EOS]


def test_only_assistant_turns_are_learned_each_to_its_end_of_turn():
    turns = [("system", "s"), ("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e")]
    record = record_of({"messages": [{"role": r, "content": c} for r, c in turns]})
    (example,) = examples([record], Tokenizer(), max_length=99)
    assert learned_tokens(example) == [98, 99, EOS, 101, EOS]
    # The turn's opening is the prompt's: generation begins after it.
    assert example.tokens[np.flatnonzero(example.learned)[0] - 1] == ROLES["assistant"]


def test_template_that_rewrites_turns_is_refused():
    class Rewriting(Tokenizer):
        def apply_chat_template(self, messages, add_generation_prompt):
            return [len(messages), *super().apply_chat_template(messages, add_generation_prompt)]

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = record_of({"messages": turns}, source="d.jsonl:4")
    with pytest.raises(ValueError, match=r"d\.jsonl:4: the tokenizer's chat template writes"):
        examples([record], Rewriting(), max_length=99)


def test_template_that_refuses_is_named_with_the_line():
    class Refusing(Tokenizer):
        def apply_chat_template(self, messages, add_generation_prompt):
            raise ValueError("the chat template refuses these messages: no system role")

    turns = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = record_of({"messages": turns}, source="d.jsonl:4")
    with pytest.raises(ValueError, match=r"d\.jsonl:4: .* refuses .*: no system role"):
        examples([record], Refusing(), max_length=99)


def test_first_message_of_the_assistant_is_refused():
    record = record_of({"messages": [{"role": "assistant", "content": "b"}]}, source="d:1")
    with pytest.raises(ValueError, match="d:1: the first message is the assistant's"):
        examples([record], Tokenizer(), max_length=99)


def test_file_keeps_order_skips_blank_lines_and_renames_fields(tmp_path):
    path = write(tmp_path / "d.jsonl", {"q": "1", "a": "2"}, "", {"q": "3", "a": "4"})
    found = load_jsonl(path, fields={"prompt": "q", "completion": "a"})
    assert found == [
        Record("prompt", ("1", "2"), f"{path}:1"),
        Record("prompt", ("3", "4"), f"{path}:3"),
    ]


GOOD = {"prompt": "a", "completion": "b"}
USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{not json", r":2: not JSON \(Expecting property name.* at column 2\)"),
        ("[1, 2]", ":2: expected a JSON object with .*, got list"),
        ({"prompt": "a"}, ':2: missing field "completion"'),
        ({"completion": "a", "id": 3}, ':2: missing field "prompt"'),
        ({"question": "a"}, r":2: expected .*, got none of them \(fields: \"question\"\)"),
        ({"prompt": "a", "completion": 3}, ':2: field "completion" must be text, got a number'),
        ({"prompt": None, "completion": "b"}, ':2: field "prompt" must be text, got null'),
        ({"text": ["a"]}, ':2: field "text" must be text, got a list of 1'),
        ({"text": "a", "prompt": "b"}, ':2: expected .*, got "prompt" and "text"'),
        ({"messages": "hello"}, ':2: field "messages" must be a list of messages, got text'),
        ({"messages": []}, ':2: field "messages" must be a list of messages, got a list of 0'),
        ({"messages": [USER]}, ':2: "messages" has no message of role "assistant"'),
        ({"messages": [USER, {"role": "assistant"}]}, r':2: "messages"\[1\]: missing .*"content"'),
        ({"messages": [USER, "b"]}, r':2: "messages"\[1\] must be an object .*, got text'),
        ({"messages": [{"role": 1, "content": ""}]}, r'"messages"\[0\]: "role" must be text'),
    ],
)
def test_bad_line_is_named(tmp_path, line, text):
    path = write(tmp_path / "d.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=text) as caught:
        load_jsonl(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such data file"):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the dataset is empty"):
        load_jsonl(write(tmp_path / "empty.jsonl", ""))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8"):
        load_jsonl(latin)
    with pytest.raises(ValueError, match="`fields` renames `promt`"):
        load_jsonl(latin, fields={"promt": "q"})


def test_too_long_is_an_error_a_cut_or_a_skip(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "cdefg"}, GOOD)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: the example has 8 tokens, .* context of 4"):
        load_examples(path, Tokenizer(), max_length=4)
    cut, whole = load_examples(path, Tokenizer(), max_length=4, too_long="truncate")
    assert cut.tokens.tolist() == [97, 98, 99, 100] and learned_tokens(cut) == [99, 100]
    (left,) = load_examples(path, Tokenizer(), max_length=4, too_long="skip")
    assert left.tokens.tolist() == whole.tokens.tolist() == [97, 98, EOS]


def test_nothing_left_to_learn_is_an_error():
    record = record_of({"prompt": "abcd", "completion": "e"}, source="d:1")
    with pytest.raises(ValueError, match="d:1: .* nothing to learn after truncation to 4 tokens"):
        examples([record], Tokenizer(), max_length=4, too_long="truncate")
    with pytest.raises(ValueError, match="dataset is empty: all 1 examples are longer than 4"):
        examples([record], Tokenizer(), max_length=4, too_long="skip")
    with pytest.raises(ValueError, match="dataset is empty: there are no records"):
        examples([], Tokenizer(), max_length=4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"too_long": "cut"}, "`too_long` must be one of error, truncate, skip, got 'cut'"),
        ({"max_length": 1}, "`max_length` must be at least 2 tokens, got 1"),
        ({"tokenizer": None}, "`tokenizer` is None"),
    ],
)
def test_bad_options(options, text):
    options = {"tokenizer": Tokenizer(), "max_length": 9, **options}
    with pytest.raises(ValueError, match=text):
        examples([record_of(GOOD)], options.pop("tokenizer"), **options)
