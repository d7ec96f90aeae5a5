"""Curves of several runs side by side, for the metrics that somebody asks for."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs.curves import ACCURACY, DEFAULTS, curve, points, starts
from flashrl_cli.runs.history import history
from flashrl_cli.verl.metrics import NAMES, SECONDS, TIMINGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.curves import Curve
    from flashrl_cli.verl.metrics import StepMetrics

    Histories = Mapping[str, Sequence[StepMetrics]]

SCHEMA_VERSION = 1
_NEAR = 4


@dataclass(frozen=True, slots=True)
class Gathered:
    """Curves of several runs by metric, and what was asked for and is not among them, a sentence each."""

    panels: Mapping[str, Sequence[Curve]]
    missing: tuple[str, ...]

    def document(self, weight: float) -> dict[str, Any]:
        """The curves as plain data, with the values smoothed by `weight`."""
        listed = (one for curves in self.panels.values() for one in curves)
        curves = [{**asdict(one), "smoothed": one.smoothed(weight)} for one in listed]
        return {"schema_version": SCHEMA_VERSION, "smoothing": weight, "curves": curves, "missing": list(self.missing)}


def gather(runs: Sequence[RunPaths], asked: str | None) -> Gathered:
    """Curves of `runs` for a comma-separated list of metrics, or for those of `DEFAULTS` that there are.

    Raises InputError for an unknown metric, NothingMatched if there is nothing to draw.
    """
    histories = {run.name: history(run) for run in runs}
    silent = [name for name, steps in histories.items() if not steps]
    if len(silent) == len(histories):
        hint = "`flashrl runs watch NAME` shows when there is one"
        raise NothingMatched(f"no step yet in {', '.join(silent)}", hint=hint)
    metrics = DEFAULTS if asked is None else _chosen(asked, histories)
    resumed = {run.name: starts(run) for run in runs}
    panels: dict[str, list[Curve]] = {}
    missing = [f"no step yet in {name}" for name in silent]
    for metric in metrics:
        found = {name: curve(name, steps, metric, resumed[name]) for name, steps in histories.items() if steps}
        panels[metric] = [one for one in found.values() if one]
        missing += [f"no {metric} in {name}" for name, one in found.items() if asked is not None and not one]
    panels = {metric: drawn for metric, drawn in panels.items() if drawn}
    if not panels:
        there = f"there are: {_present(histories)}"
        raise NothingMatched(f"no value of {', '.join(metrics)} in {', '.join(histories)}", hint=there)
    return Gathered(panels, tuple(missing))


def _chosen(asked: str, histories: Histories) -> list[str]:
    """Metrics of a comma-separated list, each once. Raises InputError for names that neither flashrl nor any run has."""
    names = list(dict.fromkeys(name for part in asked.split(",") if (name := part.strip())))
    if not names:
        raise InputError("--metric names no metric", hint=f"--metric {','.join(DEFAULTS[:2])}")
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
    """flashrl's names, then verl's own that some run logged."""
    logged = {key for history in histories.values() for metrics in history for key in metrics.logged}
    return [*_own_names(), *sorted(logged)]


def _present(histories: Histories) -> str:
    """flashrl's names of what some run has values of."""
    by_run = histories.values()
    return ", ".join(n for n in _own_names() if any(v is not None for h in by_run for v in points(h, n).values()))


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Names that look like `name`, or hold it."""
    holding = [one for one in known if name.lower() in one.lower()]
    return list(dict.fromkeys([*difflib.get_close_matches(name, known, _NEAR), *holding]))[:_NEAR]
