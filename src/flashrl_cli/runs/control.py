"""Follow a run that another process supervises, and stop it.

The run's record and metrics are read as they are written. `Display` is the interface that a run reports its progress
to: both `train` and `Follower` write to it, and `render.live` draws it.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from flashrl_cli.contract import Handshake
from flashrl_cli.errors import EnvironmentNotReady, ExitCode, InputError, RunFailed
from flashrl_cli.paths import runs_root
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import MetricsTail

if TYPE_CHECKING:
    import psutil

    from flashrl_cli.runs.store import Attempt, Run, Status
    from flashrl_cli.verl.metrics import StepMetrics


FOLLOW_POLL_S = 0.2
RECORD_S = 1.0
"""Seconds between two reads of the record; the metrics are read with every poll."""
GRACE_S = 60.0
"""Seconds that verl gets to end where the plan does not set it: the default of `watch.stop_grace_s`."""
MORE_S = 30.0
"""Further seconds for the processes that verl leaves behind, and for the record."""
BETWEEN_S = 0.5
"""Seconds between the two signals of an immediate stop."""
POLL_S = 0.2


class Display(Protocol):
    """The interface that a run reports its phases and steps to."""

    def expect(self, total: int) -> None:
        """Announce that the run will have `total` steps."""

    def phase(self, text: str) -> None:
        """Report that the run began another phase."""

    def proven(self, handshakes: list[Handshake], /) -> None:
        """Report that the rollout workers proved their precision."""

    def step(self, metrics: StepMetrics) -> None:
        """Report a finished step."""

    def warn(self, text: str) -> None:
        """Report something about the run that does not end it."""

    def tick(self) -> None:
        """Called regularly while nothing happens, so that displayed times can advance."""


class Watching(Display, Protocol):
    """A display that also shows how the run ended."""

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        """Report that the run is over."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the attempt ended, with the exit code of its command."""

    state: Status
    exit_code: int
    hint: str | None


def age(attempt: Attempt) -> float:
    """Seconds from an attempt's start to its end, or to now while it runs."""
    end = datetime.fromisoformat(attempt.ended) if attempt.ended else datetime.now(UTC)
    return max(0.0, (end - datetime.fromisoformat(attempt.started)).total_seconds())


class Follower:
    """Shows one attempt of a run on a display: what it has done so far, then each event as it happens."""

    def __init__(self, run: Run, attempt: Attempt, display: Watching) -> None:
        self.run, self.attempt, self.display = run, attempt, display
        self._metrics = MetricsTail(run.paths.attempt(attempt.number).metrics)
        self._phases = 0
        self._stepped = self._proven = False
        self._looked = time.monotonic()

    def follow(self) -> Ending:
        """Show the attempt until it is over."""
        while True:
            # before the metrics are read, so that nothing written just before the end is missed
            state = self._state()
            self._show()
            if state != "running":
                return self._end(state)
            time.sleep(FOLLOW_POLL_S)
            if time.monotonic() - self._looked > RECORD_S:
                self._look()

    def _state(self) -> Status:
        state = store.state(self.attempt)
        if state == "lost":  # the attempt may also have ended normally and recorded that after the last read
            self._look()
            state = store.state(self.attempt)
        return state

    def _look(self) -> None:
        """Read the record again; a record that is missing or damaged changes nothing."""
        self._looked = time.monotonic()
        with contextlib.suppress(InputError, OSError):
            found = store.load(self.run.paths.record)
            same = [a for a in found.attempts if a.number == self.attempt.number] if found else []
            self.attempt = same[0] if same else self.attempt

    def _show(self) -> None:
        if self.attempt.total_steps is not None:
            self.display.expect(self.attempt.total_steps)
        steps = list(self._metrics.poll())
        self._stepped = self._stepped or any(step.trained for step in steps)
        for phase in self.attempt.phases[self._phases :]:
            if not self._stepped:
                self.display.phase(phase.name)
        self._phases = len(self.attempt.phases)
        if self.attempt.proof and not self._proven:
            self._proven = True
            with contextlib.suppress(TypeError):
                self.display.proven([Handshake(**one) for one in self.attempt.proof])
        for step in steps:
            self.display.step(step)
        self.display.tick()

    def _end(self, state: Status) -> Ending:
        code = self.attempt.exit_code
        if code is None:
            code = ExitCode.OK if state == "done" else ExitCode.FAILED
        error = self.attempt.error or ("the process that supervised it is gone" if state == "lost" else None)
        self.display.over(state, exit_code=code, error=error)
        return Ending(state, code, self.attempt.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Result of a stop: `stopped` is False if nothing was running; `state` is the attempt's state afterwards."""

    name: str
    attempt: int
    stopped: bool
    state: Status
    seconds: float = 0.0
    step: int | None = None


def stop(run: Run, *, at_once: bool = False, say: Callable[[str], None] = lambda _: None) -> Stopped:
    """Stop the newest attempt of `run` and wait until its supervisor has ended; does nothing if it is not running.

    Raises InputError if there is no record, EnvironmentNotReady if the run cannot be stopped from here, RunFailed if it
    does not end.
    """
    attempt = run.last
    if attempt is None:
        raise InputError(
            f"run {run.name} has no record of its process: {run.damage or 'it was started before records were kept'}",
            hint="if it still runs, Ctrl-C in its terminal ends it",
        )
    if attempt.status == "running" and attempt.host != socket.gethostname():
        raise EnvironmentNotReady(f"run {run.name} runs on {attempt.host}", hint=_over_there(run, attempt, at_once))
    process = supervisor(attempt)
    if process is None:
        _check_job(run, attempt)
        return Stopped(
            name=run.name, attempt=attempt.number, stopped=False, state=store.state(attempt), step=attempt.last_step
        )
    return _end(run, attempt, process, at_once=at_once, say=say)


def supervisor(attempt: Attempt) -> psutil.Process | None:
    """The process that supervises `attempt` on this machine, if it is still the recorded one and alive."""
    import psutil

    if attempt.status != "running" or not store.is_alive(attempt.pid, attempt.pid_started):
        return None
    try:
        process = psutil.Process(attempt.pid)  # from now on psutil itself refuses to signal another process of this pid
        return process if abs(process.create_time() - attempt.pid_started) < 1 else None
    except psutil.NoSuchProcess:
        return None


def _end(run: Run, attempt: Attempt, process: psutil.Process, *, at_once: bool, say: Callable[[str], None]) -> Stopped:
    grace = run.setting(attempt.number, "watch", "stop_grace_s")
    limit = (float(grace) if isinstance(grace, int | float) else GRACE_S) + MORE_S
    how = "at once" if at_once else f"and wait up to {limit:.0f} s (`--now` makes short work of it)"
    say(f"ending {run.name}, attempt {attempt.number}: ask process {process.pid} to stop {how}")
    began = time.monotonic()
    # a run that a script started in the background ignores INT; TERM always reaches it
    _signal(process, signal.SIGTERM, run)
    if at_once:
        time.sleep(BETWEEN_S)
        # a different signal, because two equal ones may be delivered as one, and TERM because INT may be ignored
        _signal(process, signal.SIGINT, run)
        _signal(process, signal.SIGTERM, run)
    while store.is_alive(attempt.pid, attempt.pid_started):
        if time.monotonic() - began > limit:
            raise RunFailed(
                f"run {run.name} still runs after {limit:.0f} s: process {process.pid}",
                hint=f"flashrl runs stop {shlex.quote(run.name)} --now",
            )
        time.sleep(POLL_S)
    after = store.find(run.name).last or attempt
    return Stopped(
        name=run.name,
        attempt=attempt.number,
        stopped=True,
        state=store.state(after),
        seconds=time.monotonic() - began,
        step=after.last_step,
    )


def _signal(process: psutil.Process, number: int, run: Run) -> None:
    import psutil

    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied:
        raise EnvironmentNotReady(
            f"run {run.name} belongs to another user: process {process.pid}", hint="stop it as the user who started it"
        ) from None


def _over_there(run: Run, attempt: Attempt, at_once: bool) -> str:
    now = ["--now"] if at_once else []
    command = ["env", f"FLASHRL_RUNS={runs_root()}", "flashrl", "runs", "stop", run.name, *now]
    return shlex.join(["ssh", attempt.host, shlex.join(command)])


def _check_job(run: Run, attempt: Attempt) -> None:
    """Raise EnvironmentNotReady if the attempt's Ray job may still run although its supervisor has ended."""
    if command := orphan(attempt):
        raise EnvironmentNotReady(
            f"the process that supervised {run.name} is gone, its Ray job {attempt.job_id} may still run",
            hint=shlex.join(command),
        )


def orphan(attempt: Attempt) -> list[str] | None:
    """The command that stops the attempt's Ray job, if it may still run although its supervisor has ended."""
    if store.state(attempt) != "lost" or attempt.executor != "ray" or not attempt.job_id:
        return None
    address = ["--address", attempt.ray_address] if attempt.ray_address else []
    return ["ray", "job", "stop", *address, attempt.job_id]
