"""What a run has on disk, and who may be writing there."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import psutil
import pytest

from flashrl_cli import paths
from flashrl_cli.errors import InputError
from flashrl_cli.runs import store
from flashrl_cli.runs.saved import DOOMED, SET_ASIDE, list_checkpoints, refuse_while_running, set_aside, writers
from tests.run_lab import Lab
from tests.saved_files import saved_step


def test_newest_and_best(lab: Lab) -> None:
    lab.save(1, 2, 3)
    lab.log({1: {"critic/score/mean": 0.9}})
    (lab.run.checkpoints / "global_step_3" / "data.pt").unlink()
    stock = list_checkpoints(lab.run)
    assert ([one.step for one in stock.saved], stock.newest, stock.best) == ([1, 2, 3], 2, 1)


def test_a_run_that_saved_nothing(lab: Lab) -> None:
    stock = list_checkpoints(lab.run)
    assert (stock.saved, stock.set_aside, stock.newest, stock.best) == ((), (), None, None)


def test_the_plan_says_what_counts(lab: Lab) -> None:
    lab.save(1)
    lab.plan(advantage="gae")
    assert list_checkpoints(lab.run).saved[0].problems == ("critic/: missing",)
    (lab.run.checkpoints / "global_step_1" / "actor" / "optim_world_size_2_rank_0.pt").unlink()
    lab.plan("actor_rollout_ref.actor.checkpoint.save_contents=[model]")
    assert list_checkpoints(lab.run).saved[0].complete
    lab.run.attempt(1).plan.write_text("{")
    with pytest.raises(InputError, match=r"plan\.json is not JSON"):
        list_checkpoints(lab.run)


def test_what_was_set_aside_is_listed_with_its_reason(lab: Lab) -> None:
    lab.save(1, 2)
    moved = set_aside(saved_step(lab.run.checkpoints, 3), "data.pt: missing")
    silent = set_aside(saved_step(lab.run.checkpoints, 4), "x")
    (silent / "reason.txt").unlink()
    (lab.run.checkpoints / SET_ASIDE / "notes").mkdir()
    found = list_checkpoints(lab.run).set_aside
    assert [(one.path, one.reason) for one in found] == [(moved, "data.pt: missing"), (silent, "not recorded")]
    assert found[1].bytes == sum(file.stat().st_size for file in silent.rglob("*") if file.is_file())


def test_hidden_folders_are_not_followed(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "home" / "global_step_1").mkdir(parents=True)
    lab.save(1)
    (lab.run.checkpoints / SET_ASIDE).symlink_to(tmp_path / "home")
    (lab.run.checkpoints / DOOMED).mkdir()
    (lab.run.checkpoints / DOOMED / "global_step_2").symlink_to(tmp_path / "home")
    found = list_checkpoints(lab.run)
    assert (found.set_aside, found.leftovers) == ((), ())


@pytest.mark.parametrize("folder", ["/", "/srv", "", "r", "checkpoints/p/r", "/c/p/../r", "/c/p/other", "~"])
def test_a_record_that_points_elsewhere_is_refused(folder: str, lab: Lab) -> None:
    found = lab.recorded()
    store.change(lab.run, lambda _: dataclasses.replace(found, checkpoints=folder))
    with pytest.raises(InputError, match="is not its own"):
        store.find("r").recorded_paths()


def test_a_record_names_the_runs_folders(lab: Lab) -> None:
    lab.recorded()
    assert store.find("r").recorded_paths() == lab.run


def test_a_running_run_is_refused_on_any_machine(lab: Lab) -> None:
    lab.recorded(status="running", **store.own_process())
    with pytest.raises(InputError, match=r"nothing is deleted: r \(on .*\) is running"):
        refuse_while_running(lab.run, "nothing is deleted")
    lab.recorded(status="running", host="elsewhere", pid=1)
    with pytest.raises(InputError, match=r"r \(on elsewhere\) is running"):
        refuse_while_running(lab.run, "nothing is deleted")
    lab.recorded(status="done")
    refuse_while_running(lab.run, "nothing is deleted")


def test_another_run_that_writes_to_the_same_folder_counts(lab: Lab) -> None:
    lab.save(1)
    lab.recorded()
    link = paths.checkpoints_root() / "q" / "s"
    link.parent.mkdir()
    link.symlink_to(lab.run.checkpoints)
    other = Lab(paths.RunPaths("s", paths.runs_root() / "s", link))
    other.recorded(status="running", host="elsewhere")
    assert list(writers(lab.run.checkpoints)) == ["s (on elsewhere)"]


def test_another_runs_damaged_record_is_in_nobodys_way(lab: Lab) -> None:
    lab.recorded()
    damaged = paths.runs_root() / "t" / "run.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert list(writers(lab.run.checkpoints)) == []


def test_a_trainer_that_outlived_flashrl_counts(lab: Lab) -> None:
    argv = psutil.Process().cmdline()
    assert argv[0] == sys.argv[0] or argv
    lab.recorded(status="running", **{**store.own_process(), "pid_started": 1.0})
    lab.plan(argv=tuple(argv))
    with pytest.raises(InputError, match="verl is not"):
        refuse_while_running(lab.run, "nothing is deleted")
    lab.plan(argv=(*argv, "another"))
    refuse_while_running(lab.run, "nothing is deleted")
    assert json.loads(lab.run.attempt(1).plan.read_text())["argv"][-1] == "another"
