"""Metrics as curves over the steps of one or several runs: their titles, where they break, how they are smoothed."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import holes, read_run_metrics
from flashrl_cli.verl.metrics import AT, FIGURES, FRESH, METRICS, NAMES, PLOTTED, SECONDS, TIMINGS, verl_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.metrics import StepMetrics

    Histories = Mapping[str, Sequence[StepMetrics]]

SCHEMA_VERSION = 1
ACCURACY = "accuracy"
SMOOTHING = 0.6
_NEAR = 4
"""Number of similar names that are suggested for an unknown one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric of one run: its value at each of `steps`, None where the line breaks (NaN, or a lost step).

    `starts` are the steps after which later attempts resumed; `every_step` says whether all training steps logged the
    metric.
    """

    run: str
    metric: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    starts: tuple[int, ...] = ()
    every_step: bool = True

    def smoothed(self, weight: float) -> list[float | None]:
        """The values smoothed by `weight`; a metric that is measured only now and then is not smoothed."""
        return smoothed(self.values, weight if self.every_step else 0)


def title(metric: str) -> tuple[str, str]:
    """A metric's title, and its unit (empty for none)."""
    if metric.startswith(SECONDS):
        return metric.removeprefix(SECONDS), "s"
    name, at, number = metric.partition(AT)
    if at and name in FIGURES:
        of = "tokens scored again" if number == FRESH else f"staleness {number}" if number else "by staleness"
        return f"{METRICS[name].title}, {of}", METRICS[name].unit
    known = METRICS.get(metric)
    return (known.title or metric, known.unit) if known else (metric, "")


def curve(run: str, history: Sequence[StepMetrics], metric: str, starts: Sequence[int] = ()) -> Curve | None:
    """The curve of `metric`, by flashrl's name or verl's; None if no step has a value of it.

    Steps that did not log the metric (only some steps validate) have no point. A metric that every training step logs
    breaks where the history has a gap.
    """
    found = points(history, metric)
    if all(value is None for value in found.values()):
        return None
    every_step = all(metrics.step in found for metrics in history if metrics.trained)
    if every_step:
        found.update((step, None) for step in holes(history) if step > min(found))
    steps = tuple(sorted(found))
    values = tuple(found[step] for step in steps)
    return Curve(run=run, metric=metric, steps=steps, values=values, starts=tuple(starts), every_step=every_step)


def smoothed(values: Sequence[float | None], weight: float) -> list[float | None]:
    """Exponential moving average of `values`; `weight` (at least 0, below 1) is the weight of the past.

    None stays None and does not contribute to the average.

    m_t = w m_(t-1) + (1 - w) x_t, divided by 1 - w^t so that the start is not biased toward zero: Kingma and Ba, Adam
    (arXiv 1412.6980, section 3), and the smoothing of TensorBoard's scalars.
    """
    out: list[float | None] = []
    mean, mass = 0.0, 0.0
    for value in values:
        if value is None:
            out.append(None)
            continue
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)  # 1 - weight^t
        out.append(mean / mass)
    return out


def points(history: Sequence[StepMetrics], metric: str) -> dict[int, float | None]:
    """Steps that logged `metric`, each with its value; None for NaN and infinity."""
    if metric == ACCURACY:
        return {metrics.step: metrics.accuracy for metrics in history if metrics.accuracy is not None}
    key = verl_name(metric)
    return {metrics.step: _finite(metrics.logged[key]) for metrics in history if key in metrics.logged}


def _finite(value: object) -> float | None:
    """The value if it can be drawn, else None; verl's file holds null for NaN, and may hold Infinity."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Gathered:
    """Curves of several runs by metric, with one sentence for each requested metric or run that is missing."""

    panels: Mapping[str, Sequence[Curve]]
    missing: tuple[str, ...]

    def document(self, weight: float) -> dict[str, Any]:
        """The curves as plain data, with the values smoothed by `weight`."""
        listed = (one for curves in self.panels.values() for one in curves)
        curves = [{**asdict(one), "smoothed": one.smoothed(weight)} for one in listed]
        return {"schema_version": SCHEMA_VERSION, "smoothing": weight, "curves": curves, "missing": list(self.missing)}


def gather(runs: Sequence[RunPaths], asked: str | None) -> Gathered:
    """Curves of `runs` for a comma-separated list of metrics, or by default for those of `PLOTTED` that are present.

    Raises InputError for an unknown metric, NothingMatched if there is nothing to draw.
    """
    read = {run.name: read_run_metrics(run, store.load(run.record)) for run in runs}
    histories = {name: metrics.history for name, metrics in read.items()}
    silent = [name for name, steps in histories.items() if not steps]
    if len(silent) == len(histories):
        hint = "`flashrl runs watch NAME` shows when there is one"
        raise NothingMatched(f"no step yet in {', '.join(silent)}", hint=hint)
    metrics = PLOTTED if asked is None else _chosen(asked, histories)
    panels: dict[str, list[Curve]] = {}
    missing = [f"no step yet in {name}" for name in silent]
    for metric in metrics:
        found = {
            name: curve(name, steps, metric, read[name].resumed_after) for name, steps in histories.items() if steps
        }
        panels[metric] = [one for one in found.values() if one]
        missing += [f"no {metric} in {name}" for name, one in found.items() if asked is not None and not one]
    panels = {metric: drawn for metric, drawn in panels.items() if drawn}
    if not panels:
        there = f"there are: {_present(histories)}"
        raise NothingMatched(f"no value of {', '.join(metrics)} in {', '.join(histories)}", hint=there)
    return Gathered(panels, tuple(missing))


def _chosen(asked: str, histories: Histories) -> list[str]:
    """Metrics of a comma-separated list, without duplicates.

    Raises InputError for names that neither flashrl nor any of the runs has.
    """
    names = list(dict.fromkeys(name for part in asked.split(",") if (name := part.strip())))
    if not names:
        raise InputError("--metric names no metric", hint=f"--metric {','.join(PLOTTED[:2])}")
    known = _known(histories)
    unknown = [name for name in names if name not in known]
    if unknown:
        near = list(dict.fromkeys(one for name in unknown for one in _near(name, known)))
        hint = f"did you mean {' or '.join(near)}?" if near else f"flashrl's names: {', '.join(_own_names())}"
        raise InputError(f"no metric {', '.join(map(repr, unknown))}", hint=hint)
    return names


def _own_names() -> list[str]:
    return [*NAMES, ACCURACY, *(f"{SECONDS}{phase}" for phase in TIMINGS)]


def _known(histories: Histories) -> list[str]:
    """flashrl's names, then verl's names that some run logged."""
    steps = [metrics for history in histories.values() for metrics in history]
    stale = {name for metrics in steps for name in metrics.values if AT in name}
    return [*_own_names(), *sorted(stale), *sorted({key for metrics in steps for key in metrics.logged})]


def _present(histories: Histories) -> str:
    """flashrl's names of the metrics that at least one run has values of."""
    by_run = histories.values()
    return ", ".join(n for n in _own_names() if any(v is not None for h in by_run for v in points(h, n).values()))


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Known names that resemble `name` or contain it."""
    holding = [one for one in known if name.lower() in one.lower()]
    return list(dict.fromkeys([*difflib.get_close_matches(name, known, _NEAR), *holding]))[:_NEAR]
