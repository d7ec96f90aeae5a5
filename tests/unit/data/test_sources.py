"""Which files, or which hub id, `--source` stands for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data.recipes import RECIPES
from flashrl_cli.data.rows import BadRows
from flashrl_cli.data.sources import HubSource, LocalSource, SumsSource, open_source
from flashrl_cli.errors import InputError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    return folder


def found(name: str, source: Path) -> dict[str, list[str]]:
    opened = open_source(RECIPES[name], str(source), 0)
    assert isinstance(opened, LocalSource)
    base = source if source.is_dir() else source.parent
    return {split: [str(path.relative_to(base)) for path in paths] for split, paths in opened.files.items()}


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("gsm8k", ["train.jsonl", "test.json", "LICENSE"], {"train": ["train.jsonl"], "test": ["test.json"]}),
        (
            "gsm8k",
            ["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet", "socratic/train.parquet"],
            {"train": ["main/train-00000-of-00001.parquet"], "test": ["main/test-00000-of-00001.parquet"]},
        ),
        (
            "math",
            ["data/train-1.parquet", "data/train-0.parquet", "data/test.parquet", "README.md"],
            {"train": ["data/train-0.parquet", "data/train-1.parquet"], "test": ["data/test.parquet"]},
        ),
        ("dapo-math-17k", ["data/dapo-math-17k.parquet"], {"train": ["data/dapo-math-17k.parquet"]}),
        ("math-500", ["train.jsonl", "test.jsonl"], {"test": ["test.jsonl"]}),
        ("aime-2025", ["train.jsonl"], {"test": ["train.jsonl"]}),
        ("aime-2025", ["aime2025-II.jsonl", "aime2025-I.jsonl"], {"test": ["aime2025-I.jsonl", "aime2025-II.jsonl"]}),
    ],
)
def test_files_of_a_folder(tmp_path: Path, name: str, names: list[str], expected: dict[str, list[str]]) -> None:
    assert found(name, touch(tmp_path, *names)) == expected


@pytest.mark.parametrize(
    ("name", "file", "split"),
    [("gsm8k", "test.jsonl", "test"), ("gsm8k", "anything.parquet", "train"), ("aime-2024", "train.json", "test")],
)
def test_one_file_is_one_split(tmp_path: Path, name: str, file: str, split: str) -> None:
    assert found(name, touch(tmp_path, file) / file) == {split: [file]}


def test_a_folder_without_the_splits_says_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl", "training.json", "notes.txt")
    with pytest.raises(InputError, match=r"does not hold the files for train.jsonl and test.jsonl") as caught:
        open_source(RECIPES["gsm8k"], str(tmp_path), 0)
    assert caught.value.hint
    assert caught.value.hint.startswith("it holds notes.txt, train.jsonl, training.json;")


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source(RECIPES["aime-2025"], str(tmp_path), 0)
    assert caught.value.hint
    assert caught.value.hint.startswith("it is empty;")


def test_a_split_in_two_formats_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl", "train.parquet", "test.jsonl")
    with pytest.raises(InputError, match=r"several formats: train.jsonl, train.parquet"):
        open_source(RECIPES["gsm8k"], str(tmp_path), 0)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*train.csv"):
        open_source(RECIPES["gsm8k"], str(touch(tmp_path, "train.csv") / "train.csv"), 0)


@pytest.mark.parametrize(
    ("given", "label", "config"),
    [
        (None, "openai/gsm8k", "main"),
        ("openai/gsm8k", "openai/gsm8k", "main"),
        ("openai/gsm8k:socratic", "openai/gsm8k", "socratic"),
        ("someone/gsm8k-2.0", "someone/gsm8k-2.0", None),
    ],
)
def test_hub_ids(given: str | None, label: str, config: str | None) -> None:
    assert open_source(RECIPES["gsm8k"], given, 0) == HubSource(label, config, ("train", "test"))


@pytest.mark.parametrize("given", ["./nowhere", "nowhere", "a/b/c", "raw/train.jsonl", "/nowhere/at/all"])
def test_what_is_neither_is_refused(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such file or folder: {given}"):
        open_source(RECIPES["gsm8k"], given, 0)


def test_shards_are_read_in_order_as_one(tmp_path: Path) -> None:
    for number in (1, 0):
        (tmp_path / f"test-{number}.jsonl").write_text(f'{{"n": {number}}}\n')
    opened = open_source(RECIPES["aime-2025"], str(tmp_path), 0)
    assert [row["n"] for _, row in opened.rows("test", BadRows())] == [0, 1]
    assert opened.count("test") == 2


def test_a_local_source_matches_itself_until_a_file_changes(gsm8k_folder: Path) -> None:
    opened = open_source(RECIPES["gsm8k"], str(gsm8k_folder), 0)
    was = opened.describe()
    assert opened.matches(was)
    assert not opened.matches({"kind": "hub"})
    one = open_source(RECIPES["gsm8k"], str(gsm8k_folder / "train.jsonl"), 0)
    assert not one.matches(was)
    (gsm8k_folder / "test.jsonl").write_text("{}\n")
    assert not opened.matches(was)


def test_the_same_bytes_under_another_name_are_another_source(gsm8k_folder: Path, tmp_path: Path) -> None:
    was = open_source(RECIPES["gsm8k"], str(gsm8k_folder), 0).describe()
    moved = gsm8k_folder.rename(tmp_path / "moved")
    assert not open_source(RECIPES["gsm8k"], str(moved), 0).matches(was)


def test_a_source_without_permission_is_an_input_error(gsm8k_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any) -> Iterable[Any]:
        raise PermissionError(13, "Permission denied", str(self))

    opened = open_source(RECIPES["gsm8k"], str(gsm8k_folder), 0)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot read .*train.jsonl: .*Permission denied"):
        opened.describe()


def test_sums_come_from_the_seed() -> None:
    opened = open_source(RECIPES["arith"], None, 3)
    assert opened == SumsSource(3)
    assert len(list(opened.rows("test", BadRows()))) == opened.count("test") == 256
    assert opened.matches(opened.describe())
