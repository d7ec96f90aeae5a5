"""`flashrl train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli import paths
from flashrl_cli.cli.options import Json, Preset, Rollout, RunName, Sets, Tis
from flashrl_cli.cli.sweep import Request, run_sweep

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.plan import LaunchPlan
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
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan; start and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start a sweep of more than 64 runs.")] = False,
    json: Json = False,
) -> None:
    """Train a preset with verl, watched to its end.

    `flashrl train --preset tiny` runs on any machine;
    `flashrl train --preset dapo-32b --rollout int8 --tis 8 --dry-run` shows what a cluster would run;
    `flashrl train --preset tiny --sweep rollout=bf16,int8 --sweep tis=off,2` runs four, and compares them.
    """
    from flashrl_cli.launch import review
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    options = review.Options(rollout=rollout, tis=tis, sets=sets or ())
    if sweep:
        request = Request(preset=preset, texts=sweep, options=options, name=name, many=yes)
        run_sweep(request, _run, output, resume=resume, dry_run=dry_run, fail_fast=fail_fast)
        return
    resolved = review.read(preset, options)
    plan = review.next_plan(resolved, name, resume=resume, look_only=dry_run)
    tree = review.judge(resolved, plan)
    if dry_run:
        _show(resolved, plan, tree, output)
    else:
        _run(resolved, plan, tree, output)


def _show(resolved: Resolved, plan: LaunchPlan, tree: Tree, output: Output) -> None:
    from flashrl_cli.launch import memory
    from flashrl_cli.launch.plan import plan_document
    from flashrl_cli.launch.script import plan_script

    needed = memory.of_plan(resolved, tree)
    if output.json_mode:
        output.document(plan_document(plan) | {"memory": needed.document()})
    else:
        output.text(plan_script(plan, needed.lines))


def _run(resolved: Resolved, plan: LaunchPlan, tree: Tree, output: Output) -> None:
    from flashrl_cli.launch import devices, memory, preflight
    from flashrl_cli.launch.inputs import vocabulary
    from flashrl_cli.launch.supervise import supervise
    from flashrl_cli.render.live import display_for

    data_root = paths.data_root()
    preflight.check(plan, data_root)
    warning = memory.of_plan(resolved, tree, devices.gpu_memory(plan.spec)).warning
    if warning:
        output.warn(f"memory: {warning}")
    output.say(f"run {plan.name}, attempt {plan.attempt}: `tail -F {plan.attempt_paths.log}` shows everything")
    with display_for(output, title=plan.name, total=plan.spec.trainer.steps) as display:
        steps = supervise(plan, display, vocabulary=vocabulary(plan.spec, data_root))
    output.say(f"done: {steps} steps; checkpoints in {plan.paths.checkpoints}")
