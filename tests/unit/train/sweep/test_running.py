"""One run after another: what fails, what ends the sweep, and what is told."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flashrl_cli.errors import EnvironmentNotReady, FlashrlError, InputError, Problem, RunFailed
from flashrl_cli.paths import AttemptPaths, RunPaths
from flashrl_cli.train.plan import LaunchPlan
from flashrl_cli.train.process import Interrupted
from flashrl_cli.train.sweep import Job, Launch, check_all, run_jobs
from flashrl_cli.train.sweep_axes import Point

Do = Callable[[], None]


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begins(self, number: int, job: Job) -> None:
        self.lines.append(f"{number} {job.run.name}")

    def failed(self, job: Job, error: FlashrlError) -> None:
        self.lines.append(f"failed {job.run.name}: {error}")

    def ended(self, job: Job) -> None:
        self.lines.append(f"ended {job.run.name}")


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Four points `n=1` to `n=4`, of which the first is done."""

    def job(number: int) -> Job:
        run = RunPaths(f"r{number}", tmp_path / f"r{number}", tmp_path / "c")
        plan = SimpleNamespace(name=run.name, attempt_paths=AttemptPaths(run.root / "attempt_1"), spec=number)
        launch = Launch(resolved=cast("Any", None), plan=cast("Any", plan), tree=cast("Any", None))
        return Job(point=Point((("n", str(number)),)), run=run, standing="waiting", launch=launch)

    first, *others = map(job, range(1, 5))
    return [replace(first, standing="done", launch=None), *others]


def trainer(**outcomes: BaseException) -> tuple[list[str], Callable[[Launch], None]]:
    """A function that trains: makes the attempt's folder, then raises what was given for the run's name."""
    trained: list[str] = []

    def train(launch: Launch) -> None:
        trained.append(launch.plan.name)
        launch.plan.attempt_paths.root.mkdir(parents=True)
        if launch.plan.name in outcomes:
            raise outcomes[launch.plan.name]

    return trained, train


def test_in_order_without_what_is_done(jobs: list[Job]) -> None:
    told, (trained, train) = Told(), trainer()
    assert run_jobs(jobs, train, told) == []
    assert trained == ["r2", "r3", "r4"]
    assert told.lines == ["1 r1", "ended r1", "2 r2", "ended r2", "3 r3", "ended r3", "4 r4", "ended r4"]


@pytest.mark.parametrize("error", [RunFailed("broke"), EnvironmentNotReady("refit is broken")])
def test_a_failure_ends_a_run_only(error: FlashrlError, jobs: list[Job]) -> None:
    told, (trained, train) = Told(), trainer(r2=error)
    assert run_jobs(jobs, train, told) == [jobs[1]]
    assert trained == ["r2", "r3", "r4"]
    assert told.lines[2:5] == ["2 r2", f"failed r2: {error}", "ended r2"]


def test_fail_fast(jobs: list[Job]) -> None:
    told, (trained, train) = Told(), trainer(r3=RunFailed("broke"))
    assert run_jobs(jobs, train, told, fail_fast=True) == [jobs[2]]
    assert trained == ["r2", "r3"]
    assert told.lines[-1] == "ended r3"


@pytest.mark.parametrize("error", [EnvironmentNotReady("no GPU"), RunFailed("no cluster"), InputError("locked")])
def test_what_kept_a_run_from_starting_ends_the_sweep(error: FlashrlError, jobs: list[Job]) -> None:
    trained: list[str] = []

    def refuse(launch: Launch) -> None:
        trained.append(launch.plan.name)
        raise error

    with pytest.raises(type(error)):
        run_jobs(jobs, refuse, Told())
    assert trained == ["r2"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Interrupted(signal.SIGINT, "`--resume auto --name r3`"), 130),
        (Interrupted(signal.SIGTERM, "`--resume auto --name r3`"), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_signal_ends_the_sweep_and_says_how_to_go_on(error: BaseException, code: int, jobs: list[Job]) -> None:
    trained, train = trainer(r3=error)
    with pytest.raises(Interrupted) as caught:
        run_jobs(jobs, train, Told())
    assert (caught.value.exit_code, caught.value.hint) == (code, "the same command goes on with run r3")
    assert trained == ["r2", "r3"]


def test_all_that_is_left_is_checked(jobs: list[Job]) -> None:
    asked: list[Any] = []

    def check(plan: LaunchPlan) -> None:
        asked.append(plan.spec)
        found = [Problem("no data", "data", "prepare"), Problem("no FP8", "precision", "int8")]
        raise EnvironmentNotReady("cannot", problems=found[: 2 if plan.name == "r3" else 1])

    with pytest.raises(EnvironmentNotReady) as caught:
        check_all(jobs, check)
    assert asked == [2, 3, 4]
    assert caught.value.problems == (
        Problem("no data", "data", "prepare"),
        Problem("no FP8 (with n=3)", "precision", "int8"),
    )


def test_a_machine_that_can(jobs: list[Job]) -> None:
    check_all(jobs, lambda _: None)
