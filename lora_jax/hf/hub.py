"""Fetching a model's directory from the Hugging Face hub."""

from pathlib import Path

# What a model needs; pickle weights are not fetched at all.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")


def snapshot(name: str, *, revision: str | None = None) -> Path:
    """The local directory of a hub model, downloaded unless it is in the cache.

    Args:
      name: a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
      revision: a branch, tag or commit; the default branch by default.

    Returns:
      The directory in huggingface_hub's cache.

    Raises:
      FileNotFoundError: the hub has no such model, or none that may be read.
      ConnectionError: the hub cannot be reached and the cache does not have the model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except HFValidationError:
        raise FileNotFoundError(
            f"`{name}` is neither a directory nor a .gguf file that exists, nor a hub id "
            "(`owner/name`)"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"`{name}`: the hub has no such model or revision, or it is gated: "
            f"{str(error).splitlines()[0]}"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"`{name}` is not a local directory, and the hub cannot be reached to fetch it "
            f"({type(error).__name__}); download it elsewhere and give its directory"
        ) from None
