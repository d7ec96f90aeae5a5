"""Rows out of files, and where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import readers
from flashrl_cli.data.rows import BadRows
from flashrl_cli.errors import InputError


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
    path.write_text('[\n {"n": 1}, {"n":\n 2},\n\n 5, {"n": 3}]\n', encoding="utf-8")
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
