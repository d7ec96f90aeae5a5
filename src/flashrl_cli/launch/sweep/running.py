"""Run what a sweep still has to do, one run after another."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from flashrl_cli.errors import EnvironmentNotReady, FlashrlError, RunFailed
from flashrl_cli.launch.signals import Interrupted
from flashrl_cli.launch.sweep.complaints import Complaints

if TYPE_CHECKING:
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.sweep.jobs import Job, Launch

Train = Callable[["Launch"], object]
"""Trains one run to its end; raises RunFailed, EnvironmentNotReady or Interrupted."""


class Told(Protocol):
    """Who is told how a sweep goes on."""

    def begins(self, number: int, job: Job) -> None:
        """Point `number` (from 1) is next."""

    def failed(self, job: Job, error: FlashrlError) -> None:
        """A run failed, and the sweep goes on."""

    def ended(self, job: Job) -> None:
        """Nothing is left to do for a point."""


def check_all(jobs: Sequence[Job], check: Callable[[LaunchPlan], object]) -> None:
    """Raise EnvironmentNotReady with every reason that `check` raises against a run that is left of a sweep."""
    launches = {job.point: job.launch for job in jobs if job.launch}
    wrong = Complaints(list(launches), EnvironmentNotReady)
    for point, launch in launches.items():
        wrong.collect(point, partial(check, launch.plan))
    if found := wrong.problems():
        raise EnvironmentNotReady(
            "the sweep cannot run here", problems=found, hint="`--dry-run` shows its runs without starting any"
        )


def run_jobs(jobs: Sequence[Job], train: Train, told: Told, *, fail_fast: bool = False) -> list[Job]:
    """Run what is left, in order; returns the jobs that failed. A failure ends the sweep only if `fail_fast`.

    Raises Interrupted, and whatever kept a run from being started: that would keep the next from it, too.
    """
    failed: list[Job] = []
    for number, job in enumerate(jobs, 1):
        told.begins(number, job)
        error = _run(job.launch, train) if job.launch else None
        if error:
            failed.append(job)
            told.failed(job, error)
        told.ended(job)
        if error and fail_fast:
            break
    return failed


def _run(launch: Launch, train: Train) -> FlashrlError | None:
    try:
        train(launch)
    except (RunFailed, EnvironmentNotReady) as error:
        if launch.plan.attempt_paths.root.exists():
            return error
        raise
    except Interrupted as error:
        error.hint = f"the same command goes on with run {launch.plan.name}"
        raise
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"the same command goes on with run {launch.plan.name}") from None
    return None
