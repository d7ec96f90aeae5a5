"""`flashrl train`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli import paths
from flashrl_cli.cli import sweep as sweeps
from flashrl_cli.cli.options import Executor, Json, Preset, RayAddress, Rollout, RunName, Sets, Tis
from flashrl_cli.errors import InputError
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.executor import Start
    from flashrl_cli.launch.executors import Place
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.sweep.jobs import Launch
    from flashrl_cli.render.output import Output
    from flashrl_cli.verl.compose import Tree


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
    from flashrl_cli.launch import executors, review, signals
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    if not (dry_run or detach):
        signals.say_if_ignored(output.say)
    place = executors.chosen(executor, ray_address)
    options = review.Options(rollout=rollout, tis=tis, sets=sets or ())
    if sweep:
        asked = sweeps.Sweep(
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


def _sweep(asked: sweeps.Sweep, output: Output, *, dry_run: bool, detach: bool, fail_fast: bool) -> None:
    jobs = asked.jobs(output, dry_run=dry_run)
    first = next((job.launch for job in jobs if job.launch), None)

    def train_one(launch: Launch) -> None:
        _run(launch.plan, output, _ready(launch.resolved, launch.plan, launch.tree, output, asked.place))

    def check(plan: LaunchPlan) -> None:
        asked.place.ready(plan, paths.data_root(), output.say)

    if dry_run:
        sweeps.show(jobs, output)
    elif detach and first:
        _ready(first.resolved, first.plan, first.tree, output, asked.place)
        _detach(first.plan, output)
    else:
        sweeps.run(jobs, check, train_one, output, fail_fast=fail_fast)


def _show(resolved: Resolved, plan: LaunchPlan, tree: Tree, output: Output, place: Place) -> None:
    from flashrl_cli.launch import memory
    from flashrl_cli.launch.plan import plan_document
    from flashrl_cli.launch.script import plan_script
    from flashrl_cli.verl import demands

    needed, notes = memory.of_plan(resolved, tree), demands.notes(resolved, plan.overrides, tree)
    if output.json_mode:
        output.document(plan_document(plan) | place.document(plan) | {"memory": needed.document(), "notes": notes})
    else:
        output.text(plan_script(plan, [*needed.lines, *notes], job=place.job(plan)))


def _ready(resolved: Resolved, plan: LaunchPlan, tree: Tree, output: Output, place: Place) -> Start:
    from flashrl_cli.launch import memory
    from flashrl_cli.launch.run import refuse_running
    from flashrl_cli.runs import record
    from flashrl_cli.verl import demands

    refuse_running(record.load(plan.paths.record))
    start = place.ready(plan, paths.data_root(), output.say)
    warning = memory.of_plan(resolved, tree, place.gpu_memory(plan)).warning
    if warning:
        output.warn(f"memory: {warning}")
    for note in demands.notes(resolved, plan.overrides, tree):
        output.warn(note)
    return start


def _run(plan: LaunchPlan, output: Output, start: Start) -> None:
    from flashrl_cli.launch.inputs import vocabulary
    from flashrl_cli.launch.run import run_plan
    from flashrl_cli.render.live import display_for

    output.say(f"run {plan.name}, attempt {plan.attempt}: `tail -F {plan.attempt_paths.log}` shows everything")
    for line in plan.resume.lines():
        output.say(line)
    words = vocabulary(plan.spec, paths.data_root())
    with display_for(output, title=plan.name, total=plan.spec.trainer.steps) as display:
        steps = run_plan(plan, display, start=start, vocabulary=words, command=["flashrl", *sys.argv[1:]])
    output.say(f"done: {counted(steps, 'step')}; checkpoints in {plan.paths.checkpoints}")


def _detach(plan: LaunchPlan, output: Output) -> None:
    from flashrl_cli.launch.detach import detach

    attempt = detach(plan.paths, sys.argv[1:])
    if output.json_mode:
        output.json_line(
            {"schema_version": 1, "event": "detached", "name": plan.name, "attempt": attempt.number, "pid": attempt.pid}
        )
    output.say(f"run {plan.name}, attempt {attempt.number}, goes on as process {attempt.pid}")
    output.say(f"`flashrl runs watch {plan.name}` shows it, `flashrl runs stop {plan.name}` ends it")
