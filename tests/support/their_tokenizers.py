"""Tokenizers to write into directories, and what transformers' return for them, recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tests.support.oracle import oracle
from tests.support.places import GOLDEN

# Its text depends on the release of tokenizers.
BACKEND = "tokenizer.json"

# The first four ids of every recorded tokenizer.
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def backend_of(kind: str) -> Backend:
    """A small tokenizer: "byte_level", "unigram", "wordpiece" or "sentencepiece".

    Recorded, because the trainers of tokenizers do not give the same one each time.
    """
    return Backend.from_file(str(GOLDEN / "tokenizers" / f"{kind}.json"))


def around(single: str) -> processors.TemplateProcessing:
    """A post-processor that puts special tokens around a text: `<s> $A </s>`."""
    special = [(text, SPECIAL.index(text)) for text in ("<s>", "</s>")]
    return processors.TemplateProcessing(single=single, special_tokens=special)


def transformers_reads(name: str, directory: Path, run: Callable) -> Any:
    """What transformers' tokenizer of a directory returns.

    Args:
      name: the name of the recorded output.
      directory: the tokenizer's; the record is of these very settings.
      run: `tokenizer -> output`.
    """
    settings = {p.name: p.read_text() for p in directory.iterdir() if p.is_file()}
    settings.pop(BACKEND, None)
    settings = dict(sorted(settings.items()))

    def read():
        from transformers import AutoTokenizer

        return {"of": settings, "output": run(AutoTokenizer.from_pretrained(directory))}

    there = oracle(f"hf/tokenizer/{name}", read)
    assert there["of"] == settings, name
    return there["output"]


def encoded(tokenizer: Any, texts: list[str]) -> dict:
    """Ids of texts with and without special tokens."""
    return {
        "special": [tokenizer.encode(text) for text in texts],
        "plain": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
    }
