"""The metrics of a run as one curve, however many attempts it took."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from flashrl_cli.runs import record
from flashrl_cli.runs.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.record import RunRecord
    from flashrl_cli.verl.metrics import StepMetrics


def history(run: RunPaths) -> list[StepMetrics]:
    """Every step of `run` once, in order of step, as the newest attempt that did it logged it. Raises as `record.load`."""
    return recorded_history(run, record.load(run.record))


def recorded_history(run: RunPaths, found: RunRecord | None) -> list[StepMetrics]:
    """The same by a record that was read already; None where there is none to be had."""
    resumed = {attempt.number: attempt.resumed_from or 0 for attempt in found.attempts} if found else {}
    return merge(((n, read_metrics(run.attempt(n).metrics)) for n in run.attempts()), resumed)


def merge(attempts: Iterable[tuple[int, list[StepMetrics]]], resumed: Mapping[int, int]) -> list[StepMetrics]:
    """Metrics of attempts (number, steps) in order of their start, later ones over earlier ones.

    `resumed` maps an attempt to the step that it went on from: what earlier ones did beyond it was undone once the attempt
    logged a step itself. An attempt that is not in it undoes nothing.
    """
    steps: dict[int, StepMetrics] = {}
    for number, logged in attempts:
        if logged and number in resumed:
            steps = {step: metrics for step, metrics in steps.items() if step <= resumed[number]}
        for metrics in logged:
            steps[metrics.step] = _over(steps.get(metrics.step), metrics)
    return [steps[step] for step in sorted(steps)]


def _over(earlier: StepMetrics | None, later: StepMetrics) -> StepMetrics:
    """`later`, unless it is a validation alone: that adds its accuracy to what the training of the step logged."""
    if earlier is None or later.trained:
        return later
    return dataclasses.replace(earlier, accuracy=later.accuracy, logged={**earlier.logged, **later.logged})


def holes(steps: Iterable[StepMetrics]) -> list[int]:
    """Training steps below the last one whose metrics are missing."""
    found = {metrics.step for metrics in steps}
    return [step for step in range(1, max(found, default=0)) if step not in found]
