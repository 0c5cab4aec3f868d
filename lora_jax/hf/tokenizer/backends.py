"""Building a tokenizer from the vocabulary, merges or scores, and token types in a GGUF file.

How byte-level BPE splits text before merging is not in the file: `tokenizer.ggml.pre` has
llama.cpp's name for it. An unknown name is an error, because another split gives other tokens.
SentencePiece (Llama 2, Mistral, Gemma) splits nothing; the piece of the highest score is merged
first, and of Gemma 4 the file has the merges.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.compat import require
from lora_jax.hf.tokenizer import wordpiece

# llama.cpp's token types. Both kinds are cut out of a text before it is split.
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"  # SentencePiece's sign for a space

# The expressions of the models' own tokenizer.json: digits in groups of three, and singly.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2's, with marks (as of Devanagari) beside letters.
QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words begin where a lower letter is followed by an upper one.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek's cut a text several times: the letters that have cases, signs of China and Korea.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Split(NamedTuple):
    """How a byte-level tokenizer cuts text before it merges.

    Attributes:
      regex: what stays together, one after the other; None is GPT-2's own expression.
      digits: every digit stands alone.
      whole_words: a piece that is a token is not built from merges.
      normalize: text is brought to Unicode NFC first.
      bos: a text starts with BOS, where the file does not decide it.
      one_sep: one token is between the two texts of a pair, and not EOS and SEP.
    """

    regex: str | tuple[str, ...] | None = None
    digits: bool = False
    whole_words: bool = False
    normalize: bool = False
    bos: bool = False
    one_sep: bool = False


_LLAMA3_SPLIT = Split(regex=_LLAMA3, whole_words=True, bos=True)
SPLITS: Mapping[str, Split] = {
    "gpt-2": Split(),
    **dict.fromkeys(("phi-2", "roberta-bpe"), Split()),
    "modern-bert": Split(one_sep=True),
    "olmo": Split(normalize=True),
    **dict.fromkeys(("smollm", "starcoder", "refact"), Split(digits=True)),
    "command-r": Split(digits=True, normalize=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3_SPLIT),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Split(regex=_LLAMA3)),
    **dict.fromkeys(("qwen2", "stablelm2"), Split(regex=QWEN2, normalize=True)),
    "qwen35": Split(regex=QWEN3_5, normalize=True),
    "deepseek-r1-qwen": Split(regex=QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), Split(regex=_O200K, whole_words=True)),
    "deepseek-llm": Split(regex=_DEEPSEEK),
    "deepseek-coder": Split(regex=_DEEPSEEK_CODER),
    "deepseek-v3": Split(regex=_DEEPSEEK_V3),
    "tekken": Split(regex=_TEKKEN, whole_words=True, bos=True),
}


def build(metadata: Mapping[str, Any], *, path: Path) -> Any:
    """Builds the `tokenizers.Tokenizer` that a GGUF file describes.

    Args:
      metadata: the file's keys.
      path: the file, for messages.

    Raises:
      ValueError: a kind or split that is not known, or tables that do not belong together.
    """
    kind = metadata["tokenizer.ggml.model"]
    if kind == "llama":
        tokens = _texts(metadata, "tokens", path)
        # Source: llama.cpp's `llm_tokenizer_spm`, and transformers' `generate_merges`.
        merges = _merges_of(tokens, _scores(metadata, tokens, path))
        return _sentence_pieces(metadata, tokens, merges, path)
    if kind == "gemma4":
        # llama.cpp puts BOS before a text of this kind, whatever a file states.
        metadata = {"tokenizer.ggml.add_space_prefix": False, **metadata,
                    "tokenizer.ggml.add_bos_token": True}  # fmt: skip
        return _sentence_pieces(metadata, *_tables(metadata, path), path)
    if kind == "bert":
        return _word_pieces(metadata, path)
    if kind == "t5":
        # llama.cpp puts EOS behind a text of this kind where the file does not decide it.
        return _unigram({"tokenizer.ggml.add_eos_token": True, **metadata}, path)
    if kind != "gpt2":
        raise ValueError(
            f"{path}: a tokenizer of kind `{kind}` cannot be built from a GGUF file, only `gpt2` "
            "(byte-level BPE), `llama` (SentencePiece), `bert` (WordPiece), `t5` (Unigram) and "
            "`gemma4`; load the model from its Hugging Face directory"
        )
    name = str(metadata.get("tokenizer.ggml.pre"))
    # No default: a wrong split gives valid tokens that the model never saw.
    if name not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"{path}: `tokenizer.ggml.pre` is `{name}`, not one of {known}")
    return _byte_level(metadata, SPLITS[name], path)


def special_token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    """Text of the token whose number the file states, or None if it states none that exists."""
    number = metadata.get(f"tokenizer.ggml.{key}")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any], split: Split, path: Path) -> Any:
    library = require("tokenizers")
    tokens, merges = _tables(metadata, path)
    model = library.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=split.whole_words,
    )
    tokenizer = library.Tokenizer(model)
    if split.normalize:
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = library.decoders.ByteLevel()
    _add_special(tokenizer, metadata, tokens, path)
    plain = library.processors.ByteLevel(trim_offsets=False)
    around = _around(metadata, tokens, bos=split.bos, one_sep=split.one_sep)
    tokenizer.post_processor = (
        plain if around is None else library.processors.Sequence([plain, around])
    )
    return tokenizer


_OF_BERT = dict(
    zip(wordpiece.SPECIAL, ("unknown", "seperator", "padding", "cls", "mask"), strict=True)
)


def _word_pieces(metadata: Mapping[str, Any], path: Path) -> Any:
    """BERT's; a piece that begins a word has a sign of a space there, and others have no `##`."""
    tokens = _texts(metadata, "tokens", path)
    found = {n: special_token(metadata, tokens, f"{key}_token_id") for n, key in _OF_BERT.items()}
    found["cls_token"] = found["cls_token"] or special_token(metadata, tokens, "bos_token_id")
    if missing := [name for name, token in found.items() if token is None]:
        raise ValueError(f"{path}: the tokenizer lacks the numbers of {', '.join(missing)}")
    types = _types(metadata, tokens, path)
    whole = {*found.values(), *(tokens[n] for n, kind in enumerate(types) if kind == _CONTROL)}
    pieces = [t if t in whole else t[1:] if t.startswith(_SPACE) else f"##{t}" for t in tokens]
    if len(set(pieces)) < len(pieces):
        raise ValueError(f"{path}: the tokenizer has the same piece twice")
    flags = {}
    for ours, theirs in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents")):
        flag = metadata.get(f"tokenizer.ggml.normalizer.{theirs}")
        if flag not in (None, True, False):
            raise ValueError(f"{path}: `tokenizer.ggml.normalizer.{theirs}` must be true or false")
        flags |= {} if flag is None else {ours: bool(flag)}
    return wordpiece.of_pieces({piece: n for n, piece in enumerate(pieces)}, flags, found)


def _scores(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> Sequence[float]:
    found = metadata.get("tokenizer.ggml.scores")
    scores = [x for x in found if isinstance(x, int | float)] if isinstance(found, list) else []
    if len(scores) != len(tokens):
        raise ValueError(f"{path}: the tokenizer does not give every token its score")
    return scores


def _sentence_pieces(
    metadata: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, str]], path: Path
) -> Any:
    library = require("tokenizers")
    unknown = special_token(metadata, tokens, "unknown_token_id")
    tokenizer = library.Tokenizer(
        library.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=tokens[0] if unknown is None else unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalizers, decoders = library.normalizers, library.decoders
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), spaces] if prefix else [spaces]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    _add_special(tokenizer, metadata, tokens, path)
    around = _around(metadata, tokens, bos=True)
    if around is not None:
        tokenizer.post_processor = around
    return tokenizer


def _unigram(metadata: Mapping[str, Any], path: Path) -> Any:
    """XLM-R's and T5's: the likeliest pieces of each word, by their scores."""
    library, tokens = require("tokenizers"), _texts(metadata, "tokens", path)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if special_token(metadata, tokens, "unknown_token_id") is None:
        raise ValueError(f"{path}: `tokenizer.ggml.unknown_token_id` is {unknown!r}, no token's")
    pieces = list(zip(tokens, _scores(metadata, tokens, path), strict=True))
    tokenizer = library.Tokenizer(library.models.Unigram(pieces, unknown, False))
    if characters := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        try:
            tokenizer.normalizer = library.normalizers.Precompiled(bytes(characters))
        except Exception:  # the library's own class
            raise ValueError(
                f"{path}: `tokenizer.ggml.precompiled_charsmap` is no map of characters"
            ) from None
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    scheme = "always" if prefix else "never"
    words = library.pre_tokenizers
    marks = words.Metaspace(_SPACE, prepend_scheme=scheme, split=True)
    tokenizer.pre_tokenizer = words.Sequence([words.WhitespaceSplit(), marks])
    tokenizer.decoder = library.decoders.Metaspace(_SPACE, prepend_scheme=scheme, split=True)
    _add_special(tokenizer, metadata, tokens, path)
    around = _around(metadata, tokens, bos=False)
    if around is not None:
        tokenizer.post_processor = around
    return tokenizer


def _merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, that of the highest score first."""
    numbers = {token: i for i, token in enumerate(tokens)}
    found = [
        (-score, number, token[:cut], token[cut:])
        for number, (token, score) in enumerate(zip(tokens, scores, strict=True))
        for cut in range(1, len(token))
        if token[:cut] in numbers and token[cut:] in numbers
    ]
    return [(left, right) for _, _, left, right in sorted(found, key=lambda each: each[:2])]


def _add_special(
    tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str], path: Path
) -> None:
    """Adds the tokens that are cut out of a text before it is split."""
    library = require("tokenizers")
    types = _types(metadata, tokens, path)
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        tokenizer.add_tokens(
            [
                library.AddedToken(token, normalized=False, special=special)
                for token, its in zip(tokens, types, strict=True)
                if its == kind
            ]
        )


def _types(metadata: Mapping[str, Any], tokens: list[str], path: Path) -> list[Any]:
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path}: the tokenizer does not give every token its type")
    return types


def _texts(metadata: Mapping[str, Any], name: str, path: Path) -> list[str]:
    """A list of texts, none of them twice among tokens."""
    texts = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: the tokenizer's {name} are not a list of texts")
    if not texts:
        raise ValueError(f"{path}: the tokenizer lacks its {name}")
    if name == "tokens" and len(set(texts)) < len(texts):
        raise ValueError(f"{path}: the tokenizer has the same token twice")
    return texts


def _tables(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    tokens, merges = (_texts(metadata, name, path) for name in ("tokens", "merges"))
    known, pairs = set(tokens), []
    for merge in merges:
        # Byte-level tokens hold no space: it is written "Ġ".
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise ValueError(f"{path}: the tokenizer's merge {merge!r} is not of tokens")
        pairs.append((left, right))
    return tokens, pairs


def _pre_tokenizer(split: Split) -> Any:
    library = require("tokenizers")
    pre_tokenizers = library.pre_tokenizers
    if split.regex is not None:
        regexes = (split.regex,) if isinstance(split.regex, str) else split.regex
        return pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(library.Regex(x), behavior="isolated") for x in regexes),
                # The split is made: this only maps bytes to letters.
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if not split.digits:
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def _around(
    metadata: Mapping[str, Any], tokens: list[str], *, bos: bool, one_sep: bool = False
) -> Any:
    """BOS or EOS around a text, where the file's flags add them; None for neither.

    `bos` says whether BOS is added where the file does not; `one_sep` as in `Split`.
    """
    processors = require("tokenizers").processors

    def token_around(name: str, default: bool, spelled: str | None = None) -> str | None:
        add = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        return special_token(metadata, tokens, f"{spelled or name}_token_id") if add else None

    first, last = token_around("bos", bos), token_around("eos", False)
    if first is None and last is None:
        return None
    between = None if one_sep else token_around("sep", False, "seperator")
    around = list(dict.fromkeys(t for t in (first, last, between) if t is not None))
    single = " ".join(f"{t}:0" for t in (first, "$A", last) if t)
    pair = " ".join(f"{t}:0" for t in (first, "$A", last, between, "$B", last) if t)
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(t, tokens.index(t)) for t in around]
    )


def reads_spaces(backend: Any) -> bool:
    """Whether words have other tokens in a text than alone, those of a space and the word."""
    text = backend.encode("a a", add_special_tokens=False).ids
    alone, spaced = (
        backend.encode(["a", word], is_pretokenized=True, add_special_tokens=False).ids
        for word in ("a", " a")
    )
    return text == spaced != alone
