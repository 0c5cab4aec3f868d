"""Encoders' tokenizers against transformers': a bare vocab.txt, a saved tokenizer, batches."""

import json

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from lora_jax.hf.tokenizer.directory import from_directory
from lora_jax.hf.tokenizer.tokenizer import from_gguf

from tests.support.oracle import oracle
from tests.support.their_tokenizers import encoded, transformers_reads

pytestmark = [pytest.mark.once, pytest.mark.oracle]

TEXTS = [
    "The quick brown fox doesn't jump; it's lazy.",
    "  Grün  ist die HEIDE — 猫が好きです。🎉",
    "[CLS] a [MASK] b\tc\n",
    "unaffable",
    "",
]
PIECES = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "quick", "brown", "fox", "jump",
    "##s", "it", "'", "s", ".", ";", "t", "is", "ist", "die", "heide", "HEIDE", "grun", "grün",
    "Gr", "##ün", "猫", "が", "a", "b", "c", "un", "##aff", "##able", "—", "does", "##n", "lazy",
]  # fmt: skip


def write_vocabulary(directory, pieces=PIECES, **settings):
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    given = {"tokenizer_class": "BertTokenizer", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(given))
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return directory


def as_gguf(**settings):
    """The keys of the pieces in a GGUF file: words begin with a sign, and others have no `##`."""
    pieces = [p if p[0] == "[" else p[2:] if p[:2] == "##" else f"\u2581{p}" for p in PIECES]
    numbers = dict(padding=0, unknown=1, bos=2, seperator=3, mask=4)
    keys = {
        "model": "bert", "tokens": pieces, "token_type": [3] * 5 + [1] * (len(pieces) - 5),
        **{f"{name}_token_id": n for name, n in numbers.items()},
        **{f"normalizer.{name}": on for name, on in settings.items()},
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize(
    "stated, settings",
    [
        ({}, {}),
        ({"lowercase": False}, {"do_lower_case": False}),
        ({"lowercase": True, "strip_accents": False}, {"strip_accents": False}),
    ],
    ids=str,
)
def test_pieces_of_a_gguf_are_those_of_a_vocabulary(stated, settings, tmp_path):
    ours = from_gguf(as_gguf(**stated), path=tmp_path / "a.gguf")
    want = from_directory(write_vocabulary(tmp_path, **settings))
    for text in TEXTS:
        assert ours.encode(text) == want.encode(text), text
    pairs = [tokenizer.encoded(TEXTS[0], TEXTS[3]) for tokenizer in (ours, want)]
    assert pairs[0].ids == pairs[1].ids and pairs[0].type_ids == pairs[1].type_ids
    assert ours.decode(ours.encode("unaffable")) == want.decode(want.encode("unaffable"))
    assert (ours.pad_id, ours.vocab_size) == (0, len(PIECES))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"normalizer.lowercase": "yes"}, "`tokenizer.ggml.normalizer.lowercase` must be true or"),
        ({"seperator_token_id": 99}, "lacks the numbers of sep_token"),
        ({"token_type": [1]}, "does not give every token its type"),
    ],
)
def test_pieces_of_a_gguf_that_cannot_be_built(change, text, tmp_path):
    keys = as_gguf() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=rf"a\.gguf: .*({text})"):
        from_gguf(keys, path=tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
    ],
    ids=str,
)
def test_a_bare_vocabulary_is_transformers(tmp_path, settings):
    ours = from_directory(write_vocabulary(tmp_path, **settings))

    def run(theirs):
        word = theirs.decode(theirs.encode("unaffable"), skip_special_tokens=True)
        return {**encoded(theirs, TEXTS), "word": word}

    theirs = transformers_reads(f"wordpiece.{settings}", tmp_path, run)
    for text, ids in zip(TEXTS, theirs["special"], strict=True):
        assert ours.encode(text) == ids, text
    assert ours.pad_id == 0 and ours.special["mask_token"] == "[MASK]"
    assert ours.decode(ours.encode("unaffable")) == theirs["word"]
    assert ours.vocab_size == len(PIECES)  # the end of the last line begins no other


def test_lines_may_end_as_on_windows(tmp_path):
    directory = write_vocabulary(tmp_path)
    tokens = from_directory(directory).encode(TEXTS[0])
    text = (directory / "vocab.txt").read_bytes()
    (directory / "vocab.txt").write_bytes(text.replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    ours = from_directory(directory)
    assert ours.encode(TEXTS[0]) == tokens and ours.vocab_size == len(PIECES)


def test_special_tokens_of_other_names(tmp_path):
    pieces = [piece.replace("[MASK]", "<mask>") for piece in PIECES]
    directory = write_vocabulary(tmp_path, pieces, mask_token="<mask>")
    ours = from_directory(directory)
    assert ours.encode("a <mask>") == [2, PIECES.index("a"), 4, 3]


@pytest.mark.parametrize("pairs", [None, ["a b", "the fox", "c", "", "is"]], ids=["one", "pairs"])
def test_batches_are_transformers(tmp_path, pairs):
    ours = from_directory(write_vocabulary(tmp_path))
    batch = ours.encode_batch(TEXTS, pairs)
    want = transformers_reads(
        f"wordpiece.{'one' if pairs is None else 'pairs'}",
        tmp_path,
        lambda theirs: dict(theirs(TEXTS, pairs, padding=True)),
    )
    np.testing.assert_array_equal(batch.tokens, want["input_ids"])
    np.testing.assert_array_equal(batch.mask, want["attention_mask"])
    np.testing.assert_array_equal(batch.token_type_ids, want["token_type_ids"])
    assert batch.mask.dtype == bool


def test_robertas_saved_tokenizer(tmp_path):
    backend = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(TEXTS, vocab_size=300, special_tokens=specials)
    backend.save_model(str(tmp_path))
    texts = [*TEXTS, "a <mask> b"]

    def save():
        from transformers import RobertaTokenizerFast

        theirs = RobertaTokenizerFast.from_pretrained(tmp_path)
        theirs.save_pretrained(tmp_path / "theirs")
        files = {p.name: p.read_text() for p in sorted((tmp_path / "theirs").iterdir())}
        pairs = theirs(TEXTS, TEXTS[::-1], padding=True)["input_ids"]
        return {"files": files, "ids": encoded(theirs, texts)["special"], "pairs": pairs}

    there = oracle("hf/tokenizer/roberta", save)
    (tmp_path / "saved").mkdir()
    for name, text in there["files"].items():
        (tmp_path / "saved" / name).write_text(text)
    ours = from_directory(tmp_path / "saved")
    assert [ours.encode(text) for text in texts] == there["ids"]
    assert ours.pad_id == 1 and ours.special["cls_token"] == "<s>"
    batch = ours.encode_batch(TEXTS, TEXTS[::-1])
    np.testing.assert_array_equal(batch.tokens, there["pairs"])


BROKEN = {
    "twice": ([*PIECES, "fox"], r"vocab.txt, line 40: `fox` is on line 10 already"),
    "no [SEP]": ([p for p in PIECES if p != "[SEP]"], r"vocab.txt: lacks `\[SEP\]`, which BERT"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_vocabulary(tmp_path, case):
    pieces, text = BROKEN[case]
    with pytest.raises(ValueError, match=text):
        from_directory(write_vocabulary(tmp_path, pieces))


def test_a_vocabulary_that_is_not_text(tmp_path):
    (write_vocabulary(tmp_path) / "vocab.txt").write_bytes(b"\xff\xfe[PAD]")
    with pytest.raises(ValueError, match="vocab.txt: not UTF-8 text"):
        from_directory(tmp_path)


def test_a_batch_of_nothing(tmp_path):
    ours = from_directory(write_vocabulary(tmp_path))
    for texts, pairs in [([], None), (["a"], ["b", "c"])]:
        with pytest.raises(ValueError, match="`texts` must be at least one and `pairs` as many"):
            ours.encode_batch(texts, pairs)
