"""`flashrl train`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli import paths
from flashrl_cli.cli.options import Json, Rollout, Sets, Tis

if TYPE_CHECKING:
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.render.output import Output


def train(
    preset: Annotated[str, typer.Option(help="Name of a preset (`flashrl presets ls`) or a YAML file.")],
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: preset, precision and cap).")] = None,
    resume: Annotated[
        str, typer.Option(help="Go on with a used name: auto (newest checkpoint), never, or a global_step_N folder.")
    ] = "never",
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan; start and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Train a preset with verl, watched to its end.

    `flashrl train --preset tiny` runs on any machine;
    `flashrl train --preset dapo-32b --rollout int8 --tis 8 --dry-run` shows what a cluster would run.
    """
    from flashrl_cli.config.resolve import load_spec
    from flashrl_cli.launch import attempts
    from flashrl_cli.launch import plan as plans
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.render.output import Output
    from flashrl_cli.verl.check import check_overrides

    output = Output(json_mode=json)
    resolved = load_spec(preset, rollout=rollout, tis=tis, sets=sets or ())
    run_name = name or plans.default_name(resolved.spec.name, resolved.spec)
    roots = {
        "runs_root": paths.runs_root(),
        "checkpoints_root": paths.checkpoints_root(),
        "data_root": paths.data_root(),
    }
    resume_from = attempts.resume_path(resume)
    run = RunPaths(
        run_name, roots["runs_root"] / run_name, roots["checkpoints_root"] / resolved.spec.trainer.project / run_name
    )
    attempt = attempts.next_attempt(run, resume="auto" if dry_run else resume)
    attempts.check_resumable(resolved.spec, run, resume_from)
    plan = plans.build_plan(
        resolved, name=run_name, attempt=attempt, python=sys.executable, resume_from=resume_from, **roots
    )
    check_overrides(resolved, plan.overrides)
    if dry_run:
        _show(plan, output)
    else:
        _run(plan, output)


def _show(plan: LaunchPlan, output: Output) -> None:
    from flashrl_cli.launch.plan import plan_document
    from flashrl_cli.launch.script import plan_script

    if output.json_mode:
        output.document(plan_document(plan))
    else:
        output.text(plan_script(plan))


def _run(plan: LaunchPlan, output: Output) -> None:
    from flashrl_cli.launch import preflight
    from flashrl_cli.launch.inputs import vocabulary
    from flashrl_cli.launch.supervise import supervise
    from flashrl_cli.render.live import display_for

    data_root = paths.data_root()
    preflight.check(plan, data_root)
    output.say(f"run {plan.name}, attempt {plan.attempt}: `tail -F {plan.attempt_paths.log}` shows everything")
    with display_for(output, title=plan.name, total=plan.spec.trainer.steps) as display:
        steps = supervise(plan, display, vocabulary=vocabulary(plan.spec, data_root))
    output.say(f"done: {steps} steps; checkpoints in {plan.paths.checkpoints}")
