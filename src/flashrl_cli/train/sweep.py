"""A sweep: its points become runs that are all checked before the first one starts, run in sequence, and compared.

`sweep_axes` reads what varies. A point's run is planned, checked and executed like a single run (`launch`, `executors`,
`run`).
"""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError, InputError, Location, Problem, RunFailed
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import history
from flashrl_cli.signals import Interrupted
from flashrl_cli.text import counted
from flashrl_cli.train import launch, preflight
from flashrl_cli.train.launch import GpuMemory, Launch
from flashrl_cli.train.plan import default_name, run_paths
from flashrl_cli.train.run import refuse_running
from flashrl_cli.train.sweep_axes import run_names
from flashrl_cli.verl.metrics import SWEEP

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Options, Resolved
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.sweep_axes import Point
    from flashrl_cli.verl.metrics import Metric, StepMetrics

T = TypeVar("T")

State = Literal["waiting", "running", "begun", "done"]
"""State of a point's run before the sweep: `done` has all steps of its plan, `begun` has an attempt, `running` is
alive.
"""
NAMED_BY_DEFAULT = (
    "rollout", "tis", "rollout.precision", "correction.cap", "correction.kind", "rollout.kv_cache",
    "rollout.lm_head_fp32", "rollout.mix",
)  # fmt: skip
"""Keys whose values are part of the default name of a run."""
SHOWN = 3
"""Number of points, or of changed keys, that an error lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A point, its run, and the launch that starts it: None for a run that is done or running."""

    point: Point
    run: RunPaths
    state: State
    launch: Launch | None

    @property
    def from_step(self) -> int | None:
        """Step that the run continues from; None for one that starts from scratch, or does not start."""
        return self.launch.plan.resume.step if self.launch else None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedNames:
    """How a sweep treats runs that exist already.

    `resume` is auto or never, and applies to runs without an attempt: runs with one are continued. `force` continues
    runs that were started with another configuration, `look_only` permits runs that are under way.
    """

    resume: str = "never"
    force: bool = False
    look_only: bool = False


def plan_jobs(
    read: Callable[[Options], Resolved],
    points: Sequence[Point],
    given: Options,
    name: str | None,
    used: UsedNames,
    advance: Callable[[int], None] = lambda _: None,
    gpu_memory: GpuMemory = preflight.gpu_memory,
) -> list[Job]:
    """A job for each point; `read` reads the preset with a point's options, `advance` is called as points are checked.

    Raises InputError with every problem of any point, EnvironmentNotReady without verl.
    """
    wrong = PointProblems(points)
    specs = [(point, found) for point in points if (found := wrong.collect(point, partial(read, point.options(given))))]
    wrong.readable = [point for point, _ in specs]
    _note_twins(specs, wrong)
    jobs = []
    for (point, resolved), run in zip(specs, _names(specs, name), strict=True):
        job = wrong.collect(point, partial(_job, point, resolved, run, used, gpu_memory))
        jobs += [job] if job else []
        advance(1)
    if problems := wrong.problems():
        raise InputError(f"--sweep: {counted(len(problems), 'problem')}", problems=problems)
    return jobs


def _note_twins(specs: Sequence[tuple[Point, Resolved]], wrong: PointProblems) -> None:
    """Record a problem for points that would train the same as an earlier one."""
    first: dict[str, Point] = {}
    for point, resolved in specs:
        twin = first.setdefault(resolved.spec.model_dump_json(), point)
        if twin is not point and not resolved.broken:
            wrong.note(point, Problem(f"the same run twice: {twin}, and {point}", None, "a value is given twice"))


def _names(specs: Sequence[tuple[Point, Resolved]], name: str | None) -> list[str]:
    points = [point for point, _ in specs]
    if not points:
        return []
    if name is not None:
        return run_names([name] * len(points), points)
    return run_names([default_name(r.spec.name, r.spec) for _, r in specs], points, in_bases=NAMED_BY_DEFAULT)


def _job(point: Point, resolved: Resolved, name: str, used: UsedNames, gpu_memory: GpuMemory) -> Job:
    begun = run_paths(name, resolved.spec, paths.runs_root(), paths.checkpoints_root()).attempts()
    mode = "auto" if begun else used.resume
    plan = launch.next_plan(resolved, name, resume=mode, force=True, gpu_memory=gpu_memory)
    if not used.force:
        _refuse_changes(plan)
    state = _state(plan)
    if state == "running" and not used.look_only:
        refuse_running(store.load(plan.paths.record))
    starts = state in {"waiting", "begun"}
    judged = Launch(resolved=plan.resolved, plan=plan, tree=launch.judge(plan.resolved, plan)) if starts else None
    return Job(point=point, run=plan.paths, state=state, launch=judged)


def _refuse_changes(plan: LaunchPlan) -> None:
    """Raise InputError, in one line, if a run was started with another configuration."""
    if changed := launch.changes(plan):
        listed = "; ".join(f"{change.key} {' → '.join(change.shown())}" for change in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise InputError(
            f"run {plan.name} was started with another configuration: {listed}{more}",
            hint="`--force` goes on with the new one, another `--name` starts other runs",
        )


def _state(plan: LaunchPlan) -> State:
    found = store.load(plan.paths.record)
    last = found.last if found else None
    if last and store.state(last) == "running":
        return "running"
    wanted = plan.spec.trainer.steps  # None where epochs decide: a run that ended well did them all
    if plan.is_finished or (last and last.status == "done" and (wanted is None or (last.last_step or 0) >= wanted)):
        return "done"
    return "begun" if plan.paths.attempts() else "waiting"


class PointProblems:
    """Collects the problems of points from errors of one class.

    Each problem is reported once, with the values that it occurs with.
    """

    def __init__(self, points: Sequence[Point], error: type[FlashrlError] = InputError) -> None:
        self.points, self.error = points, error
        self.readable = points
        """Points whose configuration could be read; only these can have problems that are found later."""
        self._found: dict[Problem, list[Point]] = {}

    def collect(self, point: Point, call: Callable[[], T]) -> T | None:
        """Result of `call`, or None after an error of the class, whose problems are recorded for the point."""
        try:
            return call()
        except self.error as error:
            for problem in error.problems or (Problem(error.message, None, error.hint),):
                self.note(point, problem)
        return None

    def note(self, point: Point, problem: Problem) -> None:
        """Record one problem of one point."""
        self._found.setdefault(problem, []).append(point)

    def problems(self) -> list[Problem]:
        """Every problem once."""
        return [self._located(problem, points) for problem, points in self._found.items()]

    def _located(self, problem: Problem, points: Sequence[Point]) -> Problem:
        """The problem alone if all points have it, else with the value that its points share, else with the points."""
        if self._are_all(points):
            return problem
        for key, text in points[0].values:
            if self._are_all(points, (key, text)):
                if problem.where == Location("--sweep", key=key):
                    return replace(problem, where=Location("--sweep", key=f"{key}={text}"))
                return replace(problem, message=f"{problem.message} (with {key}={text})")
        named = "; ".join(map(str, points[:SHOWN]))
        more = f" and {len(points) - SHOWN} more" if len(points) > SHOWN else ""
        return replace(problem, message=f"{problem.message} (at {named}{more})")

    def _are_all(self, points: Sequence[Point], value: tuple[str, str] | None = None) -> bool:
        """Whether these are all points with that value, or all readable ones."""
        of_value = [
            {point for point in among if value is None or value in point.values}
            for among in (self.points, self.readable)
        ]
        return set(points) in of_value


class Progress(Protocol):
    """Interface that shows the progress of a sweep."""

    def begins(self, number: int, job: Job) -> None:
        """Report that point `number` (from 1) is next."""

    def failed(self, job: Job, error: FlashrlError) -> None:
        """Report that a run failed and the sweep continues."""

    def ended(self, job: Job) -> None:
        """Report that a point is finished."""


def check_all(jobs: Sequence[Job], check: Callable[[LaunchPlan], object]) -> None:
    """Raise EnvironmentNotReady with every reason that `check` raises for the remaining runs of a sweep."""
    launches = {job.point: job.launch for job in jobs if job.launch}
    wrong = PointProblems(list(launches), EnvironmentNotReady)
    for point, one in launches.items():
        wrong.collect(point, partial(check, one.plan))
    if found := wrong.problems():
        raise EnvironmentNotReady(
            "the sweep cannot run here", problems=found, hint="`--dry-run` shows its runs without starting any"
        )


def run_jobs(
    jobs: Sequence[Job], train: Callable[[Launch], object], progress: Progress, *, fail_fast: bool = False
) -> list[Job]:
    """Execute the remaining runs in order; returns the failed jobs. A failure ends the sweep only with `fail_fast`.

    `train` trains one run to its end, and raises RunFailed, EnvironmentNotReady or Interrupted. Raises Interrupted, and
    any error that kept a run from starting, because it would keep the next one from starting, too.
    """
    failed: list[Job] = []
    for number, job in enumerate(jobs, 1):
        progress.begins(number, job)
        error = _run(job.launch, train) if job.launch else None
        if error:
            failed.append(job)
            progress.failed(job, error)
        progress.ended(job)
        if error and fail_fast:
            break
    return failed


def _run(one: Launch, train: Callable[[Launch], object]) -> FlashrlError | None:
    try:
        train(one)
    except (RunFailed, EnvironmentNotReady) as error:
        if one.plan.attempt_paths.root.exists():
            return error
        raise
    except Interrupted as error:
        error.hint = f"the same command goes on with run {one.plan.name}"
        raise
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"the same command goes on with run {one.plan.name}") from None
    return None


LAST_SHARE, LAST_LEAST = 10, 5
"""Means are taken over the last tenth of a run's steps, but at least over five, because a single step is noisy."""
_FIRST, *_OTHERS = SWEEP
HEADINGS = ("run", "state", "steps", _FIRST.heading, "accuracy", *(metric.heading for metric in _OTHERS), "best")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A point and the state of its run: `steps` done, means of the last ones, accuracy of the last validation."""

    point: Point
    run: str
    state: str
    """The state in the run's record, or `waiting`."""
    steps: int
    total: int | None
    means: dict[str, float | None]
    accuracy: float | None
    error: str | None
    hint: str | None

    def document(self) -> dict[str, Any]:
        """The row as plain data, for `--json`."""
        return {
            "run": self.run,
            "values": self.point.data(),
            "state": self.state,
            "steps": self.steps,
            "total": self.total,
            "accuracy": self.accuracy,
            **self.means,
            "error": self.error,
            "hint": self.hint,
        }

    def cells(self, *, best: bool) -> list[object]:
        """Cells of a table under the point's keys and `HEADINGS`."""
        steps = f"{self.steps}/{self.total}" if self.total else self.steps
        return [
            *self.point.texts(),
            *(self.run, self.state, steps, self._cell(_FIRST), self.accuracy),
            *(self._cell(metric) for metric in _OTHERS),
            "★" if best else "",
        ]

    def _cell(self, metric: Metric) -> float | None:
        """The mean of a metric; shares in percent, as the heading says."""
        mean = self.means[metric.name]
        return None if mean is None else mean * (100 if metric.form.endswith("%") else 1)


def row(point: Point, run: RunPaths) -> Row:
    """The row of a point, from the current record and metrics of its run."""
    found = store.load(run.record)
    last = found.last if found else None
    steps = history(run)
    trained = [step for step in steps if step.trained]
    accuracies = [step.accuracy for step in steps if step.accuracy is not None]
    return Row(
        point=point,
        run=run.name,
        state=store.state(last) if last else "waiting",
        steps=max((step.step for step in trained), default=0),
        total=last.total_steps if last else None,
        means={metric.name: _mean(metric.name, trained) for metric in SWEEP},
        accuracy=accuracies[-1] if accuracies else None,
        error=last.error if last else None,
        hint=last.hint if last else None,
    )


def best(rows: Sequence[Row]) -> Row | None:
    """The finished run with the highest accuracy, or with the highest reward if not all were validated.

    None if fewer than two have finished.
    """
    done = [one for one in rows if one.state == "done"]
    if len(done) < 2:
        return None
    if all(one.accuracy is not None for one in done):
        return max(done, key=lambda one: one.accuracy or 0.0)
    rewarded = [one for one in done if one.means["reward"] is not None]
    return max(rewarded, key=lambda one: one.means["reward"] or 0.0, default=None)


def _mean(name: str, trained: Sequence[StepMetrics]) -> float | None:
    last = trained[-max(len(trained) // LAST_SHARE, LAST_LEAST) :]
    values = [value for step in last if (value := step[name]) is not None]
    return statistics.fmean(values) if values else None
