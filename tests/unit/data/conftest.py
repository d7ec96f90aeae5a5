"""What the tests of data sets share: files to read, rows read back, and a terminal that nobody watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data import sources


@pytest.fixture(autouse=True)
def hub_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `prepare` sets for the hub's libraries ends with the test."""
    for name in (*sources.OFFLINE, *sources.NO_PROGRESS):
        monkeypatch.setenv(name, "0")


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write JSON lines; a row that is text already is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def gsm8k_folder(tmp_path: Path) -> Path:
    """Three rows to train on and two to test on, in GSM8K's own columns."""
    folder = tmp_path / "raw"
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"{split} {n}?", "answer": f"Count.\n#### {n},000"} for n in range(1, count + 1)]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def lines() -> Callable[[Path, Iterable[Any]], Path]:
    return write_lines


@pytest.fixture
def parquet() -> Callable[[Path], list[dict[str, Any]]]:
    def read(path: Path) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows

    return read
