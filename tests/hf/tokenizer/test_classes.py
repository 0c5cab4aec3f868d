"""The classes that transformers builds from defaults, token by token against AutoTokenizer."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from lora_jax.hf.tokenizer import from_directory
from lora_jax.hf.tokenizer.tokenizer import from_gguf

from tests.support.their_tokenizers import NAMES, around, backend_of, transformers_reads

pytestmark = [pytest.mark.once, pytest.mark.oracle]

TEXTS = [
    "The quick brown fox doesn't jump; it's lazy 123 4567.",
    "  two  spaces\n\n\tand a tab ",
    "Grün ist die Heide — 猫 ﬁ e\u0301 नमस्ते",
    "<s>hello<|b|> world x</s>  <pad>",
    "a <extra_id_3> b <mask> ▁<PRE> <|endoftext|> x",
    "",
]
CLASSES = {
    "LlamaTokenizer": "sentencepiece",
    "CodeLlamaTokenizer": "sentencepiece",
    "GemmaTokenizer": "sentencepiece",
    "Qwen2Tokenizer": "byte_level",
    "Qwen3_5Tokenizer": "byte_level",
    "GPT2TokenizerFast": "byte_level",
    "GPTNeoXTokenizer": "byte_level",
    "CohereTokenizer": "byte_level",
    "RobertaTokenizer": "byte_level",
    "BartTokenizerFast": "byte_level",
    "BertTokenizer": "wordpiece",
    "DistilBertTokenizerFast": "wordpiece",
    "XLMRobertaTokenizerFast": "unigram",
    "T5Tokenizer": "unigram",
    "DebertaV2TokenizerFast": "unigram",
    "CamembertTokenizer": "unigram",
}
ENCODERS = {"sep_token": "</s>", "cls_token": "<s>", "mask_token": "<|b|>"}
ENCODER_CLASSES = ("Roberta", "Bart", "Bert", "DistilBert", "XLMRoberta", "Deberta", "Camembert")

# What is put around a text in tokenizer.json; tokenizer_config.json.
CASES = {
    "plain": (None, {}),
    "around": ("<s> $A </s>", {}),
    "prefix": ("<s> $A", {"add_prefix_space": True}),
    "no prefix": ("<s> $A", {"add_prefix_space": False}),
    "settings": (
        "<s> $A", {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False,
                   "legacy": True, "add_bos_token": False, "add_eos_token": True,
                   "split_by_punct": True, "unk_id": 5, "extra_ids": 3, "trim_offsets": False},
    ),
}  # fmt: skip


def odd(kind):
    """A tokenizer whose file has other parts than any class."""
    backend = backend_of(kind)
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Punctuation()
    if kind == "byte_level":
        backend.model.ignore_merges = True
    return backend


def write(directory, backend, settings, single=None, config=None):
    if single is not None:
        backend.post_processor = around(single)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def assert_same(name, directory):
    def run(theirs):
        pair = theirs(TEXTS[0], TEXTS[1])
        return {
            "special": [theirs.encode(text) for text in TEXTS],
            "plain": [theirs.encode(text, add_special_tokens=False) for text in TEXTS],
            "pair": pair["input_ids"],
            "types": pair.get("token_type_ids"),
            "decoded": theirs.backend_tokenizer.decode(theirs.encode(TEXTS[0])),
            "ids": [theirs.bos_token_id, theirs.eos_token_id],
            "offsets": theirs.backend_tokenizer.encode(TEXTS[1], TEXTS[0]).offsets,
        }

    ours = from_directory(directory)
    theirs = transformers_reads(f"classes/{name}", directory, run)
    for text, special, plain in zip(TEXTS, theirs["special"], theirs["plain"], strict=True):
        assert ours.encode(text) == special, text
        assert ours.encode(text, add_special_tokens=False) == plain, text
    pair = ours.encode_batch([TEXTS[0]], [TEXTS[1]])
    assert pair.tokens[0].tolist() == theirs["pair"]
    assert theirs["types"] in (None, pair.token_type_ids[0].tolist())
    assert ours.decode(ours.encode(TEXTS[0])) == theirs["decoded"]
    assert [ours.bos_id, ours.eos_id] == theirs["ids"]
    offsets = ours.encoded(TEXTS[1], TEXTS[0]).offsets
    assert [list(span) for span in offsets] == theirs["offsets"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_built_as_transformers_builds_it(tmp_path, name, case):
    single, settings = CASES[case]
    encoder = name.startswith(ENCODER_CLASSES)
    settings = {"tokenizer_class": name, **NAMES, **(ENCODERS if encoder else {}), **settings}
    make = odd if case in ("settings", "around") else backend_of
    assert_same(f"{name}.{case}", write(tmp_path, make(CLASSES[name]), settings, single))


@pytest.mark.parametrize("name", [n for n, kind in CLASSES.items() if kind != "wordpiece"])
def test_the_special_tokens_of_a_class(tmp_path, name):
    directory = write(tmp_path, backend_of(CLASSES[name]), {"tokenizer_class": name})
    assert_same(f"{name}.no names", directory)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer"])
def test_a_special_token_that_the_files_leave_empty(tmp_path, name):
    settings = {**NAMES, "tokenizer_class": name, "bos_token": None, "eos_token": None}
    directory = write(tmp_path, backend_of(CLASSES.get(name, "byte_level")), settings)
    assert_same(f"{name}.empty", directory)


@pytest.mark.parametrize("count", [0, 7])
def test_as_many_sentinels_as_the_settings_say(tmp_path, count):
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": count}
    assert_same(f"T5Tokenizer.{count}", write(tmp_path, backend_of("unigram"), settings))


@pytest.mark.parametrize("settings", [{"extra_ids": None}, {"unk_id": "3"}, {"extra_ids": -1}])
def test_a_number_that_is_none(tmp_path, settings):
    directory = write(tmp_path, backend_of("unigram"), settings)
    with pytest.raises(ValueError, match="tokenizer_config.json: `.*_id.?` must be a number from"):
        from_directory(directory)


@pytest.mark.parametrize("name", ["GPTNeoXTokenizer", "GemmaTokenizer", "T5Tokenizer"])
def test_new_tokens_are_numbered_as_transformers_numbers_them(tmp_path, name):
    """The class's own before the model's, and those before what has no name."""
    more = {"additional_special_tokens": ["<|b|>"], "image_token": "<extra_id_3>"}
    directory = write(tmp_path, backend_of(CLASSES[name]), {"tokenizer_class": name, **more})
    assert_same(f"{name}.numbers", directory)


@pytest.mark.parametrize("name", ["CodeLlamaTokenizer", "T5Tokenizer"])
def test_a_list_takes_the_place_of_the_classes_extra_tokens(tmp_path, name):
    more = {"extra_special_tokens": ["<|b|>"]}
    directory = write(
        tmp_path, backend_of(CLASSES[name]), {"tokenizer_class": name, **NAMES, **more}
    )
    assert_same(f"{name}.list", directory)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_added_tokens_that_the_list_has_not(tmp_path, name):
    """A class takes them from the list; where there is none, tokenizer.json is followed."""
    backend = backend_of("sentencepiece")
    backend.add_tokens(["<|b|>"])
    listed = {"1": {"content": "<s>", "special": True, "normalized": False}}
    settings = {"tokenizer_class": name, **NAMES, "added_tokens_decoder": listed}
    assert_same(f"{name}.not listed", write(tmp_path, backend, settings))


def test_a_list_may_make_an_added_token_plain(tmp_path):
    names = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>"}
    listed = {"3": {"content": "<pad>", "special": False, "normalized": False}}
    settings = {"tokenizer_class": "LlamaTokenizer", **names, "added_tokens_decoder": listed}
    ours = from_directory(write(tmp_path, backend_of("sentencepiece"), settings))
    assert ours.decode([3]) == "<pad>"


def test_added_tokens_without_which_others_would_have_other_ids(tmp_path):
    backend = backend_of("sentencepiece")
    backend.add_tokens(["<|b|>", "<mask>"])
    number = backend.get_vocab_size() - 1
    listed = {str(number): {"content": "<mask>", "special": True}}
    settings = {"tokenizer_class": "LlamaTokenizer", **NAMES, "added_tokens_decoder": listed}
    with pytest.warns(UserWarning, match=r"such as '<\|b\|>', that the list in .* here they are"):
        ours = from_directory(write(tmp_path, backend, settings))
    assert ours.encode("<|b|><mask>", add_special_tokens=False) == [number - 1, number]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "CohereTokenizer"])
def test_the_flags_of_special_tokens(tmp_path, name):
    """Qwen 2's class ignores them; of two spellings of one token the last counts."""
    flags = {"lstrip": True, "rstrip": True, "single_word": True, "normalized": False}
    spelled = [{"__type": "AddedToken", "content": x, **flags} for x in ("<|b|>", "<mask>")]
    settings = {"tokenizer_class": name, **NAMES, "image_token": spelled[0],
                "audio_token": "<|b|>", "additional_special_tokens": spelled[1:]}  # fmt: skip
    assert_same(f"{name}.flags", write(tmp_path, backend_of("byte_level"), settings))


def test_a_class_whose_tokens_the_model_has_no_row_for(tmp_path):
    backend = backend_of("wordpiece")
    config = {"model_type": "bert", "vocab_size": backend.get_vocab_size()}
    directory = write(tmp_path, backend, NAMES, config=config)
    with pytest.warns(UserWarning, match=r"tokens `sep_token` '\[SEP\]', `cls_token` .* left out"):
        ours = from_directory(directory)
    with pytest.raises(ValueError, match=r"tokenizer.json: a text has `\[.*113 rows: take it out"):
        ours.encode("a")


# model_type, tokenizer_class, the file's kind.
CHOICES = [
    ("mistral", "LlamaTokenizer", "sentencepiece"),
    ("llama", "LlamaTokenizer", "sentencepiece"),
    ("llama", "LlamaTokenizer", "byte_level"),
    ("llama", None, "sentencepiece"),
    ("phi3", "LlamaTokenizerFast", "sentencepiece"),
    ("llava", "LlamaTokenizer", "sentencepiece"),
    ("qwen2", "LlamaTokenizerFast", "byte_level"),
    ("qwen2", "PreTrainedTokenizerFast", "byte_level"),
    ("qwen2", None, "byte_level"),
    ("qwen3", "PreTrainedTokenizerFast", "byte_level"),
    ("qwen3", None, "byte_level"),
    ("gemma3_text", "LlamaTokenizer", "sentencepiece"),
    ("gemma2", None, "sentencepiece"),
    ("gpt2", None, "byte_level"),
    ("mistral", "GPT2Tokenizer", "byte_level"),
    ("roberta", None, "byte_level"),
    ("xlm-roberta", "PreTrainedTokenizerFast", "unigram"),
    ("t5", None, "unigram"),
    ("llama", "TheirOwnTokenizer", "byte_level"),
    ("glm4", "GPT2Tokenizer", "byte_level"),
    ("olmo3", "GPT2Tokenizer", "byte_level"),
    ("ernie4_5", "LlamaTokenizer", "sentencepiece"),
    ("qwen3_5", "PreTrainedTokenizerFast", "byte_level"),
    ("umt5", "T5Tokenizer", "unigram"),
    ("deberta-v2", None, "unigram"),
    ("camembert", None, "unigram"),
    ("mamba2", None, "byte_level"),
    ("llava_next", "LlamaTokenizer", "sentencepiece"),
    ("internvl", None, "byte_level"),
]


@pytest.mark.parametrize(("model", "name", "kind"), CHOICES)
def test_the_class_that_is_taken(tmp_path, model, name, kind):
    settings = {**NAMES, **({} if name is None else {"tokenizer_class": name})}
    config = {"model_type": model, "vocab_size": 10000}
    directory = write(tmp_path, odd(kind), settings, "<s> $A", config)
    assert_same(f"{model}.{name}.{kind}", directory)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        (
            "AlbertTokenizerFast",
            "unigram",
            "`AlbertTokenizer`: .* its normalizer, pre-tok",
        ),
        ("MPNetTokenizer", "wordpiece", "`MPNetTokenizer`: .* here tokenizer.json is followed"),
        ("LlamaTokenizer", "unigram", "`LlamaTokenizer`: .* a model of kind BPE in place of Unig"),
        ("T5Tokenizer", "sentencepiece", "`T5Tokenizer`: .* kind Unigram in place of BPE"),
    ],
)
def test_a_class_that_is_not_followed_is_named(tmp_path, name, kind, text):
    directory = write(tmp_path, backend_of(kind), {"tokenizer_class": name, **NAMES})
    with pytest.warns(UserWarning, match=text):
        ours = from_directory(directory)
    saved = Backend.from_file(str(directory / "tokenizer.json"))
    assert ours.encode(TEXTS[0]) == saved.encode(TEXTS[0]).ids


def test_the_tokens_of_a_class_that_the_model_has_no_row_for(tmp_path):
    backend = backend_of("unigram")
    config = {"model_type": "t5", "vocab_size": backend.get_vocab_size()}
    ours = from_directory(write(tmp_path, backend, NAMES, config=config))
    assert ours.encode("<pad>", add_special_tokens=False) == [3]
    with pytest.raises(ValueError, match="has `<extra_id_99>`, token .*, but .* has 54 rows"):
        ours.encode("a <extra_id_99>")


def test_the_models_end_token_wins_over_the_classes(tmp_path):
    config = {"model_type": "qwen2", "eos_token_id": 2}
    ours = from_directory(write(tmp_path, backend_of("byte_level"), {}, config=config))
    assert (ours.eos_id, ours.special["eos_token"]) == (2, "</s>")


def test_the_unigram_of_a_gguf_is_that_of_the_directory(tmp_path):
    """As llama.cpp's converter writes XLM-R's, whose unknown piece has the number 3."""
    backend = backend_of("unigram")
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    settings = {"tokenizer_class": "XLMRobertaTokenizerFast", **NAMES}
    theirs = from_directory(write(tmp_path, backend, settings, "<s> $A </s>"))
    tokens = [piece for piece, _ in pieces]
    keys = {
        "model": "t5", "tokens": tokens, "scores": [score for _, score in pieces],
        "token_type": [3 if token in NAMES.values() else 1 for token in tokens],
        "unknown_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True,
    }  # fmt: skip
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    ours = from_gguf(metadata, path=tmp_path / "a.gguf")
    assert ours is not None
    for text in (*TEXTS[:3], "", "<s>hello world</s> x"):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    plain = from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": False}, path=tmp_path)
    assert plain is not None and plain.encode("The fox") != ours.encode("The fox")
    for key, value, message in (
        ("precompiled_charsmap", [1, 2, 3], "`tokenizer.ggml.precompiled_charsmap` is no map"),
        ("precompiled_charsmap", [999], "`tokenizer.ggml.precompiled_charsmap` is no map"),
        ("unknown_token_id", 10**6, "`tokenizer.ggml.unknown_token_id` is 1000000, no token's"),
        ("scores", [0.5], "does not give every token its score"),
    ):
        with pytest.raises(ValueError, match=f"a.gguf: .*{message}"):
            from_gguf({**metadata, f"tokenizer.ggml.{key}": value}, path=tmp_path / "a.gguf")
