"""Curves over training steps: as text in a terminal, and as a PNG."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady

_POINTS = "●○■□▲△◆◇"
_WIDTH, _HEIGHT = 76, 18
_TICKS = 12
_MARKED = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: `ys` at steps `xs`, each with the ends of its interval, if there are intervals."""

    label: str
    xs: Sequence[int]
    ys: Sequence[float]
    los: Sequence[float] = ()
    his: Sequence[float] = ()


def installed(package: str) -> bool:
    """Whether the plotting `package` can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """Raise EnvironmentNotReady if the plotting `package` is not installed."""
    if not installed(package):
        raise EnvironmentNotReady(f"{package} is not installed", hint='pip install "flashrl-cli[plot]"')


def text_curve(series: Sequence[Series], *, ylabel: str) -> str:
    """The curves as lines of plain text, with interval bars; needs plotext."""
    require("plotext")
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(_WIDTH, _HEIGHT)
    for one, marker in zip(series, _markers(len(series)), strict=True):
        figure.draw(figure.signal(one.xs, one.ys, marker="braille").lines())
        if one.los:
            _draw_bars(figure, one)
        points = figure.signal(one.xs[:: _every(one)], one.ys[:: _every(one)], marker=marker)
        figure.draw(points.label(one.label) if len(series) > 1 else points)
    lower, upper = limits(series)
    figure.ruler("y").lim(lower, upper)
    figure.ruler("x").ticks(ticks(series))
    figure.title(ylabel)
    figure.label("step")
    lines = str(plotext.uncolorize(figure.build().string())).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def write_png(series: Sequence[Series], path: Path, *, ylabel: str) -> None:
    """Draw the curves with their intervals to `path`; needs matplotlib, and no display."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for one in series:
        (line,) = axes.plot(one.xs, one.ys, marker="o", label=one.label)
        if one.los:
            axes.fill_between(one.xs, one.los, one.his, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="step", ylabel=ylabel, ylim=limits(series))
    axes.set_xticks(ticks(series))
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def limits(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the vertical axis: the tenths that hold every interval, or every value without one."""
    lower = math.floor(min(min(one.los or one.ys) for one in series) * 10) / 10
    upper = math.ceil(max(max(one.his or one.ys) for one in series) * 10) / 10
    return lower, max(upper, lower + 0.1)


def ticks(series: Sequence[Series]) -> list[int]:
    """Steps to mark on the horizontal axis: all of them, or evenly every few if there are many."""
    steps = sorted({x for one in series for x in one.xs})
    return steps[:: math.ceil(len(steps) / _TICKS)]


def _every(one: Series) -> int:
    """Of how many points one is marked: of a long curve few, so that the line is seen."""
    return math.ceil(len(one.xs) / _MARKED)


def _markers(count: int) -> list[str]:
    return [_POINTS[i % len(_POINTS)] for i in range(count)]


def _draw_bars(figure: Any, one: Series) -> None:
    """plotext's error bars are symmetric, so they stand around the middle of each interval."""
    middles = [(lo + hi) / 2 for lo, hi in zip(one.los, one.his, strict=True)]
    halves = [(hi - lo) / 2 for lo, hi in zip(one.los, one.his, strict=True)]
    figure.draw(figure.error(one.xs, middles, halves, [0.0] * len(one.xs)))
