"""BERT's WordPiece tokenizer from its pieces, as transformers builds it of a bare vocab.txt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.compat import require

# The names in BERT's own files; tokenizer_config.json may have others.
SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def build(path: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> Any:
    """A tokenizer of the pieces in vocab.txt.

    Args:
      path: vocab.txt, one piece a line; a piece's id is its line's number, from 0.
      settings: tokenizer_config.json; `do_lower_case`, `strip_accents` and
        `tokenize_chinese_chars` count.
      special: text of the special tokens, all of `SPECIAL`.

    Returns:
      The `tokenizers.Tokenizer`.

    Raises:
      ValueError: not text, a piece that occurs twice, or a special token that is missing.
    """
    return of_pieces(_vocabulary(path, special), settings, special)


def of_pieces(
    pieces: Mapping[str, int], settings: Mapping[str, Any], special: Mapping[str, Any]
) -> Any:
    """As `build`, of pieces and their ids."""
    made = require("tokenizers").BertWordPieceTokenizer(
        vocab=dict(pieces),
        **special,
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    return made._tokenizer


def _vocabulary(path: Path, special: Mapping[str, str]) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    # A last line may end in a line break or not; files from Windows have "\r" before each.
    pieces = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if piece in vocabulary:
            raise ValueError(
                f"{path}, line {number + 1}: `{piece}` is on line {vocabulary[piece] + 1} "
                "already; a piece has one id"
            )
        vocabulary[piece] = number
    if missing := [text for text in special.values() if text not in vocabulary]:
        raise ValueError(
            f"{path}: lacks {', '.join(f'`{m}`' for m in missing)}, which BERT needs; name the "
            "file's own special tokens in tokenizer_config.json"
        )
    return vocabulary
