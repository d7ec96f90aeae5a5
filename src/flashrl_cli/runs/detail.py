"""Everything that is known of one run: its attempts, its start, where its time goes, its proof, and what the mismatch says."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.contract import Handshake
from flashrl_cli.runs import history, mismatch, record
from flashrl_cli.runs.curves import starts
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.runs.overview import Row, row
from flashrl_cli.runs.totals import start_shares, step_shares

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flashrl_cli.runs.known import Known
    from flashrl_cli.runs.mismatch import Advice
    from flashrl_cli.runs.record import Attempt, Status
    from flashrl_cli.runs.totals import Spent
    from flashrl_cli.verl.metrics import StepMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """An attempt in the list; without a record only its number and its last step are known."""

    number: int
    state: Status | None = None
    started: str | None = None
    seconds: float | None = None
    """From its start to its end, or until now, or (when it is lost) until it was last heard of."""
    last_step: int | None = None
    resumed_from: int | None = None
    exit_code: int | None = None
    error: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One run in full."""

    row: Row
    run: Known
    attempts: tuple[AttemptRow, ...]
    steps: tuple[StepMetrics, ...]
    holes: tuple[int, ...]
    start: tuple[Spent, ...]
    """Phases of the newest attempt's start."""
    step: tuple[Spent, ...]
    """Phases of a mean step."""
    proof: tuple[Handshake, ...]
    set_aside: tuple[str, ...]
    advice: Advice

    def document(self) -> dict[str, Any]:
        """For programs: the record word for word, and what is drawn from the metrics."""
        curve = [{"step": s.step, "reward": s["reward"], "accuracy": s.accuracy} for s in self.steps]
        return {
            "run": self.row.document(),
            "folder": str(self.run.paths.root),
            "checkpoints": str(self.run.paths.checkpoints),
            "record": asdict(self.run.record) if self.run.record else None,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "curve": curve,
            "holes": list(self.holes),
            "start": [asdict(spent) for spent in self.start],
            "step": [asdict(spent) for spent in self.step],
            "proof": [asdict(shake) for shake in self.proof],
            "set_aside": list(self.set_aside),
            "mismatch": self.advice.document(),
        }


def detail(run: Known) -> Detail:
    """Gather what is known of `run`."""
    steps = history.recorded_history(run.paths, run.record)
    last = run.last
    return Detail(
        row=row(run),
        run=run,
        attempts=tuple(_attempts(run)),
        steps=tuple(steps),
        holes=tuple(history.holes(steps)),
        start=tuple(start_shares(last) if last else ()),
        step=tuple(step_shares(steps, starts(run.paths))),
        proof=tuple(_proof(run)),
        set_aside=tuple(
            aside for attempt in (run.record.attempts if run.record else ()) for aside in attempt.set_aside
        ),
        advice=advice(run),
    )


def advice(run: Known) -> Advice:
    """Mismatch advice on the newest attempt that logged metrics, with the cap that it was started with."""
    logged = run.logged()
    if logged is None:
        return mismatch.advise([], None)
    number, files = logged
    cap = run.setting(number, "correction", "cap")
    return mismatch.advise(read_metrics(files.metrics), cap if isinstance(cap, int | float) else None)


def _attempts(run: Known) -> Iterable[AttemptRow]:
    recorded = {attempt.number: attempt for attempt in run.record.attempts} if run.record else {}
    for number in sorted({*recorded, *run.paths.attempts()}):
        if attempt := recorded.get(number):
            yield _attempt(attempt)
        else:
            logged = read_metrics(run.paths.attempt(number).metrics)
            yield AttemptRow(number=number, last_step=max((step.step for step in logged), default=None))


def _attempt(attempt: Attempt) -> AttemptRow:
    state = record.state(attempt)
    ends = {"running": datetime.now(UTC).isoformat(), "lost": attempt.updated}
    end = attempt.ended or ends.get(state, attempt.updated)
    return AttemptRow(
        number=attempt.number,
        state=state,
        started=attempt.started,
        seconds=max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(attempt.started)).total_seconds()),
        last_step=attempt.last_step,
        resumed_from=attempt.resumed_from,
        exit_code=attempt.exit_code,
        error=attempt.error,
        hint=attempt.hint,
    )


def _proof(run: Known) -> Iterable[Handshake]:
    """Handshakes of the newest attempt that has some: from its record, else from its folder."""
    for attempt in reversed(run.record.attempts if run.record else ()):
        if attempt.proof:
            with contextlib.suppress(TypeError):
                return [Handshake(**shake) for shake in attempt.proof]
    for number in reversed(run.paths.attempts()):
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            if found := list(contract.read_handshakes(run.paths.attempt(number).plugins)):
                return found
    return []
