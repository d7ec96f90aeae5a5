"""From points to plans: every run of a sweep resolved and judged before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flashrl_cli import paths
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.launch import review
from flashrl_cli.launch.plan import default_name, run_paths
from flashrl_cli.launch.sweep.complaints import Complaints
from flashrl_cli.launch.sweep.points import run_names
from flashrl_cli.launch.sweep.standing import standing

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.sweep.points import Point
    from flashrl_cli.launch.sweep.standing import Standing
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.compose import Tree

NAMED_BY_DEFAULT = ("rollout", "tis", "rollout.precision", "correction.cap")
"""Keys whose values stand in the name of a run that was given none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What starts a run."""

    resolved: Resolved
    plan: LaunchPlan
    tree: Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A point, its run, and what starts it: None for a run that is done, or running."""

    point: Point
    run: RunPaths
    standing: Standing
    launch: Launch | None


def plan_jobs(
    preset: str,
    points: Sequence[Point],
    given: review.Options,
    name: str | None,
    *,
    look_only: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Job]:
    """A job for each point; `look_only` allows for runs that are under way. `advance` is called as points are judged.

    Raises InputError with everything that is wrong with any of them, and what `review.judge` raises.
    """
    wrong = Complaints(points)
    read = [(point, found) for point in points if (found := wrong.collect(point, partial(_read, preset, point, given)))]
    wrong.readable = [point for point, _ in read]
    _note_twins(read, wrong)
    jobs = []
    for (point, resolved), run in zip(read, _runs(read, name), strict=True):
        job = wrong.collect(point, partial(_job, point, resolved, run, look_only=look_only))
        jobs += [job] if job else []
        advance(1)
    if problems := wrong.problems():
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise InputError(f"sweep of preset {preset}: {count}", problems=problems)
    return jobs


def _read(preset: str, point: Point, given: review.Options) -> Resolved:
    return review.read(preset, point.options(given))


def _note_twins(read: Sequence[tuple[Point, Resolved]], wrong: Complaints) -> None:
    """Note the points that would train the same as an earlier one."""
    first: dict[str, Point] = {}
    for point, resolved in read:
        twin = first.setdefault(resolved.spec.model_dump_json(), point)
        if twin is not point and not resolved.broken:
            wrong.note(point, Problem(f"the same run twice: {twin}, and {point}", None, "a value stands there twice"))


def _runs(read: Sequence[tuple[Point, Resolved]], name: str | None) -> list[RunPaths]:
    specs = [resolved.spec for _, resolved in read]
    points = [point for point, _ in read]
    if name is None:
        names = run_names([default_name(spec.name, spec) for spec in specs], points, said=NAMED_BY_DEFAULT)
    else:
        names = run_names([name] * len(points), points)
    roots = paths.runs_root(), paths.checkpoints_root()
    return [run_paths(run, spec, *roots) for run, spec in zip(names, specs, strict=True)]


def _job(point: Point, resolved: Resolved, run: RunPaths, *, look_only: bool) -> Job:
    now = standing(run, resolved.spec)
    if now == "running" and not look_only:
        raise InputError(f"run {run.name} is under way", hint="wait for its end, or `flashrl runs stop` it")
    if now in ("done", "running"):
        return Job(point=point, run=run, standing=now, launch=None)
    plan = review.next_plan(resolved, run.name, resume="auto" if now == "begun" else "never")
    launch = Launch(resolved=resolved, plan=plan, tree=review.judge(resolved, plan))
    return Job(point=point, run=run, standing=now, launch=launch)
