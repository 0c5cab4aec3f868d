"""JSON lines to examples: what is learned, and what is said about bad data."""

import dataclasses
import json
from typing import Any, cast

import numpy as np
import pytest

from lora_jax.train import Record, examples, load_examples, load_jsonl, record_of

from tests.support.tiny import tiny_tokenizer

pytestmark = pytest.mark.once

BOS, EOS, PAD = 1, 2, 0
ROLES = {"system": 3, "user": 4, "assistant": 5}
NEWLINE = 6


class Tokenizer:
    """A letter a token; a template of the form `<role> text <eos> newline`."""

    eos_id, pad_id, stop_ids = EOS, PAD, (EOS,)

    def __init__(self, bos=False):
        self.opening = [BOS] * bos

    def encode(self, text, add_special_tokens=True):
        return self.opening * add_special_tokens + [ord(c) for c in text]

    def encode_prompt(self, text):
        return self.encode(text)

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(map(chr, tokens))

    def marked_chat(self, messages, **options):
        return None

    def render_chat(self, messages, add_generation_prompt=False, **options):
        turns = [chr(ROLES[m["role"]]) + m["content"] + chr(EOS) + chr(NEWLINE) for m in messages]
        return "".join(turns) + chr(ROLES["assistant"]) * add_generation_prompt


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


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


def test_tokenizer_that_closes_texts_closes_no_prompt():
    class Closing(Tokenizer):
        def encode(self, text, add_special_tokens=True):
            return super().encode(text, add_special_tokens) + [EOS] * add_special_tokens

        def encode_prompt(self, text):
            return super().encode(text)

    for row in ({"prompt": "a", "completion": "b"}, {"text": "ab"}):
        (example,) = examples([record_of(row)], Closing(bos=True), max_length=9)
        assert example.tokens.tolist() == [BOS, ord("a"), ord("b"), EOS]


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
    record = record_of(chat(*turns))
    (example,) = examples([record], Tokenizer(), max_length=99)
    assert learned_tokens(example) == [98, 99, EOS, 101, EOS]
    # The turn's opening is the prompt's: generation begins after it.
    assert example.tokens[np.flatnonzero(example.learned)[0] - 1] == ROLES["assistant"]


def test_template_that_writes_answers_elsewhere_is_refused():
    class Counting(Tokenizer):
        def render_chat(self, messages, add_generation_prompt=False, **options):
            return str(len(messages)) + super().render_chat(messages, add_generation_prompt)

    record = record_of(chat(("user", "a"), ("assistant", "b")), source="d.jsonl:4")
    with pytest.raises(ValueError, match=r"d\.jsonl:4: the tokenizer's chat template writes mess"):
        examples([record], Counting(), max_length=99)


def test_thinking_that_no_row_has_is_switched_off_and_one_that_helps_is_named():
    """As GLM's template, whose prompt begins to think and whose answers without thoughts do not."""
    thinks = "'</t>' if enable_thinking is defined and not enable_thinking else '<t>'"
    template = (
        "{% for m in messages %}{{ m.role }}{{ '</t>' if m.role == 'assistant' }}{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant{{ "
        + thinks
        + " }}{% endif %}"
    )
    tokenizer = dataclasses.replace(tiny_tokenizer(), chat_template=template)
    row = chat(("user", "a"), ("assistant", "b"))
    with pytest.warns(UserWarning, match='trained with "chat_template_kwargs": {"enable_th'):
        (plain,) = examples([record_of(row)], tokenizer, max_length=99)
    thought = chat(("user", "a"), ("assistant", "<t>c</think>b"))
    with pytest.raises(ValueError, match='add "chat_template_kwargs": {"enable_thinking": false}'):
        examples([record_of(thought)], tokenizer, max_length=99)
    off = {**row, "chat_template_kwargs": {"enable_thinking": False}}
    (example,) = examples([record_of(off)], tokenizer, max_length=99)
    said = example.tokens[example.learned].tolist()
    assert tokenizer.decode(said, skip_special_tokens=False) == "b<|im_end|>"
    np.testing.assert_array_equal(plain.tokens, example.tokens)
    np.testing.assert_array_equal(plain.learned, example.learned)
    # What the records name themselves is left as it is.
    on = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    with pytest.raises(ValueError, match="elsewhere than behind the prompt"):
        examples([record_of(on)], tokenizer, max_length=99)


@pytest.mark.parametrize(
    ("thought", "left"),
    [("</think>", ""), ("<think></think>", "</think>"), ("<|channel>thought\n<channel|>", "")],
)
def test_an_answer_is_learned_behind_the_empty_thought_of_its_prompt(thought, left):
    """As DeepSeek-V3.2's and Gemma 4's templates, whose turns have no thought."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ '" + left + "' if m.role == 'assistant' }}"
        "{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:" + thought + "{% endif %}"
    )
    tokenizer = dataclasses.replace(tiny_tokenizer(), chat_template=template)
    turns = ("user", "a"), ("assistant", "@b"), ("user", "c"), ("assistant", "<d")
    found = examples([record_of(chat(*turns))], tokenizer, max_length=99)
    texts = [tokenizer.decode(x.tokens.tolist(), skip_special_tokens=False) for x in found]
    first = f"user:a<|im_end|>assistant:{thought}@b<|im_end|>"
    assert texts[0] == first
    assert (
        texts[1] == f"{first.replace(thought, left)}user:c<|im_end|>assistant:{thought}<d<|im_end|>"
    )
    learned = [tokenizer.decode(x.tokens[x.learned].tolist(), skip_special_tokens=False)
               for x in found]  # fmt: skip
    assert learned == ["@b<|im_end|>", "<d<|im_end|>"]
    # One with a thought of its own stays refused.
    with pytest.raises(ValueError, match="elsewhere than behind the prompt"):
        examples(
            [record_of(chat(*turns[:1], ("assistant", "x</think>b")))], tokenizer, max_length=9
        )


def test_template_that_refuses_is_named_with_the_line():
    class Refusing(Tokenizer):
        def render_chat(self, messages, add_generation_prompt=False, **options):
            raise ValueError("the chat template refuses these messages: no system role")

    record = record_of(chat(("system", "a"), ("assistant", "b")), source="d.jsonl:4")
    with pytest.raises(ValueError, match=r"d\.jsonl:4: .* refuses .*: no system role"):
        examples([record], Refusing(), max_length=99)


def test_first_message_of_the_assistant_is_refused():
    record = record_of(chat(("assistant", "b")), source="d:1")
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
TURN = [USER, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{not json", r":2: not JSON \(Expecting property name.* at column 2\)"),
        ('{"a": "b" "c"}', r":2: not JSON \(Expecting ',' delimiter at column 11\)"),
        ("[" * 20000, r":2: not JSON that can be read"),
        ("[1, 2]", ":2: expected a JSON object with .*, got list"),
        (r'{"prompt": "\ud83d", "completion": "b"}', ":2: .* is half of a character; remove it"),
        (
            {"prompt": "a"},
            r':2: missing field "completion" \(fields: "prompt"\); `fields` gives it',
        ),
        (
            {"question": "a", "answer": "b"},
            r':2: .* \(fields: "question", "answer"\).* give `fields`',
        ),
        ({"completion": "a", "id": 3}, ':2: missing field "prompt"'),
        ({"question": "a"}, r":2: expected .*, got none of them \(fields: \"question\"\)"),
        ({"prompt": "a", "completion": 3}, ':2: field "completion" must be text, got a number'),
        ({"prompt": None, "completion": "b"}, ':2: field "prompt" must be text, got null'),
        ({"text": ["a"]}, ':2: field "text" must be text, got a list of 1'),
        ({"text": "a", **GOOD}, ':2: expected .*, got "prompt" and "text" .*choose by `fields`'),
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
    with pytest.raises(FileNotFoundError, match="a directory, not a data file"):
        load_jsonl(tmp_path)
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match=r"a\.gz: a gzip file; unpack it first"):
        load_jsonl(tmp_path / "a.gz")
    with pytest.raises(
        ValueError, match=r"array\.json: a JSON array; expected one object a line: jq"
    ):
        load_jsonl(write(tmp_path / "array.json", "[", "{}", "]"))
    with pytest.raises(ValueError, match=r"row\.json: a JSON array; expected one object a line"):
        load_jsonl(write(tmp_path / "row.json", "\ufeff[{}]"))
    with pytest.raises(ValueError, match="`fields` renames `promt`"):
        load_jsonl(latin, fields={"promt": "q"})
    for name, kind in (("a.csv", "csv"), ("a.parquet", "parquet"), ("a.txt", "text")):
        (tmp_path / name).write_text("prompt,completion\na,b\n")
        with pytest.raises(ValueError, match=rf'a {kind} file; .*load_dataset\("{kind}", data_f'):
            load_jsonl(tmp_path / name)
    (tmp_path / "lines.txt").write_text('{"text": "a"}\n')
    assert len(load_jsonl(tmp_path / "lines.txt")) == 1
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"a folder of `datasets`, which datasets.load_fro"):
        load_jsonl(tmp_path)


def test_too_long_is_an_error_a_cut_or_a_skip(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "cdefg"}, GOOD)
    with pytest.raises(
        ValueError, match=r"d\.jsonl:1: the example has 8 tokens, .* `max_length`, 4"
    ):
        load_examples(path, Tokenizer(), max_length=4)
    cut, whole = load_examples(path, Tokenizer(), max_length=4, too_long="truncate")
    assert cut.tokens.tolist() == [97, 98, 99, 100] and learned_tokens(cut) == [99, 100]
    assert len(load_examples(path, Tokenizer(), max_length=8)) == 2  # as long as it may be
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
        (
            {"too_long": "cut"},
            "`too_long` must be one of error, truncate, skip, windows, got 'cut'",
        ),
        ({"max_length": 1}, "`max_length` must be an integer of at least 2, got 1"),
        ({"tokenizer": None}, "`tokenizer` is None"),
    ],
)
def test_bad_options(options, text):
    options = {"tokenizer": Tokenizer(), "max_length": 9, **options}
    with pytest.raises(ValueError, match=text):
        examples([record_of(GOOD)], options.pop("tokenizer"), **options)


# The spellings of other datasets.

HELLO = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def turns_of(row, **fields):
    return record_of(row, source="d:1", fields=fields or None)


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {"conversations": [{"from": f, "value": v} for f, v in
                               [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]]},
            HELLO,
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
             "system": "s"},
            [("system", "s"), *HELLO[:2]],
        ),
        ({**chat(*HELLO), "system": ""}, HELLO),
        ({**chat(("system", "s"), *HELLO), "system": "s"}, [("system", "s"), *HELLO]),
        ({"conversations": chat(*HELLO)["messages"]}, HELLO),
        ({"instruction": "a", "output": "b"}, HELLO[:2]),
        ({"instruction": "a", "input": "", "output": "b", "id": 3}, HELLO[:2]),
        ({"instruction": "a", "input": None, "output": "b"}, HELLO[:2]),
        ({"instruction": "a", "input": "x", "output": "b"}, [("user", "a\n\nx"), HELLO[1]]),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, HELLO),
        ({"instruction": "a", "output": "b", "history": None}, HELLO[:2]),
        (
            {"messages": [{"role": r, "content": [{"type": "text", "text": c[:1]}, c[1:]]}
                          for r, c in HELLO]},
            HELLO,
        ),
        ({**chat(*HELLO), "prompt": "a", "prompt_id": "7"}, HELLO),
        ({**chat(*HELLO), "tools": [], "documents": None}, HELLO),
    ],
)  # fmt: skip
def test_other_spellings_are_the_same_chat(row, same):
    assert turns_of(row).options == {}
    (got,), (want,) = (
        examples([r], Tokenizer(), max_length=99) for r in (turns_of(row), record_of(chat(*same)))
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.learned, want.learned)


def test_sharegpts_speakers_have_their_roles():
    said = {"human": "user", "observation": "tool", "gpt": "assistant", "system": "system",
            "function_response": "tool", "model": "assistant"}  # fmt: skip
    turns = [{"from": speaker, "value": "x"} for speaker in said]
    (messages,) = turns_of({"conversations": turns}).fields
    assert [m["role"] for m in messages] == list(said.values())


def test_a_field_that_is_named_chooses_the_form():
    row = {"instruction": "a", "output": "b", "text": "ab", "question": "q", "answer": "r"}
    assert turns_of(row, text="text").fields == ("ab",)
    assert turns_of(row, output="answer").fields[0][1]["content"] == "r"
    assert turns_of(row, prompt="question", completion="answer").fields == ("q", "r")
    with pytest.raises(ValueError, match="d:1: expected .*choose by `fields`: text=text"):
        turns_of(row)


def test_a_prompt_of_messages_is_not_learned():
    row = {"prompt": chat(*HELLO[:3])["messages"], "completion": chat(HELLO[3])["messages"]}
    for completion in (row["completion"], "d"):
        (example,) = examples(
            [record_of({**row, "completion": completion})], Tokenizer(), max_length=99
        )
        assert learned_tokens(example) == [ord("d"), EOS]


def test_a_message_of_weight_0_is_not_learned():
    row = chat(*HELLO)
    row["messages"][1]["weight"] = 0
    (example,) = examples([record_of(row)], Tokenizer(), max_length=99)
    assert learned_tokens(example) == [ord("d"), EOS]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


class Writing(Tokenizer):
    """A template that writes all that a conversation holds."""

    def render_chat(self, messages, add_generation_prompt=False, **options):
        self.seen = messages, options
        turns = [
            {**m, "content": m["content"] + "".join(f"{m[n]}" for n in m if n not in BARE)}
            for m in messages
        ]
        return f"{options or ''}" + super().render_chat(turns, add_generation_prompt)


BARE = ("role", "content", "weight")


def test_calls_tools_and_reasoning_reach_the_template():
    turns = [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "why"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": turns, "tools": json.dumps(tools), "chat_template_kwargs": {"think": True}}
    tokenizer = Writing()
    examples([record_of(row)], tokenizer, max_length=999)
    messages, options = tokenizer.seen
    assert options == {"tools": tools, "think": True}
    assert [dict(m) for m in messages] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "why"},
    ]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
         "d:1: \"messages\"\\[1\\]: \"content\" has a part of type 'image'; only text"),
        ({"messages": [USER, {"role": "assistant", "function_call": {}, "content": ""}]},
         'd:1: "messages"\\[1\\]: "function_call" is OpenAI\'s old spelling'),
        ({"messages": [{"role": "user", "content": None}]}, '"content" must be text, got null'),
        ({"messages": [{**USER, "weight": 0.5}]}, '"weight" must be 0 or 1, got 0.5'),
        ({**chat(*HELLO), "tools": {"a": 1}}, 'field "tools" must be a list, got an object'),
        ({**chat(*HELLO), "tools": "{"}, 'd:1: "tools": not JSON'),
        ({**chat(*HELLO), "chat_template_kwargs": 1}, '"chat_template_kwargs" must be an object'),
        ({**chat(*HELLO), "system": 1}, 'field "system" must be text, got a number'),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "is 'narrator', expected"),
        ({"conversations": [{"from": {"a": 1}, "value": "x"}]}, "is {'a': 1}, expected one of"),
        ({"conversations": [{"from": "human"}]}, 'missing field "value"'),
        ({"instruction": "a", "input": 3, "output": "b"}, 'field "input" must be text'),
        ({"instruction": "a", "output": "b", "history": ["x"]}, '"history" must be a list'),
        ({"instruction": "a", "output": "b", "history": [["x", 1]]}, '"history" must be text'),
        ({"prompt": [USER], "completion": [USER]}, '"completion" has no message of role "assist'),
    ],
)  # fmt: skip
def test_what_cannot_reach_the_template_is_refused(row, text):
    with pytest.raises(ValueError, match=text):
        turns_of(row)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_alone_is_no_empty_answer(field):
    row = {"messages": [USER, {"role": "assistant", "content": "", field: "why"}]}
    assert len(examples([record_of(row)], Writing(), max_length=99)) == 1


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "thinking"])
def test_an_answer_that_the_template_leaves_empty_is_refused(field):
    value = [CALL] if field == "tool_calls" else "why"
    row = {"messages": [USER, {"role": "assistant", "content": None, field: value}, *TURN]}
    text = f'd:1: the chat template does not write "{field}", so the answer is empty; remove'
    with pytest.raises(ValueError, match=text):
        examples([record_of(row, source="d:1")], Tokenizer(), max_length=99)


def test_what_the_template_leaves_out_is_warned_of_once():
    turns = [USER, {"role": "assistant", "content": "b", "reasoning": "why", "tool_calls": [CALL]}]
    rows = [GOOD, {"messages": turns, "tools": [CALL]}, {"messages": turns}]
    records = [record_of(row, source=f"d:{i}") for i, row in enumerate(rows)]
    with pytest.warns(UserWarning) as caught:
        assert len(examples(records, Tokenizer(), max_length=99)) == 3
    texts = [str(w.message) for w in caught]
    assert [text.partition(", so")[0] for text in texts] == [
        "d:1: the chat template does not write `tools`",
        "d:1 and 1 more: the chat template does not write `tool_calls`",
        "d:1 and 1 more: the chat template does not write `reasoning`",
    ]
    assert len(examples(records, Writing(), max_length=999)) == 3


def test_a_text_that_the_template_leaves_out_is_warned_of():
    """Llama 3 writes no text beside a call, Phi-3 no results of tools."""

    class Calls(Writing):
        def render_chat(self, messages, add_generation_prompt=False, **options):
            kept = [{**m, "content": ""} if m.get("tool_calls") else m for m in messages
                    if m["role"] != "tool"]  # fmt: skip
            return super().render_chat(kept, add_generation_prompt, **options)

    called = {"role": "assistant", "content": "I look", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "found"}
    rows = [GOOD, {"messages": [USER, called, result, {"role": "assistant", "content": "b"}]}]
    records = [record_of(row, source=f"d:{i}") for i, row in enumerate(rows)]
    with pytest.warns(UserWarning) as caught:
        assert len(examples(records, Calls(), max_length=999)) == 2
    assert [str(w.message).partition(", so")[0] for w in caught] == [
        "d:1: the chat template does not write `content of role assistant beside tool_calls`",
        "d:1: the chat template does not write `content of role tool`",
    ]


def test_a_template_that_drops_earlier_reasoning_writes_it():
    answer = {"role": "assistant", "content": "b", "reasoning_content": "why"}

    class Last(Writing):
        def render_chat(self, messages, add_generation_prompt=False, **options):
            last = len(messages) - 1
            turns = [
                m if i == last else {**m, "reasoning_content": ""} for i, m in enumerate(messages)
            ]
            return super().render_chat(turns, add_generation_prompt, **options)

    row = {"messages": [USER, answer, *TURN]}
    first, second = examples([record_of(row)], Last(), max_length=99)
    assert b"why" in bytes(first.tokens.tolist()) and b"why" not in bytes(second.tokens.tolist())


def test_empty_answers_are_refused_together():
    rows = [
        GOOD, {"prompt": "a", "completion": ""}, chat(("user", "a"), ("assistant", "")),
        {"messages": [USER, {"role": "assistant", "content": None}]}, {"text": ""},
    ]  # fmt: skip
    records = [record_of(row, source=f"d:{i}") for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match="d:1 and 3 more: the answer is empty; remove such rows"):
        examples(records, Tokenizer(), max_length=99)


# Templates that rewrite earlier turns, and end tokens.


class Thinking(Tokenizer):
    """Writes reasoning in the last answer only, as Qwen3."""

    def render_chat(self, messages, add_generation_prompt=False, **options):
        last = len(messages) - 1
        turns = [
            {**m, "content": "()" * (i == last and m["role"] == "assistant") + m["content"]}
            for i, m in enumerate(messages)
        ]
        return super().render_chat(turns, add_generation_prompt)


def test_an_answer_that_is_rewritten_later_is_an_example_of_its_own():
    first, second = examples([record_of(chat(*HELLO))], Thinking(), max_length=99)
    for example, n, answer in ((first, 1, "()b"), (second, 3, "()d")):
        prompt = Thinking().render_chat(chat(*HELLO[:n])["messages"], True)
        # The prompt is what generation reads, letter by letter.
        assert Thinking().decode(example.tokens[: len(prompt)].tolist()) == prompt
        assert learned_tokens(example) == [*map(ord, answer), EOS]
        assert learned_tokens(example) == example.tokens[len(prompt) :].tolist()


class Merging(Thinking):
    """Tokens of two letters where there are two, so that an answer may merge with its prompt."""

    def encode(self, text, add_special_tokens=True):
        return [
            ord(a) * 1000 + ord(b or "\0")
            for a, b in zip(text[::2], text[1::2] + "\0", strict=False)
        ]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(t // 1000) + chr(t % 1000) for t in tokens).replace("\0", "")


def test_an_answer_that_merges_with_its_prompt_is_cut_where_generation_begins():
    row = record_of(chat(*HELLO))
    with pytest.warns(UserWarning, match="EOS is never learned"):
        made = examples([row], Merging(), max_length=99)
    for example, n in zip(made, (1, 3), strict=True):
        prompt = Merging().encode(Merging().render_chat(chat(*HELLO[:n])["messages"], True))
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert not example.learned[: len(prompt)].any() and example.learned[len(prompt) :].all()


def test_end_tokens_that_are_never_learned_are_warned_of():
    class Endless(Tokenizer):
        eos_id, stop_ids = None, ()

    with pytest.warns(UserWarning, match="EOS is never learned.*the tokenizer has no eos_token"):
        examples([record_of(GOOD)], Endless(), max_length=9)
    with pytest.warns(UserWarning, match="EOS is never learned.*the truncation leaves out"):
        examples([record_of({"text": "abcdef"})], Tokenizer(), max_length=3, too_long="truncate")
    # In the prompt it teaches nothing.
    row = {"prompt": "a" + chr(EOS), "completion": "bcdef"}
    with pytest.warns(UserWarning, match="EOS is never learned.*the truncation leaves out"):
        examples([record_of(row)], Tokenizer(), max_length=4, too_long="truncate")


def test_an_answer_with_two_end_tokens_is_learned_to_the_last():
    class Twice(Tokenizer):
        stop_ids = (EOS, 7)

        def render_chat(self, messages, add_generation_prompt=False, **options):
            turns = [{**m, "content": m["content"] + chr(7)} for m in messages]
            return super().render_chat(turns, add_generation_prompt)

    (example,) = examples([record_of(chat(*HELLO[:2]))], Twice(), max_length=99)
    assert learned_tokens(example) == [ord("b"), 7, EOS]


def test_any_end_token_of_the_model_ends_a_turn():
    class Two(Tokenizer):
        eos_id, stop_ids = 99, (99, EOS)

    (example,) = examples([record_of(chat(*HELLO[:2]))], Two(), max_length=99)
    assert learned_tokens(example) == [ord("b"), EOS]


def test_rows_that_are_no_records():
    with pytest.raises(TypeError, match=r"must be `Record`s, got .*`lora.train.record_of\(row\)`"):
        examples(cast(Any, [{"text": "yes"}]), Tokenizer(), max_length=64)
