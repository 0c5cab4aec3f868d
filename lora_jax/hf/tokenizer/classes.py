"""Tokenizer classes that transformers 5 builds from defaults of their own.

For most directories AutoTokenizer follows tokenizer.json. For these it takes the vocabulary, the
merges, Unigram's character map, and the post-processor unless the class has its own; the rest comes
from the class and tokenizer_config.json.

Source: transformers 5.23, the `__init__` of each class in `models/*/tokenization_*.py`, and
`AutoTokenizer.from_pretrained` for the choice of the class.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lora_jax.hf.tokenizer.backends import QWEN2, QWEN3_5

# A part of tokenizer.json, as it is written there.
Part = dict[str, Any] | None


class Given(NamedTuple):
    """What the parts of a class depend on.

    Attributes:
      settings: tokenizer_config.json.
      special: name -> text of the special tokens.
      characters: the character map (`Precompiled`) in the file's normalizer, if it has one.
    """

    settings: Mapping[str, Any]
    special: Mapping[str, str]
    characters: Part

    def prefix(self, default: bool) -> bool:
        """`add_prefix_space`, where it is set."""
        value = self.settings.get("add_prefix_space")
        return default if value is None else bool(value)


class Parts(NamedTuple):
    """What a class sets, whatever tokenizer.json has.

    Attributes:
      normalizer, pre_tokenizer, decoder: as in tokenizer.json.
      model: fields of the model; of Unigram's, `unk_id` is for a vocabulary without `unk_token`.
    """

    normalizer: Part
    pre_tokenizer: Part
    decoder: Part
    model: Mapping[str, Any]


class Class(NamedTuple):
    """One class.

    Attributes:
      model: the kind of model that it has.
      parts: what it sets.
      special: its special tokens, where tokenizer_config.json names none.
      single, pair: what it puts around one text and two: names of special tokens, "$A" and "$B:1"
        with their type ids; empty if tokenizer.json decides.
      trims: offsets leave out the spaces around a token, unless `trim_offsets` is false.
      extra: further special tokens, where the files list none, by tokenizer_config.json.
      again: how it adds its special tokens again: "plain", without `lstrip`, `single_word` and the
        others; "special", those without a name as special ones; "" for not at all.
    """

    model: str
    parts: Callable[[Given], Parts]
    special: Mapping[str, str]
    single: str = ""
    pair: str = ""
    trims: bool = False
    extra: Callable[[Mapping[str, Any]], Sequence[str]] = lambda settings: ()
    again: Literal["", "plain", "special"] = ""


def _bytes(prefix: bool, regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True,
            "use_regex": regex}  # fmt: skip


def _metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def _sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


_NFC = {"type": "NFC"}
_BYTES = _bytes(True)  # as a decoder: its settings do not count
# Metaspace's marks back to spaces, and `<0x0A>` back to bytes.
_FALLBACK = (
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_PLAIN_BPE = {
    "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
    "ignore_merges": False, "continuing_subword_prefix": None, "end_of_word_suffix": None,
}  # fmt: skip
_FALLBACK_BPE = {**_PLAIN_BPE, "fuse_unk": True, "byte_fallback": True}


def _llama(given: Given) -> Parts:
    # One space at the start of the text, not after every special token as in older files.
    prefix = given.prefix(True)
    scheme = ("always" if given.settings.get("legacy", False) else "first") if prefix else "never"
    decoder = _sequence("decoders", *_FALLBACK, *[_STRIP] * prefix)
    return Parts(None, _metaspace(scheme, False), decoder, _FALLBACK_BPE)


def _code_llama(given: Given) -> Parts:
    scheme = "first" if given.prefix(True) else "never"
    decoder = _sequence("decoders", *_FALLBACK, _STRIP)
    model = {**_FALLBACK_BPE, "unk_token": given.special["unk_token"]}
    return Parts(None, _metaspace(scheme, False), decoder, model)


def _gemma(given: Given) -> Parts:
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
             "invert": False}  # fmt: skip
    model = {**_FALLBACK_BPE, "unk_token": given.special["unk_token"]}
    return Parts(normalizer, split, _sequence("decoders", *_FALLBACK), model)


def _qwen(regex: str) -> Callable[[Given], Parts]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    def parts(given: Given) -> Parts:
        words = _sequence("pretokenizers", split, _bytes(given.prefix(False), regex=False))
        return Parts(_NFC, words, _BYTES, _PLAIN_BPE)

    return parts


def _gpt2(given: Given) -> Parts:
    return Parts(None, _bytes(given.prefix(False)), _BYTES, _PLAIN_BPE)


def _neox(given: Given) -> Parts:
    return _gpt2(given)._replace(normalizer=_NFC)


def _cohere(given: Given) -> Parts:
    digits = {"type": "Digits", "individual_digits": True}
    words = _sequence("pretokenizers", digits, _bytes(given.prefix(False)))
    return Parts(_NFC, words, _BYTES, _PLAIN_BPE)


def _bert(given: Given) -> Parts:
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": given.settings.get("tokenize_chinese_chars", True),
        "strip_accents": given.settings.get("strip_accents"),
        "lowercase": given.settings.get("do_lower_case", True),
    }
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    model = {"unk_token": given.special["unk_token"], "continuing_subword_prefix": "##"}
    return Parts(normalizer, {"type": "BertPreTokenizer"}, decoder, model)


def _xlm_roberta(given: Given) -> Parts:
    return _unigram(given, {"unk_id": 3}, prefix=given.prefix(True))


def _camembert(given: Given) -> Parts:
    unknown = {"unk_id": 0, "unk_token": given.special["unk_token"]}
    return _unigram(given, unknown, prefix=given.prefix(True))


def _t5(given: Given) -> Parts:
    return _unigram(given, {"unk_id": 2}, prefix=True)


def _unigram(given: Given, unknown: Mapping[str, Any], *, prefix: bool) -> Parts:
    marks = _metaspace("always" if prefix else "never", True)
    words = _sequence("pretokenizers", {"type": "WhitespaceSplit"}, marks)
    return Parts(given.characters, words, marks, unknown)


def _deberta(given: Given) -> Parts:
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s{2,}|[\n\r\t]"}, "content": " "}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    lower = [{"type": "Lowercase"}] * bool(given.settings.get("do_lower_case", False))
    marks = _metaspace("always" if given.prefix(True) else "first", True)
    punctuation = {"type": "Punctuation", "behavior": "Isolated"}
    split = [punctuation] * bool(given.settings.get("split_by_punct", False))
    unknown = {
        "unk_id": given.settings.get("unk_id", 1), "unk_token": given.special["unk_token"]
    }  # fmt: skip
    return Parts(
        _sequence("normalizers", *lower, spaces, _NFC, strip),
        _sequence("pretokenizers", *split, marks),
        marks,
        unknown,
    )


def _sentinels(settings: Mapping[str, Any]) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(settings.get("extra_ids", 100))]


def _end(text: str) -> dict[str, str]:
    return dict.fromkeys(("unk_token", "eos_token"), text)


_S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILL = {
    "prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>", "fill_token": "<FILL_ME>",
}  # fmt: skip
_ROBERTA_SPECIAL = {
    **_S, "sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
_BERT_SPECIAL = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}  # fmt: skip
_GEMMA_SPECIAL = {
    "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
    "mask_token": "<mask>",
}  # fmt: skip
_COHERE_SPECIAL = {
    "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>",
    "sep_token": "<SEP>", "pad_token": "<PAD>", "cls_token": "<CLS>", "mask_token": "<MASK_TOKEN>",
}  # fmt: skip
_TEXT_END = _end("<|endoftext|>")

CLASSES: Mapping[str, Class] = {
    "LlamaTokenizer": Class("BPE", _llama, _S),
    "CodeLlamaTokenizer": Class(
        "BPE", _code_llama, {**_S, **_INFILL}, single="bos_token $A",
        pair="bos_token $A bos_token:1 $B:1",
    ),
    "GemmaTokenizer": Class("BPE", _gemma, _GEMMA_SPECIAL),
    "Qwen2Tokenizer": Class(
        "BPE", _qwen(QWEN2), {**_TEXT_END, "pad_token": "<|endoftext|>"}, again="plain"
    ),
    "Qwen3_5Tokenizer": Class(
        "BPE", _qwen(QWEN3_5), {**_TEXT_END, "pad_token": "<|endoftext|>"}
    ),
    "GPT2Tokenizer": Class("BPE", _gpt2, {**_TEXT_END, "bos_token": "<|endoftext|>"}),
    "GPTNeoXTokenizer": Class(
        "BPE", _neox, {**_TEXT_END, "bos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
        single="$A", pair="$A $B:1",
    ),
    "CohereTokenizer": Class("BPE", _cohere, _COHERE_SPECIAL, again="special"),
    "RobertaTokenizer": Class(
        "BPE", _gpt2, _ROBERTA_SPECIAL, single="cls_token $A sep_token",
        pair="cls_token $A sep_token sep_token $B sep_token", trims=True,
    ),
    "BertTokenizer": Class(
        "WordPiece", _bert, _BERT_SPECIAL, single="cls_token $A sep_token",
        pair="cls_token $A sep_token $B:1 sep_token:1",
    ),
    "XLMRobertaTokenizer": Class(
        "Unigram", _xlm_roberta, _ROBERTA_SPECIAL, single="bos_token $A eos_token",
        pair="bos_token $A eos_token eos_token $B eos_token",
    ),
    "T5Tokenizer": Class(
        "Unigram", _t5, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        single="$A eos_token", pair="$A eos_token $B eos_token",
        extra=_sentinels,
    ),
    "DebertaV2Tokenizer": Class(
        "Unigram", _deberta, {**_BERT_SPECIAL, "bos_token": "[CLS]", "eos_token": "[SEP]"},
        single="cls_token $A sep_token", pair="cls_token $A sep_token $B:1 sep_token:1",
    ),
    "CamembertTokenizer": Class(
        "Unigram", _camembert, _ROBERTA_SPECIAL, single="bos_token $A eos_token",
        pair="bos_token $A eos_token eos_token $B eos_token",
        extra=lambda settings: ("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"),
    ),
}  # fmt: skip
