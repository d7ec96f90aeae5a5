"""A run on disk is found by its name in whatever state it is, its record survives what happens to runs, its plans are
found.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files, paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs import store
from flashrl_cli.runs.store import (
    Attempt,
    Phase,
    RunRecord,
    all_runs,
    find,
    find_plan,
    newest_plan,
    read_plan,
    run_names,
)
from tests.unit.runs import on_disk
from tests.unit.runs.on_disk import attempt, make

PLAN: dict[str, Any] = {"schema_version": 1, "overrides": [], "env": {}, "files": {}}
DAMAGED = ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2}', "\x00"]


# the record


def test_what_is_written_is_read() -> None:
    run = on_disk.place()
    assert store.load(run.record) is None
    full = attempt(
        phases=(Phase(name="starting Ray", began="t"),),
        proof=({"precision": "int8"},),
        argv=("flashrl", "train"),
        set_aside=("global_step_3",),
        git={"commit": "abc", "dirty": True},
        last_step=3,
    )
    assert on_disk.write_record(run, [full]) == store.load(run.record)
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_or_newer_record_is_an_error_and_keeps_no_run_from_being_found(text: str) -> None:
    run = make("broken")
    run.record.write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        store.load(run.record)
    found = find("broken")
    assert found.record is None
    assert "run.json" in str(found.damage)
    assert [one.name for one in all_runs()] == ["broken"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("updated", None),
        ("updated", "yesterday"),
        ("updated", 7),
        ("started", "2026-03-01"),
        ("pid_started", "x"),
        ("status", 3),
        ("checkpoints", 3),
    ],
)
def test_nonsense_in_a_record_is_damage(key: str, value: Any) -> None:
    run = make("demo", attempt(status="running"))
    data = json.loads(run.record.read_text())
    (data if key in data else data["attempts"][-1])[key] = value
    run.record.write_text(json.dumps(data))
    assert "run.json is no run record" in str(find("demo").damage)
    assert find("demo").state is None


def test_renewing_one_attempt_leaves_the_others() -> None:
    run = make("r", attempt(1, status="failed"), attempt(2))
    store.renew(run, 2, last_step=7)
    found = store.load(run.record)
    assert found
    first, second = found.attempts
    assert (first.status, first.last_step, first.updated) == ("failed", None, on_disk.LATER)
    assert (second.last_step, found.last) == (7, second)
    assert second.updated != on_disk.LATER
    run.record.unlink()
    with pytest.raises(InputError, match="gone"):
        store.renew(run, 1, last_step=1)


def test_changes_at_once_lose_nothing() -> None:
    run = make("r", attempt(0))

    def add(number: int) -> None:
        def edit(found: RunRecord | None) -> RunRecord:
            assert found
            return dataclasses.replace(found, attempts=(*found.attempts, attempt(number)))

        store.change(run, edit)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.load(run.record)
    assert found
    assert sorted(one.number for one in found.attempts) == list(range(9))


@pytest.mark.parametrize(
    ("one", "state"),
    [
        (attempt(status="running"), "running"),
        (attempt(status="running", pid_started=1.0), "lost"),  # another process has that pid now
        (attempt(status="running", **on_disk.GONE), "lost"),
        (attempt(status="done", **on_disk.GONE), "done"),
        (attempt(status="running", host=f"not-{socket.gethostname()}", **on_disk.GONE), "running"),
    ],
)
def test_running_is_believed_of_another_machine_or_while_the_process_lives(one: Attempt, state: str) -> None:
    assert store.state(one) == state


# runs


def test_a_run_with_its_record() -> None:
    run = make("demo", attempt(1, status="failed"), attempt(2))
    found = find("demo")
    assert (found.name, found.damage, found.paths) == ("demo", None, run)
    assert found.last
    assert (found.last.number, found.state) == (2, "done")
    assert found.recorded_paths() == run


def test_without_a_record_the_newest_plan_names_the_checkpoints() -> None:
    run = make("old")
    on_disk.planned(run, 1, correction={"cap": 2})
    found = find("old")
    assert (found.record, found.damage, found.state, found.last) == (None, None, None, None)
    assert found.paths.checkpoints == run.checkpoints
    assert found.setting(1, "correction", "cap") == 2
    assert found.setting(1, "correction", "cap", "deeper") is None
    assert found.setting(7, "correction", "cap") is None
    with pytest.raises(InputError, match="no record that names its checkpoints"):
        found.recorded_paths()


def test_without_a_plan_the_one_folder_of_that_name_holds_the_checkpoints() -> None:
    run = make("old [1]", checkpoints=5)
    run.attempt(1).plan.write_text("{")
    assert find("old [1]").plan(1) is None
    assert find("old [1]").paths.checkpoints == run.checkpoints
    (paths.checkpoints_root() / "other" / "old [1]").mkdir(parents=True)
    assert not find("old [1]").paths.checkpoints.exists()


@pytest.mark.parametrize("folder", ["/", "/srv", "", "r", "checkpoints/p/r", "/c/p/../r", "/c/p/other", "~"])
def test_a_record_whose_checkpoints_are_anothers_is_refused(folder: str) -> None:
    on_disk.write_record(on_disk.place(), [attempt()], checkpoints=folder)
    with pytest.raises(InputError, match="is not its own"):
        find("r").recorded_paths()


def test_the_newest_attempt_that_logged() -> None:
    run = make("demo", attempt(1), attempt(2), attempt(3))
    assert find("demo").logged() is None
    for number in (1, 2):
        on_disk.log(run, number, {1: on_disk.REWARD})
    run.attempt(3).metrics.write_text("")
    assert find("demo").logged() == 2


def test_an_unknown_name_is_an_error_with_near_ones() -> None:
    with pytest.raises(NothingMatched) as caught:
        find("demo")
    assert "FLASHRL_RUNS" in str(caught.value.hint)
    make("tiny-int8")
    make("other")
    with pytest.raises(NothingMatched, match="no run tiny-int in ") as caught:
        find("tiny-int")
    assert (caught.value.hint, caught.value.exit_code) == ("did you mean tiny-int8?", 4)
    with pytest.raises(NothingMatched) as caught:
        find("zzz")
    assert "flashrl runs ls" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../demo", "demo/..", "/", "/demo", ".hidden", "a\nb"])
def test_what_is_no_name(name: str) -> None:
    make("demo")
    with pytest.raises(InputError, match="is not the name of a run"):
        find(name)


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("demo").root.parent
    (root / "a-file").write_text("")
    for name in (".hidden", "another"):
        (root / name).mkdir()
    assert run_names() == ["another", "demo"]
    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "nowhere"))
    assert run_names() == []


# plans


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run `demo` with three attempts, the last without a plan; the working folder is another."""
    monkeypatch.chdir(tmp_path)
    run = on_disk.place("demo")
    for number in (2, 10):
        files.write_json(run.attempt(number).plan, PLAN | {"preset": number})
    run.attempt(11).root.mkdir()
    return run.root


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        ("demo", 10),
        ("demo/", 10),
        ("demo/attempt_2", 2),
        ("demo/attempt_2/plan.json", 2),
        ("{run}", 10),
        ("{run}/attempt_2", 2),
        ("{run}/attempt_2/plan.json", 2),
    ],
)
def test_a_plan_is_found_by_the_names_that_people_have_for_it(reference: str, number: int, demo: Path) -> None:
    assert find_plan(reference.format(run=demo)) == demo / f"attempt_{number}" / "plan.json"


@pytest.mark.parametrize("reference", ["other", "demo/attempt_11", "demo/attempt_3", ".", "", "demo/attempt_2/x.json"])
def test_what_names_no_plan(reference: str, demo: Path) -> None:
    assert find_plan(reference) is None


def test_a_plan_in_the_working_folder(tmp_path: Path, demo: Path) -> None:
    files.write_json(tmp_path / "old.json", PLAN)
    assert find_plan("old.json") == tmp_path / "old.json"
    assert read_plan(tmp_path / "old.json") == PLAN


def test_the_newest_plan_of_a_run(demo: Path) -> None:
    run = find("demo").paths
    assert newest_plan(run)["preset"] == 10
    run.attempt(10).plan.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        newest_plan(run)
    assert newest_plan(on_disk.place("other")) == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "is not a launch plan"),
        ('{"schema_version": 1}', "is not a launch plan"),
        (json.dumps(PLAN | {"schema_version": 2}), "schema version 2"),
    ],
)
def test_what_is_no_plan(text: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=match):
        read_plan(file)
