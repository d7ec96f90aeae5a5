"""`flashrl train`: run a preset, or with `--sweep` one run per point, all planned, checked and executed alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import Executor, Json, Preset, RayAddress, Rollout, RunName, Sets, Tis
from flashrl_cli.errors import FlashrlError, InputError, RunFailed
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Options, Resolved
    from flashrl_cli.render.output import Output
    from flashrl_cli.train.executors import Place
    from flashrl_cli.train.launch import Launch
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.preflight import Validation
    from flashrl_cli.train.process import Start
    from flashrl_cli.train.sweep import Job, UsedNames

SCHEMA_VERSION = 1


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
    from flashrl_cli import signals
    from flashrl_cli.config.resolve import Options
    from flashrl_cli.render.output import Output
    from flashrl_cli.train import executors, launch
    from flashrl_cli.train.sweep import UsedNames

    output = Output(json_mode=json)
    if not (dry_run or detach):
        signals.say_if_ignored(output.say)
    place = executors.chosen(executor, ray_address)
    options = Options(rollout=rollout, tis=tis, sets=sets or ())
    starter = Starter(output, place)

    def read(options: Options) -> Resolved:
        return place.fit(launch.read(preset, options))

    if sweep:
        used = UsedNames(resume=resume, force=force, look_only=dry_run)
        jobs = _plan_sweep(read, sweep, options, name, used, place, output, many=yes or dry_run)
        first = next((job.launch for job in jobs if job.launch), None)
        if dry_run:
            _show_sweep(jobs, output)
        elif detach and first:
            starter.detach(first)
        else:
            _run_sweep(jobs, starter, fail_fast=fail_fast)
        return
    if fail_fast or yes:
        raise InputError("--fail-fast and --yes belong to --sweep")
    resolved = read(options)
    plan = launch.next_plan(resolved, name, resume=resume, look_only=dry_run, force=force, gpu_memory=place.gpu_memory)
    single = launch.Launch(resolved=plan.resolved, plan=plan, tree=launch.judge(plan.resolved, plan))
    if dry_run:
        starter.show(single)
    elif plan.is_finished:
        done = counted(plan.resume.step or 0, "step")
        output.say(f"run {plan.name} is complete: {done}; a larger trainer.steps goes on with it")
    elif detach:
        starter.detach(single)
    else:
        starter.run(single)


@dataclass(frozen=True, slots=True)
class Starter:
    """Shows, checks and starts a launch, of a single run or of a sweep."""

    output: Output
    place: Place

    def show(self, launch: Launch) -> None:
        """Print the plan as a script or as a document."""
        from flashrl_cli.memory.budget import lines
        from flashrl_cli.train.plan import plan_document, plan_script
        from flashrl_cli.train.preflight import memory_of, validation_of
        from flashrl_cli.train.speed import slow
        from flashrl_cli.verl.lint import notes

        plan = launch.plan
        memory = memory_of(launch.resolved, launch.tree, self.place.gpu_memory(plan.spec))
        noted = notes(launch.resolved, plan.overrides, launch.tree)
        validation = validation_of(launch.resolved, launch.tree, plan.resume.step or 0)
        slowing = slow(launch, memory, validation)
        if self.output.json_mode:
            added = {
                "memory": memory.document(),
                "validation": validation.document(),
                "slow": [one.document() for one in slowing],
                "notes": noted,
            }
            self.output.document(plan_document(plan) | self.place.document(plan) | added)
        else:
            submission = self.place.submission_script(plan)
            listed = [f"slows a step: {one}" for one in slowing]
            remarks = [validation.text, *memory.lines, *lines(launch.resolved), *listed, *noted]
            self.output.text(plan_script(plan, remarks, submission=submission))

    def check(self, plan: LaunchPlan) -> Start:
        """Check that a plan can run, and return the function that starts it. Raises EnvironmentNotReady, InputError."""
        return self.place.ready(plan, self.output.say)

    def run(self, launch: Launch) -> None:
        """Check a launch, and train it to its end under supervision."""
        from flashrl_cli.render.live import display_for
        from flashrl_cli.train.preflight import vocabulary
        from flashrl_cli.train.run import run_plan

        (start, validation), plan, output = self._ready(launch), launch.plan, self.output
        output.say(f"run {plan.name}, attempt {plan.attempt}: `tail -F {plan.attempt_paths.log}` shows everything")
        for line in plan.resume.lines():
            output.say(line)
        with display_for(output, title=plan.name, total=plan.spec.trainer.steps) as display:
            steps = run_plan(
                plan,
                display,
                start=start,
                vocabulary=vocabulary(plan.spec),
                validates=validation.size,
                command=["flashrl", *sys.argv[1:]],
            )
        output.say(f"done: {counted(steps, 'step')}; checkpoints in {plan.paths.checkpoints}")

    def detach(self, launch: Launch) -> None:
        """Check a launch, and let another process train it and the remaining runs of a sweep."""
        from flashrl_cli.train.run import detach

        self._ready(launch)
        plan, output = launch.plan, self.output
        attempt = detach(plan.paths, sys.argv[1:])
        if output.json_mode:
            _event(output, "detached", name=plan.name, attempt=attempt.number, pid=attempt.pid)
        output.say(f"run {plan.name}, attempt {attempt.number}, goes on as process {attempt.pid}")
        output.say(f"`flashrl runs watch {plan.name}` shows it, `flashrl runs stop {plan.name}` ends it")

    def _ready(self, launch: Launch) -> tuple[Start, Validation]:
        """Check a launch, and print what it validates, and warnings about what does not prevent a start."""
        from flashrl_cli.runs import store
        from flashrl_cli.train.preflight import memory_of, shared_prompts, validation_of
        from flashrl_cli.train.run import refuse_running
        from flashrl_cli.train.speed import slow
        from flashrl_cli.verl.lint import notes

        plan = launch.plan
        refuse_running(store.load(plan.paths.record))
        start = self.check(plan)
        memory = memory_of(launch.resolved, launch.tree, self.place.gpu_memory(plan.spec))
        validation = validation_of(launch.resolved, launch.tree, plan.resume.step or 0)
        self.output.say(validation.text)
        for shared in shared_prompts(plan.spec):
            self.output.warn(shared)
        if memory.warning:
            self.output.warn(f"memory: {memory.warning}")
        for one in slow(launch, memory, validation):
            self.output.warn(f"slows a step: {one}")
        for note in notes(launch.resolved, plan.overrides, launch.tree):
            self.output.warn(note)
        return start, validation


def _plan_sweep(
    read: Callable[[Options], Resolved],
    texts: Sequence[str],
    options: Options,
    name: str | None,
    used: UsedNames,
    place: Place,
    output: Output,
    *,
    many: bool,
) -> list[Job]:
    """Every run of the sweep, checked; `many` permits more than 64. Raises InputError with every problem."""
    from flashrl_cli.train.sweep import plan_jobs
    from flashrl_cli.train.sweep_axes import points, read_axes

    if used.resume not in ("auto", "never"):
        raise InputError(f"--resume {used.resume}: a sweep has many runs", hint="it goes on with each by itself")
    found = points(read_axes(texts, options), many=many)
    with output.progress(f"judging {counted(len(found), 'run')}", len(found)) as advance:
        return plan_jobs(read, found, options, name, used, advance, place.gpu_memory)


def _show_sweep(jobs: Sequence[Job], output: Output) -> None:
    """Print the runs that a sweep would execute."""
    from flashrl_cli.train.plan import plan_document

    if not output.json_mode:
        keys = [key for key, _ in jobs[0].point.values]
        rows = [[*job.point.texts(), job.run.name, job.state, job.from_step] for job in jobs]
        output.table([*keys, "run", "state", "from step"], rows)
        return
    points = [
        {
            "run": job.run.name,
            "values": job.point.data(),
            "state": job.state,
            "plan": plan_document(job.launch.plan) if job.launch else None,
        }
        for job in jobs
    ]
    output.document({"schema_version": SCHEMA_VERSION, "points": points})


def _run_sweep(jobs: Sequence[Job], starter: Starter, *, fail_fast: bool) -> None:
    """Check and train all unfinished runs, and print the table of all runs.

    Raises EnvironmentNotReady before anything starts, RunFailed if runs failed.
    """
    from flashrl_cli.train import sweep

    sweep.check_all(jobs, starter.check)
    try:
        failed = sweep.run_jobs(jobs, starter.run, SweepProgress(starter.output, len(jobs)), fail_fast=fail_fast)
    finally:
        _report(jobs, starter.output)
    if failed:
        names = ", ".join(job.run.name for job in failed)
        raise RunFailed(f"{len(failed)} of {len(jobs)} runs failed: {names}", hint="the same command tries them again")


class SweepProgress:
    """Shows the progress of a sweep on stderr, or as events on stdout."""

    def __init__(self, output: Output, total: int) -> None:
        self.output, self.total = output, total

    def begins(self, number: int, job: Job) -> None:
        """Print event `point`, or its line."""
        doing = "is done" if job.launch is None else "goes on" if job.state == "begun" else "starts"
        if self.output.json_mode:
            _event(self.output, "point", number=number, of=self.total, run=job.run.name, doing=doing)
        else:
            self.output.say(f"[{number}/{self.total}] {job.point}: run {job.run.name} {doing}")

    def failed(self, job: Job, error: FlashrlError) -> None:
        """Print a warning, or event `failed`."""
        if self.output.json_mode:
            _event(self.output, "failed", run=job.run.name, error=error.message, hint=error.hint)
        else:
            self.output.warn(f"run {job.run.name} failed: {error.message}")

    def ended(self, job: Job) -> None:
        """Print event `result`, or its line."""
        from flashrl_cli.train.sweep import row

        if self.output.json_mode:
            _event(self.output, "result", **row(job.point, job.run).document())


def _report(jobs: Sequence[Job], output: Output) -> None:
    """Print the current table of all runs, or event `sweep`."""
    from flashrl_cli.train import sweep

    rows = [sweep.row(job.point, job.run) for job in jobs]
    best = sweep.best(rows)
    if output.json_mode:
        _event(output, "sweep", points=[row.document() for row in rows], best=best.run if best else None)
        return
    keys = [key for key, _ in jobs[0].point.values]
    output.table([*keys, *sweep.HEADINGS], [row.cells(best=row is best) for row in rows])


def _event(output: Output, event: str, **data: Any) -> None:
    output.json_line({"schema_version": SCHEMA_VERSION, "event": event, **data})
