"""`flashrl doctor`: whether this machine can run, the reload test, and the container of the original recipe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli import paths
from flashrl_cli.cli.options import NAME_OR_FILE, Json, Rollout, Sets, Tis, preset_names
from flashrl_cli.errors import ExitCode, InputError
from flashrl_cli.precision import REFITTED

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.doctor.checks import Report
    from flashrl_cli.render.output import Output

SYMBOLS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


def doctor(
    preset: Annotated[
        str | None,
        typer.Option(metavar=NAME_OR_FILE, help="Check what this preset needs, too.", autocompletion=preset_names),
    ] = None,
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    quant: Annotated[
        bool,
        typer.Option(
            "--quant", help="Test instead that an engine here takes new weights (--rollout, int8 if not given)."
        ),
    ] = False,
    docker: Annotated[
        bool, typer.Option("--docker", help="Print the docker command of the GPU stack instead.")
    ] = False,
    run: Annotated[bool, typer.Option("--run", help="With --docker: run that command.")] = False,
    json: Json = False,
) -> None:
    """Check this machine, and what a preset needs of it.

    Versions, GPUs, disk, limits, plugins, logins, each with its fix; exit 3 if a run cannot start.

    `flashrl doctor --preset dapo-32b --rollout int8` adds what that run needs; `flashrl doctor --quant --rollout fp8`
    refits a tiny engine and compares its answers with an independent computation; `flashrl doctor --docker --preset
    gsm8k-0.5b` prints the container that trains it.
    """
    from flashrl_cli.config.resolve import Options, read_spec
    from flashrl_cli.render.output import Output

    options = _options(preset, rollout, tis, sets)
    if quant:
        from flashrl_cli import signals

        signals.say_if_ignored(Output(json_mode=json).say)
        _reload_test(rollout or "int8", others=docker or run or len(options) > 2 * (rollout is not None), json=json)
        return
    if options and preset is None:
        raise InputError(f"{options[0]} without --preset", hint="--preset NAME says what it changes")
    if run and not docker:
        raise InputError("--run without --docker", hint="`flashrl train` runs here; --docker --run in a container")
    asked = Options(rollout=rollout, tis=tis, sets=sets or ())
    resolved = read_spec(preset, asked).checked() if preset else None
    out = Output(json_mode=json)
    if docker:
        _docker(resolved, options, out, run=run)
    else:
        _check(resolved, out)


def _options(preset: str | None, rollout: str | None, tis: str | None, sets: list[str] | None) -> list[str]:
    """The options in the form of `flashrl train`."""
    single = {"--preset": preset, "--rollout": rollout, "--tis": tis}
    words = [word for option, value in single.items() if value is not None for word in (option, value)]
    return words + [word for text in sets or () for word in ("--set", text)]


def _reload_test(precision: str, *, others: bool, json: bool) -> None:
    from flashrl_cli.doctor import checks, reload
    from flashrl_cli.machine import software
    from flashrl_cli.render.output import Output

    if others:
        raise InputError("--quant takes no option but --rollout and --json", hint="`flashrl doctor --quant`")
    if precision not in REFITTED:
        raise InputError(f"no reload test for {precision}", hint=f"--rollout {'|'.join(REFITTED)}")
    out = Output(json_mode=json)
    out.say(f"reload test of {precision}: starting a tiny engine …")
    findings, measured = reload.reload_test(precision)
    stack = software.installed_stack(software.probe_versions())
    found = checks.Report(stack.name if stack else None, tuple(findings))
    if out.json_mode:
        out.document({**checks.document(found, None), "precision": precision, "measured": measured})
    else:
        _show_findings(found, out)
        out.say(f"{precision} rollouts {'take new weights here' if found.ok else 'do not work here'}")
    if not found.ok:
        raise typer.Exit(ExitCode.ENVIRONMENT)


def _check(resolved: Resolved | None, out: Output) -> None:
    from flashrl_cli.doctor.checks import check_machine, document
    from flashrl_cli.train import preflight
    from flashrl_cli.train.rewards import with_reward

    report = check_machine()
    if resolved:
        chosen = preflight.with_attention(with_reward(resolved))
        report = report.with_preset(list(preflight.findings(chosen.spec)))
    name = resolved.spec.name if resolved else None
    if out.json_mode:
        out.document(document(report, name))
    else:
        _show(report, name, out)
    if not report.ok:
        raise typer.Exit(ExitCode.ENVIRONMENT)


def _show(report: Report, preset: str | None, out: Output) -> None:
    _show_findings(report, out)
    counts = [sum(finding.level == level for finding in report.findings) for level in ("fail", "warn")]
    what = f"{preset} can run here" if preset else f"ready ({report.stack} stack)"
    verdict = what if report.ok else f"{preset or 'a run'} cannot start here"
    failed = ", ".join(dict.fromkeys(finding.name for finding in report.findings if finding.level == "fail"))
    out.say(f"{verdict}: {counts[0]} ✗, {counts[1]} !{f' ({failed})' if failed else ''}")


def _show_findings(report: Report, out: Output) -> None:
    from rich.text import Text

    width = max(len(finding.name) for finding in report.findings)
    for finding in report.findings:
        symbol, colour = SYMBOLS[finding.level]
        line = Text.assemble((symbol, colour), f" {finding.name:<{width}}  {finding.text}")
        if finding.fix:
            line.append(f"  → {finding.fix}", style="bold" if finding.level == "fail" else "dim")
        out.stdout.print(line, soft_wrap=True)


def _docker(resolved: Resolved | None, options: list[str], out: Output, *, run: bool) -> None:
    from flashrl_cli.doctor import docker

    if resolved and resolved.spec.resources.platform == "cpu":
        name = resolved.spec.name
        raise InputError(f"{name} runs on a CPU; the image is for GPUs", hint=f"`flashrl train --preset {name}`")
    folders = docker.folders(_read(resolved, options) if resolved else ())
    words = docker.command(
        folders,
        ["flashrl", "train", *options] if resolved else ["bash"],
        environment=os.environ,
        nodes=resolved.spec.resources.nodes if resolved else 1,
        terminal=not run or sys.stdin.isatty(),
    )
    if run:
        docker.run(words, folders)
    elif out.json_mode:
        out.document({"schema_version": docker.SCHEMA_VERSION, "image": docker.IMAGE, "argv": docker.argv(words)})
    else:
        out.text(docker.script(words))


def _read(resolved: Resolved, options: list[str]) -> list[Path]:
    """Paths on this machine that the run reads: data, models, and the preset if it is a file."""
    from flashrl_cli.train.preflight import local_inputs

    preset = paths.absolute(options[options.index("--preset") + 1])
    return [*local_inputs(resolved.spec).values(), *([preset] if preset.is_file() else [])]
