"""Fetching from the hub: what is asked for, and what each failure says. Nothing is downloaded."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from lora_jax import models
from lora_jax.hf.hub import PATTERNS, snapshot

pytestmark = pytest.mark.once


def test_a_hub_id_becomes_its_directory(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert snapshot("owner/name", revision="v1") == tmp_path
    assert asked == {"name": "owner/name", "revision": "v1", "allow_patterns": list(PATTERNS)}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in PATTERNS)


def test_offline_and_not_cached_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="`nobody/nothing` is not a local directory") as error:
        models.load("nobody/nothing")
    assert "give its directory" in str(error.value) and "\n" not in str(error.value)


def failing(error):
    def download(*_, **__):
        raise error

    return download


def response_error(kind):
    """An error of huggingface_hub's with the parts that it is made of, without a server."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error.\nRepository Not Found for url")
    return error


@pytest.mark.parametrize(
    "kind", [errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError]
)
def test_no_such_model(monkeypatch, kind):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(response_error(kind)))
    with pytest.raises(FileNotFoundError, match="the hub has no such model or revision, or it is"):
        snapshot("owner/name")


@pytest.mark.parametrize(
    "error",
    [errors.LocalEntryNotFoundError("offline"), OSError("no route"), TimeoutError()],
    ids=repr,
)
def test_no_connection(monkeypatch, error):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(ConnectionError, match="the hub cannot be reached to fetch it"):
        snapshot("owner/name")


@pytest.mark.parametrize("name", ["no/such/directory", "./model", "a--b..", ""])
def test_what_is_no_hub_id_is_said_to_be_no_directory_either(name):
    with pytest.raises(FileNotFoundError, match="is neither a directory nor a .gguf file"):
        snapshot(name)
