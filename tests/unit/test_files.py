"""Files are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from flashrl_cli import files


def test_write_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a/b/c.txt", "é\n")
    files.write_text(tmp_path / "a/b/c.txt", "ü\n")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "ü\n".encode()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["c.txt"]


def test_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, None]}
    assert "é" in text
    assert text.endswith("}\n")


def test_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with files.replacing(target) as temporary:
            temporary.write_text("half")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_old_content_stands_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with files.replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent.parent == target.parent, "on the same disk, or it could not be moved at once"
    assert target.read_text() == "new"


def test_folder_replaces_a_missing_or_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with files.replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "x").write_text("1")
    assert (target / "x").read_text() == "1"
    with pytest.raises(OSError), files.replacing(target) as temporary:
        temporary.mkdir()
    assert (target / "x").read_text() == "1"


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 1_000_000])
def test_sha256(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_json_holds_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    data = {"folder": "d\udce9\udcff", "é": "→"}
    files.write_json(tmp_path / "f.json", data)
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == data
    files.write_json(tmp_path / "g.json", {"é": "→"})
    assert "→" in (tmp_path / "g.json").read_text(encoding="utf-8")
