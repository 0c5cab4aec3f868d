"""Pushing to the hub, by the real client to a hub of this machine, and reading back from it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import constants

from lora_jax import hf
from lora_jax.cli import main
from lora_jax.files import write_text
from lora_jax.hf.hub import snapshot
from lora_jax.hf.peft.directory import read_directory
from lora_jax.hf.upload import push
from lora_jax.recipes.forms import FORM_FILE, read_form

from tests.support.hub import OWNER, hub
from tests.support.peft_trees import QV, equal, planted, random_params, randomized

pytestmark = pytest.mark.once

REPO = f"{OWNER}/mine"
TREE = randomized(planted(random_params(), QV), QV)


@pytest.fixture
def there(monkeypatch, tmp_path):
    with hub() as its:
        monkeypatch.setattr(constants, "ENDPOINT", its.url)
        template = its.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield its


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "run" / "adapter"
    hf.save_peft(folder, TREE, QV, base_model_name="org/base")
    write_text(folder / FORM_FILE, '{"form": "prompt"}')
    # What training leaves, which is nobody else's.
    for name in ("checkpoints/7/state", "metrics.jsonl", "optimizer.pt", "optimizer.safetensors"):
        write_text(folder / name, "secret")
    return folder


@pytest.fixture
def merged(tmp_path):
    folder = tmp_path / "merged"
    hf.save_weights(folder, {"lm_head": {"kernel": np.ones((4, 3), np.float32)}}, hf.FLAX)
    for name in ("config.json", "tokenizer.json", "trainer_state.json"):
        write_text(folder / name, "{}")
    return folder


def test_an_adapter_goes_up_whole_and_comes_back_by_its_hub_id(there, adapter, tmp_path):
    pushed = push(adapter, REPO, private=True, message="First")
    repo = there.repos[REPO]
    assert repo.private and repo.log == ["initial commit", "First"]
    assert pushed.url == f"{there.url}/{REPO}/commit/{repo.branches['main']}"
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", FORM_FILE}
    assert {*repo.files("main")} == {".gitattributes", *names} == {".gitattributes", *pushed.files}
    assert pushed.left_out == (
        "checkpoints",
        "metrics.jsonl",
        "optimizer.pt",
        "optimizer.safetensors",
    )
    for name in names - {"README.md"}:
        assert repo.files("main")[name] == (adapter / name).read_bytes()
    card = repo.files("main")["README.md"].decode()
    assert f"PeftModel.from_pretrained(base, '{REPO}')" in card and "base_model: 'org/base'" in card
    assert read_directory(REPO)[0] == read_directory(adapter)[0]
    equal(read_directory(REPO)[1], read_directory(adapter)[1])
    assert read_form(REPO) == "prompt"


def test_a_hub_id_is_inspected_as_what_it_holds(there, adapter, tmp_path, capsys):
    push(adapter, REPO, private=True)
    # A base beside the adapter, as some have it, is neither fetched nor shown.
    files = there.repos[REPO].files("main")
    there.repos[REPO].add("main", {**files, "model.safetensors": b"big"}, "base")
    assert main(["inspect", REPO, "--check"]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", str(adapter), "--check"]) == 0
    assert shown == capsys.readouterr().out and shown.startswith("PEFT")
    assert {p.name for p in snapshot(REPO, patterns=()).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_model_of_the_hub_is_inspected(there, merged, capsys):
    push(merged, f"{OWNER}/model")
    assert main(["inspect", f"{OWNER}/model", "--tensors"]) == 0
    assert "lm_head.weight" in capsys.readouterr().out
    assert main(["inspect", f"{OWNER}/nothing"]) == 1
    assert "the hub has no such model or revision" in capsys.readouterr().err


def test_the_same_again_changes_nothing_and_a_branch_is_made(there, adapter):
    push(adapter, REPO)
    first = there.repos[REPO].files("main")
    push(adapter, REPO, revision="v2")
    hf.save_peft(adapter, TREE, QV, base_model_name="org/other")
    push(adapter, REPO, revision="v2")
    assert there.repos[REPO].files("main") == first
    assert b"org/other" in there.repos[REPO].files("v2")["adapter_config.json"]
    assert not there.repos[REPO].private


def test_a_merged_model_replaces_all_of_an_earlier_one(there, merged, tmp_path):
    pushed = push(merged, REPO)
    assert {*pushed.files} == {"config.json", "model.safetensors", "tokenizer.json"}
    old = dict.fromkeys(("model-00001-of-00001.safetensors", "model.safetensors.index.json"), b"")
    there.repos[REPO].add("main", {**there.repos[REPO].files("main"), **old, "notes": b""}, "old")
    push(merged, REPO)
    now = there.repos[REPO].files("main")
    assert {*now} == {".gitattributes", "notes", *pushed.files}
    assert now["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    downloaded = snapshot(REPO)
    for name in pushed.files:
        assert (downloaded / name).read_bytes() == (merged / name).read_bytes(), name


def test_a_base_with_a_path_for_a_name_is_said_and_can_be_named(there, adapter, tmp_path):
    hf.save_peft(adapter, TREE, QV, base_model_name=str(tmp_path / "base"))
    with pytest.warns(UserWarning, match="names its base by a path, `.*base`, which nobody else"):
        push(adapter, REPO)
    assert b"base_model:" not in there.repos[REPO].files("main")["README.md"]
    push(adapter, REPO, base_model="org/base")
    now = there.repos[REPO].files("main")
    assert json.loads(now["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b"base_model: 'org/base'" in now["README.md"]
    (adapter / "README.md").write_text("---\nbase_model: '../x y'\n---\nmine\n")
    with pytest.raises(ValueError, match='(?s)README.md.*"../x y" is not valid'):
        push(adapter, REPO, base_model="org/base")


@pytest.mark.parametrize(
    ("token", "repo", "kind", "text"),
    [
        ("hf_old", REPO, PermissionError, "the hub does not take the token: .*hf auth login"),
        ("hf_reads", REPO, PermissionError, r"may not write there.*\(403 .*no write permission"),
        ("hf_writes", "you/it", PermissionError, r"may not write .*`repo` \(403.*member of"),
        ("", REPO, PermissionError, "there is no token for the hub: .*or set HF_TOKEN"),
        ("", "mine", ValueError, "`repo` must be a hub id, `owner/name`, got 'mine'"),
        ("hf_writes", "a--b/..", ValueError, "`repo` must be a hub id, `owner/name`, got 'a--b"),
    ],
    ids=str,
)  # fmt: skip
def test_who_may_not_is_told_in_one_sentence(there, adapter, monkeypatch, token, repo, kind, text):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=text) as error:
        push(adapter, repo)
    assert "\n" not in str(error.value) and there.repos == {}


def test_no_network_no_branch_and_a_public_repository(there, adapter, monkeypatch):
    push(adapter, REPO)
    with pytest.raises(FileNotFoundError, match="has no such repository or branch.*404"):
        push(adapter, REPO, revision="refs/pr/1")
    before = there.repos[REPO].log[:]
    with pytest.raises(ValueError, match="`private` is for a new repository, and `me/mine` is pub"):
        push(adapter, REPO, private=True)
    assert there.repos[REPO].log == before
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot be reached.*try again later"):
        push(adapter, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode is enabled"):
        push(adapter, REPO)


def test_what_is_no_adapter_is_not_pushed(there, adapter):
    with pytest.raises(FileNotFoundError, match=r"no/where: there is no such directory"):
        push("no/where", REPO)
    with pytest.raises(FileNotFoundError, match=r"neither an adapter .*; push .*run/adapter"):
        push(adapter.parent, REPO)
    with pytest.raises(FileNotFoundError, match=r"neither an adapter .*`lora-jax export` writes"):
        push(adapter / "checkpoints", REPO)
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        push(adapter, REPO)
    assert there.repos == {}


def test_the_command_says_what_went_up_and_what_did_not(there, adapter, capsys):
    assert main(["push", str(adapter), REPO, "--message", "Mine"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"pushed .*README.md.* to http://.*/me/mine/commit/\w+", out[0])
    assert out[1].startswith("not pushed: checkpoints, metrics.jsonl")
    assert main(["push", str(adapter), REPO, "--private"]) == 2
    assert capsys.readouterr().err.startswith("lora-jax push: `--private` is for a new repository")


@pytest.mark.slow
def test_the_environment_names_the_hub_and_the_token(adapter, tmp_path):
    """As a user has it: nothing of this process is in the other."""
    with hub() as its:
        environment = {"HF_ENDPOINT": its.url, "HF_TOKEN": "hf_writes", "HF_HUB_OFFLINE": "0",
                       "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}  # fmt: skip
        program = (
            "from lora_jax import cli, hf\n"
            f"assert cli.main(['push', {str(adapter)!r}, {REPO!r}]) == 0\n"
            f"print(hf.read_peft({REPO!r})[0].rank)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(QV.rank)
