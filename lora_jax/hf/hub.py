"""Fetching a model's directory from the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from lora_jax.compat import require

# What a model needs; pickle weights are not fetched at all.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
_NAME = r"[\w-][\w.-]*"


def is_hub_id(name: str, *, owner: bool = True) -> bool:
    """Whether a name is spelled as a hub id: `owner/name`, or `gpt2` where none has to be there."""
    return bool(re.fullmatch(f"{_NAME}/{_NAME}" if owner else f"({_NAME}/)?{_NAME}", name))


def snapshot(name: str, *, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Path:
    """The local directory of a hub model, downloaded unless it is in the cache.

    Args:
      name: a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
      revision: a branch, tag or commit; the default branch by default.
      patterns: of the files to fetch.

    Returns:
      The directory in huggingface_hub's cache.

    Raises:
      FileNotFoundError: the hub has no such model, or none that may be read.
      ConnectionError: the hub cannot be reached and the cache does not have the model.
    """
    hub = require("huggingface_hub")
    errors = require("huggingface_hub.errors")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    # No `owner/name`: most often the misspelt path of a directory.
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"`{name}` is neither a directory nor a .gguf file that exists, nor a hub id "
            "(`owner/name`)"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"`{name}`: the hub has no such model or revision, or it is gated: "
            f"{str(error).splitlines()[0]}"
        ) from None
    # HTTPError is that of the HTTP client of huggingface_hub, whose errors are no OSErrors.
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        raise ConnectionError(
            f"`{name}` is not a local directory, and the hub cannot be reached to fetch it "
            f"({type(error).__name__}); download it elsewhere and give its directory"
        ) from None
