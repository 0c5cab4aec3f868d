"""What transformers' tokenizers return, recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.oracle import oracle

# Its text depends on the release of tokenizers.
BACKEND = "tokenizer.json"


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
