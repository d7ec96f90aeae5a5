"""`flashrl train --sweep`: several runs of one preset, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.errors import FlashrlError, InputError, RunFailed

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.review import Options
    from flashrl_cli.launch.sweep.jobs import Job, Launch
    from flashrl_cli.launch.sweep.points import Point
    from flashrl_cli.render.output import Output
    from flashrl_cli.verl.compose import Tree

    Train = Callable[[Resolved, LaunchPlan, Tree, Output], object]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for: a preset, the `--sweep` texts, the options and the name that all runs share."""

    preset: str
    texts: Sequence[str]
    options: Options
    name: str | None
    many: bool

    def points(self, *, many: bool) -> list[Point]:
        """Every combination of values. Raises InputError."""
        from flashrl_cli.launch.sweep.axes import read_axes
        from flashrl_cli.launch.sweep.points import points

        return points(read_axes(self.texts, self.options), many=many or self.many)


def run_sweep(request: Request, train: Train, output: Output, *, resume: str, dry_run: bool, fail_fast: bool) -> None:
    """Judge every run of a sweep, then train those that are not done, and show how all of them stand.

    Raises InputError, EnvironmentNotReady and Interrupted as training one run does, RunFailed if some failed.
    """
    from flashrl_cli.launch.sweep import running
    from flashrl_cli.launch.sweep.jobs import plan_jobs

    if resume not in ("auto", "never"):
        raise InputError(f"--resume {resume}: a sweep has many runs", hint="it goes on with each where it stopped")
    points = request.points(many=dry_run)
    with output.progress(f"judging {len(points)} runs", len(points)) as advance:
        jobs = plan_jobs(request.preset, points, request.options, request.name, look_only=dry_run, advance=advance)
    if dry_run:
        _show(request.preset, jobs, output)
        return
    running.check_machine(jobs, paths.data_root())

    def train_one(launch: Launch) -> None:
        train(launch.resolved, launch.plan, launch.tree, output)

    try:
        failed = running.run_jobs(jobs, train_one, _Told(output, len(jobs)), fail_fast=fail_fast)
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
        doing = "done already" if job.launch is None else "goes on" if job.standing == "begun" else "starts"
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


def _show(preset: str, jobs: Sequence[Job], output: Output) -> None:
    """What a sweep would run."""
    from flashrl_cli.launch.plan import plan_document

    if not output.json_mode:
        keys = [key for key, _ in jobs[0].point.values]
        cells = [[*dict(job.point.values).values(), job.run.name, job.standing] for job in jobs]
        output.table([*keys, "run", "state"], cells)
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
    output.document({"schema_version": SCHEMA_VERSION, "preset": preset, "points": points})


def _report(jobs: Sequence[Job], output: Output) -> None:
    """How all runs stand now."""
    from flashrl_cli.launch.sweep import results

    rows = [results.row(job.point, job.run) for job in jobs]
    best = results.best(rows)
    if output.json_mode:
        name = best.run if best else None
        _event(output, "sweep", points=[row.document() for row in rows], best=name)
        return
    keys = [key for key, _ in jobs[0].point.values]
    output.table([*keys, *results.HEADINGS], [row.cells(best=row is best) for row in rows])
