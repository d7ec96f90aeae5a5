"""The list of runs: newest first, from records and the ends of metrics; nothing on disk makes it fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.runs.metrics import LOOK_BACK, read_last
from flashrl_cli.runs.store import find
from flashrl_cli.runs.summary import Row, row, rows
from tests.unit.runs import disk


def of(name: str) -> Row:
    return row(find(name))


def test_a_row_of_a_record() -> None:
    run = disk.make(
        "demo", disk.attempt(1, status="failed"), disk.attempt(2, last_step=3, total_steps=20), checkpoints=70
    )
    disk.log(run, 2, {"critic/score/mean": 0.25, "val-core/tiny/acc/mean@1": 0.5}, {"critic/score/mean": 0.75})
    found = of("demo")
    assert (found.name, found.preset, found.state, found.step, found.total_steps) == ("demo", "demo", "done", 3, 20)
    assert (found.reward, found.accuracy, found.attempts) == (0.75, 0.5, 2)
    assert (found.changed, found.checkpoint_bytes, found.problem) == (disk.LATER, 70, None)
    assert found.run_bytes == sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file())


def test_a_resumed_run_that_has_not_stepped_shows_what_it_reached() -> None:
    run = disk.make("demo", disk.attempt(1, last_step=2), disk.attempt(2, status="running"))
    disk.log(run, 1, {"critic/score/mean": 0.25}, {"critic/score/mean": 0.5})
    found = of("demo")
    assert (found.state, found.step, found.reward) == ("running", 2, 0.5)


def test_a_run_from_before_there_were_records() -> None:
    run = disk.make("old")
    disk.planned(run, 1, trainer={"steps": 8})
    disk.log(run, 1, {"critic/score/mean": 0.5})
    disk.touch(run, 1_700_000_000)
    found = of("old")
    assert (found.preset, found.state, found.step, found.total_steps) == ("older", None, 1, 8)
    assert (found.reward, found.attempts, found.changed) == (0.5, 1, "2023-11-14T22:13:20+00:00")


def test_an_empty_folder() -> None:
    disk.place("empty").root.mkdir(parents=True)
    found = of("empty")
    assert (found.preset, found.step, found.total_steps, found.reward, found.attempts) == (None, None, None, None, 0)


def test_newest_first() -> None:
    disk.make("b", disk.attempt(updated="2026-03-01T12:00:00+00:00"))
    disk.make("a", disk.attempt(updated="2026-03-01T10:00:00+00:00"))
    disk.make("c", disk.attempt(updated="2026-03-01T11:00:00+00:00"))
    disk.touch(disk.make("old"), 1_700_000_000)
    assert [one.name for one in rows()] == ["b", "c", "a", "old"]


def test_no_runs() -> None:
    assert rows() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("updated", None),
        ("updated", "yesterday"),
        ("updated", 7),
        ("started", "2026-03-01"),
        ("pid_started", "x"),
        ("status", 3),
    ],
)
def test_nonsense_in_a_record_is_told_instead_of_an_error(key: str, value: Any) -> None:
    run = disk.make("demo", disk.attempt(status="running"))
    data = json.loads(run.record.read_text())
    data["attempts"][-1][key] = value
    run.record.write_text(json.dumps(data))
    (found,) = rows()
    assert (found.name, found.state) == ("demo", None)
    assert "run.json is no run record" in str(found.problem)


def test_checkpoints_that_are_no_path(tmp_path: Path) -> None:
    run = disk.make("demo", disk.attempt())
    run.record.write_text(json.dumps(json.loads(run.record.read_text()) | {"checkpoints": 3}))
    assert rows()[0].problem


def test_the_end_of_a_long_file_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "data": {"critic/score/mean": 0.1, "filler": "x" * 5000}})
    file.write_text("\n".join([line] * (LOOK_BACK // 5000 + 50)) + "\n")
    with file.open("a") as stream:
        stream.write('{"step": 998, "data": {"critic/score/mean": 0.5, "val-core/tiny/acc/mean@1": 0.25}}\n')
        stream.write('{"step": 999, "data": {"critic/score/mean": 0.75}}\n')
        stream.write('{"step": 999, "data": {"val-core/tiny/acc/mean@1": 0.5}}\n')
        stream.write('{"step": 1000, "data": {"crit')
    step, accuracy = read_last(file)
    assert step
    assert (step.step, step["reward"], accuracy) == (999, 0.75, 0.5)


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe", b'{"step": "x"}\n', b'[1, "step"]\n'])
def test_a_file_without_steps(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_last(file) == (None, None)
    file.write_bytes(data)
    assert read_last(file) == (None, None)
