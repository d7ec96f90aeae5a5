"""Follow a run that another process supervises: its record and its metrics, read as they are written."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from flashrl_cli.contract import Handshake
from flashrl_cli.errors import ExitCode, InputError
from flashrl_cli.runs import record
from flashrl_cli.runs.display import Display
from flashrl_cli.runs.metrics import MetricsTail

if TYPE_CHECKING:
    from flashrl_cli.runs.known import Known
    from flashrl_cli.runs.record import Attempt, Status

POLL_S = 0.2
RECORD_S = 1.0
"""Time between two looks at the record; the metrics are looked at with every poll."""


class Watching(Display, Protocol):
    """A display that also shows the end."""

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        """The run is over."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the attempt ended, with the exit code that its command had."""

    state: Status
    exit_code: int
    hint: str | None


def age(attempt: Attempt) -> float:
    """Seconds since an attempt started, up to its end."""
    end = datetime.fromisoformat(attempt.ended) if attempt.ended else datetime.now(UTC)
    return max(0.0, (end - datetime.fromisoformat(attempt.started)).total_seconds())


class Follower:
    """One attempt of a run, shown on a display as far as it got and while it goes on."""

    def __init__(self, run: Known, attempt: Attempt, display: Watching) -> None:
        self.run, self.attempt, self.display = run, attempt, display
        self._metrics = MetricsTail(run.paths.attempt(attempt.number).metrics)
        self._phases = 0
        self._stepped = self._proven = False
        self._looked = time.monotonic()

    def follow(self) -> Ending:
        """Show the attempt until it is over."""
        while True:
            # before the metrics are read, so that none written before the end is missed
            state = self._state()
            self._show()
            if state != "running":
                return self._end(state)
            time.sleep(POLL_S)
            if time.monotonic() - self._looked > RECORD_S:
                self._look()

    def _state(self) -> Status:
        state = record.state(self.attempt)
        if state == "lost":  # or it ended in order, and said so after the last look at its record
            self._look()
            state = record.state(self.attempt)
        return state

    def _look(self) -> None:
        """Read the record anew; one that is gone or damaged tells nothing."""
        self._looked = time.monotonic()
        with contextlib.suppress(InputError, OSError):
            found = record.load(self.run.paths.record)
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
                self.display.proven([Handshake(**shake) for shake in self.attempt.proof])
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
