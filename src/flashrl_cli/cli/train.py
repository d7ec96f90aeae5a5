"""`flashrl train`.

`flashrl train --sweep`: several runs of one preset, and what became of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli import paths
from flashrl_cli.cli.options import Executor, Json, Preset, RayAddress, Rollout, RunName, Sets, Tis
from flashrl_cli.errors import FlashrlError, InputError, RunFailed
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.render.output import Output
    from flashrl_cli.train.executors import Place
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.process import Start
    from flashrl_cli.train.review import Options
    from flashrl_cli.train.sweep import Job, Launch
    from flashrl_cli.verl.compose import Tree

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
        from flashrl_cli.train.sweep import Going, plan_jobs
        from flashrl_cli.train.sweep_axes import points, read_axes

        if self.resume not in ("auto", "never"):
            raise InputError(f"--resume {self.resume}: a sweep has many runs", hint="it goes on with each by itself")
        found = points(read_axes(self.texts, self.options), many=self.many or dry_run)
        going = Going(resume=self.resume, force=self.force, look_only=dry_run)
        with output.progress(f"judging {counted(len(found), 'run')}", len(found)) as advance:
            return plan_jobs(self._read, found, self.options, self.name, going, advance)

    def _read(self, options: Options) -> Resolved:
        from flashrl_cli.train import review

        return self.place.fit(review.read(self.preset, options))


def show(jobs: Sequence[Job], output: Output) -> None:
    """Print what a sweep would run."""
    from flashrl_cli.train.plan import plan_document

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
    from flashrl_cli.train import sweep

    sweep.check_all(jobs, check)
    try:
        failed = sweep.run_jobs(jobs, train, _Told(output, len(jobs)), fail_fast=fail_fast)
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
        from flashrl_cli.train.sweep import row

        if self.output.json_mode:
            _event(self.output, "result", **row(job.point, job.run).document())


def _event(output: Output, event: str, **data: Any) -> None:
    output.json_line({"schema_version": SCHEMA_VERSION, "event": event, **data})


def _report(jobs: Sequence[Job], output: Output) -> None:
    """How all runs stand now."""
    from flashrl_cli.train import sweep

    rows = [sweep.row(job.point, job.run) for job in jobs]
    best = sweep.best(rows)
    if output.json_mode:
        _event(output, "sweep", points=[row.document() for row in rows], best=best.run if best else None)
        return
    keys = [key for key, _ in jobs[0].point.values]
    output.table([*keys, *sweep.HEADINGS], [row.cells(best=row is best) for row in rows])


def train(
    preset: Preset,
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    name: RunName = None,
    resume: Annotated[
        str, typer.Option(help="Go on with a used name: auto (newest checkpoint), never, or a global_step_N folder.")
    ] = "never",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2|FILE", help="A run for each value (rollout and tis are keys, too); repeatable."
        ),
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End a sweep at its first run that fails.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with a run although its configuration is another now.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Go on without this terminal: `flashrl runs watch NAME` shows the run.")
    ] = False,
    executor: Executor = "local",
    ray_address: RayAddress = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan; start and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start a sweep of more than 64 runs.")] = False,
    json: Json = False,
) -> None:
    """Train a preset with verl, watched to its end.

    `flashrl train --preset tiny` runs on any machine;
    `flashrl train --preset dapo-32b --rollout int8 --tis 8 --executor ray --dry-run` shows what a cluster would run;
    `flashrl train --preset tiny --sweep rollout=bf16,int8 --sweep tis=off,2` runs four, and compares them.
    """
    from flashrl_cli.render.output import Output
    from flashrl_cli.train import executors, process, review

    output = Output(json_mode=json)
    if not (dry_run or detach):
        process.say_if_ignored(output.say)
    place = executors.chosen(executor, ray_address)
    options = review.Options(rollout=rollout, tis=tis, sets=sets or ())
    if sweep:
        asked = Sweep(
            preset=preset, place=place, texts=sweep, options=options, name=name, resume=resume, force=force, many=yes
        )
        _sweep(asked, output, dry_run=dry_run, detach=detach, fail_fast=fail_fast)
        return
    if fail_fast or yes:
        raise InputError("--fail-fast and --yes belong to --sweep")
    resolved = place.fit(review.read(preset, options))
    plan = review.next_plan(resolved, name, resume=resume, look_only=dry_run, force=force)
    tree = review.judge(resolved, plan)
    if dry_run:
        _show(resolved, plan, tree, output, place)
    elif plan.is_finished:
        output.say(
            f"run {plan.name} is complete: {counted(plan.resume.step or 0, 'step')}; a larger trainer.steps goes on with it"
        )
    else:
        start = _ready(resolved, plan, tree, output, place)
        _detach(plan, output) if detach else _run(plan, output, start)


def _sweep(asked: Sweep, output: Output, *, dry_run: bool, detach: bool, fail_fast: bool) -> None:
    jobs = asked.jobs(output, dry_run=dry_run)
    first = next((job.launch for job in jobs if job.launch), None)

    def train_one(launch: Launch) -> None:
        _run(launch.plan, output, _ready(launch.resolved, launch.plan, launch.tree, output, asked.place))

    def check(plan: LaunchPlan) -> None:
        asked.place.ready(plan, paths.data_root(), output.say)

    if dry_run:
        show(jobs, output)
    elif detach and first:
        _ready(first.resolved, first.plan, first.tree, output, asked.place)
        _detach(first.plan, output)
    else:
        run(jobs, check, train_one, output, fail_fast=fail_fast)


def _show(resolved: Resolved, plan: LaunchPlan, tree: Tree, output: Output, place: Place) -> None:
    from flashrl_cli.train import preflight
    from flashrl_cli.train.plan import plan_document, plan_script
    from flashrl_cli.verl import lint

    needed, notes = preflight.of_plan(resolved, tree), lint.notes(resolved, plan.overrides, tree)
    if output.json_mode:
        output.document(plan_document(plan) | place.document(plan) | {"memory": needed.document(), "notes": notes})
    else:
        output.text(plan_script(plan, [*needed.lines, *notes], job=place.job(plan)))


def _ready(resolved: Resolved, plan: LaunchPlan, tree: Tree, output: Output, place: Place) -> Start:
    from flashrl_cli.runs import store
    from flashrl_cli.train import preflight
    from flashrl_cli.train.run import refuse_running
    from flashrl_cli.verl import lint

    refuse_running(store.load(plan.paths.record))
    start = place.ready(plan, paths.data_root(), output.say)
    warning = preflight.of_plan(resolved, tree, place.gpu_memory(plan)).warning
    if warning:
        output.warn(f"memory: {warning}")
    for note in lint.notes(resolved, plan.overrides, tree):
        output.warn(note)
    return start


def _run(plan: LaunchPlan, output: Output, start: Start) -> None:
    from flashrl_cli.render.live import display_for
    from flashrl_cli.train.preflight import vocabulary
    from flashrl_cli.train.run import run_plan

    output.say(f"run {plan.name}, attempt {plan.attempt}: `tail -F {plan.attempt_paths.log}` shows everything")
    for line in plan.resume.lines():
        output.say(line)
    words = vocabulary(plan.spec, paths.data_root())
    with display_for(output, title=plan.name, total=plan.spec.trainer.steps) as display:
        steps = run_plan(plan, display, start=start, vocabulary=words, command=["flashrl", *sys.argv[1:]])
    output.say(f"done: {counted(steps, 'step')}; checkpoints in {plan.paths.checkpoints}")


def _detach(plan: LaunchPlan, output: Output) -> None:
    from flashrl_cli.train.run import detach

    attempt = detach(plan.paths, sys.argv[1:])
    if output.json_mode:
        output.json_line(
            {"schema_version": 1, "event": "detached", "name": plan.name, "attempt": attempt.number, "pid": attempt.pid}
        )
    output.say(f"run {plan.name}, attempt {attempt.number}, goes on as process {attempt.pid}")
    output.say(f"`flashrl runs watch {plan.name}` shows it, `flashrl runs stop {plan.name}` ends it")
