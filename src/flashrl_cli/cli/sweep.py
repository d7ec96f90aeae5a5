"""`flashrl train --sweep`: several runs of one preset, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import FlashrlError, InputError, RunFailed
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.executors import Place
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.review import Options
    from flashrl_cli.launch.sweep.jobs import Job, Launch
    from flashrl_cli.render.output import Output

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What was asked for: a preset, where it runs, the `--sweep` texts, and the options and the name that all runs share."""

    preset: str
    place: Place
    texts: Sequence[str]
    options: Options
    name: str | None
    resume: str
    force: bool
    many: bool
    """Start more than 64 runs."""

    def jobs(self, output: Output, *, dry_run: bool) -> list[Job]:
        """Every run of the sweep, judged. Raises InputError with all that is wrong with any; EnvironmentNotReady."""
        from flashrl_cli.launch.sweep.axes import read_axes
        from flashrl_cli.launch.sweep.jobs import Going, plan_jobs
        from flashrl_cli.launch.sweep.points import points

        if self.resume not in ("auto", "never"):
            raise InputError(f"--resume {self.resume}: a sweep has many runs", hint="it goes on with each by itself")
        found = points(read_axes(self.texts, self.options), many=self.many or dry_run)
        going = Going(resume=self.resume, force=self.force, look_only=dry_run)
        with output.progress(f"judging {counted(len(found), 'run')}", len(found)) as advance:
            return plan_jobs(self._read, found, self.options, self.name, going, advance)

    def _read(self, options: Options) -> Resolved:
        from flashrl_cli.launch import review

        return self.place.fit(review.read(self.preset, options))


def show(jobs: Sequence[Job], output: Output) -> None:
    """Print what a sweep would run."""
    from flashrl_cli.launch.plan import plan_document

    if not output.json_mode:
        keys = [key for key, _ in jobs[0].point.values]
        rows = [[*job.point.texts(), job.run.name, job.standing, job.from_step] for job in jobs]
        output.table([*keys, "run", "state", "from step"], rows)
        return
    points = [
        {
            "run": job.run.name,
            "values": job.point.data(),
            "state": job.standing,
            "plan": plan_document(job.launch.plan) if job.launch else None,
        }
        for job in jobs
    ]
    output.document({"schema_version": SCHEMA_VERSION, "points": points})


def run(
    jobs: Sequence[Job],
    check: Callable[[LaunchPlan], object],
    train: Callable[[Launch], object],
    output: Output,
    *,
    fail_fast: bool,
) -> None:
    """Check all that is not done, train it, and print how all runs stand.

    Raises EnvironmentNotReady before anything starts, RunFailed if runs failed, and what `train` raises.
    """
    from flashrl_cli.launch.sweep import running

    running.check_all(jobs, check)
    try:
        failed = running.run_jobs(jobs, train, _Told(output, len(jobs)), fail_fast=fail_fast)
    finally:
        _report(jobs, output)
    if failed:
        names = ", ".join(job.run.name for job in failed)
        raise RunFailed(f"{len(failed)} of {len(jobs)} runs failed: {names}", hint="the same command tries them again")


class _Told:
    """Tells on stderr how a sweep goes on, or as events on stdout."""

    def __init__(self, output: Output, total: int) -> None:
        self.output, self.total = output, total

    def begins(self, number: int, job: Job) -> None:
        """Event `point`."""
        doing = "is done" if job.launch is None else "goes on" if job.standing == "begun" else "starts"
        if self.output.json_mode:
            _event(self.output, "point", number=number, of=self.total, run=job.run.name, doing=doing)
        else:
            self.output.say(f"[{number}/{self.total}] {job.point}: run {job.run.name} {doing}")

    def failed(self, job: Job, error: FlashrlError) -> None:
        """A warning, or event `failed`."""
        if self.output.json_mode:
            _event(self.output, "failed", run=job.run.name, error=error.message, hint=error.hint)
        else:
            self.output.warn(f"run {job.run.name} failed: {error.message}")

    def ended(self, job: Job) -> None:
        """Event `result`."""
        from flashrl_cli.launch.sweep.results import row

        if self.output.json_mode:
            _event(self.output, "result", **row(job.point, job.run).document())


def _event(output: Output, event: str, **data: Any) -> None:
    output.json_line({"schema_version": SCHEMA_VERSION, "event": event, **data})


def _report(jobs: Sequence[Job], output: Output) -> None:
    """How all runs stand now."""
    from flashrl_cli.launch.sweep import results

    rows = [results.row(job.point, job.run) for job in jobs]
    best = results.best(rows)
    if output.json_mode:
        _event(output, "sweep", points=[row.document() for row in rows], best=best.run if best else None)
        return
    keys = [key for key, _ in jobs[0].point.values]
    output.table([*keys, *results.HEADINGS], [row.cells(best=row is best) for row in rows])
