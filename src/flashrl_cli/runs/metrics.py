"""Metrics that verl writes while it trains, merged over all attempts of a run into one history.

`Tail` reads the lines that another process appends to a file, `MetricsTail` the steps among them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.runs import store
from flashrl_cli.verl.metrics import VALIDATION, StepMetrics, read_step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.store import RunRecord

LOOK_BACK = 1 << 20
"""Bytes at the end of a metrics file that are searched for the last accuracy: about 200 steps."""


class Tail:
    """Reads each complete line of a growing file once, from byte `start` on.

    The file may not exist yet; an incomplete last line is returned once its end is written.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self._offset = start

    def poll(self, *, ended: bool = False) -> list[str]:
        """Lines completed since the last call, without their line ends; undecodable bytes are replaced.

        Once the writer has `ended`, a last line without a line end counts as well.
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


class MetricsTail:
    """Yields each step once, as soon as its line is complete; lines that hold no step are skipped."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)

    def poll(self) -> Iterator[StepMetrics]:
        """Yield the steps that were written since the last call."""
        for line in self._tail.poll():
            step = _read(line)
            if step is not None:
                yield step


def read_metrics(path: Path) -> list[StepMetrics]:
    """All steps of a metrics file, in order; empty if the file does not exist."""
    return list(MetricsTail(path).poll())


def read_last(path: Path) -> tuple[StepMetrics | None, float | None]:
    """The last training step of a metrics file and the last accuracy, read from the end of the file only."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - LOOK_BACK))
            data = stream.read()
    except OSError:
        return None, None
    accuracies = (step.accuracy for step in _backwards(data, f'"{VALIDATION}'.encode()) if step.accuracy is not None)
    return next((step for step in _backwards(data, b'"step"') if step.trained), None), next(accuracies, None)


def last_values(logged: Sequence[StepMetrics]) -> tuple[StepMetrics | None, float | None]:
    """The last training step among `logged`, in order, and the last accuracy: what `read_last` finds in their file."""
    accuracies = (step.accuracy for step in reversed(logged) if step.accuracy is not None)
    return next((step for step in reversed(logged) if step.trained), None), next(accuracies, None)


def _backwards(data: bytes, text: bytes) -> Iterator[StepMetrics]:
    """Yield the steps of lines that contain `text`, the last one first."""
    end = len(data)
    while (found := data.rfind(text, 0, end)) >= 0:
        start, stop = data.rfind(b"\n", 0, found) + 1, data.find(b"\n", found)
        step = _read(data[start : stop if stop >= 0 else len(data)].decode("utf-8", errors="replace"))
        if step is not None:
            yield step
        end = start


def _read(line: str) -> StepMetrics | None:
    """The step of a line; None if the line is incomplete or holds no step."""
    try:
        record = json.loads(line)
        step, data = int(record["step"]), dict(record["data"])
    except (ValueError, KeyError, TypeError):
        return None
    return read_step(step, data)


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """The metrics of a run, with each attempt's file read once."""

    attempts: Mapping[int, Sequence[StepMetrics]]
    """Steps by number of the attempt that logged them, in order of number."""
    history: list[StepMetrics]
    """Every step once, in order, from the newest attempt that logged it."""

    @property
    def resumed_after(self) -> tuple[int, ...]:
        """Steps after which later attempts resumed, unless a still later attempt went back before them."""
        attempts = ([metrics.step for metrics in logged if metrics.trained] for logged in self.attempts.values())
        began = [min(steps) - 1 for steps in attempts if steps]
        later = {step for index, step in enumerate(began[1:], start=2) if all(step < after for after in began[index:])}
        return tuple(sorted(step for step in later if step > began[0]))

    @property
    def missing(self) -> list[int]:
        """Training steps below the last one whose metrics are missing."""
        return holes(self.history)


def read_run_metrics(run: RunPaths, record: RunRecord | None) -> RunMetrics:
    """Read the metrics of all attempts of `run`; `record` is the run's record, None if it is not available."""
    resumed = {attempt.number: attempt.resumed_from or 0 for attempt in record.attempts} if record else {}
    attempts = {number: read_metrics(run.attempt(number).metrics) for number in run.attempts()}
    return RunMetrics(attempts, merge(attempts, resumed))


def history(run: RunPaths) -> list[StepMetrics]:
    """Every step of `run` once, in order, from the newest attempt that logged it.

    Raises the errors of `store.load`.
    """
    return read_run_metrics(run, store.load(run.record)).history


def merge(attempts: Mapping[int, Sequence[StepMetrics]], resumed: Mapping[int, int]) -> list[StepMetrics]:
    """Merge the steps of all attempts (by number, in order of their start); later attempts override earlier ones.

    `resumed` maps an attempt to the step that it resumed from: once the attempt has logged a step itself, the steps of
    earlier attempts beyond that one are dropped. An attempt that is not in `resumed` drops nothing.
    """
    steps: dict[int, StepMetrics] = {}
    for number, logged in attempts.items():
        if logged and number in resumed:
            steps = {step: metrics for step, metrics in steps.items() if step <= resumed[number]}
        for metrics in logged:
            steps[metrics.step] = _over(steps.get(metrics.step), metrics)
    return [steps[step] for step in sorted(steps)]


def _over(earlier: StepMetrics | None, later: StepMetrics) -> StepMetrics:
    """`later`, unless it holds only a validation: then its accuracy is added to the metrics of the training step."""
    if earlier is None or later.trained:
        return later
    return dataclasses.replace(earlier, accuracy=later.accuracy, logged={**earlier.logged, **later.logged})


def holes(steps: Iterable[StepMetrics]) -> list[int]:
    """Training steps below the last one whose metrics are missing."""
    found = {metrics.step for metrics in steps}
    return [step for step in range(1, max(found, default=0)) if step not in found]
