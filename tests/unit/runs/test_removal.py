"""Removing takes a run's own folders and nothing else, and a killed removal leaves no half run."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.delete import plan_removal, remove
from tests.unit.runs import disk


def recording(run: RunPaths, **fields: Any) -> None:
    """Change the record of `run`."""
    store.change(run, lambda found: dataclasses.replace(found or pytest.fail("no record"), **fields))


def test_both_folders_go_and_the_neighbours_stay() -> None:
    run, other = disk.make("demo", disk.attempt(), checkpoints=50), disk.make("demo-2", disk.attempt(), checkpoints=5)
    planned = plan_removal("demo")
    assert (planned.checkpoint_bytes, planned.checkpoints) == (50, run.checkpoints)
    assert planned.bytes == planned.root_bytes + 50
    remove(planned)
    assert list(run.root.parent.iterdir()) == [other.root]
    assert list(run.checkpoints.parent.iterdir()) == [other.checkpoints]


def test_an_empty_project_goes_too() -> None:
    run = disk.make("demo", disk.attempt(), checkpoints=50)
    remove(plan_removal("demo"))
    assert not run.checkpoints.parent.exists()
    assert paths.checkpoints_root().is_dir()


def test_checkpoints_are_kept_if_asked() -> None:
    run = disk.make("demo", disk.attempt(), checkpoints=50)
    remove(plan_removal("demo", keep_checkpoints=True))
    assert not run.root.exists()
    assert run.checkpoints.is_dir()


def test_without_a_record_the_plan_tells_the_checkpoints() -> None:
    run = disk.make("old", checkpoints=50)
    disk.planned(run, 1)
    remove(plan_removal("old"))
    assert not run.root.exists()
    assert not run.checkpoints.exists()


def test_a_damaged_record_can_be_removed() -> None:
    run = disk.make("broken", disk.attempt())
    run.record.write_text("{")
    remove(plan_removal("broken"))
    assert not run.root.exists()


def test_a_running_one_is_refused_before_and_after_it_was_planned() -> None:
    run = disk.make("demo", disk.attempt(), checkpoints=50)
    planned = plan_removal("demo")
    recording(run, attempts=(disk.attempt(status="running"),))
    for refused in (lambda: plan_removal("demo"), lambda: remove(planned)):
        with pytest.raises(InputError, match="is running") as caught:
            refused()
        assert caught.value.hint == "flashrl runs stop demo"
    assert run.root.is_dir()
    assert run.checkpoints.is_dir()


def test_another_machines_is_believed_to_run() -> None:
    disk.make("demo", disk.attempt(status="running", host="node7"))
    with pytest.raises(InputError, match="is running on node7"):
        plan_removal("demo")


@pytest.mark.processes
def test_one_that_a_process_still_works_in_is_refused() -> None:
    run = disk.make("old")
    disk.make("lost", disk.attempt(status="running", **disk.GONE))
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=run.attempt(1).root, stdin=subprocess.PIPE) as process:
        with pytest.raises(InputError, match=f"process {process.pid} .* still works in"):
            plan_removal("old")
        plan_removal("lost")
        process.communicate(b"\n")
    remove(plan_removal("old"))
    assert not run.root.exists()


def test_a_ray_job_that_may_go_on_is_told() -> None:
    ray: dict[str, Any] = {"executor": "ray", "job_id": "job-1", **disk.GONE}
    disk.make("demo", disk.attempt(status="running", **ray))
    assert "`ray job stop job-1`" in str(plan_removal("demo").warning)
    disk.make("over", disk.attempt(executor="ray", job_id="job-1"))
    assert plan_removal("over").warning is None


@pytest.mark.parametrize("name", ["..", ".", "a/b", "", "/", "demo/..", ".hidden"])
def test_names_that_lead_elsewhere(name: str) -> None:
    disk.make("demo", disk.attempt())
    with pytest.raises(InputError, match="not the name of a run"):
        plan_removal(name)


def test_an_unknown_name() -> None:
    with pytest.raises(NothingMatched):
        plan_removal("demo")


@pytest.mark.parametrize(
    "where", ["/", "{home}", "{cwd}", "{runs}", "{root}", "{run}", "{project}", "{other}", "relative/demo"]
)
def test_checkpoints_that_are_not_the_runs_own(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = disk.make("demo", disk.attempt(), checkpoints=50), disk.make("other", disk.attempt(), checkpoints=50)
    (tmp_path / "work" / "relative" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    places = {
        "home": Path.home(),
        "cwd": Path.cwd(),
        "runs": paths.runs_root(),
        "root": paths.checkpoints_root(),
        "run": run.root,
        "project": run.checkpoints.parent,
        "other": other.checkpoints,
    }
    recording(run, checkpoints=where.format(**places))
    with pytest.raises(InputError, match="is not a folder of its own") as caught:
        plan_removal("demo")
    assert "--keep-checkpoints" in str(caught.value.hint)
    assert plan_removal("demo", keep_checkpoints=True).checkpoints is None


@pytest.mark.parametrize("inside", ["home", "cwd", "runs", "data"])
def test_a_folder_of_the_right_name_that_holds_more(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk.make("demo", disk.attempt(), checkpoints=50)
    below = run.checkpoints / "inside"
    below.mkdir()
    if inside == "cwd":
        monkeypatch.chdir(below)
    elif inside == "home":
        monkeypatch.setenv("HOME", str(below))
    elif inside == "data":
        monkeypatch.setenv("FLASHRL_DATA", str(below))
    else:
        shutil.move(paths.runs_root() / "demo", below / "demo")
        monkeypatch.setenv("FLASHRL_RUNS", str(below))
    with pytest.raises(InputError, match="is not a folder of its own"):
        plan_removal("demo")


def test_links_are_left_to_the_person(tmp_path: Path) -> None:
    run = disk.make("demo", disk.attempt(), checkpoints=50)
    moved = tmp_path / "elsewhere" / "demo"
    moved.parent.mkdir()
    run.checkpoints.rename(moved)
    run.checkpoints.symlink_to(moved)
    with pytest.raises(InputError, match="not a folder of its own"):
        plan_removal("demo")
    (run.root.parent / "link").symlink_to(run.root)
    with pytest.raises(InputError, match="is a link"):
        plan_removal("link", keep_checkpoints=True)


def test_a_link_inside_is_not_followed(tmp_path: Path) -> None:
    run = disk.make("demo", disk.attempt(), checkpoints=50)
    (tmp_path / "precious").write_text("x")
    (run.checkpoints / "link").symlink_to(tmp_path)
    remove(plan_removal("demo"))
    assert (tmp_path / "precious").read_text() == "x"


def test_a_killed_removal_leaves_no_half_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is removed when the process dies, names lead to a whole run or to none; the next removal sweeps up."""
    run = disk.make("demo", disk.attempt(), checkpoints=50)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove(plan_removal("demo"))
    assert store.run_names() == []
    assert not run.checkpoints.exists()
    assert any(run.root.parent.iterdir())
    disk.make("next", disk.attempt(), checkpoints=5)
    remove(plan_removal("next"))
    assert list(run.root.parent.iterdir()) == []


def test_what_cannot_be_removed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    disk.make("demo", disk.attempt())
    planned = plan_removal("demo")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"demo could not be removed: .*read-only"):
        remove(planned)
