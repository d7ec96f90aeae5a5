"""Everything that is known of one run: its attempts, its start, where its time goes, its proof, and what the mismatch says.

A run in numbers: how far it came, how good, how fast, and where its time went.

One row for each run: what it is, how far it is, and what it takes on disk.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.contract import Handshake
from flashrl_cli.runs import metrics, mismatch, store
from flashrl_cli.runs.curves import starts
from flashrl_cli.runs.delete import size
from flashrl_cli.runs.metrics import read_last, read_metrics
from flashrl_cli.verl.metrics import BESIDE_STEP, TIMINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flashrl_cli.runs.mismatch import Advice
    from flashrl_cli.runs.store import Attempt, Known, RunRecord, Status
    from flashrl_cli.verl.metrics import StepMetrics

OTHER = "other"
"""What verl's timer of a step holds beside its phases."""


@dataclass(frozen=True, slots=True)
class Point:
    """A value and its step."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a run comes down to; None where nothing tells. Speeds are medians of a step."""

    steps: int
    """The last training step."""
    total_steps: int | None
    reward: tuple[Point, Point] | None
    """Of the first and of the last step."""
    accuracy: tuple[Point, Point] | None
    """First and last validation."""
    running_s: float | None
    """Seconds that all attempts ran, together."""
    step_s: float | None
    tokens_per_s: float | None
    """A device."""
    tokens: float | None
    """Prompts and responses of all steps."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds spent on something, and the share of the whole."""

    what: str
    seconds: float
    share: float


def totals(record: RunRecord | None, history: Sequence[StepMetrics]) -> Totals:
    """The numbers of a run from its record, if it has one, and its metrics."""
    attempts = record.attempts if record else ()
    trained = [metrics for metrics in history if metrics.trained]
    return Totals(
        steps=max((metrics.step for metrics in trained), default=0),
        total_steps=next((one.total_steps for one in reversed(attempts) if one.total_steps), None),
        reward=_ends([(metrics.step, metrics["reward"]) for metrics in trained]),
        accuracy=_ends([(metrics.step, metrics.accuracy) for metrics in history]),
        running_s=sum(map(ran_s, attempts)) if attempts else None,
        step_s=_median([metrics["step_s"] for metrics in trained]),
        tokens_per_s=_median([metrics["tokens_per_s"] for metrics in trained]),
        tokens=sum(known) if (known := [n for metrics in trained if (n := metrics["tokens"])]) else None,
    )


def ran_s(attempt: Attempt) -> float:
    """Seconds from an attempt's start to its end, or to the last that is known of it."""
    return _seconds(attempt.started, attempt.ended or attempt.updated)


def step_shares(history: Sequence[StepMetrics], starts: Sequence[int] = ()) -> list[Spent]:
    """Mean seconds of a step by phase, and the share of each, in the order of a step; what no phase covers comes last.

    The first step of each attempt is left out where others are left: it warms up. `starts` are the steps after which later
    attempts went on. Validation is spread over all steps: verl's timer of the step does not hold it.
    """
    timed = [metrics for metrics in history if metrics.trained and metrics["step_s"]]
    first = {metrics.step for metrics in timed[:1]} | {step + 1 for step in starts}
    timed = [metrics for metrics in timed if metrics.step not in first] or timed
    spent = {phase: sum(metrics.seconds.get(phase, 0.0) for metrics in timed) for phase in TIMINGS}
    within = sum(seconds for phase, seconds in spent.items() if phase != BESIDE_STEP)
    spent[OTHER] = max(0.0, sum(metrics["step_s"] or 0.0 for metrics in timed) - within)
    return _spent({phase: seconds / len(timed) for phase, seconds in spent.items() if seconds})


def start_shares(attempt: Attempt) -> list[Spent]:
    """Seconds of each phase of an attempt's start; its last phase is the first step, unless it ended before that."""
    began = [(phase.name, phase.began) for phase in attempt.phases]
    if attempt.last_step is None and attempt.ended:
        began.append(("", attempt.ended))
    spent: dict[str, float] = {}
    for (name, at), (_, until) in pairwise(began):
        spent[name] = spent.get(name, 0.0) + _seconds(at, until)
    return _spent(spent)


def _spent(seconds: dict[str, float]) -> list[Spent]:
    whole = sum(seconds.values())
    return [Spent(what, one, one / whole if whole else 0.0) for what, one in seconds.items()]


def _seconds(began: str, ended: str) -> float:
    return max(0.0, (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds())


def _ends(points: Sequence[tuple[int, float | None]]) -> tuple[Point, Point] | None:
    known = [Point(step, value) for step, value in points if value is not None]
    return (known[0], known[-1]) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run in the list. What nothing on disk tells is None; times are ISO 8601 in UTC, sizes in bytes."""

    name: str
    preset: str | None
    state: Status | None
    step: int | None
    total_steps: int | None
    reward: float | None
    accuracy: float | None
    attempts: int
    changed: str
    run_bytes: int
    checkpoint_bytes: int
    problem: str | None
    """Why there is no record, if there should be one."""

    def document(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def rows() -> list[Row]:
    """All runs, the one that changed last first."""
    return sorted(map(row, store.every()), key=lambda one: (one.changed, one.name), reverse=True)


def row(run: Known) -> Row:
    """The row of one run, from its record and the end of its metrics."""
    logged = run.logged()
    step, accuracy = read_last(logged[1].metrics) if logged else (None, None)
    preset, total = _planned(run)
    last = run.last
    reached = step.step if step else None
    return Row(
        name=run.name,
        preset=run.record.preset if run.record else preset,
        state=run.state,
        step=last.last_step if last and last.last_step is not None else reached,
        total_steps=last.total_steps if last and last.total_steps is not None else total,
        reward=step["reward"] if step else None,
        accuracy=accuracy,
        attempts=max(len(run.record.attempts) if run.record else 0, len(run.paths.attempts())),
        changed=last.updated if last else _changed(run),
        run_bytes=size(run.paths.root),
        checkpoint_bytes=size(run.paths.checkpoints),
        problem=run.damage,
    )


def _planned(run: Known) -> tuple[str | None, int | None]:
    """Preset and number of steps by the newest plan; only read where the record does not tell."""
    if run.last and run.last.total_steps is not None:
        return None, None
    for number in reversed(run.paths.attempts()):
        if plan := run.plan(number):
            return plan.get("preset"), run.setting(number, "trainer", "steps")
    return None, None


def _changed(run: Known) -> str:
    """When anything of a run without a record was written last."""
    attempts = [run.paths.attempt(number) for number in run.paths.attempts()]
    places = [run.paths.root, *(file for one in attempts for file in (one.root, one.log, one.metrics))]
    return datetime.fromtimestamp(max(map(_modified, places)), UTC).isoformat(timespec="seconds")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


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
    steps = metrics.recorded_history(run.paths, run.record)
    last = run.last
    return Detail(
        row=row(run),
        run=run,
        attempts=tuple(_attempts(run)),
        steps=tuple(steps),
        holes=tuple(metrics.holes(steps)),
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
    state = store.state(attempt)
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
