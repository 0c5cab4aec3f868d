"""The demo's folder: what it writes, what it replaces and what it leaves alone."""

import json
import re

import pytest

from lora_jax.recipes.demo import files, task

pytestmark = pytest.mark.once


def examples():
    return task.make_examples(0, train=3, test=2)


def test_the_data_is_written_as_chats(tmp_path):
    train, test = examples()
    path = files.prepare(tmp_path / "a" / "demo", train, test)
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"messages": task.conversation(example)} for example in train
    ]
    assert len((path.parent / "test.jsonl").read_text("utf-8").splitlines()) == 2
    assert not list(path.parent.glob(".*"))


def test_a_demos_folder_is_emptied_for_the_next(tmp_path):
    files.prepare(tmp_path, *examples())
    files.finish(tmp_path, {"after": 1.0})
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "loss.png").write_bytes(b"old")
    files.prepare(tmp_path, *examples())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "test.jsonl", "train.jsonl"]
    assert json.loads((tmp_path / "demo.json").read_text()) == {"state": "running"}


@pytest.mark.parametrize("mark", [True, False])
def test_what_no_demo_wrote_is_left_alone(tmp_path, mark):
    if mark:
        files.prepare(tmp_path, *examples())
    (tmp_path / "thesis.tex").write_text("years of work")
    message = re.escape(f"{tmp_path} holds `thesis.tex`, which no demo wrote; choose another")
    with pytest.raises(FileExistsError, match=message):
        files.prepare(tmp_path, *examples())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_known_names_without_the_mark_are_left_alone_too(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="holds `train.jsonl`, which no demo wrote"):
        files.prepare(tmp_path, *examples())
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(FileExistsError, match="demo is a file; choose a folder as `output_dir`"):
        files.prepare(tmp_path / "demo", *examples())


def test_contents_lists_what_is_there(tmp_path):
    files.prepare(tmp_path, *examples())
    listed = files.contents(tmp_path)
    assert f"{tmp_path / 'train.jsonl'}: the training data" in listed
    assert "loss.png" not in listed
