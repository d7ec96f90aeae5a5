"""Everything that is known of one run: its attempts, its start, where its time goes, its proof, and what the mismatch says."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.contract import Handshake
from flashrl_cli.launch.overview import Row, row
from flashrl_cli.runs import history, mismatch, record
from flashrl_cli.runs.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flashrl_cli.launch.known import Known
    from flashrl_cli.runs.mismatch import Advice
    from flashrl_cli.runs.record import Attempt, Status
    from flashrl_cli.verl.metrics import StepMetrics

OUTSIDE = ("validate",)
"""Phases that verl does not count among a step's seconds."""


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
class Share:
    """A phase of a step: mean seconds, and their share of the mean step (None for what lies outside it)."""

    phase: str
    seconds: float
    share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One run in full."""

    row: Row
    run: Known
    attempts: tuple[AttemptRow, ...]
    steps: tuple[StepMetrics, ...]
    holes: tuple[int, ...]
    start: tuple[tuple[str, float], ...]
    """Phases of the newest attempt's start with their seconds."""
    shares: tuple[Share, ...]
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
            "start": [{"phase": phase, "seconds": seconds} for phase, seconds in self.start],
            "step": [asdict(share) for share in self.shares],
            "proof": [asdict(shake) for shake in self.proof],
            "set_aside": list(self.set_aside),
            "mismatch": self.advice.document(),
        }


def detail(run: Known) -> Detail:
    """Gather what is known of `run`."""
    steps = _steps(run)
    last = run.last
    return Detail(
        row=row(run),
        run=run,
        attempts=tuple(_attempts(run)),
        steps=tuple(steps),
        holes=tuple(history.holes(steps)),
        start=tuple(_start(last) if last else ()),
        shares=tuple(shares(steps)),
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


def shares(steps: Sequence[StepMetrics]) -> list[Share]:
    """Where the time of a mean step goes; what no phase accounts for is `other`. Empty without timed steps."""
    timed = [step for step in steps if step["step_s"]]
    if not timed:
        return []
    whole = sum(step["step_s"] or 0.0 for step in timed) / len(timed)
    phases = dict.fromkeys(phase for step in timed for phase in step.seconds)
    means = {phase: sum(step.seconds.get(phase, 0.0) for step in timed) / len(timed) for phase in phases}
    found = [
        Share(phase=phase, seconds=mean, share=None if phase in OUTSIDE else mean / whole)
        for phase, mean in means.items()
    ]
    other = whole - sum(one.seconds for one in found if one.share is not None)
    return [*found, *([Share(phase="other", seconds=other, share=other / whole)] if other > 0 else [])]


def _steps(run: Known) -> list[StepMetrics]:
    resumed = {attempt.number: attempt.resumed_from or 0 for attempt in run.record.attempts} if run.record else {}
    attempts = ((number, read_metrics(run.paths.attempt(number).metrics)) for number in run.paths.attempts())
    return history.merge(attempts, resumed)


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


def _start(attempt: Attempt) -> Iterable[tuple[str, float]]:
    """Each phase lasts until the next begins; the last one, in which the first step is sampled, is no part of the start."""
    for phase, after in zip(attempt.phases, attempt.phases[1:], strict=False):
        yield phase.name, (datetime.fromisoformat(after.began) - datetime.fromisoformat(phase.began)).total_seconds()


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
