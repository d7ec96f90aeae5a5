"""Points become plans: all judged before anything starts, and runs that stand are recognized."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files, paths
from flashrl_cli.config.resolve import Resolved
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train import review
from flashrl_cli.train.plan import LaunchPlan, plan_document
from flashrl_cli.train.review import Options
from flashrl_cli.train.sweep import Going, Job, plan_jobs
from flashrl_cli.train.sweep_axes import points, read_axes
from tests.saved_files import saved_step

NEXT = Going()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the runs that verl's tree was asked about, in order; runs lie in an empty folder."""
    names: list[str] = []

    def judge(resolved: Resolved, plan: LaunchPlan) -> Any:
        if resolved.broken:
            raise resolved.refusal(resolved.broken)
        names.append(plan.name)

    monkeypatch.setattr(review, "judge", judge)
    monkeypatch.chdir(tmp_path)
    return names


def jobs(*texts: str, name: str | None = "s", going: Going = NEXT, **given: Any) -> list[Job]:
    options = Options(**given)
    return plan_jobs(partial(review.read, "tiny"), points(read_axes(texts, options)), options, name, going)


def problems(*texts: str, **given: Any) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        jobs(*texts, **given)
    return list(caught.value.problems)


def leave(job: Job, **fields: Any) -> None:
    """Write what an attempt of a job's run leaves."""
    assert job.launch
    plan = job.launch.plan
    files.write_json(plan.attempt_paths.plan, plan_document(plan))
    given = {"status": "done", "started": "t", "updated": "t", "exit_code": 0, "last_step": 15, **fields}
    attempt = Attempt(number=plan.attempt, **given)
    whole = RunRecord(name=job.run.name, project="p", preset="tiny", created="t", checkpoints="", attempts=(attempt,))
    store.change(job.run, lambda _: whole)


def test_a_job_for_each_point(judged: list[str], tmp_path: Path) -> None:
    found = jobs("rollout=bf16,int8", "tis=off,2", sets=["trainer.steps=4"])
    assert [job.run.name for job in found] == judged == ["s-bf16-tisoff", "s-bf16-tis2", "s-int8-tisoff", "s-int8-tis2"]
    assert {job.standing for job in found} == {"waiting"}
    specs = [job.launch.plan.spec for job in found if job.launch]
    assert [(spec.rollout.precision, spec.correction.cap) for spec in specs] == [
        ("bf16", None),
        ("bf16", 2),
        ("int8", None),
        ("int8", 2),
    ]
    assert {spec.trainer.steps for spec in specs} == {4}
    assert list(tmp_path.iterdir()) == []


def test_names_of_their_own_as_single_runs_have_them(judged: list[str]) -> None:
    jobs("rollout=bf16,int8", "tis=off,2", "algorithm.lr=1e-4", name=None)
    assert judged == ["tiny-bf16-lr1e-4", "tiny-bf16-tis2-lr1e-4", "tiny-int8-lr1e-4", "tiny-int8-tis2-lr1e-4"]


def test_every_error_of_every_point_at_once(judged: list[str]) -> None:
    found = problems("rollout=int8,int4", "tis=2,x", "rollout.nn=1,2", "algorithm.mini_batch_size=7,16")
    assert [(problem.where, problem.message.split(":")[0]) for problem in found] == [
        ("--sweep tis=x", "correction.cap = x"),
        ("--sweep rollout.nn", "unknown key rollout.nn"),
        ("--sweep rollout=int4", "rollout.precision = int4"),
    ]
    assert judged == []


def test_broken_rules_name_the_value(judged: list[str]) -> None:
    (problem,) = problems("rollout=int8,bf16", "algorithm.mini_batch_size=7,16")
    assert problem.where == "--sweep algorithm.mini_batch_size=7"
    assert judged == ["s-int8-mini_batch_size16", "s-bf16-mini_batch_size16"]


@pytest.mark.parametrize("texts", [("tis=2,2.0",), ("algorithm.lr=1e-4,0.0001",)])
def test_a_value_that_stands_there_twice(texts: tuple[str, ...], judged: list[str]) -> None:
    (problem,) = problems(*texts, name=None)
    assert problem.message.startswith("the same run twice")


def test_a_run_that_is_done_is_left_alone(judged: list[str]) -> None:
    first, second = jobs("tis=1,2", sets=["trainer.steps=15"])
    leave(first)
    judged.clear()
    first, second = jobs("tis=1,2", sets=["trainer.steps=15"])
    assert (first.standing, first.launch) == ("done", None)
    assert second.standing == "waiting"
    assert judged == [second.run.name]


@pytest.mark.parametrize("fields", [{"status": "failed"}, {"status": "stopped"}, {"last_step": 14}])
def test_a_run_that_was_begun_goes_on(fields: dict[str, Any], judged: list[str]) -> None:
    leave(jobs("tis=2", sets=["trainer.steps=15"])[0], **fields)
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    assert job.standing == "begun"
    assert job.launch
    assert job.launch.plan.attempt == 2
    assert job.from_step is None


def test_a_run_goes_on_from_its_newest_complete_step(judged: list[str]) -> None:
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    leave(job, status="failed")
    saved_step(job.run.checkpoints, 10, world_size=1)
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    assert (job.standing, job.from_step) == ("begun", 10)


def test_a_run_with_its_last_step_saved_is_done(judged: list[str]) -> None:
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    leave(job, status="stopped")
    saved_step(job.run.checkpoints, 15, world_size=1)
    assert jobs("tis=2", sets=["trainer.steps=15"])[0].standing == "done"


def test_more_steps_go_on_with_a_run_that_was_done(judged: list[str]) -> None:
    leave(jobs("tis=2", sets=["trainer.steps=15"])[0])
    assert jobs("tis=2", sets=["trainer.steps=20"])[0].standing == "begun"
    assert jobs("tis=2", sets=["trainer.steps=10", "watch.stop_grace_s=1"])[0].standing == "done"


def test_a_run_of_another_configuration(judged: list[str]) -> None:
    leave(jobs("tis=2", sets=["trainer.steps=15"])[0])
    (problem,) = problems("tis=2", sets=["trainer.steps=15", "algorithm.lr=0.3"])
    assert "run s-tis2 was started with another configuration: algorithm.lr" in problem.message
    assert "→ 0.3" in problem.message
    assert problem.hint == "`--force` goes on with the new one, another `--name` starts other runs"
    (job,) = jobs("tis=2", going=Going(force=True), sets=["trainer.steps=16", "algorithm.lr=0.3"])
    assert job.standing == "begun"


def test_a_run_that_is_under_way(judged: list[str]) -> None:
    leave(jobs("tis=2")[0], status="running", **store.own_process())
    (problem,) = problems("tis=2")
    assert problem.message.startswith("run s-tis2 is under way: attempt 1")
    (job,) = jobs("tis=2", going=Going(look_only=True))
    assert (job.standing, job.launch) == ("running", None)


def test_checkpoints_without_a_run(judged: list[str]) -> None:
    (paths.checkpoints_root() / "tiny/s-tis2").mkdir(parents=True)
    (problem,) = problems("tis=2")
    assert "run s-tis2 exists already" in problem.message


def test_advance_counts_the_points(judged: list[str]) -> None:
    counted: list[int] = []
    options = Options()
    plan_jobs(
        partial(review.read, "tiny"), points(read_axes(["tis=1,2,3"], options)), options, "s", NEXT, counted.append
    )
    assert counted == [1, 1, 1]


def test_a_lost_run_goes_on(judged: list[str]) -> None:
    process = store.own_process() | {"pid": os.getpid(), "pid_started": 1.0}
    leave(jobs("tis=2")[0], status="running", **process)
    assert jobs("tis=2")[0].standing == "begun"
