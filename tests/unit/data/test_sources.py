"""Which files, or which hub id, `--source` stands for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import readers, sources
from flashrl_cli.data.recipes import RECIPES
from flashrl_cli.data.rows import BadRows
from flashrl_cli.data.sources import HubSource, LocalSource, SumsSource, open_source
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location
from flashrl_cli.machine import software


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
    with pytest.raises(InputError, match=r"cannot read .*train.xlsx"):
        open_source(RECIPES["gsm8k"], str(touch(tmp_path, "train.xlsx") / "train.xlsx"), 0)


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


READ = """
import json, sys
from flashrl_cli.data.sources import HubSource
from flashrl_cli.data.rows import BadRows
source = HubSource(sys.argv[1], None, ("train", "test"))
rows = [(str(place), row) for place, row in source.rows("test", BadRows())]
print(json.dumps([rows, source.count("train"), source.describe()["files"]]))
"""


@pytest.mark.processes
def test_rows_come_through_load_dataset(gsm8k_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(gsm8k_folder)], env=environment, capture_output=True, text=True, check=True
    )
    rows, count, files = json.loads(done.stdout.splitlines()[-1])
    first = {"question": "test 1?", "answer": "Count.\n#### 1,000"}
    assert rows[0] == [f"{gsm8k_folder}:test:row 1", first]
    assert (len(rows), count) == (2, 3)
    assert [len(files[split]) for split in ("train", "test")] == [1, 1]
    assert files["test"][0]["path"].endswith("-test.arrow")


class Table:
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.cache_files = [{"filename": __file__}]

    def __len__(self) -> int:
        return len(self.rows)

    def with_format(self, name: str) -> Table:
        assert name == "arrow"
        return self

    def iter(self, size: int) -> Iterator[Table]:
        yield self

    def to_pylist(self) -> list[dict[str, Any]]:
        return self.rows


def answer_with(result: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Put a module in the place of `datasets` whose load_dataset returns or raises `result`; returns its calls."""
    calls: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None) -> Any:
        calls.append((name, config))
        if isinstance(result, Exception):
            raise result
        return result

    exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    fake = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    return calls


def test_a_set_of_one_split_takes_the_only_one_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer_with({"train": Table([{"n": 1}])}, monkeypatch)
    source = HubSource("a/b", "c", ("test",))
    assert list(source.rows("test", BadRows())) == [(Location("a/b:test", 1, unit="row"), {"n": 1})]
    assert source.count("test") == 1
    description = source.describe()
    assert description["files"]["test"][0]["path"] == __file__
    assert calls == [("a/b", "c")]
    assert HubSource("a/b", "c", ("test",)).matches(description)
    assert not HubSource("a/b", None, ("test",)).matches(description)


def test_a_split_that_is_not_there_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with({"train": Table([])}, monkeypatch)
    with pytest.raises(InputError, match="a/b has no split 'test'"):
        HubSource("a/b", None, ("train", "test")).count("test")


def test_a_configuration_that_is_not_there_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(ValueError("Config name is missing."), monkeypatch)
    with pytest.raises(InputError, match="Config name is missing"):
        HubSource("a/b", None, ("train",)).describe()


@pytest.mark.parametrize("error", [ConnectionError("timed out"), RuntimeError("timed out")])
def test_a_hub_that_does_not_answer_is_the_environment(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(error, monkeypatch)
    with pytest.raises(EnvironmentNotReady, match="cannot fetch a/b from the hub: timed out") as caught:
        HubSource("a/b", None, ("train",)).describe()
    assert caught.value.hint
    assert "--source PATH" in caught.value.hint


def test_without_a_network_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    answer_with(ConnectionError("no"), monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(EnvironmentNotReady, match="this machine is offline, and the hub's cache does not hold it"):
        HubSource("a/b", None, ("train",)).describe()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_a_proxy_resolves_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for a name"))
    sources.detect_offline()
    assert not sources.is_offline()


def test_datasets_not_installed_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(None, monkeypatch)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentNotReady, match="datasets is not installed") as caught:
        HubSource("a/b", None, ("train",)).describe()
    assert caught.value.hint == software.install_extra("data")


def write_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": [1, 2, 3]}), path)
    return path


def read(path: Path) -> tuple[list[tuple[str, Any]], list[tuple[str | None, str]]]:
    bad = BadRows()
    rows = [(str(place).removeprefix(f"{path}:"), row) for place, row in readers.read(path, bad)]
    return rows, [(str(problem.where), problem.message) for problem in bad.problems()]


def test_lines_know_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"n": 1}\n\n{"n": "ü"}', encoding="utf-8")
    assert read(path) == ([("1", {"n": 1}), ("3", {"n": "ü"})], [])


def test_lines_that_are_no_rows_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \n"text"\n\xff\xfe\xfa\n' + b"[" * 100_000 + b'\n{"n": 2}\n')
    rows, bad = read(path)
    assert [row["n"] for _, row in rows] == [1, 2]
    assert [where for where, _ in bad] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert bad[0][1].startswith("not JSON; 2 rows: 2 (")
    assert bad[1][1] == "not a JSON object but text"
    assert bad[2][1] == "nested too deep to be read"


def test_an_array_knows_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"n": 1}, {"n":\n 2},\n\n 5, {"n": 3}]\n', encoding="utf-8-sig")
    rows, bad = read(path)
    assert rows == [("2", {"n": 1}), ("2", {"n": 2}), ("5", {"n": 3})]
    assert bad == [(f"{path}:5", "not a JSON object but a whole number")]


@pytest.mark.parametrize("text", ['[\n{"n": 1},\n{"n": 2', '[\n{"n": 1},\n', '[\n{"n": 1}\n{"n"}]'])
def test_a_broken_array_is_told_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    rows, [(where, message)] = read(path)
    assert rows == [("2", {"n": 1})]
    assert where == f"{path}:3"
    assert message.startswith("not JSON")


json_rows = st.lists(st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=5), max_size=3))


@given(rows=json_rows, indent=st.sampled_from([None, 0, 2]))
def test_an_array_and_lines_give_the_same_rows(
    rows: list[dict[str, Any]], indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    array, lines = folder / "a.json", folder / "b.json"
    array.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [row for _, row in read(array)[0]] == [row for _, row in read(lines)[0]] == rows


def test_parquet_counts_rows_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH", 2)
    assert read(write_parquet(tmp_path / "a.parquet")) == (
        [("row 1", {"n": 1}), ("row 2", {"n": 2}), ("row 3", {"n": 3})],
        [],
    )


@pytest.mark.parametrize("name", ["a.parquet", "missing.parquet", "missing.jsonl", "missing.json"])
def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        read(tmp_path / name)


def test_rows_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    (tmp_path / "a.json").write_text("[{}, {}]")
    write_parquet(tmp_path / "a.parquet")
    assert [readers.count(tmp_path / name) for name in ("a.jsonl", "a.json", "a.parquet")] == [2, None, 3]


def test_what_follows_an_array_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"n": 1}]\n\n{"n": 2}\n', encoding="utf-8")
    assert read(path) == ([("1", {"n": 1})], [(f"{path}:3", "text after the end of the array: '{\"n\": 2}'")])


def test_a_value_that_python_cannot_hold_is_an_input_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": pa.array([2**62], pa.timestamp("us"))}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "a.parquet")


def test_of_media_only_their_presence_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([[b"png"], [], None])
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "images": images, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    rows = [row for _, row in readers.read(tmp_path / "a.parquet", BadRows(), ("prompt", "images"))]
    assert [row["images"] for row in rows] == [True, False, False]
    assert list(rows[0]) == ["prompt", "images"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.csv", 'q,a\n"x, ""y""\nz",1\n\n2,\n'),
        ("q.csv", '\ufeffq;a\n"x, ""y""\nz";1\n2;\n'),
        ("q.tsv", 'q\ta\r\n"x, ""y""\nz"\t1\r\n2\t\r\n'),
    ],
)
def test_rows_of_a_csv_file_know_where_they_begin(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    rows, bad = read(tmp_path / name)
    assert not bad
    assert rows == [("2", {"q": 'x, "y"\nz', "a": "1"}), ("5" if "\n\n" in text else "4", {"q": "2", "a": ""})]


def test_rows_of_a_csv_file_with_other_cells_are_told(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("q,a\n1,2\nwhat is 1,000?,5\n3\n", encoding="utf-8")
    rows, bad = read(path)
    assert [row for _, row in rows] == [{"q": "1", "a": "2"}]
    assert bad == [
        (f"{path}:3", "3 cells, and 2 columns in line 1"),
        (f"{path}:4", "1 cell, and 2 columns in line 1"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,q\n1,2\n", ":1: two columns are named 'q'"),
        (b"q,\n1,2\n", ":1: a column has no name"),
        (b"", ":1: no names of columns"),
        (b'q,a\n1,2\n"3,4\n', ":3: not CSV: unexpected end of data"),
        (b'q,a\n"1"x,2\n', ":2: not CSV: ',' expected after '\"'"),
        (b"q,a\n\xff,2\n", "cannot read"),
    ],
)
def test_a_csv_file_that_is_none_is_an_input_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "q.csv")
    assert message in caught.value.message


def test_a_hub_set_without_a_recipe_says_which_splits_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    source = HubSource("me/mine", None, ())
    for there, splits in (({"train": 1, "validation": 2}, ("train", "test")), ({"all": 1}, ("train",))):
        monkeypatch.setattr(source, "loaded", there)
        assert source.splits == splits
        assert [source._split(split) for split in splits] == list(there.values())
