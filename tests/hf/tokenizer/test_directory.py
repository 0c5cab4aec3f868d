"""Tokenizers as directories hold them, token by token against transformers' AutoTokenizer."""

import json
import re
from typing import Any

import pytest
from tokenizers import processors

from lora_jax.hf.tokenizer import from_directory

from tests.support.their_tokenizers import (
    NAMES,
    around,
    backend_of,
    encoded,
    transformers_reads,
)

pytestmark = [pytest.mark.once, pytest.mark.oracle]

TEXTS = [
    "The quick brown fox doesn't jump; it's lazy.",
    "  two  spaces\n\n\tand a tab ",
    "Grün ist die Heide — 猫",
    "<s>hello<|b|> world <|e|> x</s>  <pad>",
    " </s> yes",
    "",
]
FLAGS = {"special": True, "lstrip": False, "rstrip": False, "normalized": False,
         "single_word": False}  # fmt: skip


KINDS = ("byte_level", "unigram", "wordpiece", "sentencepiece")


ROBERTA = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
BYTES = processors.ByteLevel(trim_offsets=False)

OBJECT = {"content": "<|e|>", **FLAGS, "rstrip": True, "__type": "AddedToken"}

# What is put around a text; tokenizer_config.json; other files. N and M are the next ids.
CASES = {
    "plain": (None, {}, {}),
    "bos": (around("<s> $A"), {}, {}),
    "bos and eos": (around("<s> $A </s>"), {}, {}),
    "roberta": (ROBERTA, {}, {}),
    "bytes and bos": (processors.Sequence([BYTES, around("<s> $A")]), {}, {}),
    "flags are of slow tokenizers": (
        around("<s> $A"), {"add_bos_token": False, "add_eos_token": True}, {},
    ),
    "flags without a post-processor": (None, {"add_bos_token": True, "add_eos_token": True}, {}),
    "added_tokens_decoder": (
        None,
        {"added_tokens_decoder": {
            "M": {"content": "<|e|>", **FLAGS},
            "N": {"content": "<|b|>", **FLAGS, "special": False, "normalized": True},
        }},
        {},
    ),
    "other flags of a known token": (
        None, {"added_tokens_decoder": {"2": {"content": "</s>", **FLAGS, "lstrip": True}}}, {},
    ),
    "added_tokens.json": (
        None, {"additional_special_tokens": ["<|e|>"]},
        {"added_tokens.json": {"<|b|>": "N", "<|e|>": "M"}},
    ),
    "additional_special_tokens": (
        None,
        {"additional_special_tokens": ["<|b|>", OBJECT]},
        {},
    ),
    "named extra tokens": (
        None, {"extra_special_tokens": {"image_token": "<|b|>"}, "audio_token": "<|e|>"}, {},
    ),
    "named extra tokens as objects": (
        None,
        {"model_specific_special_tokens": {"image_token": "<|b|>", "audio_token": OBJECT}},
        {},
    ),
    "a new end token": (None, {"eos_token": "<|e|>"}, {}),
    "special_tokens_map.json wins": (
        None, {}, {"special_tokens_map.json": {"eos_token": {"content": "<|e|>", "lstrip": False}}},
    ),
    "special_tokens_map.json is not read": (
        None,
        {"added_tokens_decoder": {"0": {"content": "<unk>", **FLAGS}}},
        {"special_tokens_map.json": {"eos_token": "<|e|>"}},
    ),
    "a named token has its object's flags": (None, {"eos_token": OBJECT}, {}),
    "special_tokens_map.json lists more": (
        None, {}, {"special_tokens_map.json": {"additional_special_tokens": ["<|b|>", "<|e|>"]}},
    ),
    "special_tokens_map.json's list is not read": (
        None, {"additional_special_tokens": ["<|e|>"]},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|b|>"]}},
    ),
    "special tokens are split": (None, {"split_special_tokens": True}, {}),
}  # fmt: skip


def write(directory, backend, settings, files=()):
    backend.save(str(directory / "tokenizer.json"))
    size = backend.get_vocab_size()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, **settings}
    for name, value in {"tokenizer_config.json": settings, **dict(files)}.items():
        text = json.dumps(value).replace('"N"', f'"{size}"').replace('"M"', f'"{size + 1}"')
        if name == "added_tokens.json":
            text = text.replace(f'"{size}"', str(size)).replace(f'"{size + 1}"', str(size + 1))
        (directory / name).write_text(text)
    return directory


def assert_same(name, directory):
    def run(theirs):
        special = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
        return {**encoded(theirs, TEXTS), "ids": special}

    ours, theirs = from_directory(directory), transformers_reads(name, directory, run)
    for text, special, plain in zip(TEXTS, theirs["special"], theirs["plain"], strict=True):
        assert ours.encode(text) == special, text
        assert ours.encode(text, add_special_tokens=False) == plain, text
    assert [ours.bos_id, ours.eos_id, ours.pad_id] == theirs["ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_transformers(tmp_path, kind, case):
    backend = backend_of(kind)
    processor, settings, files = CASES[case]
    if processor is not None:
        backend.post_processor = processor
    assert_same(f"{kind}.{case}", write(tmp_path, backend, settings, files))


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "sentencepiece"])
def test_text_is_cleaned_up_as_transformers_does(tmp_path, kind):
    """Not the text of BPE, which it would damage."""
    settings = {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    directory = write(tmp_path, backend_of(kind), settings)
    texts = ["it 's . a , b ! c ? d ' e", "don n't I 'm we 've they 're 've"]

    def decode(tokenizer):
        return [tokenizer.decode(tokenizer.encode(t), skip_special_tokens=False) for t in texts]

    ours = from_directory(directory)
    assert decode(ours) == transformers_reads(f"{kind}.clean", directory, decode)


def test_padding_in_the_file_names_the_padding_token(tmp_path):
    backend = backend_of("byte_level")
    backend.enable_padding(pad_id=3, pad_token="<pad>")
    directory = write(tmp_path, backend, {})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_same("padding", directory)


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_llamas_class_treats_spaces_as_transformers_5(tmp_path, name, legacy):
    backend = backend_of("sentencepiece")
    backend.post_processor = around("<s> $A")
    settings = {"tokenizer_class": name, **({} if legacy is None else {"legacy": legacy})}
    assert_same(f"{name}.{legacy}", write(tmp_path, backend, settings))


# What transformers does not do: the model's own end tokens, and ids that are checked.


def test_a_prompt_gets_what_opens_a_text_once_and_nothing_behind(tmp_path):
    backend = backend_of("byte_level")
    backend.post_processor = around("<s> $A </s>")
    ours = from_directory(write(tmp_path, backend, {}))
    text = ours.encode("hello", add_special_tokens=False)
    assert ours.encode_prompt("hello") == ours.encode_prompt("<s>hello") == [1, *text]
    assert ours.encode_prompt("") == [1]
    backend.post_processor = ROBERTA
    assert from_directory(write(tmp_path, backend, {})).encode_prompt("hello") == [1, *text]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_models_end_tokens(tmp_path, file):
    directory = write(tmp_path, backend_of("byte_level"), {"eos_token": None})
    (directory / file).write_text('{"eos_token_id": [2, 3, 9999]}')
    ours = from_directory(directory)
    assert (ours.eos_id, ours.stop_ids) == (2, (2, 3))
    (directory / file).write_text('{"eos_token_id": 3}')
    assert from_directory(write(tmp_path, backend_of("byte_level"), {})).stop_ids == (2, 3)


def test_an_end_token_that_the_model_has_no_row_for(tmp_path):
    backend = backend_of("byte_level")
    directory = write(tmp_path, backend, {"eos_token": "<|endoftext|>"})
    config = {"vocab_size": backend.get_vocab_size(), "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"320 rows, .* `eos_token` '<\|endoftext\|>'"):
        assert from_directory(directory).eos_id == 2


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"9999": {"content": "<|b|>", **FLAGS}}, r"declares `<\|b\|>` as token 9999, but"),
        (
            {"1": {"content": "</s>", **FLAGS}},
            "declares `</s>` as token 1, but .* makes it token 2",
        ),
        ({"x": {"content": "a"}}, "the added tokens are not ids with texts"),
        ({"1": "a"}, "the added tokens are not ids with texts|declares `a`"),
        ([1], "the added tokens are not ids with texts"),
    ],
)
def test_added_tokens_that_cannot_be_right(tmp_path, declared, text):
    directory = write(tmp_path, backend_of("byte_level"), {"added_tokens_decoder": declared})
    with pytest.raises(ValueError, match=f"tokenizer_config.json: .*{text}"):
        from_directory(directory)


def test_a_named_token_is_left_out_of_text_whatever_its_file_says(tmp_path):
    backend = backend_of("byte_level")
    backend.add_tokens(["<|e|>"])
    number = backend.get_vocab_size() - 1
    ours = from_directory(write(tmp_path, backend, {"eos_token": "<|e|>"}))
    assert (ours.eos_id, ours.decode([number])) == (number, "")


@pytest.mark.parametrize("value", [{}, [], "x", 2.5, None])
def test_an_id_that_is_no_number(tmp_path, value):
    directory = write(
        tmp_path, backend_of("byte_level"), {}, {"added_tokens.json": {"<|b|>": value}}
    )
    with pytest.raises(ValueError, match="added_tokens.json: the added tokens are not ids with"):
        from_directory(directory)


def test_only_special_ones_of_added_tokens_are_left_out_of_text(tmp_path):
    _, settings, files = CASES["added_tokens.json"]
    backend = backend_of("byte_level")
    ours = from_directory(write(tmp_path, backend, settings, files))
    size = backend.get_vocab_size()
    assert ours.decode([size, size + 1]) == "<|b|>"
    assert ours.decode([size, size + 1], skip_special_tokens=False) == "<|b|><|e|>"


def test_templates_in_every_place(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    named = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    directory = write(tmp_path, backend_of("byte_level"), {})
    (directory / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert from_directory(directory).render_chat(chat) == "processor"
    write(tmp_path, backend_of("byte_level"), {"chat_template": named})
    assert from_directory(directory).render_chat(chat, tools=[{}]) == "T"
    with pytest.raises(
        ValueError, match="no chat template named `default`, only `tool_use`, `rag`"
    ):
        from_directory(directory).render_chat(chat)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("file T")
    (directory / "chat_template.jinja").write_text("file")
    ours = from_directory(directory)
    assert (ours.render_chat(chat), ours.render_chat(chat, tools=[{}])) == ("file", "file T")


@pytest.mark.parametrize("where", ["tokenizer.json", "added_tokens.json", "named"])
def test_a_padding_token_that_the_model_has_no_row_for(tmp_path, where):
    """As in models that were trained after `[PAD]` was put into the tokenizer alone."""
    backend = backend_of("byte_level")
    rows = backend.get_vocab_size()
    if where == "tokenizer.json":
        backend.add_special_tokens(["[PAD]"])
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps({"[PAD]": rows}))
    write(tmp_path, backend, {"eos_token": "</s>", "pad_token": "[PAD]"})
    assert transformers_reads(f"no row.{where}", tmp_path, lambda t: t.pad_token_id) == rows
    with pytest.warns(UserWarning, match=r"320 rows, .* `pad_token` '\[PAD\]', which are left out"):
        ours = from_directory(tmp_path, rows=rows)
    batch = ours.encode_batch(["a", "some more of it"])
    assert batch.tokens.max() < rows and batch.tokens[0, -1] == ours.eos_id
    for read in (
        lambda: ours.encode("a [PAD]"),
        lambda: ours.encode_prompt("[PAD]"),
        lambda: ours.encode_batch(["a", "[PAD]"]),
        lambda: ours.encoded("a", "b [PAD]", window=3),
        lambda: ours.encoded_words(["a", "[PAD]"]),
    ):
        with pytest.raises(ValueError, match=r"tokenizer.json: a text has `\[PAD\]`, token 320"):
            read()


@pytest.mark.parametrize(
    "file",
    ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer_config.json",
     "chat_template.json"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path, file, template, text):
    write(tmp_path, backend_of("byte_level"), {"eos_token": "</s>"})
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    whole = json.dumps({"eos_token": "</s>", "chat_template": template})
    path.write_text(template if path.suffix == ".jinja" else whole)
    ours = from_directory(tmp_path)
    tools: dict[str, Any] = {"tools": [{}]} if "tool_use" in file else {}
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: the chat template .*{text}"):
        ours.apply_chat_template([{"role": "user", "content": "a"}], **tools)
