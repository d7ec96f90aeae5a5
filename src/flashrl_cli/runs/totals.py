"""A run in numbers: how far it came, how good, how fast, and where its time went."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from flashrl_cli.verl.metrics import BESIDE_STEP, TIMINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.runs.record import Attempt, RunRecord
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
