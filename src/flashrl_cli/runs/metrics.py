"""Follow the metrics file of an attempt while verl writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flashrl_cli.runs.tail import Tail
from flashrl_cli.verl.metrics import StepMetrics, read_step


class MetricsTail:
    """Yields each step once, as soon as its line is complete; lines that are no JSON are passed over."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)

    def poll(self) -> Iterator[StepMetrics]:
        """Steps that were written since the last call."""
        for line in self._tail.poll():
            try:
                record = json.loads(line)
                step, data = int(record["step"]), dict(record["data"])
            except (ValueError, KeyError, TypeError):
                continue
            yield read_step(step, data)


def read_metrics(path: Path) -> list[StepMetrics]:
    """All steps of a metrics file, in order; empty if there is none."""
    return list(MetricsTail(path).poll())
