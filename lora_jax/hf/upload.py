"""Pushing an adapter or a merged model to the Hugging Face hub: its own files, in one commit."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.compat import VERSION, require
from lora_jax.config.arguments import check_path
from lora_jax.files import check_links, read_object
from lora_jax.hf.checkpoint.safetensors import INDEX, SINGLE, open_directory
from lora_jax.hf.hub import is_hub_id
from lora_jax.hf.peft.card import CARD_FILE, card, classes_of
from lora_jax.hf.peft.directory import CONFIG_FILE, FORM_FILE, TENSOR_FILE, read_directory

_TEXTS = (
    CARD_FILE, "LICENSE*", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip


class _Kind(NamedTuple):
    """What a folder holds.

    Attributes:
      name: for messages.
      files: patterns of the files that are pushed.
      check: refuses a folder whose files are not whole.
      replaced: ends of the files of the repository that an earlier push has left.
    """

    name: str
    files: tuple[str, ...]
    check: Callable[[Path], object]
    replaced: tuple[str, ...] = ()


# The file that shows what a folder holds -> the kind.
_KINDS = {
    CONFIG_FILE: _Kind("adapter", (CONFIG_FILE, TENSOR_FILE, FORM_FILE, *_TEXTS), read_directory),
    "config.json": _Kind(
        "model",
        ("config.json", "generation_config.json", "*processor_config.json", SINGLE, INDEX,
         "model-*-of-*.safetensors", *_TEXTS),
        open_directory,
        replaced=(".safetensors", ".safetensors.index.json"),
    ),
}  # fmt: skip


class Pushed(NamedTuple):
    """What is on the hub now.

    Attributes:
      url: of the commit.
      files: that were pushed, by their names in the repository.
      left_out: names in the folder that are no part of an adapter or a model.
    """

    url: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def push(
    directory: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Pushes a PEFT directory or a merged model to the hub, in one commit.

    Of an adapter these are its two files, the form of its training data, tokenizer files and the
    model card, which names the repository; of a model its configuration, weights and tokenizer.
    Everything else in the folder stays where it is: checkpoints, optimizer state, logs.

    Args:
      directory: of `lora_jax.hf.save_peft` or `save_merged`.
      repo: `owner/name`; it is made if it does not exist.
      private: only you may read a repository that is made.
      revision: the branch, which is made if it does not exist; the default branch by default.
      message: of the commit.
      base_model: the base's hub id for an adapter's config and card, which may name a folder of
        this machine.
      token: by default that of the environment, HF_TOKEN, or of `hf auth login`.

    Returns:
      The commit, and which files are in it.

    Raises:
      FileNotFoundError: no such folder, or one without an adapter or a model; or the hub has no
        such branch.
      PermissionError: there is no token, or it may not write there.
      ConnectionError: the hub cannot be reached, or fails.
      ValueError: an adapter or a model that is damaged, a repository that is public and was to be
        private, or a name or a card that the hub refuses.

    Example:
      lora.hf.push("outputs/first/adapter", "me/first", private=True)
    """
    root = check_path("directory", directory)
    if not is_hub_id(repo):
        raise ValueError(f"`repo` must be a hub id, `owner/name`, got {repo!r}")
    kind = _kind_of(root)
    kind.check(root)
    files = sorted({p for each in kind.files for p in root.glob(each) if p.is_file()})
    names = [p.relative_to(root).as_posix() for p in files]
    contents: dict[str, Any] = dict(zip(names, files, strict=True))
    if kind.name == "adapter":
        contents |= _described(root, repo, base_model)
    hub, errors = require("huggingface_hub"), require("huggingface_hub.errors")
    if not (token := token or hub.get_token()):
        raise PermissionError(
            f"`{repo}`: there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN"
        )
    api = hub.HfApi(token=token, library_name="lora_jax", library_version=VERSION)
    message = message or f"Upload {kind.name}"
    try:
        url = _commit(api, contents, kind, repo, private=private, revision=revision, text=message)
    except errors.HFValidationError:
        raise ValueError(f"`repo` must be a hub id, `owner/name`, got {repo!r}") from None
    # HTTPError is that of the HTTP client of huggingface_hub, whose errors are no OSErrors.
    except (errors.HTTPError, OSError, RuntimeError) as error:
        raise _explained(error, repo) from error
    pushed = {name.partition("/")[0] for name in contents}
    left = sorted(p.name for p in root.iterdir() if p.name not in pushed)
    return Pushed(url, tuple(contents), tuple(left))


def _kind_of(root: Path) -> _Kind:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such directory")
    check_links(root)
    found = next((kind for file, kind in _KINDS.items() if (root / file).is_file()), None)
    if found is not None:
        return found
    inner = root / "adapter"
    is_run = (inner / CONFIG_FILE).is_file()
    raise FileNotFoundError(
        f"{root}: holds neither an adapter ({CONFIG_FILE}) nor a model (config.json); "
        + (f"push {inner}" if is_run else "`lora-jax export` writes one")
    )


def _described(root: Path, repo: str, base_model: str | None) -> Mapping[str, bytes]:
    """The config and the card of an adapter, where they are other than in the folder."""
    fields, new = read_object(root / CONFIG_FILE), {}
    old, name = root / CARD_FILE, "base_model_name_or_path"
    classes = classes_of(old.read_text("utf-8"), fields) if old.is_file() else [None]
    if base_model is not None:
        fields[name] = base_model
        new[CONFIG_FILE] = json.dumps(fields, indent=2, sort_keys=True).encode()
    base = fields.get(name) or ""
    if base and (Path(base).exists() or not is_hub_id(base, owner=False)):
        warnings.warn(
            f"{root / CONFIG_FILE}: names its base by a path, `{base}`, which nobody else has: "
            "give the base's hub id as `base_model`",
            stacklevel=3,
        )
    # A card that its user has changed stays as it is.
    if classes:
        new[CARD_FILE] = card(fields, classes[0], place=repo).encode()
    return new


def _commit(
    api: Any,
    contents: Mapping[str, Path | bytes],
    kind: _Kind,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    text: str,
) -> str:
    """Makes what is missing, and commits; the commit's address."""
    hub = require("huggingface_hub")
    # An organization may have private repositories by default.
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise ValueError(
            f"`private` is for a new repository, and `{repo}` is public already: make it private "
            "in its settings on the hub, or choose another `repo`"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo, revision=revision) if kind.replaced else ()
    old = [name for name in there if name.endswith(kind.replaced) and name not in contents]
    changes = [hub.CommitOperationAdd(name, value) for name, value in contents.items()]
    changes += [hub.CommitOperationDelete(name) for name in old]
    # Not `upload_folder`, which may spread the files over several commits.
    commit = api.create_commit(repo, changes, commit_message=text, revision=revision)
    return commit.commit_url


_REMEDIES = {
    401: (PermissionError, "the hub does not take the token: `hf auth login`, or set HF_TOKEN"),
    403: (PermissionError, "the token may not write there: take one that may, or another `repo`"),
    404: (FileNotFoundError, "the hub has no such repository or branch, or hides it"),
}
_OTHER = (ConnectionError, "the hub cannot be reached or fails: try again later")


def _explained(error: Exception, repo: str) -> OSError:
    """The error of huggingface_hub in one sentence."""
    # What a thread raises while it uploads is the cause of a RuntimeError.
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    status = getattr(getattr(cause or error, "response", None), "status_code", 0)
    kind, remedy = _REMEDIES.get(status, _OTHER)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else type(error).__name__
    return kind(f"`{repo}`: {remedy} ({said})")
