"""Runs found by name, whatever state their folders are in."""

from __future__ import annotations

import pytest

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs.store import all_runs, find
from tests.unit.runs import disk


def test_a_run_with_its_record() -> None:
    run = disk.make("demo", disk.attempt(1, status="failed"), disk.attempt(2))
    found = find("demo")
    assert (found.name, found.damage, found.paths) == ("demo", None, run)
    assert found.last
    assert (found.last.number, found.state) == (2, "done")


def test_a_process_that_is_gone_is_lost() -> None:
    disk.make("demo", disk.attempt(status="running", **disk.GONE))
    assert find("demo").state == "lost"


def test_without_a_record_the_plan_tells_where_checkpoints_lie() -> None:
    run = disk.make("old")
    disk.planned(run, 1, correction={"cap": 2})
    found = find("old")
    assert (found.record, found.damage, found.state, found.last) == (None, None, None, None)
    assert found.paths.checkpoints == run.checkpoints
    assert found.setting(1, "correction", "cap") == 2
    assert found.setting(1, "correction", "cap", "deeper") is None
    assert found.setting(7, "correction", "cap") is None


def test_without_a_plan_the_one_folder_of_that_name_holds_the_checkpoints() -> None:
    run = disk.make("old [1]", checkpoints=5)
    assert find("old [1]").paths.checkpoints == run.checkpoints
    (paths.checkpoints_root() / "other" / "old [1]").mkdir(parents=True)
    assert not find("old [1]").paths.checkpoints.exists()


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 9}', '{"schema_version": 1}', "[]", "\x00"])
def test_a_damaged_record_is_told_and_stops_nothing(text: str) -> None:
    run = disk.make("broken")
    run.record.write_text(text)
    found = find("broken")
    assert found.record is None
    assert "run.json" in str(found.damage)
    assert [one.name for one in all_runs()] == ["broken"]


def test_a_damaged_plan_tells_nothing() -> None:
    run = disk.make("broken")
    run.attempt(1).plan.write_text("{")
    assert find("broken").plan(1) is None


def test_the_newest_attempt_that_logged() -> None:
    run = disk.make("demo", disk.attempt(1), disk.attempt(2), disk.attempt(3))
    assert find("demo").logged() is None
    disk.log(run, 2, {"critic/score/mean": 0.5})
    run.attempt(3).metrics.write_text("")
    found = find("demo").logged()
    assert found == 2


def test_near_names_are_the_hint() -> None:
    disk.make("tiny-int8")
    disk.make("other")
    with pytest.raises(NothingMatched, match="no run tiny-int in ") as caught:
        find("tiny-int")
    assert caught.value.hint == "did you mean tiny-int8?"
    assert caught.value.exit_code == 4
    with pytest.raises(NothingMatched) as caught:
        find("zzz")
    assert "flashrl runs ls" in str(caught.value.hint)


def test_no_runs_at_all() -> None:
    with pytest.raises(NothingMatched) as caught:
        find("demo")
    assert "FLASHRL_RUNS" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../demo", "/demo", ".hidden", "a\nb"])
def test_what_is_no_name(name: str) -> None:
    disk.make("demo")
    with pytest.raises(InputError, match="is not the name of a run"):
        find(name)
