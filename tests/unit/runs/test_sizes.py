"""Sizes of folders: every file once, no link, nothing for what is not there."""

from __future__ import annotations

from pathlib import Path

from flashrl_cli.runs.saved import measure


def test_files_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 5)
    assert measure(tmp_path)[0] == 15


def test_links_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "large").write_bytes(b"x" * 100_000)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "up").symlink_to(tmp_path)
    (tmp_path / "here" / "large").symlink_to(tmp_path / "far" / "large")
    assert measure(tmp_path / "here")[0] < 1000


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert measure(tmp_path / "nowhere")[0] == 0
    (tmp_path / "file").write_text("x")
    assert measure(tmp_path / "file")[0] == 0
