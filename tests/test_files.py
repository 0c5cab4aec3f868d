"""Files are there whole or not at all, and what was computed is not computed again."""

import pytest

from lora_jax import files


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
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_was_computed_is_kept(tmp_path):
    path = tmp_path / "folder" / "part.json"
    assert files.kept(path, lambda: {"a": (1, 2.5)}) == {"a": [1, 2.5]}
    assert files.kept(path, lambda: pytest.fail("computed again")) == {"a": [1, 2.5]}
    path.write_text('{"a": [1,')
    with pytest.raises(ValueError, match=r"part.json: not JSON .* remove the file"):
        files.kept(path, dict)
