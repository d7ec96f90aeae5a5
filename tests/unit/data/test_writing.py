"""Parquet files and manifest: all replaced, or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import __version__
from flashrl_cli.data.rows import Row, make_row
from flashrl_cli.data.writing import (
    Manifest,
    outputs_unchanged,
    read_manifest,
    remove_stale,
    rows_of,
    stamp,
    unchanged,
    write_dataset,
)
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.files import sha256
from flashrl_cli.paths import DatasetPaths

Read = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def paths(tmp_path: Path) -> DatasetPaths:
    return DatasetPaths("gsm8k", tmp_path / "data" / "gsm8k")


def rows(*answers: str) -> list[Row]:
    return [make_row("math", "p", answer, {"split": "train", "index": n}) for n, answer in enumerate(answers)]


def write(paths: DatasetPaths, **splits: list[Row]) -> Manifest:
    return write_dataset(paths, splits, {"options": {"limit": None}}, {split: {"duplicates": 0} for split in splits})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_counted_by_the_manifest_while_it_describes_the_file(paths: DatasetPaths) -> None:
    write(paths, train=rows("1", "2"), test=rows("3"))
    manifest = json.loads(paths.manifest.read_text())
    manifest["splits"]["train"]["rows"] = 77
    paths.manifest.write_text(json.dumps(manifest))
    assert rows_of(paths.split("train")) == 77
    paths.split("test").replace(paths.split("train"))
    assert rows_of(paths.split("train")) == 1
    paths.split("train").write_bytes(b"PAR1")
    assert rows_of(paths.split("train")) is None
    assert rows_of(paths.root / "none.jsonl") is None


def test_what_is_written_is_described(paths: DatasetPaths, parquet: Read) -> None:
    manifest = write(paths, train=rows("1", "2"), test=rows("3"))
    assert sorted(path.name for path in paths.root.iterdir()) == ["manifest.json", "test.parquet", "train.parquet"]
    assert parquet(paths.split("train")) == rows("1", "2")
    assert json.loads(paths.manifest.read_text()) == manifest == read_manifest(paths)
    assert (manifest["schema_version"], manifest["dataset"], manifest["flashrl"]) == (1, "gsm8k", __version__)
    assert manifest["options"] == {"limit": None}
    entry = manifest["splits"]["train"]
    assert (entry["rows"], entry["duplicates"], entry["path"]) == (2, 0, "train.parquet")
    assert entry["sha256"] == sha256(paths.split("train"))
    assert outputs_unchanged(paths, manifest)


def test_columns_stand_in_the_order_of_verls_scripts(paths: DatasetPaths) -> None:
    import pyarrow.parquet as pq

    write(paths, train=rows("1"))
    schema = pq.read_schema(paths.split("train"))
    assert schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert str(schema.field("prompt").type) == "list<element: struct<role: string, content: string>>"
    assert str(schema.field("reward_model").type) == "struct<style: string, ground_truth: string>"


def test_a_changed_output_is_noticed(paths: DatasetPaths) -> None:
    manifest = write(paths, train=rows("1"), test=rows("2"))
    paths.split("test").write_bytes(b"")
    assert not outputs_unchanged(paths, manifest)


def test_a_failure_in_the_second_split_leaves_all_as_it_was(paths: DatasetPaths) -> None:
    write(paths, train=rows("1"), test=rows("2"))
    before = snapshot(paths.root)
    mixed = [make_row("math", "p", "1", {"index": 1}), make_row("math", "p", "1", {"index": "one"})]
    with pytest.raises(InputError, match="do not share one schema"):
        write(paths, train=rows("3"), test=mixed)
    assert snapshot(paths.root) == before


def test_an_interrupt_leaves_all_as_it_was(paths: DatasetPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write(paths, train=rows("1"))
    before = snapshot(paths.root)
    monkeypatch.setattr("flashrl_cli.files.write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(paths, train=rows("2"))
    assert snapshot(paths.root) == before


def test_the_manifest_is_moved_into_place_last(paths: DatasetPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    write(paths, train=rows("1"), test=rows("2"))
    assert moved[-1] == "manifest.json"
    assert {"train.parquet", "test.parquet"} <= set(moved[:-1])


def test_a_folder_that_cannot_be_written_is_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentNotReady, match="cannot write"):
        write(DatasetPaths("gsm8k", tmp_path / "file" / "gsm8k"), train=rows("1"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}'])
def test_a_manifest_of_another_kind_is_none(paths: DatasetPaths, text: str) -> None:
    assert read_manifest(paths) is None
    paths.root.mkdir(parents=True)
    paths.manifest.write_text(text)
    assert read_manifest(paths) is None


def test_splits_that_are_no_more_are_removed(paths: DatasetPaths) -> None:
    earlier = write(paths, train=rows("1"), test=rows("2"))
    manifest = write(paths, test=rows("3"))
    assert remove_stale(paths, earlier, manifest) == [paths.split("train")]
    assert sorted(path.name for path in paths.root.iterdir()) == ["manifest.json", "test.parquet"]
    assert remove_stale(paths, {}, manifest) == []


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
