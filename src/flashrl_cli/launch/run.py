"""One attempt of a run from its claim to its end: what `train` and a sweep do with a plan."""

from __future__ import annotations

import dataclasses
import platform
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__
from flashrl_cli.doctor.software import probe_versions
from flashrl_cli.errors import ExitCode, FlashrlError, InputError, exit_code_of
from flashrl_cli.launch import changes, signals
from flashrl_cli.launch.recording import Recording
from flashrl_cli.launch.repository import git_state
from flashrl_cli.launch.supervise import locally, supervise
from flashrl_cli.runs import record
from flashrl_cli.runs.record import Attempt, RunRecord
from flashrl_cli.secrets import without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.launch.executor import Start
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.runs.display import Display


def run_plan(
    plan: LaunchPlan,
    display: Display,
    *,
    start: Start = locally,
    vocabulary: int | None = None,
    command: Sequence[str] = (),
) -> int:
    """Carry out `plan` and keep the run's record; returns the number of steps done.

    `command` is the command line that asked for it. Raises InputError if the run is under way already, and what
    `supervise` raises.
    """
    with signals.collected() as received:
        _claim(plan, command)
        try:
            plan.resume.prepare()
            steps = supervise(plan, Recording(display, plan), received, start=start, vocabulary=vocabulary)
        except BaseException as error:
            _close(plan, **_ending(error))
            raise
        _close(plan, status="done", exit_code=int(ExitCode.OK))
    return steps


def refuse_running(found: RunRecord | None) -> None:
    """Raise InputError if an attempt of a run is under way, here or (as far as its record says) elsewhere."""
    last = found.last if found else None
    if found is None or last is None or record.state(last) != "running":
        return
    where = "" if last.host == socket.gethostname() else f" on {last.host}"
    raise InputError(
        f"run {found.name} is under way: attempt {last.number}, process {last.pid}{where}",
        hint=f"`flashrl runs watch {found.name}` shows it, `flashrl runs stop {found.name}` ends it",
    )


def _claim(plan: LaunchPlan, command: Sequence[str]) -> None:
    """Enter the attempt into the record; of two processes that want the same run, one is refused."""
    fresh = RunRecord(
        name=plan.name,
        project=plan.spec.trainer.project,
        preset=plan.preset,
        created=record.now(),
        checkpoints=str(plan.paths.checkpoints),
    )
    attempt = _attempt(plan, command)

    def edit(found: RunRecord | None) -> RunRecord:
        refuse_running(found)
        try:
            plan.attempt_paths.root.mkdir(mode=0o700)
        except FileExistsError:
            raise InputError(
                f"attempt {plan.attempt} of run {plan.name} was just started elsewhere", hint="try again"
            ) from None
        before = found or fresh
        return dataclasses.replace(before, preset=plan.preset, attempts=(*before.attempts, attempt))

    record.change(plan.paths, edit)


def _attempt(plan: LaunchPlan, command: Sequence[str]) -> Attempt:
    moment = record.now()
    return Attempt(
        number=plan.attempt,
        status="running",
        started=moment,
        updated=moment,
        **record.own_process(),
        argv=without_secrets(tuple(command)),
        plan_hash=changes.plan_hash(plan),
        resumed_from=plan.resume.step,
        total_steps=plan.spec.trainer.steps,
        set_aside=tuple(f"{path.name}: {why}" for path, why in plan.resume.aside),
        versions={"flashrl-cli": __version__, "python": platform.python_version(), **probe_versions()},
        git=git_state(Path.cwd()),
    )


def _ending(error: BaseException) -> dict[str, Any]:
    """How the record tells an attempt that `error` ended."""
    code = int(exit_code_of(error))
    if isinstance(error, signals.Interrupted):
        return {"status": "stopped", "exit_code": code, "error": error.message}
    if isinstance(error, FlashrlError):
        return {"status": "failed", "exit_code": code, "error": error.message.partition("\n")[0], "hint": error.hint}
    return {"status": "failed", "exit_code": code, "error": f"{type(error).__name__}: {error}"}


def _close(plan: LaunchPlan, **fields: Any) -> None:
    try:
        record.renew(plan.paths, plan.attempt, ended=record.now(), **fields)
    except (OSError, InputError) as error:  # the run is over: say so, and let its own end be told
        print(f"warning: {plan.paths.record} was not renewed: {error}", file=sys.stderr)
