"""Deleting takes what was asked for, and nothing else that anybody may miss; a killed deletion leaves nothing
half-deleted.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.delete import Keep, parse_keep, plan_prune, plan_removal, prune, remove
from flashrl_cli.runs.saved import (
    DOOMED,
    SET_ASIDE,
    CheckpointList,
    Saved,
    Scores,
    list_checkpoints,
    point_tracker,
    set_aside,
)
from tests.run_lab import Lab
from tests.saved_files import saved_step
from tests.unit.runs import on_disk
from tests.unit.runs.on_disk import GONE, attempt, make

TRACKER = "latest_checkpointed_iteration.txt"


# which checkpoints stay


def saved(step: int, *, complete: bool = True, weights: bool = True, tracked: bool = False) -> Saved:
    return Saved(
        step=step,
        path=Path(f"/c/p/r/global_step_{step}"),
        problems=() if complete else ("data.pt: missing",),
        world_size=1,
        bytes=10,
        written=0.0,
        has_hf=False,
        has_weights=weights,
        tracked=tracked,
        lora=False,
    )


def listed(*steps: Saved, scores: dict[int, float] | None = None) -> CheckpointList:
    run = RunPaths("r", Path("/r"), Path("/c/p/r"))
    return CheckpointList(run=run, saved=steps, set_aside=(), scores=Scores("validation", scores) if scores else None)


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("last:3", Keep(last=3)),
        ("best:2, every:50", Keep(best=2, every=50)),
        ("every:10,last:1,best:1", Keep(1, 1, 10)),
    ],
)
def test_rules(text: str, keep: Keep) -> None:
    assert parse_keep(text) == keep


@pytest.mark.parametrize(
    "text",
    ["", "3", "last", "last:0", "last:-1", "last:1.5", "first:1", "last:1,", "last:1,last:2", "last:9999999999"],
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="not understood"):
        parse_keep(text)


@pytest.mark.parametrize(
    ("steps", "text", "stays"),
    [
        (
            listed(*map(saved, range(10, 90, 10)), scores={10: 0.5, 20: 0.9, 30: 0.8, 80: 0.1}),
            "last:3,best:2,every:50",
            {20: "best by validation", 30: "best:2", 50: "every:50", 60: "last:3", 70: "last:3", 80: "newest"},
        ),
        (
            listed(saved(1), saved(2), saved(3), saved(4, complete=False), scores={1: 0.9, 3: 0.1}),
            "every:100",
            {1: "best by validation", 3: "newest"},
        ),
        (listed(saved(1), saved(2, tracked=True), saved(3)), "last:1", {2: "verl goes on from it", 3: "newest"}),
        (
            listed(saved(1), saved(2), saved(3, complete=False), saved(4, complete=False)),
            "last:2",
            {1: "last:2", 2: "newest"},
        ),
        (
            listed(saved(10, complete=False), saved(20, complete=False, weights=False), saved(21)),
            "every:10",
            {10: "every:10", 21: "newest"},
        ),
    ],
    ids=["all rules", "newest and best unasked", "tracked", "incomplete ones are not the last", "weights are enough"],
)
def test_what_stays_and_why(steps: CheckpointList, text: str, stays: dict[int, str]) -> None:
    verdicts = plan_prune(steps, parse_keep(text), set_aside=False).verdicts
    assert {verdict.saved.step: ", ".join(verdict.stays) for verdict in verdicts if verdict.stays} == stays


def test_where_nothing_is_complete_nothing_goes() -> None:
    with pytest.raises(InputError, match="no step of run r is complete"):
        plan_prune(listed(saved(1, complete=False)), Keep(last=1), set_aside=False)
    assert plan_prune(listed(), Keep(last=1), set_aside=False).going == []
    assert plan_prune(listed(saved(1, complete=False)), None, set_aside=True).going == []


@settings(deadline=None)
@given(
    steps=st.sets(st.integers(1, 60), min_size=1),
    torn=st.sets(st.integers(1, 60)),
    scores=st.dictionaries(st.integers(1, 60), st.floats(0, 1)),
    keep=st.builds(Keep, last=st.integers(0, 5), best=st.integers(0, 5), every=st.integers(0, 9)),
)
def test_no_rules_lose_the_newest_or_the_best(
    steps: set[int], torn: set[int], scores: dict[int, float], keep: Keep
) -> None:
    known = {step: value for step, value in scores.items() if step in steps}
    found = listed(*(saved(step, complete=step not in torn) for step in sorted(steps)), scores=known)
    if found.newest is None:
        return
    going = {path.name for path in plan_prune(found, keep, set_aside=True).going}
    assert f"global_step_{found.newest}" not in going
    assert f"global_step_{found.best}" not in going
    complete = sorted(steps - torn)
    assert not going & {f"global_step_{step}" for step in (complete[-keep.last :] if keep.last else [])}
    assert not going & {f"global_step_{step}" for step in steps if keep.every and step % keep.every == 0}
    assert len(steps) - len(going) <= 2 + keep.last + keep.best + (60 // keep.every if keep.every else 0)


# deleting checkpoints


def delete(lab: Lab, keep: Keep | None, *, aside: bool = False) -> None:
    shown = plan_prune(list_checkpoints(lab.run), keep, set_aside=aside)
    prune(lab.run, keep, set_aside=aside, shown=shown)


@pytest.fixture
def trained(lab: Lab) -> Lab:
    """Steps 1, 2 and 3, no scores."""
    lab.recorded()
    lab.save(1, 2, 3)
    return lab


def test_only_steps_are_deleted(trained: Lab) -> None:
    trained.evaluate({1: 0.5})
    point_tracker(trained.run.checkpoints, 1)
    (trained.run.checkpoints / "notes.txt").write_text("mine")
    (trained.run.checkpoints / "global_step_best").mkdir()
    delete(trained, Keep(last=1))
    assert trained.names() == ["eval", "global_step_1", "global_step_3", "global_step_best", TRACKER, "notes.txt"]


def test_links_stay_and_what_they_point_to(trained: Lab, tmp_path: Path) -> None:
    elsewhere = saved_step(tmp_path / "elsewhere", 1)
    shutil.rmtree(trained.run.checkpoints / "global_step_1")
    (trained.run.checkpoints / "global_step_1").symlink_to(elsewhere)
    (trained.run.checkpoints / "global_step_2" / "actor" / "extra").symlink_to(elsewhere)
    trained.run.checkpoints.rename(tmp_path / "disk")
    trained.run.checkpoints.symlink_to(tmp_path / "disk")
    delete(trained, Keep(last=1))
    assert trained.names() == ["global_step_1", "global_step_3", TRACKER]
    assert (elsewhere / "data.pt").is_file()
    assert trained.run.checkpoints.is_symlink()


def test_what_was_set_aside_goes_only_if_asked_and_leftovers_always(trained: Lab) -> None:
    moved = set_aside(saved_step(trained.run.checkpoints, 4), "torn")
    left = saved_step(trained.run.checkpoints / DOOMED, 5)
    delete(trained, Keep(last=9))
    assert (moved.is_dir(), left.exists()) == (True, False)
    delete(trained, None, aside=True)
    assert trained.names() == [SET_ASIDE, "global_step_1", "global_step_2", "global_step_3", TRACKER]
    assert not moved.exists()


def test_what_changed_since_it_was_shown_stops_it(trained: Lab) -> None:
    shown = plan_prune(list_checkpoints(trained.run), Keep(last=1), set_aside=False)
    trained.recorded(status="running", **store.own_process())
    with pytest.raises(InputError, match="is running"):
        prune(trained.run, Keep(last=1), set_aside=False, shown=shown)
    assert "global_step_1" in trained.names()
    trained.recorded()
    delete(trained, Keep(last=2))
    with pytest.raises(InputError, match="changed meanwhile"):
        prune(trained.run, Keep(last=1), set_aside=False, shown=shown)
    assert trained.names() == ["global_step_2", "global_step_3", TRACKER]


def test_what_another_prune_deletes_is_no_failure(trained: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shutil.rmtree

    def gone(path: Path, **how: bool) -> None:
        whole(path, ignore_errors=True)
        if not how:
            raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(shutil, "rmtree", gone)
    delete(trained, Keep(last=1))
    assert trained.names() == ["global_step_3", TRACKER]


def test_what_cannot_be_deleted_is_hidden_and_goes_next_time(trained: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(EnvironmentNotReady, match="global_step_1 cannot be deleted: Permission denied"):
            delete(trained, Keep(last=1))
    assert [one.step for one in list_checkpoints(trained.run).saved] == [3]
    delete(trained, Keep(last=1))
    assert trained.names() == ["global_step_3", TRACKER]


# removing runs


def recording(run: RunPaths, **fields: Any) -> None:
    """Change the record of `run`."""
    store.change(run, lambda found: dataclasses.replace(found or pytest.fail("no record"), **fields))


def test_both_folders_go_and_the_neighbours_stay() -> None:
    run, other = make("demo", attempt(), checkpoints=50), make("demo-2", attempt(), checkpoints=5)
    planned = plan_removal("demo")
    assert (planned.checkpoint_bytes, planned.checkpoints) == (50, run.checkpoints)
    assert planned.bytes == planned.root_bytes + 50
    remove(planned)
    assert list(run.root.parent.iterdir()) == [other.root]
    assert list(run.checkpoints.parent.iterdir()) == [other.checkpoints]
    remove(plan_removal("demo-2"))
    assert not run.checkpoints.parent.exists(), "an empty project goes too"
    assert paths.checkpoints_root().is_dir()


def test_checkpoints_are_kept_if_asked() -> None:
    run = make("demo", attempt(), checkpoints=50)
    remove(plan_removal("demo", keep_checkpoints=True))
    assert (run.root.exists(), run.checkpoints.is_dir()) == (False, True)


def test_runs_without_a_readable_record_can_be_removed() -> None:
    run = make("old", checkpoints=50)
    on_disk.planned(run, 1)
    make("broken", attempt()).record.write_text("{")
    for name in ("old", "broken"):
        remove(plan_removal(name))
    assert store.run_names() == []
    assert not run.checkpoints.exists(), "the plan names them"


def test_a_running_one_is_refused_before_and_after_it_was_planned() -> None:
    run = make("demo", attempt(), checkpoints=50)
    planned = plan_removal("demo")
    recording(run, attempts=(attempt(status="running"),))
    for refused in (lambda: plan_removal("demo"), lambda: remove(planned)):
        with pytest.raises(InputError, match="is running") as caught:
            refused()
        assert caught.value.hint == "flashrl runs stop demo"
    assert run.root.is_dir()
    assert run.checkpoints.is_dir()
    recording(run, attempts=(attempt(status="running", host="node7"),))
    with pytest.raises(InputError, match="is running on node7"):
        plan_removal("demo")


@pytest.mark.processes
def test_one_that_a_process_still_works_in_is_refused() -> None:
    run = make("old")
    make("lost", attempt(status="running", **GONE))
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=run.attempt(1).root, stdin=subprocess.PIPE) as process:
        with pytest.raises(InputError, match=f"process {process.pid} .* still works in"):
            plan_removal("old")
        plan_removal("lost")
        process.communicate(b"\n")
    remove(plan_removal("old"))
    assert not run.root.exists()


def test_a_ray_job_that_may_go_on_is_a_warning() -> None:
    make("demo", attempt(status="running", executor="ray", job_id="job-1", **GONE))
    assert "`ray job stop job-1`" in str(plan_removal("demo").warning)
    make("over", attempt(executor="ray", job_id="job-1"))
    assert plan_removal("over").warning is None


def test_only_names_of_runs_are_removed() -> None:
    with pytest.raises(NothingMatched):
        plan_removal("demo")
    with pytest.raises(InputError, match="not the name of a run"):
        plan_removal("demo/..")


@pytest.mark.parametrize(
    "where", ["/", "{home}", "{cwd}", "{runs}", "{root}", "{run}", "{project}", "{other}", "{foreign}", "relative/demo"]
)
def test_checkpoints_that_are_not_the_runs_own(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = make("demo", attempt(), checkpoints=50), make("other", attempt(), checkpoints=50)
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
        "foreign": paths.checkpoints_root() / "another project" / "demo",
    }
    places["foreign"].mkdir(parents=True)
    recording(run, checkpoints=where.format(**places))
    with pytest.raises(InputError, match="is not a folder of its own") as caught:
        plan_removal("demo")
    assert "--keep-checkpoints" in str(caught.value.hint)
    assert plan_removal("demo", keep_checkpoints=True).checkpoints is None


@pytest.mark.parametrize("inside", ["home", "cwd", "runs", "data"])
def test_a_folder_of_the_right_name_that_holds_more(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("demo", attempt(), checkpoints=50)
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


def test_links_are_left_to_the_person_and_not_followed(tmp_path: Path) -> None:
    run, inside = make("demo", attempt(), checkpoints=50), make("inside", attempt(), checkpoints=50)
    moved = tmp_path / "elsewhere" / "demo"
    moved.parent.mkdir()
    (moved.parent / "precious").write_text("x")
    (inside.checkpoints / "link").symlink_to(moved.parent)
    remove(plan_removal("inside"))
    assert (moved.parent / "precious").read_text() == "x"
    run.checkpoints.rename(moved)
    run.checkpoints.symlink_to(moved)
    with pytest.raises(InputError, match="not a folder of its own"):
        plan_removal("demo")
    (run.root.parent / "link").symlink_to(run.root)
    with pytest.raises(InputError, match="is a link"):
        plan_removal("link", keep_checkpoints=True)


def test_a_killed_removal_leaves_no_half_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the process dies, a name refers to a complete run or none; the next removal deletes the rest."""
    run = make("demo", attempt(), checkpoints=50)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove(plan_removal("demo"))
    assert store.run_names() == []
    assert not run.checkpoints.exists()
    assert any(run.root.parent.iterdir())
    make("next", attempt(), checkpoints=5)
    remove(plan_removal("next"))
    assert list(run.root.parent.iterdir()) == []


def test_what_cannot_be_removed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("demo", attempt())
    planned = plan_removal("demo")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"demo could not be removed: .*read-only"):
        remove(planned)
    assert run.record.is_file()
