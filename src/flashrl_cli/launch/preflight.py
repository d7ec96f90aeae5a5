"""Can this machine run a preset? Found out before anything starts, every reason at once.

`train` refuses to start over the failures; `flashrl doctor --preset` shows the same findings, the good ones too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.doctor import plugins, software
from flashrl_cli.doctor.finding import Finding, fail, ok, problems
from flashrl_cli.doctor.plugins import ENTRY_POINTS
from flashrl_cli.errors import EnvironmentNotReady, InputError, Problem
from flashrl_cli.launch import devices, inputs, storage
from flashrl_cli.verl import loggers

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.launch.plan import LaunchPlan

__all__ = ["ENTRY_POINTS", "check", "findings"]
SHOWN = 2
"""Fixes that the last line repeats, which is all that some logs keep."""


def check(plan: LaunchPlan, data_root: Path) -> None:
    """Raise EnvironmentNotReady with every reason why this machine cannot run `plan`, InputError for the rows alone."""
    found = list(problems(_machine(plan.spec, data_root)))
    rows = list(problems(_rows(plan.spec, data_root)))
    if found:
        fixes = list(dict.fromkeys(problem.hint for problem in found if problem.hint))
        raise EnvironmentNotReady(
            f"this machine cannot run {plan.preset}: {', '.join(dict.fromkeys(str(problem.where) for problem in found))}",
            problems=[*found, *rows],
            hint=f"{'; '.join(fixes[:SHOWN])}; `flashrl doctor --preset` shows all that was checked, `--dry-run` the plan alone",
        )
    _refuse(plan, rows)


def check_rows(plan: LaunchPlan, data_root: Path) -> None:
    """Raise InputError if the rows of a data file that is on this machine cannot be trained on."""
    _refuse(plan, list(problems(_rows(plan.spec, data_root))))


def _refuse(plan: LaunchPlan, rows: list[Problem]) -> None:
    if rows:
        raise InputError(
            f"{plan.preset} cannot be trained on these rows; nothing was started",
            problems=rows,
            hint="`flashrl prepare` writes rows whose truths verl's scorer pays for",
        )


def findings(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    """Yield how this machine, and the rows on it, stand to each thing that a run of `spec` needs."""
    yield from _machine(spec, data_root)
    yield from _rows(spec, data_root)


def _rows(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    for problem in inputs.row_problems(spec, data_root):
        yield fail(problem.where or "rows", problem.message, problem.hint)


def _machine(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    versions = software.probe_versions()
    yield from software.missing(find_spec)
    yield from software.one_vllm(versions)
    yield from software.verl_version(versions)
    yield from software.vllm_version(versions)
    yield from software.stack_for(spec.resources.platform, versions)
    yield from plugins.findings(os.environ)
    yield from devices.findings(spec, versions)
    yield from storage.findings(spec, data_root)
    yield from _loggers(spec)


def _loggers(spec: RunSpec) -> Iterator[Finding]:
    names, environment = tuple(dict.fromkeys(spec.trainer.logger)), {**os.environ, **spec.env}
    broken = list(loggers.problems(names, environment, lambda module: find_spec(module) is not None, Path.home()))
    for problem in broken:
        yield fail(f"logger {problem.where}", problem.message, problem.hint)
    for name in loggers.demanding(names):
        if name not in {problem.where for problem in broken}:
            yield ok(f"logger {name}", "ready")
