"""Follow the metrics file of an attempt while verl writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flashrl_cli.runs.tail import Tail
from flashrl_cli.verl.metrics import VALIDATION, StepMetrics, read_step

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
