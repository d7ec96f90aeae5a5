"""A run as a row of the list, as numbers, and in full.

`rows` is the list of runs, one `Row` each. `summarize` reads all files of one run once: `flashrl runs show` prints its
`Summary` and `render.run_report` writes it as a report.
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
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs import mismatch, store
from flashrl_cli.runs.metrics import last_values, read_last, read_run_metrics
from flashrl_cli.runs.replay import replay_run
from flashrl_cli.runs.samples import shown
from flashrl_cli.runs.saved import measure
from flashrl_cli.runs.speed import Speed, Spent, diagnose, spent, step_shares
from flashrl_cli.verl.metrics import dropped, dropped_in_words

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Mapping, Sequence

    from flashrl_cli.runs.metrics import RunMetrics
    from flashrl_cli.runs.mismatch import Advice
    from flashrl_cli.runs.replay import Replay
    from flashrl_cli.runs.samples import Shown
    from flashrl_cli.runs.store import Attempt, Run, RunRecord, Status
    from flashrl_cli.verl.metrics import StepMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run in the list. Unknown values are None; times are ISO 8601 in UTC, sizes in bytes."""

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
    """Why the record is missing or unreadable, if the run should have one."""


def rows() -> list[Row]:
    """All runs, the most recently changed one first."""
    return sorted(map(row, store.all_runs()), key=lambda one: (one.changed, one.name), reverse=True)


def row(run: Run, metrics: RunMetrics | None = None) -> Row:
    """The row of one run from its record and `metrics`, which default to the end of the newest metrics file."""
    step, accuracy = None, None
    if (logged := run.logged()) is not None:
        file = run.paths.attempt(logged).metrics
        step, accuracy = read_last(file) if metrics is None else last_values(metrics.attempts.get(logged, ()))
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
        attempts=max(len(run.attempts), len(run.paths.attempts())),
        changed=last.updated if last else _changed(run),
        run_bytes=measure(run.paths.root)[0],
        checkpoint_bytes=measure(run.paths.checkpoints)[0],
        problem=run.damage,
    )


def _planned(run: Run) -> tuple[str | None, int | None]:
    """Preset and number of steps from the newest readable plan; only read where the record lacks them."""
    if run.last and run.last.total_steps is not None:
        return None, None
    for number in reversed(run.paths.attempts()):
        if plan := run.plan(number):
            return plan.get("preset"), run.setting(number, "trainer", "steps")
    return None, None


def _changed(run: Run) -> str:
    """When a file of a run without a record was last written."""
    attempts = [run.paths.attempt(number) for number in run.paths.attempts()]
    places = [run.paths.root, *(file for one in attempts for file in (one.root, one.log, one.metrics))]
    return datetime.fromtimestamp(max(map(_modified, places)), UTC).isoformat(timespec="seconds")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """A value and the step that it belongs to."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A run in numbers; None for unknown values. Speeds are medians over the steps."""

    steps: int
    """The last training step."""
    total_steps: int | None
    reward: tuple[Point, Point] | None
    """Reward of the first and of the last step."""
    accuracy: tuple[Point, Point] | None
    """Accuracy of the first and of the last validation."""
    running_s: float | None
    """Seconds that all attempts ran, added up."""
    step_s: float | None
    tokens_per_s: float | None
    """Tokens per second and device."""
    tokens: float | None
    """Prompt and response tokens of all steps."""


def totals(record: RunRecord | None, history: Sequence[StepMetrics]) -> Totals:
    """The numbers of a run from its metrics and, if it has one, its record."""
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
    """Seconds from an attempt's start to its end, or to the last update of its entry."""
    return _seconds(attempt.started, attempt.ended or attempt.updated)


def start_shares(attempt: Attempt) -> list[Spent]:
    """Seconds of each phase of an attempt's start; the last phase is the first step, unless it ended earlier."""
    began = [(phase.name, phase.began) for phase in attempt.phases]
    if attempt.last_step is None and attempt.ended:
        began.append(("", attempt.ended))
    seconds: dict[str, float] = {}
    for (name, at), (_, until) in pairwise(began):
        seconds[name] = seconds.get(name, 0.0) + _seconds(at, until)
    return spent(seconds)


def _seconds(began: str, ended: str) -> float:
    return max(0.0, (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds())


def _ends(points: Sequence[tuple[int, float | None]]) -> tuple[Point, Point] | None:
    known = [Point(step, value) for step, value in points if value is not None]
    return (known[0], known[-1]) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """An attempt in the list; without a record only its number and its last step are known."""

    number: int
    state: Status | None = None
    started: str | None = None
    seconds: float | None = None
    """Seconds from its start to its end, to now, or (if it is lost) to the last update of its entry."""
    last_step: int | None = None
    resumed_from: int | None = None
    exit_code: int | None = None
    error: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All that is known about one run; `notes` name what could not be read."""

    row: Row
    run: Run
    attempts: tuple[AttemptRow, ...]
    metrics: RunMetrics
    start: tuple[Spent, ...]
    """Phases of the start of the newest attempt."""
    step: tuple[Spent, ...]
    """Phases of a median step."""
    speed: Speed
    """How fast the last steps were, and what slowed them."""
    plans: Mapping[int, Mapping[str, Any]]
    """The plans' documents, by attempt."""
    handshakes: dict[int, list[Handshake]]
    """The latest handshakes of each attempt's rollout workers: from its files, else from the record."""
    advice: Advice
    """Mismatch advice on the newest attempt that logged metrics."""
    replay: Replay | None
    """Other corrections of the last steps whose log-ratios were kept; None if none were."""
    samples: Shown | None
    """Responses of the last step of which some were kept; None if none were."""
    notes: tuple[str, ...]

    @property
    def proof(self) -> Sequence[Handshake]:
        """Handshakes of the newest attempt that has some, as the record kept them when the precision was proven."""
        for attempt in reversed(self.run.attempts):
            if attempt.proof:
                with contextlib.suppress(TypeError):
                    return [Handshake(**one) for one in attempt.proof]
        return next((found for _, found in reversed(self.handshakes.items()) if found), ())

    @property
    def dropped(self) -> Counter[str]:
        """How many groups of responses were sampled and not trained on, by the metric that counts them."""
        return dropped(self.metrics.history)

    @property
    def set_aside(self) -> list[str]:
        """Superseded checkpoints that attempts moved out of their way, with the reasons."""
        return [one for attempt in self.run.attempts for one in attempt.set_aside]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The newest plan; empty if there is none."""
        return self.plans[max(self.plans)] if self.plans else {}

    def document(self) -> dict[str, Any]:
        """Plain data for `runs show --json`: the unchanged record, and what is computed from the metrics."""
        history = self.metrics.history
        return {
            "run": asdict(self.row),
            "folder": str(self.run.paths.root),
            "checkpoints": str(self.run.paths.checkpoints),
            "record": asdict(self.run.record) if self.run.record else None,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "curve": [{"step": s.step, "reward": s["reward"], "accuracy": s.accuracy} for s in history],
            "holes": self.metrics.missing,
            "start": [asdict(spent) for spent in self.start],
            "step": [asdict(spent) for spent in self.step],
            "speed": self.speed.document(),
            "proof": [asdict(one) for one in self.proof],
            "set_aside": self.set_aside,
            "dropped": dict(self.dropped),
            "mismatch": self.advice.document(),
            "correction": self.replay.document() if self.replay else None,
        }


def summarize(run: Run) -> Summary:
    """Read the files of `run`, which may lack a record, plans or metrics."""
    notes: list[str] = []
    if run.damage:
        notes.append(f"The record is left out: {run.damage}.")
    elif run.record is None:
        notes.append("There is no record (run.json): state, times and causes are not known.")
    metrics = read_run_metrics(run.paths, run.record)
    plans = {number: plan for number in run.paths.attempts() if (plan := _plan(run, number, notes))}
    handshakes = {number: _handshakes(run, number, notes) for number in run.paths.attempts()}
    if not metrics.history:
        notes.append("No step was logged.")
    if metrics.missing:
        notes.append(f"Steps without metrics: {', '.join(map(str, metrics.missing))}.")
    if groups := dropped(metrics.history):
        notes.append(f"Dropped and not trained on: {dropped_in_words(groups)}.")
    return Summary(
        row=row(run, metrics),
        run=run,
        attempts=tuple(_attempts(run, metrics)),
        metrics=metrics,
        start=tuple(start_shares(run.last) if run.last else ()),
        step=tuple(step_shares(metrics.history, metrics.resumed_after)),
        speed=diagnose(metrics.history, metrics.resumed_after, plans[max(plans)] if plans else {}),
        plans=plans,
        handshakes=handshakes,
        advice=_advice(run, metrics),
        replay=_replay(run, notes),
        samples=_samples(run, notes),
        notes=tuple(notes),
    )


def _plan(run: Run, number: int, notes: list[str]) -> dict[str, Any] | None:
    try:
        return store.read_plan(run.paths.attempt(number).plan)
    except FileNotFoundError:
        notes.append(f"Attempt {number} left no plan.")
    except InputError as error:
        notes.append(f"The plan of attempt {number} is left out: {error.message}.")
    return None


def _handshakes(run: Run, number: int, notes: list[str]) -> list[Handshake]:
    """Handshakes of an attempt, from its files or else from the record."""
    recorded = next((one.proof for one in run.attempts if one.number == number), ())
    try:
        found = list(contract.read_handshakes(run.paths.attempt(number).plugins))
        return found or [Handshake(**one) for one in recorded]
    except (ValueError, TypeError, AttributeError):
        notes.append(f"A handshake of attempt {number} is damaged.")
        return []


def _advice(run: Run, metrics: RunMetrics) -> Advice:
    """Mismatch advice on the newest attempt that logged metrics, with the cap that it was started with."""
    number = run.logged()
    if number is None:
        return mismatch.advise([], None)
    cap, kind = (run.setting(number, "correction", name) for name in ("cap", "kind"))
    return mismatch.advise(metrics.attempts.get(number, ()), cap if isinstance(cap, int | float) else None, kind)


def _samples(run: Run, notes: list[str]) -> Shown | None:
    """Responses of the last step that kept some; a note for each file that cannot be read."""
    try:
        found = shown(run)
    except NothingMatched:
        return None
    except InputError as error:
        notes.append(error.message)
        return None
    notes.extend(found.damaged)
    return found


def _replay(run: Run, notes: list[str]) -> Replay | None:
    """The replay of the last kept steps; a note for each file that cannot be read."""
    try:
        found = replay_run(run)
    except NothingMatched:
        return None
    except InputError as error:
        notes.append(f"The kept log-ratios are left out: {error.message}.")
        return None
    notes.extend(f"A step's log-ratios are left out: {one}." for one in found.damaged)
    return found


def _attempts(run: Run, metrics: RunMetrics) -> Iterator[AttemptRow]:
    recorded = {attempt.number: attempt for attempt in run.attempts}
    for number in sorted({*recorded, *metrics.attempts}):
        if attempt := recorded.get(number):
            yield _attempt(attempt)
        else:
            yield AttemptRow(
                number=number, last_step=max((step.step for step in metrics.attempts[number]), default=None)
            )


def _attempt(attempt: Attempt) -> AttemptRow:
    state = store.state(attempt)
    end = attempt.ended or (datetime.now(UTC).isoformat() if state == "running" else attempt.updated)
    return AttemptRow(
        number=attempt.number,
        state=state,
        started=attempt.started,
        seconds=_seconds(attempt.started, end),
        last_step=attempt.last_step,
        resumed_from=attempt.resumed_from,
        exit_code=attempt.exit_code,
        error=attempt.error,
        hint=attempt.hint,
    )
