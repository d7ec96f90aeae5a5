"""From points to plans: every run of a sweep resolved and judged before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flashrl_cli import paths
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.launch import changes, review
from flashrl_cli.launch.plan import default_name, run_paths
from flashrl_cli.launch.run import refuse_running
from flashrl_cli.launch.sweep.complaints import Complaints
from flashrl_cli.launch.sweep.points import run_names
from flashrl_cli.launch.sweep.standing import standing
from flashrl_cli.runs import record
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.sweep.points import Point
    from flashrl_cli.launch.sweep.standing import Standing
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.compose import Tree

NAMED_BY_DEFAULT = (
    "rollout", "tis", "rollout.precision", "correction.cap", "rollout.kv_cache", "rollout.lm_head_fp32", "rollout.mix",
)  # fmt: skip
"""Keys whose values stand in the name of a run that was given none."""
TOLD = 3
"""Changed keys that an error names."""


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

    @property
    def from_step(self) -> int | None:
        """Step that the run goes on from; None for one that starts from nothing, or does not start."""
        return self.launch.plan.resume.step if self.launch else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """How a sweep goes on with runs that were begun: `resume` is auto or never, which holds for runs without an attempt.

    `force` goes on with what was started with another configuration, `look_only` allows for runs that are under way.
    """

    resume: str = "never"
    force: bool = False
    look_only: bool = False


def plan_jobs(
    read: Callable[[review.Options], Resolved],
    points: Sequence[Point],
    given: review.Options,
    name: str | None,
    going: Going,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Job]:
    """A job for each point; `read` reads the preset under a point's options, `advance` is called as points are judged.

    Raises InputError with everything that is wrong with any of them, EnvironmentNotReady without verl.
    """
    wrong = Complaints(points)
    specs = [(point, found) for point in points if (found := wrong.collect(point, partial(read, point.options(given))))]
    wrong.readable = [point for point, _ in specs]
    _note_twins(specs, wrong)
    jobs = []
    for (point, resolved), run in zip(specs, _names(specs, name), strict=True):
        job = wrong.collect(point, partial(_job, point, resolved, run, going))
        jobs += [job] if job else []
        advance(1)
    if problems := wrong.problems():
        raise InputError(f"--sweep: {counted(len(problems), 'problem')}", problems=problems)
    return jobs


def _note_twins(specs: Sequence[tuple[Point, Resolved]], wrong: Complaints) -> None:
    """Note the points that would train the same as an earlier one."""
    first: dict[str, Point] = {}
    for point, resolved in specs:
        twin = first.setdefault(resolved.spec.model_dump_json(), point)
        if twin is not point and not resolved.broken:
            wrong.note(point, Problem(f"the same run twice: {twin}, and {point}", None, "a value stands there twice"))


def _names(specs: Sequence[tuple[Point, Resolved]], name: str | None) -> list[str]:
    points = [point for point, _ in specs]
    if name is not None:
        return run_names([name] * len(points), points)
    return run_names([default_name(r.spec.name, r.spec) for _, r in specs], points, said=NAMED_BY_DEFAULT)


def _job(point: Point, resolved: Resolved, name: str, going: Going) -> Job:
    used = run_paths(name, resolved.spec, paths.runs_root(), paths.checkpoints_root()).attempts()
    plan = review.next_plan(resolved, name, resume="auto" if used else going.resume, force=True)
    if not going.force:
        _refuse_changes(plan)
    now = standing(plan)
    if now == "running" and not going.look_only:
        refuse_running(record.load(plan.paths.record))
    launch = None
    if now in ("waiting", "begun"):
        launch = Launch(resolved=resolved, plan=plan, tree=review.judge(resolved, plan))
    return Job(point=point, run=plan.paths, standing=now, launch=launch)


def _refuse_changes(plan: LaunchPlan) -> None:
    """Raise InputError, in one line, if a run was started with another configuration."""
    if changed := changes.since_last(plan):
        told = "; ".join(f"{change.key} {' → '.join(change.shown())}" for change in changed[:TOLD])
        more = f" and {len(changed) - TOLD} more" if len(changed) > TOLD else ""
        raise InputError(
            f"run {plan.name} was started with another configuration: {told}{more}",
            hint="`--force` goes on with the new one, another `--name` starts other runs",
        )
