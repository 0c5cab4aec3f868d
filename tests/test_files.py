"""Files and folders are there whole or not at all, and one process writes in a folder."""

import os
import resource
import subprocess
import sys
import textwrap

import pytest

from lora_jax import files

from tests.support.places import ROOT

pytestmark = pytest.mark.once


def write_folder(path, text):
    with files.replacing(path) as new:
        new.mkdir()
        (new / "text").write_text(text)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as new:
        new.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    files.write_text(path, "neu, größer")
    assert path.read_text("utf-8") == "neu, größer"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("can", [True, False])
def test_a_folder_is_replaced(tmp_path, monkeypatch, can):
    if not can:
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    for text in ("one", "two", "three"):
        write_folder(tmp_path / "deep" / "f[1]", text)
        assert (tmp_path / "deep" / "f[1]" / "text").read_text() == text
        assert names(tmp_path / "deep") == ["f[1]"]


def test_folders_are_exchanged_in_one_step(tmp_path):
    for name in "ab":
        write_folder(tmp_path / name, name)
    assert files.exchange(tmp_path / "a", tmp_path / "b") is sys.platform.startswith("linux")
    if sys.platform.startswith("linux"):
        assert (tmp_path / "a" / "text").read_text() == "b"
        with pytest.raises(FileNotFoundError, match="No such file or directory"):
            files.exchange(tmp_path / "a", tmp_path / "none")


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    files.write_text(tmp_path / "file", "text")
    write_folder(tmp_path / "folder", "text")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert names(tmp_path / "disk") == ["file", "folder"]


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, call):
    files.write_text(tmp_path / "a", "old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((files.Path, "write_text") if call == "write" else (os, call)), fail)
    with pytest.raises(OSError, match="No space left on device: '.*/a'") as error:
        files.write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert error.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_an_error_about_another_file_stays(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), files.replacing(tmp_path / "a"):
        open(tmp_path / "other")


def test_what_the_living_write_stays(tmp_path):
    files.write_text(tmp_path / "a", "one")
    with files.replacing(tmp_path / "a") as slow:
        slow.write_text("three")
        files.write_text(tmp_path / "a", "two")
        assert slow.exists()
        (tmp_path / ".a.made-now.tmp").mkdir()  # its owner has not locked it yet
        files.write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "three"
    assert names(tmp_path) == [".a.made-now.tmp", "a"]
    os.utime(tmp_path / ".a.made-now.tmp", (0, 0))
    files.sweep(tmp_path / "a")
    assert names(tmp_path) == ["a"]


# Processes are killed at each of these moments of replacing a file or folder by another.
KILLED = """
    import os, pathlib, signal, sys
    sys.path.insert(0, {root!r})
    from lora_jax import files

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path, kind, end):
        with files.replacing(path) as new:
            if kind == "folder":
                new.mkdir()
            (new / "text" if kind == "folder" else new).write_text("after")
            end()

    def die_at_the_second_rename():
        rename = os.rename
        files.exchange = lambda a, b: False
        os.rename = lambda a, b: die() if b == str(place) or b == place else rename(a, b)

    MOMENTS = dict(
        writing=lambda: None,
        written=lambda: setattr(files, "sync", die),
        synced=lambda: setattr(files, "_put", die),
        swapped=lambda: setattr(files.shutil, "rmtree", die),
        between=die_at_the_second_rename,
    )
    for kind in ("file", "folder"):
        for moment, prepare in MOMENTS.items():
            place = pathlib.Path({place!r}, kind, moment)
            if os.fork() == 0:
                prepare()
                write(place, kind, die if moment == "writing" else lambda: None)
                os._exit(9)
            status = os.wait()[1]
            assert status == signal.SIGKILL or (kind, moment) == ("file", "between"), (kind, moment)
"""


def test_a_writer_that_is_killed_leaves_the_content_before(tmp_path):
    moments = ("writing", "written", "synced", "swapped", "between")
    for moment in moments:
        write_folder(tmp_path / "folder" / moment, "before")
        files.write_text(tmp_path / "file" / moment, "before")
    code = textwrap.dedent(KILLED).format(root=str(ROOT), place=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for moment in moments:
        folder, file = tmp_path / "folder" / moment, tmp_path / "file" / moment
        # Between two renames there is no folder: the next writer puts the old one back.
        assert folder.exists() is (moment != "between")
        files.sweep(folder)
        wanted = "after" if moment == "swapped" else "before"
        assert (folder / "text").read_text() == wanted
        assert file.read_text() == ("after" if moment in ("swapped", "between") else wanted)
        write_folder(folder, "next")
        files.write_text(file, "next")
    assert names(tmp_path / "folder") == names(tmp_path / "file") == sorted(moments)


def test_a_folder_is_locked_for_other_processes(tmp_path):
    code = """
import pathlib, sys
from lora_jax.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=f"run: process {other.pid} on .* is writing"):
            with files.locked(tmp_path / "run"):
                pass
        other.kill()
    with files.locked(tmp_path / "run"):  # the lock of the killed one is gone
        pass


JSON = {
    "a name twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', ": `c` occurs twice in one object"),
    "cut": (b'{\n"a": ', ":2: not JSON: "),
    "nested": (b"[" * 100_000, ":1: not JSON: nested too deeply"),
    "not text": (b'{\n"a": "\xff"}', ":2: not UTF-8 text: "),
    "half a character": (b'{"b": 1,\n"a": ["\\uD83D"]}', ":2: `.ud83d` is half of a character"),
    "a number too long": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_is_read_strictly(tmp_path, name):
    content, text = JSON[name]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json.*{text}") as error:
        files.read_json(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b'{"a": "\\ud83d\\ude00 \\\\ud83d"}')
    assert files.read_json(path) == {"a": "\U0001f600 \\ud83d"}


def test_what_was_computed_is_kept(tmp_path):
    path = tmp_path / "folder" / "part.json"
    assert files.kept(path, lambda: {"a": (1, 2.5)}) == {"a": [1, 2.5]}
    assert files.kept(path, lambda: pytest.fail("computed again")) == {"a": [1, 2.5]}
    for text in ('{"a": [1,', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"part.json: not JSON .* remove the file"):
            files.kept(path, dict)


def test_a_lock_that_is_a_link_is_not_written_over(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / files.LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match=r"symbolic links: .*run/\.lock"):
        with files.locked(tmp_path / "run"):
            pass
    assert (tmp_path / "other").read_text() == "kept"


def test_a_lock_on_a_full_disk_names_its_file(tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
    try:
        with pytest.raises(OSError, match=r"File too large: .*run/\.lock"):
            with files.locked(tmp_path / "run"):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not list((tmp_path / "run").iterdir())
