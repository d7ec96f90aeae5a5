"""What became of a sweep's points, read from the records and metrics of their runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.runs import record
from flashrl_cli.runs.history import history

if TYPE_CHECKING:
    from flashrl_cli.launch.sweep.points import Point
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.metrics import StepMetrics

LAST_SHARE, LAST_LEAST = 10, 5
"""Means are taken over the last tenth of a run's steps, and over five at least: one step is noise."""
MEANS = ("reward", "kl", "truncated", "step_s", "tokens_per_s")
HEADINGS = ("run", "state", "steps", "reward", "accuracy", "KL", "cut %", "s/step", "tok/s", "best")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A point and how its run stands: `steps` done, means of the last ones, accuracy of the last validation."""

    point: Point
    run: str
    state: str
    """As the run's record has it, or `waiting`."""
    steps: int
    total: int | None
    means: dict[str, float | None]
    accuracy: float | None
    error: str | None
    hint: str | None

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": self.run,
            "values": self.point.data(),
            "state": self.state,
            "steps": self.steps,
            "total": self.total,
            "accuracy": self.accuracy,
            **self.means,
            "error": self.error,
            "hint": self.hint,
        }

    def cells(self, *, best: bool) -> list[object]:
        """For people, under the point's keys and `HEADINGS`."""
        means, cut = self.means, self.means["truncated"]
        steps = f"{self.steps}/{self.total}" if self.total else self.steps
        return [
            *self.point.texts(),
            *(self.run, self.state, steps, means["reward"], self.accuracy, means["kl"]),
            *(None if cut is None else 100 * cut, means["step_s"], means["tokens_per_s"], "★" if best else ""),
        ]


def row(point: Point, run: RunPaths) -> Row:
    """How the run of a point stands now."""
    found = record.load(run.record)
    last = found.last if found else None
    steps = history(run)
    trained = [step for step in steps if step.trained]
    accuracies = [step.accuracy for step in steps if step.accuracy is not None]
    return Row(
        point=point,
        run=run.name,
        state=record.state(last) if last else "waiting",
        steps=max((step.step for step in trained), default=0),
        total=last.total_steps if last else None,
        means={name: _mean(name, trained) for name in MEANS},
        accuracy=accuracies[-1] if accuracies else None,
        error=last.error if last else None,
        hint=last.hint if last else None,
    )


def best(rows: Sequence[Row]) -> Row | None:
    """The finished run of the highest accuracy, or of the highest reward where not all were validated.

    None where fewer than two have finished.
    """
    done = [one for one in rows if one.state == "done"]
    if len(done) < 2:
        return None
    if all(one.accuracy is not None for one in done):
        return max(done, key=lambda one: one.accuracy or 0.0)
    rewarded = [one for one in done if one.means["reward"] is not None]
    return max(rewarded, key=lambda one: one.means["reward"] or 0.0, default=None)


def _mean(name: str, trained: Sequence[StepMetrics]) -> float | None:
    last = trained[-max(len(trained) // LAST_SHARE, LAST_LEAST) :]
    values = [value for step in last if (value := step[name]) is not None]
    return statistics.fmean(values) if values else None
