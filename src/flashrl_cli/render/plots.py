"""Curves over training steps: what is drawn, and the drawing of an evaluation as text and as PNG."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli.doctor import stacks
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.runs import curves

_TICKS = 12
_MARGIN = 0.06
"""Free space above and below curves, as a share of their height."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: `ys` at steps `xs`, None where its line breaks.

    With `los` and `his` each point has an interval; with `raw` the curve is that of smoothed values. `starts` are the steps
    after which later attempts went on.
    """

    label: str
    xs: Sequence[int]
    ys: Sequence[float | None]
    los: Sequence[float] = ()
    his: Sequence[float] = ()
    raw: Sequence[float | None] = ()
    starts: Sequence[int] = ()

    def segments(self) -> Iterator[tuple[list[int], list[float]]]:
        """Unbroken pieces of the curve."""
        points = zip(self.xs, self.ys, strict=True)
        for broken, piece in itertools.groupby(points, key=lambda point: point[1] is None):
            if not broken:
                xs, ys = zip(*piece, strict=True)
                yield list(xs), list(ys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves on one pair of axes: `limits` of the vertical one, `ticks` on the horizontal one (None: any whole numbers)."""

    title: str
    series: Sequence[Series]
    limits: tuple[float, float]
    ticks: Sequence[int] | None = None


def installed(package: str) -> bool:
    """Whether the plotting `package` can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """Raise EnvironmentNotReady if the plotting `package` is not installed."""
    if not installed(package):
        raise EnvironmentNotReady(f"{package} is not installed", hint=stacks.install_extra("plot"))


def panels(found: Mapping[str, Sequence[curves.Curve]], weight: float) -> list[Panel]:
    """A panel for each metric, with its curves smoothed by `weight` over their own values."""
    drawn = {metric: [_series(one, weight) for one in listed] for metric, listed in found.items()}
    return [Panel(title=heading(metric), series=series, limits=around(series)) for metric, series in drawn.items()]


def heading(metric: str) -> str:
    """A metric's title with its unit."""
    name, unit = curves.title(metric)
    return f"{name} ({unit})" if unit else name


def text_curve(series: Sequence[Series], *, ylabel: str) -> str:
    """The curves in one panel as lines of plain text, with interval bars if there are intervals; needs plotext."""
    from flashrl_cli.render.text_plot import text_panel

    return text_panel(_panel(series, ylabel))


def write_png(series: Sequence[Series], path: Path, *, ylabel: str) -> None:
    """Draw the curves in one panel to `path`, with their intervals; needs matplotlib, and no display."""
    from flashrl_cli.render.figure import write_png as write

    write([_panel(series, ylabel)], path)


def limits(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the vertical axis: the tenths that hold every interval."""
    lower = math.floor(min(min(one.los) for one in series) * 10) / 10
    upper = math.ceil(max(max(one.his) for one in series) * 10) / 10
    return lower, max(upper, lower + 0.1)


def span(panels: Sequence[Panel]) -> tuple[int, int]:
    """First and last step of all curves; a lone step has room on both sides."""
    steps = [x for panel in panels for one in panel.series for x in one.xs]
    first, last = min(steps), max(steps)
    return (first, last) if first < last else (first - 1, last + 1)


def labels(panels: Sequence[Panel]) -> list[str]:
    """Labels of all curves, each once; a label looks the same in all panels."""
    return list(dict.fromkeys(one.label for panel in panels for one in panel.series))


def around(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the vertical axis: a little more than all values, raw ones too; a flat curve lies in the middle."""
    values = [y for one in series for y in (*one.ys, *one.raw) if y is not None]
    lower, upper = min(values), max(values)
    margin = _MARGIN * (upper - lower) or abs(upper) / 10 or 1.0
    return lower - margin, upper + margin


def ticks(series: Sequence[Series]) -> list[int]:
    """Steps to mark on the horizontal axis: all of them, or evenly every few if there are many."""
    steps = sorted({x for one in series for x in one.xs})
    return steps[:: math.ceil(len(steps) / _TICKS)]


def _series(one: curves.Curve, weight: float) -> Series:
    smoothed = one.smoothed(weight)
    raw = () if smoothed == list(one.values) else one.values
    return Series(label=one.run, xs=one.steps, ys=smoothed, raw=raw, starts=one.starts)


def _panel(series: Sequence[Series], title: str) -> Panel:
    """Curves with intervals are of few steps, all of them marked, and of shares."""
    if all(one.los for one in series):
        return Panel(title=title, series=series, limits=limits(series), ticks=ticks(series))
    return Panel(title=title, series=series, limits=around(series))
