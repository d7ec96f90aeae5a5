"""A sweep: all points are judged before anything starts; then one run after another; then a table of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flashrl_cli import files, paths
from flashrl_cli.config.resolve import Options, Resolved
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError, InputError, Location, Problem, RunFailed
from flashrl_cli.paths import AttemptPaths, RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.signals import Interrupted
from flashrl_cli.train import launch
from flashrl_cli.train.launch import Launch
from flashrl_cli.train.plan import LaunchPlan, plan_document
from flashrl_cli.train.sweep import (
    HEADINGS,
    Job,
    PointProblems,
    Row,
    UsedNames,
    best,
    check_all,
    plan_jobs,
    row,
    run_jobs,
)
from flashrl_cli.train.sweep_axes import Point, points, read_axes
from flashrl_cli.verl.metrics import NAMES
from tests.saved_files import saved_step

# points become plans

NEXT = UsedNames()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the runs that verl's tree was asked about, in order; runs lie in an empty folder."""
    names: list[str] = []

    def judge(resolved: Resolved, plan: LaunchPlan) -> Any:
        if resolved.broken:
            raise resolved.refusal(resolved.broken)
        names.append(plan.name)

    monkeypatch.setattr(launch, "judge", judge)
    monkeypatch.chdir(tmp_path)
    return names


def jobs(*texts: str, name: str | None = "s", used: UsedNames = NEXT, **given: Any) -> list[Job]:
    options = Options(**given)
    return plan_jobs(partial(launch.read, "tiny"), points(read_axes(texts, options)), options, name, used)


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
    assert {job.state for job in found} == {"waiting"}
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
    found = problems("rollout=int8,int3", "tis=2,x", "rollout.nn=1,2", "algorithm.mini_batch_size=7,16")
    assert [(str(problem.where), problem.message.split(":")[0]) for problem in found] == [
        ("--sweep tis=x", "correction.cap = x"),
        ("--sweep rollout.nn", "unknown key rollout.nn"),
        ("--sweep rollout=int3", "rollout.precision = int3"),
    ]
    assert judged == []


@pytest.mark.parametrize("texts", [("trainer.mode=async",), ("tis=x,y", "rollout=int3")])
def test_no_point_can_be_read(texts: tuple[str, ...], judged: list[str]) -> None:
    assert problems(*texts)
    assert judged == []


def test_broken_rules_name_the_value(judged: list[str]) -> None:
    (problem,) = problems("rollout=int8,bf16", "algorithm.mini_batch_size=7,16")
    assert str(problem.where) == "--sweep algorithm.mini_batch_size=7"
    assert problem.hint == "--sweep algorithm.mini_batch_size=4"
    assert judged == ["s-int8-mini_batch_size16", "s-bf16-mini_batch_size16"]


@pytest.mark.parametrize("texts", [("tis=2,2.0",), ("algorithm.lr=1e-4,0.0001",)])
def test_a_value_that_is_given_twice(texts: tuple[str, ...], judged: list[str]) -> None:
    (problem,) = problems(*texts, name=None)
    assert problem.message.startswith("the same run twice")


def test_a_run_that_is_done_is_left_alone(judged: list[str]) -> None:
    first, second = jobs("tis=1,2", sets=["trainer.steps=15"])
    leave(first)
    judged.clear()
    first, second = jobs("tis=1,2", sets=["trainer.steps=15"])
    assert (first.state, first.launch) == ("done", None)
    assert second.state == "waiting"
    assert judged == [second.run.name]


@pytest.mark.parametrize("fields", [{"status": "failed"}, {"status": "stopped"}, {"last_step": 14}])
def test_a_run_that_was_begun_goes_on(fields: dict[str, Any], judged: list[str]) -> None:
    leave(jobs("tis=2", sets=["trainer.steps=15"])[0], **fields)
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    assert job.state == "begun"
    assert job.launch
    assert job.launch.plan.attempt == 2
    assert job.from_step is None


def test_a_run_goes_on_from_its_newest_complete_step(judged: list[str]) -> None:
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    leave(job, status="failed")
    saved_step(job.run.checkpoints, 10, world_size=1)
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    assert (job.state, job.from_step) == ("begun", 10)


def test_a_run_with_its_last_step_saved_is_done(judged: list[str]) -> None:
    (job,) = jobs("tis=2", sets=["trainer.steps=15"])
    leave(job, status="stopped")
    saved_step(job.run.checkpoints, 15, world_size=1)
    assert jobs("tis=2", sets=["trainer.steps=15"])[0].state == "done"


def test_more_steps_go_on_with_a_run_that_was_done(judged: list[str]) -> None:
    leave(jobs("tis=2", sets=["trainer.steps=15"])[0])
    assert jobs("tis=2", sets=["trainer.steps=20"])[0].state == "begun"
    assert jobs("tis=2", sets=["trainer.steps=10", "watch.stop_grace_s=1"])[0].state == "done"


def test_a_run_of_another_configuration(judged: list[str]) -> None:
    leave(jobs("tis=2", sets=["trainer.steps=15"])[0])
    (problem,) = problems("tis=2", sets=["trainer.steps=15", "algorithm.lr=0.3"])
    assert "run s-tis2 was started with another configuration: algorithm.lr" in problem.message
    assert "→ 0.3" in problem.message
    assert problem.hint == "`--force` goes on with the new one, another `--name` starts other runs"
    (job,) = jobs("tis=2", used=UsedNames(force=True), sets=["trainer.steps=16", "algorithm.lr=0.3"])
    assert job.state == "begun"


def test_a_run_that_is_under_way(judged: list[str]) -> None:
    leave(jobs("tis=2")[0], status="running", **store.own_process())
    (problem,) = problems("tis=2")
    assert problem.message.startswith("run s-tis2 is under way: attempt 1")
    (job,) = jobs("tis=2", used=UsedNames(look_only=True))
    assert (job.state, job.launch) == ("running", None)


def test_checkpoints_without_a_run(judged: list[str]) -> None:
    (paths.checkpoints_root() / "tiny/s-tis2").mkdir(parents=True)
    (problem,) = problems("tis=2")
    assert "run s-tis2 exists already" in problem.message


def test_advance_counts_the_points(judged: list[str]) -> None:
    counted: list[int] = []
    options = Options()
    plan_jobs(
        partial(launch.read, "tiny"), points(read_axes(["tis=1,2,3"], options)), options, "s", NEXT, counted.append
    )
    assert counted == [1, 1, 1]


def test_a_lost_run_goes_on(judged: list[str]) -> None:
    process = store.own_process() | {"pid": os.getpid(), "pid_started": 1.0}
    leave(jobs("tis=2")[0], status="running", **process)
    assert jobs("tis=2")[0].state == "begun"


# what is wrong with points


POINTS = [Point((("rollout", rollout), ("algorithm.lr", lr))) for rollout in ("int8", "bf16") for lr in ("1", "2", "3")]


def stated(*noted: tuple[int, Problem]) -> list[Problem]:
    wrong = PointProblems(POINTS)
    for number, problem in noted:
        wrong.note(POINTS[number], problem)
    return wrong.problems()


def test_what_is_wrong_everywhere_is_stated_as_it_is() -> None:
    problem = Problem("unknown key a", "--set a", "did you mean b?")
    assert stated(*((number, problem) for number in range(6))) == [problem]


def test_what_goes_with_one_value_names_it() -> None:
    bad = Problem("should be less", "p.yaml:3")
    assert stated(*((n, bad) for n in (0, 1, 2))) == [Problem("should be less (with rollout=int8)", "p.yaml:3")]
    own = Problem("should be less", Location("--sweep", key="algorithm.lr"))
    assert stated((1, own), (4, own)) == [Problem("should be less", Location("--sweep", key="algorithm.lr=2"))]


def test_what_goes_with_no_value_names_points() -> None:
    bad = Problem("no", None)
    assert stated((0, bad), (4, bad))[0].message == "no (at rollout=int8 algorithm.lr=1; rollout=bf16 algorithm.lr=2)"
    assert stated(*((n, bad) for n in (0, 1, 3, 4, 5)))[0].message.endswith("algorithm.lr=1 and 2 more)")


def test_what_only_some_can_have_is_stated_of_those() -> None:
    wrong = PointProblems(POINTS)
    wrong.readable = POINTS[1:]
    for number in (3, 4, 5):
        wrong.note(POINTS[number], Problem("a"))
    for number in range(1, 6):
        wrong.note(POINTS[number], Problem("b"))
    for number in (1, 2):
        wrong.note(POINTS[number], Problem("c"))
    assert [problem.message for problem in wrong.problems()] == ["a (with rollout=bf16)", "b", "c (with rollout=int8)"]


def test_problems_are_collected_from_errors_of_one_class() -> None:
    def fail(error: Exception) -> int:
        raise error

    wrong = PointProblems(POINTS[:1])
    assert wrong.collect(POINTS[0], lambda: 3) == 3
    assert wrong.collect(POINTS[0], lambda: fail(InputError("bad", hint="fix"))) is None
    assert wrong.collect(POINTS[0], lambda: fail(InputError("x", problems=[Problem("a"), Problem("b")]))) is None
    assert wrong.problems() == [Problem("bad", None, "fix"), Problem("a"), Problem("b")]
    with pytest.raises(RunFailed):
        wrong.collect(POINTS[0], lambda: fail(RunFailed("broke")))


# one run after another


class Seen:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begins(self, number: int, job: Job) -> None:
        self.lines.append(f"{number} {job.run.name}")

    def failed(self, job: Job, error: FlashrlError) -> None:
        self.lines.append(f"failed {job.run.name}: {error}")

    def ended(self, job: Job) -> None:
        self.lines.append(f"ended {job.run.name}")


@pytest.fixture
def four_jobs(tmp_path: Path) -> list[Job]:
    """Four points `n=1` to `n=4`, of which the first is done."""

    def job(number: int) -> Job:
        run = RunPaths(f"r{number}", tmp_path / f"r{number}", tmp_path / "c")
        plan = SimpleNamespace(name=run.name, attempt_paths=AttemptPaths(run.root / "attempt_1"), spec=number)
        launch = Launch(resolved=cast("Any", None), plan=cast("Any", plan), tree=cast("Any", None))
        return Job(point=Point((("n", str(number)),)), run=run, state="waiting", launch=launch)

    first, *others = map(job, range(1, 5))
    return [replace(first, state="done", launch=None), *others]


def trainer(**outcomes: BaseException) -> tuple[list[str], Callable[[Launch], None]]:
    """A function that trains: makes the attempt's folder, then raises what was given for the run's name."""
    trained: list[str] = []

    def train(launch: Launch) -> None:
        trained.append(launch.plan.name)
        launch.plan.attempt_paths.root.mkdir(parents=True)
        if launch.plan.name in outcomes:
            raise outcomes[launch.plan.name]

    return trained, train


def test_runs_follow_one_another_without_what_is_done(four_jobs: list[Job]) -> None:
    seen, (trained, train) = Seen(), trainer()
    assert run_jobs(four_jobs, train, seen) == []
    assert trained == ["r2", "r3", "r4"]
    assert seen.lines == ["1 r1", "ended r1", "2 r2", "ended r2", "3 r3", "ended r3", "4 r4", "ended r4"]


@pytest.mark.parametrize("error", [RunFailed("broke"), EnvironmentNotReady("refit is broken")])
def test_a_failure_ends_a_run_only(error: FlashrlError, four_jobs: list[Job]) -> None:
    seen, (trained, train) = Seen(), trainer(r2=error)
    assert run_jobs(four_jobs, train, seen) == [four_jobs[1]]
    assert trained == ["r2", "r3", "r4"]
    assert seen.lines[2:5] == ["2 r2", f"failed r2: {error}", "ended r2"]


def test_fail_fast_ends_the_sweep_at_the_first_failure(four_jobs: list[Job]) -> None:
    seen, (trained, train) = Seen(), trainer(r3=RunFailed("broke"))
    assert run_jobs(four_jobs, train, seen, fail_fast=True) == [four_jobs[2]]
    assert trained == ["r2", "r3"]
    assert seen.lines[-1] == "ended r3"


@pytest.mark.parametrize("error", [EnvironmentNotReady("no GPU"), RunFailed("no cluster"), InputError("locked")])
def test_what_kept_a_run_from_starting_ends_the_sweep(error: FlashrlError, four_jobs: list[Job]) -> None:
    trained: list[str] = []

    def refuse(launch: Launch) -> None:
        trained.append(launch.plan.name)
        raise error

    with pytest.raises(type(error)):
        run_jobs(four_jobs, refuse, Seen())
    assert trained == ["r2"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Interrupted(signal.SIGINT, "`--resume auto --name r3`"), 130),
        (Interrupted(signal.SIGTERM, "`--resume auto --name r3`"), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_signal_ends_the_sweep_and_says_how_to_go_on(error: BaseException, code: int, four_jobs: list[Job]) -> None:
    trained, train = trainer(r3=error)
    with pytest.raises(Interrupted) as caught:
        run_jobs(four_jobs, train, Seen())
    assert (caught.value.exit_code, caught.value.hint) == (code, "the same command goes on with run r3")
    assert trained == ["r2", "r3"]


def test_all_that_is_left_is_checked(four_jobs: list[Job]) -> None:
    asked: list[Any] = []

    def check(plan: LaunchPlan) -> None:
        asked.append(plan.spec)
        found = [Problem("no data", "data", "prepare"), Problem("no FP8", "precision", "int8")]
        raise EnvironmentNotReady("cannot", problems=found[: 2 if plan.name == "r3" else 1])

    with pytest.raises(EnvironmentNotReady) as caught:
        check_all(four_jobs, check)
    assert asked == [2, 3, 4]
    assert caught.value.problems == (
        Problem("no data", "data", "prepare"),
        Problem("no FP8 (with n=3)", "precision", "int8"),
    )


def test_a_machine_that_can(four_jobs: list[Job]) -> None:
    check_all(four_jobs, lambda _: None)


# what became of them


POINT = Point((("rollout", "int8"), ("algorithm.lr", "1e-4")))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/p/r")


def logged(run: RunPaths, *rewards: float | None, accuracy: dict[int, float] | None = None) -> None:
    """Write an attempt that logged these rewards from step 1 on."""
    lines = []
    for step, reward in enumerate(rewards, 1):
        values = {"reward": reward, "kl": 0.01 * step, "truncated": 0.02, "step_s": 2.0, "tokens_per_s": 100.0}
        data = {NAMES[name]: value for name, value in values.items()}
        if accuracy and step in accuracy:
            data["val-core/tiny/acc/mean@1"] = accuracy[step]
        lines.append(json.dumps({"step": step, "data": data}))
    files.write_text(run.attempt(1).metrics, "\n".join(lines) + "\n")


def recorded(run: RunPaths, **fields: Any) -> None:
    given = {"status": "done", "started": "t", "updated": "t", "total_steps": 7, **fields}
    attempts = (Attempt(number=1, **given),)
    whole = RunRecord(name="r", project="p", preset="tiny", created="t", checkpoints="", attempts=attempts)
    store.change(run, lambda _: whole)


def a_row(state: str = "done", *, reward: float | None = None, accuracy: float | None = None) -> Row:
    means = dict.fromkeys(("kl", "truncated", "step_s", "tokens_per_s"), None)
    return Row(
        point=POINT,
        run="r",
        state=state,
        steps=1,
        total=None,
        means={"reward": reward, **means},
        accuracy=accuracy,
        error=None,
        hint=None,
    )


def test_the_row_of_a_run_that_is_not_begun(run: RunPaths) -> None:
    found = row(POINT, run)
    assert (found.state, found.steps, found.total, found.accuracy) == ("waiting", 0, None, None)
    assert set(found.means.values()) == {None}
    assert found.cells(best=False) == ["int8", "1e-4", "r", "waiting", 0, None, None, None, None, None, None, ""]


def test_means_of_the_last_five_steps(run: RunPaths) -> None:
    logged(run, 9, 9, 1, 2, 3, 4, 5, accuracy={2: 0.1, 6: 0.5})
    recorded(run)
    found = row(POINT, run)
    assert (found.state, found.steps, found.total, found.accuracy) == ("done", 7, 7, 0.5)
    assert found.means["reward"] == 3
    assert found.means["kl"] == pytest.approx(0.05)
    assert found.cells(best=True)[2:] == ["r", "done", "7/7", 3, 0.5, pytest.approx(0.05), 2.0, 2.0, 100.0, "★"]


def test_means_of_the_last_tenth_of_a_long_run(run: RunPaths) -> None:
    logged(run, *range(1, 101))
    assert row(POINT, run).means["reward"] == 95.5


def test_what_was_not_logged_does_not_count(run: RunPaths) -> None:
    logged(run, 1, None, 3)
    assert row(POINT, run).means["reward"] == 2


def test_a_failure_is_in_the_document(run: RunPaths) -> None:
    recorded(run, status="failed", error="out of memory", hint="less")
    document = row(POINT, run).document()
    assert (document["state"], document["error"], document["hint"]) == ("failed", "out of memory", "less")
    assert document["values"] == {"rollout": "int8", "algorithm.lr": 1e-4}
    json.dumps(document)


def test_cells_fit_the_headings() -> None:
    assert len(a_row().cells(best=False)) == len(POINT.values) + len(HEADINGS)


def test_best_by_accuracy() -> None:
    rows = [a_row(accuracy=0.5, reward=9), a_row(accuracy=0.7, reward=1), a_row("failed", accuracy=0.9)]
    assert best(rows) is rows[1]


def test_best_by_reward_where_not_all_were_validated() -> None:
    rows = [a_row(accuracy=0.5, reward=1), a_row(reward=2), a_row("running", reward=3)]
    assert best(rows) is rows[1]


@pytest.mark.parametrize("rows", [[], [a_row(accuracy=1)], [a_row(), a_row()], [a_row(accuracy=1), a_row("failed")]])
def test_nothing_to_compare(rows: list[Row]) -> None:
    assert best(rows) is None
