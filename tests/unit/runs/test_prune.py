"""Pruning keeps what was asked for and what nobody may lose, and touches nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.delete import Keep, parse_keep, plan_prune, prune
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


def stock(*steps: Saved, scores: dict[int, float] | None = None) -> CheckpointList:
    run = RunPaths("r", Path("/r"), Path("/c/p/r"))
    return CheckpointList(run=run, saved=steps, set_aside=(), scores=Scores("validation", scores) if scores else None)


def staying(found: CheckpointList, text: str) -> dict[int, tuple[str, ...]]:
    verdicts = plan_prune(found, parse_keep(text), set_aside=False).verdicts
    return {verdict.saved.step: verdict.stays for verdict in verdicts if verdict.stays}


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


def test_what_stays_and_why() -> None:
    steps = stock(*map(saved, range(10, 90, 10)), scores={10: 0.5, 20: 0.9, 30: 0.8, 80: 0.1})
    assert staying(steps, "last:3,best:2,every:50") == {
        20: ("best by validation",),
        30: ("best:2",),
        50: ("every:50",),
        60: ("last:3",),
        70: ("last:3",),
        80: ("newest",),
    }


def test_the_newest_complete_and_the_best_stay_unasked() -> None:
    steps = stock(saved(1), saved(2), saved(3), saved(4, complete=False), scores={1: 0.9, 3: 0.1})
    assert staying(steps, "every:100") == {1: ("best by validation",), 3: ("newest",)}


def test_what_verl_goes_on_from_stays() -> None:
    assert staying(stock(saved(1), saved(2, tracked=True), saved(3)), "last:1") == {
        2: ("verl goes on from it",),
        3: ("newest",),
    }


def test_incomplete_steps_do_not_count_as_the_last() -> None:
    steps = stock(saved(1), saved(2), saved(3, complete=False), saved(4, complete=False))
    assert staying(steps, "last:2") == {1: ("last:2",), 2: ("newest",)}


def test_weights_alone_are_enough_for_every() -> None:
    steps = stock(saved(10, complete=False), saved(20, complete=False, weights=False), saved(21))
    assert staying(steps, "every:10") == {10: ("every:10",), 21: ("newest",)}


def test_where_nothing_is_complete_nothing_goes() -> None:
    with pytest.raises(InputError, match="no step of run r is complete"):
        plan_prune(stock(saved(1, complete=False)), Keep(last=1), set_aside=False)
    assert plan_prune(stock(), Keep(last=1), set_aside=False).going == []
    only_hidden = plan_prune(stock(saved(1, complete=False)), None, set_aside=True)
    assert only_hidden.going == []


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
    found = stock(*(saved(step, complete=step not in torn) for step in sorted(steps)), scores=known)
    if found.newest is None:
        return
    going = {path.name for path in plan_prune(found, keep, set_aside=True).going}
    assert f"global_step_{found.newest}" not in going
    assert f"global_step_{found.best}" not in going
    complete = sorted(steps - torn)
    assert not going & {f"global_step_{step}" for step in (complete[-keep.last :] if keep.last else [])}
    assert not going & {f"global_step_{step}" for step in steps if keep.every and step % keep.every == 0}
    assert len(steps) - len(going) <= 2 + keep.last + keep.best + (60 // keep.every if keep.every else 0)


def do(lab: Lab, keep: Keep | None, *, aside: bool = False) -> None:
    shown = plan_prune(list_checkpoints(lab.run), keep, set_aside=aside)
    prune(lab.run, keep, set_aside=aside, shown=shown)


def test_only_steps_are_deleted(lab: Lab) -> None:
    lab.recorded()
    lab.save(1, 2, 3)
    lab.evaluate({1: 0.5})
    (lab.run.checkpoints / "notes.txt").write_text("mine")
    (lab.run.checkpoints / "global_step_best").mkdir()
    do(lab, Keep(last=1))
    assert lab.names() == [
        "eval", "global_step_1", "global_step_3", "global_step_best", "latest_checkpointed_iteration.txt", "notes.txt",
    ]  # fmt: skip


def test_links_stay_and_what_they_point_to(lab: Lab, tmp_path: Path) -> None:
    lab.recorded()
    lab.save(2, 3)
    elsewhere = saved_step(tmp_path / "elsewhere", 1)
    (lab.run.checkpoints / "global_step_1").symlink_to(elsewhere)
    (lab.run.checkpoints / "global_step_2" / "actor" / "extra").symlink_to(elsewhere)
    do(lab, Keep(last=1))
    assert [name for name in lab.names() if name.startswith("global")] == ["global_step_1", "global_step_3"]
    assert (elsewhere / "data.pt").is_file()


def test_checkpoints_on_another_disk(lab: Lab, tmp_path: Path) -> None:
    lab.recorded()
    lab.save(1, 2)
    lab.run.checkpoints.rename(tmp_path / "disk")
    lab.run.checkpoints.symlink_to(tmp_path / "disk")
    do(lab, Keep(last=1))
    assert not (tmp_path / "disk" / "global_step_1").exists()
    assert lab.run.checkpoints.is_symlink()


def test_set_aside_and_leftovers_go(lab: Lab) -> None:
    lab.recorded()
    lab.save(1, 2)
    set_aside(saved_step(lab.run.checkpoints, 3), "torn")
    left = saved_step(lab.run.checkpoints, 4)
    (lab.run.checkpoints / DOOMED).mkdir()
    left.rename(lab.run.checkpoints / DOOMED / "global_step_4")
    do(lab, None, aside=True)
    assert lab.names() == [SET_ASIDE, "global_step_1", "global_step_2", "latest_checkpointed_iteration.txt"]
    assert not list((lab.run.checkpoints / SET_ASIDE).iterdir())


def test_set_aside_stays_unless_asked_for(lab: Lab) -> None:
    lab.recorded()
    lab.save(1, 2)
    set_aside(saved_step(lab.run.checkpoints, 3), "torn")
    do(lab, Keep(last=1))
    assert (lab.run.checkpoints / SET_ASIDE / "global_step_3").is_dir()


def test_a_run_that_started_meanwhile_loses_nothing(lab: Lab) -> None:
    lab.recorded()
    lab.save(1, 2)
    shown = plan_prune(list_checkpoints(lab.run), Keep(last=1), set_aside=False)
    lab.recorded(status="running", **store.own_process())
    with pytest.raises(InputError, match="is running"):
        prune(lab.run, Keep(last=1), set_aside=False, shown=shown)
    assert "global_step_1" in lab.names()


def test_two_prunes_at_once(lab: Lab) -> None:
    lab.recorded()
    lab.save(1, 2, 3)
    shown = plan_prune(list_checkpoints(lab.run), Keep(last=1), set_aside=False)
    do(lab, Keep(last=2))
    with pytest.raises(InputError, match="changed meanwhile"):
        prune(lab.run, Keep(last=1), set_aside=False, shown=shown)
    assert {"global_step_2", "global_step_3"} <= set(lab.names())


def test_what_another_prune_deletes_is_no_failure(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.recorded()
    lab.save(1, 2, 3)
    whole = shutil.rmtree

    def gone(path: Path, **how: bool) -> None:
        whole(path, ignore_errors=True)
        if not how:
            raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(shutil, "rmtree", gone)
    do(lab, Keep(last=1))
    assert lab.names() == ["global_step_3", "latest_checkpointed_iteration.txt"]


def test_what_cannot_be_deleted_is_hidden_and_goes_next_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.recorded()
    lab.save(1, 2)

    def refuse(path: Path, **_: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(EnvironmentNotReady, match="global_step_1 cannot be deleted: Permission denied"):
            do(lab, Keep(last=1))
    assert [one.step for one in list_checkpoints(lab.run).saved] == [2]
    do(lab, Keep(last=1))
    assert lab.names() == ["global_step_2", "latest_checkpointed_iteration.txt"]


def test_the_tracked_step_is_there_after_any_prune(lab: Lab) -> None:
    lab.recorded()
    lab.save(1, 2, 3)
    point_tracker(lab.run.checkpoints, 1)
    do(lab, Keep(last=1))
    assert lab.names() == ["global_step_1", "global_step_3", "latest_checkpointed_iteration.txt"]
