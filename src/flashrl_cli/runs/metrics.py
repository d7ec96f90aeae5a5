"""Follow the metrics file of an attempt while verl writes it.

Read the lines that another process appends to a file.

The metrics of a run as one curve, however many attempts it took.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.runs import store
from flashrl_cli.verl.metrics import VALIDATION, StepMetrics, read_step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.store import RunRecord


class Tail:
    """Complete lines of a growing file from byte `start` on, each once. The file may not exist yet; a torn last line waits for its end."""

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self._offset = start

    def poll(self, *, ended: bool = False) -> list[str]:
        """Lines completed since the last call, without their line ends; undecodable bytes are replaced.

        Once the writer has `ended`, a last line without an end is a line too.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        end = len(data) if ended else data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].decode("utf-8", errors="replace").splitlines()


LOOK_BACK = 1 << 20
"""Bytes at the end of a metrics file in which the last accuracy is looked for: some 200 steps."""


class MetricsTail:
    """Yields each step once, as soon as its line is complete; lines that are no JSON are passed over."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)

    def poll(self) -> Iterator[StepMetrics]:
        """Steps that were written since the last call."""
        for line in self._tail.poll():
            step = _read(line)
            if step is not None:
                yield step


def read_metrics(path: Path) -> list[StepMetrics]:
    """All steps of a metrics file, in order; empty if there is none."""
    return list(MetricsTail(path).poll())


def read_last(path: Path) -> tuple[StepMetrics | None, float | None]:
    """The last training step of a metrics file and the last accuracy, from the file's end alone."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - LOOK_BACK))
            data = stream.read()
    except OSError:
        return None, None
    accuracies = (step.accuracy for step in _backwards(data, f'"{VALIDATION}'.encode()) if step.accuracy is not None)
    return next((step for step in _backwards(data, b'"step"') if step.trained), None), next(accuracies, None)


def _backwards(data: bytes, text: bytes) -> Iterator[StepMetrics]:
    """Steps of the lines that hold `text`, the last one first."""
    end = len(data)
    while (found := data.rfind(text, 0, end)) >= 0:
        start, stop = data.rfind(b"\n", 0, found) + 1, data.find(b"\n", found)
        step = _read(data[start : stop if stop >= 0 else len(data)].decode("utf-8", errors="replace"))
        if step is not None:
            yield step
        end = start


def _read(line: str) -> StepMetrics | None:
    """The step of a line; None if the line is torn or no step's."""
    try:
        record = json.loads(line)
        step, data = int(record["step"]), dict(record["data"])
    except (ValueError, KeyError, TypeError):
        return None
    return read_step(step, data)


def history(run: RunPaths) -> list[StepMetrics]:
    """Every step of `run` once, in order of step, as the newest attempt that did it logged it. Raises as `record.load`."""
    return recorded_history(run, store.load(run.record))


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
