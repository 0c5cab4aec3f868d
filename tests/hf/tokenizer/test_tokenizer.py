"""Tokenizers against transformers': SmolLM2's from the GGUF file, and ones saved in a directory."""

import functools
import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from lora_jax import train
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.tokenizer.backends import SPLITS
from lora_jax.hf.tokenizer.directory import from_directory
from lora_jax.hf.tokenizer.panics import without_panics
from lora_jax.hf.tokenizer.tokenizer import Tokenizer, from_gguf

from tests.support.oracle import oracle
from tests.support.their_tokenizers import backend_of, encoded

pytestmark = [pytest.mark.once, pytest.mark.oracle]

WORDS = [
    "The quick brown fox doesn't jump; it's lazy.",
    "  two  spaces\n\n\tand a tab ",
    "Grün ist die Heide — 猫が好きです。🎉",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return x",
    "",
]
DIGITS = [" 1 12  123", "x² ½ ٣٤", "2026-11-21, 3.14159"]
CHAT = [
    {"role": "user", "content": "Hi 12"},
    {"role": "assistant", "content": " ok "},
    {"role": "user", "content": "<b>&'\"</b>"},
]


@pytest.fixture(scope="module")
def ours(smollm2):
    return from_gguf(open_gguf(smollm2).metadata, path=smollm2)


TURNS = (CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT])


@pytest.fixture(scope="module")
def theirs(smollm2):
    """What transformers makes of texts and chats with the tokenizer of the GGUF file."""

    def ask():
        from transformers import AutoTokenizer

        directory, _, file = smollm2.rpartition("/")
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
        # transformers' reading of a GGUF file does not know the split `smollm`; SmolLM2's own
        # tokenizer.json has it, and llama.cpp too: every digit apart, then GPT-2's expression.
        backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
        chats = [
            tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
            for turns in TURNS
            for prompt in (False, True)
        ]
        return {
            "words": [tokenizer.encode(text) for text in WORDS],
            "digits": [backend.encode(text).ids for text in DIGITS],
            "chats": chats,
            "chat ids": [tokenizer(text)["input_ids"] for text in chats],
        }

    return oracle("hf/tokenizer/smollm2", ask)


@pytest.mark.parametrize("text", WORDS)
def test_tokens_are_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs["words"][WORDS.index(text)]
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", DIGITS)
def test_digits_stand_alone_as_smollm2_learned_them(ours, theirs, text):
    assert ours.encode(text) == theirs["digits"][DIGITS.index(text)]
    assert ours.decode(ours.encode(text)) == text


def test_the_chat_is_transformers(ours, theirs):
    cases = [(turns, prompt) for turns in TURNS for prompt in (False, True)]
    for (turns, prompt), text, ids in zip(cases, theirs["chats"], theirs["chat ids"], strict=True):
        assert ours.render_chat(turns, prompt) == text
        assert ours.apply_chat_template(turns, prompt) == ids


def test_special_tokens(ours):
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, 2, 49152)
    ids = ours.encode("<|im_start|>a<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert ours.decode(ids) == "a"


# A small tokenizer saved by transformers, with BOS, a template, and padding left switched on.

TEMPLATES = {
    "loop controls and whitespace": (
        "{% for m in messages %}\n  {% if m.role == 'skip' %}\n    {% continue %}\n  {% endif %}\n"
        "{{ bos_token }}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
    "JSON": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "the generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "tools that are not there": "{{ tools is none }}{{ messages | length }}{{ pad_token }}",
}


SKIPPED = [{"role": "skip", "content": "ä"}, *CHAT]


@functools.cache
def small():
    """The tokenizer itself."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", special_tokens=[("<s>", 0)]
    )
    return backend


def saved(directory, case=None):
    """Writes the directory that transformers saves it in, and returns what transformers reads."""
    template = TEMPLATES.get(str(case))

    def save():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=small(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory / "theirs")
        files = {p.name: p.read_text() for p in sorted((directory / "theirs").iterdir())}
        again = AutoTokenizer.from_pretrained(directory / "theirs")
        chats = [
            again.apply_chat_template(SKIPPED, add_generation_prompt=prompt, tokenize=False)
            for prompt in (False, True)
            if template is not None
        ]
        return {"files": files, **encoded(again, WORDS + DIGITS), "chats": chats}

    there = oracle(f"hf/tokenizer/small.{case}", save)
    for name, text in there["files"].items():
        (directory / name).write_text(text)
    return there


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_saved_tokenizer_is_transformers(tmp_path, case):
    there = saved(tmp_path, case)
    ours = from_directory(tmp_path)
    for text, special, plain in zip(WORDS + DIGITS, there["special"], there["plain"], strict=True):
        assert ours.encode(text) == special
        assert ours.encode(text, add_special_tokens=False) == plain
    for prompt, text in zip((False, True), there["chats"], strict=True):
        assert ours.render_chat(SKIPPED, prompt) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)


def test_padding_and_truncation_of_the_saver_are_dropped(tmp_path):
    there = saved(tmp_path)
    raw = Backend.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_padding(length=50)
    raw.enable_truncation(3)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert from_directory(tmp_path).encode(WORDS[0]) == there["special"][0]


def test_templates_in_older_places(tmp_path):
    saved(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for given in ("A", [{"name": "tool", "template": "B"}, {"name": "default", "template": "A"}]):
        path.write_text(json.dumps({**settings, "chat_template": given}))
        assert from_directory(tmp_path).render_chat(CHAT) == "A"
    path.write_text(json.dumps({**settings, "eos_token": {"content": "<pad>", "lstrip": False}}))
    assert from_directory(tmp_path).eos_id == 2
    path.unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert from_directory(tmp_path).eos_id == 1


def test_no_tokenizer_is_none(tmp_path):
    assert from_directory(tmp_path) is None
    assert from_gguf({}, path=tmp_path) is None


SLOW = ("tokenizer.model", "vocab.json", "spiece.model", "spm.model", "sentencepiece.bpe.model")


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_tokenizer_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: only tokenizer.json can be read"):
        from_directory(tmp_path)


def test_broken_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        from_directory(tmp_path)
    saved(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"a":\n 1,,}')
    with pytest.raises(ValueError, match="tokenizer_config.json:2: not JSON"):
        from_directory(tmp_path)


@pytest.mark.parametrize(
    "template, messages, text",
    [
        (None, CHAT, "no chat template"),
        ("{% if %}", CHAT, "not valid Jinja"),
        ("{{ raise_exception('only users') }}", CHAT, "refuses these messages: only users"),
        ("{{ messages.append(1) }}", CHAT, "refuses these messages: .*append"),
        ("{{ ''.__class__.__mro__ }}", CHAT, "refuses these messages: .*__class__"),
        ("{{ messages[0].content + 1 }}", CHAT, "refuses these messages: can only concatenate"),
        ("x", ["hi"], "message 0 is not an object with a `role`: 'hi'"),
        ("x", [CHAT[0], {"content": "a"}], "message 1 is not an object with a `role`"),
    ],
)
def test_templates_that_cannot_be_used(template, messages, text):
    tokenizer = Tokenizer(backend=small(), chat_template=template)
    with pytest.raises(ValueError, match=text):
        tokenizer.apply_chat_template(messages)


def test_an_expression_that_takes_too_long_is_an_error(capfd):
    """The library panics, which is no Exception; the regex of a downloaded file may be any."""
    backend = small()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    text = "a" * 40 + "!"
    ours = Tokenizer(
        backend=backend, chat_template="{% generation %}" + text + "{% endgeneration %}",
        paths={"": Path("t.json")},
    )  # fmt: skip
    for read in (
        lambda: ours.encode(text),
        lambda: ours.encode_prompt(text),
        lambda: ours.encode_batch([text]),
        lambda: ours.marked_chat([{"role": "user", "content": ""}]),
    ):
        with pytest.raises(ValueError, match=r"^t.json: .*cannot .*retry-limit.* takes too long"):
            read()
    with pytest.raises(ValueError, match="^d:7: t.json: the tokenizer cannot read a text"):
        train.examples([train.record_of({"text": text}, source="d:7")], ours, max_length=99)
    # Rust's own text of its panics is not shown, another one is.
    assert capfd.readouterr().err == ""
    with without_panics(str):
        os.write(2, b"a warning\n")  # as Rust and C++ write, past Python
    assert capfd.readouterr().err == "a warning\n"


_QWEN = r"(?i:'s|'t|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_MARKED = normalizers.Replace(" ", "▁")
_AT_MARKS = pre_tokenizers.Split("▁", "merged_with_next")
# How a tokenizer treats spaces: RoBERTa's and ModernBERT's, Qwen's and Llama 3's, Gemma's, and
# others; and whether the first word of a text has other tokens.
SPACES = {
    "bytes": ("byte_level", dict(pre_tokenizer=pre_tokenizers.ByteLevel(False)), True),
    "split first": (
        "byte_level", dict(pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_QWEN), "isolated"), _BYTES])), True,
    ),
    "replaced": (
        "unigram", dict(normalizer=_MARKED, pre_tokenizer=_AT_MARKS), True,
    ),
    "Llama's": (
        "unigram", dict(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), _MARKED]),
                        pre_tokenizer=_AT_MARKS), False,
    ),
    "never put": ("unigram", dict(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
                  True),
    "put": ("byte_level", dict(pre_tokenizer=pre_tokenizers.ByteLevel(True)), False),
    "always put": ("unigram", {}, False),
    "not read": ("wordpiece", {}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", SPACES)
def test_words_have_the_tokens_that_they_have_in_a_text(case):
    kind, parts, other = SPACES[case]
    backend = backend_of(kind)
    for name, part in parts.items():
        setattr(backend, name, part)
    ours = Tokenizer(backend=backend)
    words = ["don't", "see", "3rd", "Anna's", "U.S.", "(x)", "a-b", "Grün", "猫", "x"]
    row, text = ours.encoded_words(words), ours.encode(" ".join(words))
    first = row.word_ids.count(0)
    rest = len(row.ids) - first
    assert row.ids[first:] == text[-rest:]
    assert (row.ids[:first] != text[: len(text) - rest]) == other
    assert ours.encoded_words(["", "x"]).word_ids == [1] * len(ours.encoded_words(["x"]).ids)


WRONG = {
    "no text": (lambda t: t.encode(None), "reads one text at a time, got `NoneType`"),
    "a second one": (lambda t: t.encoded("a", 3), "reads one text at a time, got `int` 3"),
    "bytes": (lambda t: t.encode_prompt(b"a"), "reads one text at a time, got `bytes`"),
    "one text": (lambda t: t.encode_batch("ab"), "reads a list of texts here, got `str` 'ab'"),
    "one word": (lambda t: t.encoded_words("ab"), "reads a list of texts here, got `str` 'ab'"),
    "no words": (lambda t: t.encoded_words([None]), "reads one text at a time, got `NoneType`"),
    "pairs": (lambda t: t.encode_batch(["a"], [3]), "reads one text at a time, got `int` 3"),
    "half": (lambda t: t.encode("ab\ud800"), r"has `.ud800` at character 2, which is half"),
    "rows": (lambda t: t.decode([[1]]), "must be the token ids of one text, got `list`"),
    "floats": (lambda t: t.decode([1.5]), "must be the token ids of one text, got `list`"),
    "a number": (lambda t: t.decode(3), "must be the token ids of one text, got `int` 3"),
    "below 0": (lambda t: t.decode([1, -1]), "`ids` must be token ids, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_text_is_said(case):
    read, match = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=match):
        read(Tokenizer(backend=small()))


GGUF = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>", "c"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.bos_token_id": 3,
}


def test_a_gguf_may_ask_for_bos_and_eos(tmp_path):
    def encode(**keys):
        keys = {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
        return from_gguf({**GGUF, **keys}, path=tmp_path).encode("abc")

    assert encode() == [2, 4]
    assert encode(add_bos_token=True) == [3, 2, 4]
    assert encode(add_eos_token=True) == [2, 4, 3]
    assert encode(add_bos_token=True, add_eos_token=True) == [3, 2, 4, 3]
    assert encode(pre="llama-bpe") == [3, 2, 4]
    assert encode(pre="llama-bpe", add_bos_token=False) == [2, 4]


def test_a_pair_of_texts_is_cut_as_its_encoder_reads_it(tmp_path):
    """ModernBERT has one SEP between two texts, RoBERTa two."""
    keys = {"add_bos_token": True, "add_eos_token": True, "add_sep_token": True,
            "seperator_token_id": 3}  # fmt: skip
    for name, between in (("modern-bert", [3]), ("roberta-bpe", [3, 3])):
        own = {f"tokenizer.ggml.{k}": v for k, v in {**keys, "pre": name}.items()}
        tokenizer = from_gguf({**GGUF, **own}, path=tmp_path)
        assert tokenizer.encode("ab") == [3, 2, 3]
        assert tokenizer.encoded("ab", "c").ids == [3, 2, *between, 4, 3]


# The pieces of a text as the real llama.cpp (xllamacpp 2026.10) cuts it; `_` is a space.
TEXT = "camelCase's 1234\r\n  -- //\n "
SPLIT = {
    "gpt-2 phi-2 olmo roberta-bpe modern-bert": "camelCase|'s|_1234|\r\n_|_--|_//|\n_",
    "smollm starcoder refact command-r": "camelCase|'s|_|1|2|3|4|\r\n_|_--|_//|\n_",
    "deepseek-llm": "camelCase|'|s|_|1234|\r|\n|_|_--|_//|\n|_",
    "deepseek-coder": "camelCase|'|s|_|1|2|3|4|\r|\n|_|_--|_//|\n|_",
    "llama-bpe llama3 llama-v3 dbrx smaug-bpe glm4 chatglm-bpe deepseek-v3": (
        "camelCase|'s|_|123|4|\r\n|_|_--|_//\n|_"
    ),
    "qwen2 qwen35 stablelm2 deepseek-r1-qwen": "camelCase|'s|_|1|2|3|4|\r\n|_|_--|_//\n|_",
    "gpt-4o llama4": "camel|Case's|_|123|4|\r\n|_|_--|_//\n|_",
    "tekken": "camel|Case|'s|_|1|2|3|4|\r\n|_|_--|_//\n|_",
}

LETTERS = "\u00dcn \u0939\u093f \u4e2d\u6587 \u304b\u306a \ud55c \u01bbx\u300d\u3002 \u2019t"
SPLIT_LETTERS = {
    "qwen35": (
        "\xdcn|_\u0939\u093f|_\u4e2d\u6587|_\u304b\u306a|_\ud55c|_\u01bbx|\u300d\u3002|_\u2019|t"
    ),
    "deepseek-llm": (
        "\xdc|n|_|\u0939\u093f|_|\u4e2d\u6587|_|\u304b\u306a|_|\ud55c|_\u01bb|x|\u300d|\u3002|_|\u2019|t"
    ),
    "deepseek-coder": (
        "\xdcn|_|\u0939|\u093f|_|\u4e2d\u6587|_|\u304b\u306a|_|\ud55c|_\u01bbx|\u300d\u3002|_|\u2019|t"
    ),
    "deepseek-v3": (
        "\xdcn|_\u0939\u093f|_|\u4e2d\u6587|_|\u304b\u306a|_\ud55c|_\u01bbx|\u300d\u3002|_\u2019|t"
    ),
}


def test_byte_level_tokenizers_of_gguf_cut_texts_as_llama_cpp(tmp_path):
    found = {}
    for name in SPLITS:
        tokenizer = from_gguf({**GGUF, "tokenizer.ggml.pre": name}, path=tmp_path)
        pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(TEXT)
        found[name] = "|".join(TEXT[a:b] for _, (a, b) in pieces).replace(" ", "_")
        if name in SPLIT_LETTERS:
            pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(LETTERS)
            got = "|".join(LETTERS[a:b] for _, (a, b) in pieces).replace(" ", "_")
            assert got == SPLIT_LETTERS[name]
    assert found == {name: pieces for names, pieces in SPLIT.items() for name in names.split()}


def test_a_gguf_may_name_more_end_tokens(tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 99}
    assert from_gguf(GGUF, path=tmp_path).stop_ids == (3,)
    assert from_gguf({**GGUF, **keys}, path=tmp_path).stop_ids == (3, 4)
    keys["tokenizer.ggml.eom_token_id"] = 0
    assert from_gguf({**GGUF, **keys}, path=tmp_path).stop_ids == (3, 4, 0)


def test_only_control_tokens_of_a_gguf_are_left_out_of_text(tmp_path):
    tokenizer = from_gguf(GGUF, path=tmp_path)
    assert tokenizer.decode([2, 4, 3]) == "abc"
    assert tokenizer.decode([2, 4, 3], skip_special_tokens=False) == "abc<e>"


def test_llama3_takes_a_word_of_the_vocabulary_whole(tmp_path):
    # No merge makes "aba".
    words = {**GGUF, "tokenizer.ggml.tokens": [*GGUF["tokenizer.ggml.tokens"], "aba"]}
    words["tokenizer.ggml.token_type"] = [1, 1, 1, 3, 4, 1]
    for pre, tokens in (("gpt-2", [2, 0]), ("llama-bpe", [5])):
        tokenizer = from_gguf({**words, "tokenizer.ggml.pre": pre}, path=tmp_path)
        assert tokenizer.encode("aba", add_special_tokens=False) == tokens


@pytest.mark.parametrize(
    "change, text",
    [
        ({"model": "rwkv"}, "tokenizer of kind `rwkv` cannot be built"),
        ({"model": "bert"}, "lacks the numbers of unk_token, sep_token, pad_token, mask_token"),
        ({"pre": "viking"}, "`tokenizer.ggml.pre` is `viking`, not one of gpt-2, phi-2"),
        ({"pre": None}, "`tokenizer.ggml.pre` is `None`"),
        ({"merges": None}, "merges are not a list of texts"),
        ({"tokens": 3}, "tokens are not a list of texts"),
        ({"tokens": []}, "lacks its tokens"),
        ({"model": "llama"}, "does not give every token its score"),
        ({"model": "llama", "scores": ["a"] * 5}, "does not give every token its score"),
        ({"merges": ["a c d"]}, "merge 'a c d' is not of tokens"),
        ({"merges": ["a x"]}, "merge 'a x' is not of tokens"),
        ({"tokens": ["a", "b", "ab", "a", "c"]}, "same token twice"),
        ({"token_type": [1]}, "does not give every token its type"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_built(tmp_path, change, text):
    keys = {f"tokenizer.ggml.{k}": v for k, v in change.items()}
    with pytest.raises(ValueError, match=text) as error:
        from_gguf({**GGUF, **keys}, path=tmp_path / "a.gguf")
    assert "a.gguf" in str(error.value)


SENTENCES = (
    "The quick brown fox", "  two  spaces ", "caf\u00e9 \U0001f600 na\u00efve", "line\nbreak\tx",
    "", "<s>hi</s> there", "the the other", "<e>the", "\u2581the",
)  # fmt: skip


@pytest.fixture(scope="module")
def pieces():
    """The keys of a SentencePiece vocabulary in a GGUF file: the words' pieces, best first."""
    words = "the quick brown fox the other two spaces hi there then he his over".split()
    chars = sorted({c for word in words for c in word} | {"\u2581"})
    merged = "he \u2581t \u2581the th er hi \u2581hi ow ro wn \u2581\u2581".split(" ")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *merged, *chars, "<e>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(merged + chars), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged))] + [-1e3] * len(chars) + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.oracle
def test_sentence_pieces_of_a_gguf_are_transformers(pieces, tmp_path):
    ours = from_gguf(pieces, path=tmp_path)

    def theirs():
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

        known = {name.removeprefix("tokenizer.ggml."): x for name, x in pieces.items()}
        # Of Llama it makes one without a space before a text that begins with one, which neither
        # SentencePiece nor llama.cpp do; of Phi-3, whose kind is the same, it does not.
        made, _ = convert_gguf_tokenizer("phi3", {**known, "tokenizer_type": known.pop("model")})
        return [made.encode(text, add_special_tokens=False).ids for text in SENTENCES]

    want = oracle("hf/tokenizer/pieces", theirs)
    assert [ours.encode(text, add_special_tokens=False) for text in SENTENCES] == want


def test_pieces_of_gemma4_are_joined_by_the_merges_of_the_file(pieces, tmp_path):
    flags = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    scored = from_gguf({**pieces, **flags}, path=tmp_path)
    merges = json.loads(scored.backend.to_str())["model"]["merges"]
    merged = {
        **pieces, "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.scores": None,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }  # fmt: skip
    ours = from_gguf(merged, path=tmp_path)
    for text in SENTENCES:
        assert ours.encode(text) == [1, *scored.encode(text)]
        assert ours.decode(ours.encode(text)) == scored.decode(scored.encode(text))
    # As llama.cpp, whatever the file states.
    assert from_gguf({**merged, **flags}, path=tmp_path).encode("the")[0] == 1
    del merged["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match="lacks its merges"):
        from_gguf(merged, path=tmp_path)


def test_sentence_pieces_come_back_as_text(pieces, tmp_path):
    ours = from_gguf(pieces, path=tmp_path)
    assert ours.encode("the")[0] == 1  # BOS, where the file does not say otherwise
    assert ours.bos_id == 1 and ours.stop_ids == (2,)
    for text in SENTENCES[:4]:
        assert ours.decode(ours.encode(text)) == text
    plain = from_gguf({**pieces, "tokenizer.ggml.add_space_prefix": False}, path=tmp_path)
    assert plain.encode("the", add_special_tokens=False) != ours.encode("the")[1:]
    assert plain.decode(plain.encode(" the")) == " the"
