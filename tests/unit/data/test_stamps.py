"""Whether a file is still the one it was."""

from __future__ import annotations

import os
from pathlib import Path

from flashrl_cli.data.writing import stamp, unchanged


def test_an_untouched_file_is_not_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    assert unchanged(path, stamp(path) | {"sha256": "never looked at"})


def test_another_time_with_the_same_bytes_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    was = stamp(path)
    os.utime(path, ns=(1, 1))
    assert unchanged(path, was)
    path.write_text("two")
    assert not unchanged(path, was)


def test_another_size_and_a_missing_file_are_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    was = stamp(path)
    path.write_text("three")
    assert not unchanged(path, was)
    path.unlink()
    assert not unchanged(path, was)


def test_a_stamp_that_is_none_never_matches(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    assert not unchanged(path, {})
    assert not unchanged(path, None)
