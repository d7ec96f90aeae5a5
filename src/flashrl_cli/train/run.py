"""Execute one attempt of a run and record it, from its claim to its end, in this process or a detached one."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__, signals
from flashrl_cli.errors import ExitCode, FlashrlError, InputError, RunFailed, exit_code_of
from flashrl_cli.machine.software import probe_versions
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import Tail
from flashrl_cli.runs.store import Attempt, Phase, RunRecord
from flashrl_cli.secrets import without_secrets
from flashrl_cli.train.launch import plan_hash
from flashrl_cli.train.plan import reward_document
from flashrl_cli.train.supervise import supervise

if TYPE_CHECKING:
    from flashrl_cli.contract import Handshake
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.control import Display
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.process import Start
    from flashrl_cli.verl.metrics import StepMetrics


def run_plan(
    plan: LaunchPlan,
    display: Display,
    *,
    start: Start,
    vocabulary: int | None = None,
    validates: str = "",
    command: Sequence[str] = (),
) -> int:
    """Execute `plan` and keep the run's record up to date; returns the number of steps done.

    `validates` says what a validation generates, `command` is the command line that requested the run. Raises
    InputError if the run is already under way, and the errors of `supervise`.
    """
    with signals.collected() as received:
        _claim(plan, command)
        try:
            plan.resume.prepare()
            seen = Recording(display, plan)
            steps = supervise(plan, seen, received, start=start, vocabulary=vocabulary, validates=validates)
        except BaseException as error:
            _close(plan, **_ending(error))
            raise
        _close(plan, status="done", exit_code=int(ExitCode.OK))
    return steps


def _claim(plan: LaunchPlan, command: Sequence[str]) -> None:
    """Enter the attempt into the record; if two processes want the same run, one is refused."""
    fresh = RunRecord(
        name=plan.name,
        project=plan.spec.trainer.project,
        preset=plan.preset,
        created=store.now(),
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

    store.change(plan.paths, edit)


def _attempt(plan: LaunchPlan, command: Sequence[str]) -> Attempt:
    moment = store.now()
    return Attempt(
        number=plan.attempt,
        status="running",
        started=moment,
        updated=moment,
        **store.own_process(),
        argv=without_secrets(tuple(command)),
        plan_hash=plan_hash(plan),
        resumed_from=plan.resume.step,
        total_steps=plan.spec.trainer.steps,
        set_aside=tuple(f"{path.name}: {why}" for path, why in plan.resume.superseded),
        versions={"flashrl-cli": __version__, "python": platform.python_version(), **probe_versions()},
        reward=reward_document(plan),
        git=git_state(Path.cwd()),
    )


def _ending(error: BaseException) -> dict[str, Any]:
    """Fields for the record of an attempt that `error` ended."""
    code = int(exit_code_of(error))
    if isinstance(error, signals.Interrupted):
        return {"status": "stopped", "exit_code": code, "error": error.message}
    if isinstance(error, FlashrlError):
        return {"status": "failed", "exit_code": code, "error": error.message.partition("\n")[0], "hint": error.hint}
    return {"status": "failed", "exit_code": code, "error": f"{type(error).__name__}: {error}"}


def _close(plan: LaunchPlan, **fields: Any) -> None:
    try:
        store.renew(plan.paths, plan.attempt, ended=store.now(), **fields)
    except (OSError, InputError) as error:  # the run is over, and its own result is what must be reported
        print(f"warning: {plan.paths.record} was not renewed: {error}", file=sys.stderr)


def refuse_running(found: RunRecord | None) -> None:
    """Raise InputError if an attempt of a run is under way, here or (according to its record) elsewhere."""
    last = found.last if found else None
    if found is None or last is None or store.state(last) != "running":
        return
    where = "" if last.host == socket.gethostname() else f" on {last.host}"
    raise InputError(
        f"run {found.name} is under way: attempt {last.number}, process {last.pid}{where}",
        hint=f"`flashrl runs watch {found.name}` shows it, `flashrl runs stop {found.name}` ends it",
    )


class Recording:
    """A display that writes each event of one attempt to the run's record, then passes it to `display`.

    A closed pipe or terminal does not end a run; a signal does.
    """

    def __init__(self, display: Display, plan: LaunchPlan) -> None:
        self.display, self.plan = display, plan
        self._phases: tuple[Phase, ...] = ()

    def expect(self, total: int) -> None:
        """Record and show the number of steps that the run will have."""
        self._renew(total_steps=total)
        with contextlib.suppress(OSError):
            self.display.expect(total)

    def phase(self, text: str) -> None:
        """Record and show that another phase began."""
        self._phases = (*self._phases, Phase(name=text, began=store.now()))
        self._renew(phases=self._phases)
        with contextlib.suppress(OSError):
            self.display.phase(text)

    def proven(self, handshakes: list[Handshake]) -> None:
        """Record and show that the rollout workers proved their precision."""
        self._renew(proof=tuple(dataclasses.asdict(handshake) for handshake in handshakes))
        with contextlib.suppress(OSError):
            self.display.proven(handshakes)

    def step(self, metrics: StepMetrics) -> None:
        """Record and show a finished step."""
        if metrics.trained:
            self._renew(last_step=metrics.step)
        with contextlib.suppress(OSError):
            self.display.step(metrics)

    def warn(self, text: str) -> None:
        """Show a warning."""
        with contextlib.suppress(OSError):
            self.display.warn(text)

    def tick(self) -> None:
        """Pass the call on."""
        with contextlib.suppress(OSError):
            self.display.tick()

    def _renew(self, **changes: Any) -> None:
        # a full disk must not end a run that could continue: the log and the metrics hold what is missing here
        with contextlib.suppress(OSError):
            store.renew(self.plan.paths, self.plan.attempt, **changes)


FLAG = "--detach"
POLL_S = 0.1
TAIL_LINES = 20


class NotStarted(RunFailed):
    """The detached process ended before it began the attempt; this error has its exit code."""

    def __init__(self, code: int, last_lines: Sequence[str], console: Path) -> None:
        super().__init__("\n".join(["the detached run did not start", *(f"  | {line}" for line in last_lines)]))
        self.hint = f"all it said: {console}"
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED


def console(run: RunPaths) -> Path:
    """File for the terminal output of a detached process of `run`."""
    return run.root / "console.log"


def detach(run: RunPaths, command: Sequence[str]) -> Attempt:
    """Run flashrl's `command` (without `--detach`) in a separate session; returns once its attempt is on record.

    Raises NotStarted, with the end of its output, if the process ends before that.
    """
    output = console(run)
    run.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with output.open("ab") as stream:
        tail = Tail(output, start=stream.tell())
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "flashrl_cli", *(word for word in command if word != FLAG)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while True:
        ended = child.poll()
        if attempt := _attempt_of(run, child.pid):
            child.returncode = 0  # the child outlives this process; otherwise Popen would warn about it
            return attempt
        if ended is not None:
            raise NotStarted(ended, tail.poll(ended=True)[-TAIL_LINES:], output)
        time.sleep(POLL_S)


def _attempt_of(run: RunPaths, pid: int) -> Attempt | None:
    try:
        found = store.load(run.record)
    except FlashrlError:
        return None
    last = found.last if found else None
    return last if last and last.pid == pid else None


GIT_TIMEOUT_S = 10.0


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and whether tracked files were changed; None outside a repository or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    """Output of a git command that only reads; None if it fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
