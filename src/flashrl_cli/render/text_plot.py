"""Draw panels of curves as text, for a terminal or a log. Needs plotext."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashrl_cli.render.figure import labels, require, span

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flashrl_cli.render.figure import Panel, Series

Style = tuple[str, str | None]
"""A curve's marker and its colour."""

_MARKS = "●○■□▲△◆◇"
_COLOURS = ("blue", "orange", "green", "magenta", "cyan", "red")
_ALONE = (76, 18)
_BESIDE = (76, 13)
_GAP = "   "
_FEW = 24
"""Largest number of points for which each point is marked; longer curves have regular marks and one at the end."""
_SOME = 12
_TICK_WIDTH = 10
"""Number of columns for a tick label of the horizontal axis with its space."""
_TICK_HEIGHT = 3


def text_panel(panel: Panel) -> str:
    """One panel as lines of plain text, including its legend."""
    styles = _styles([panel], colour=False)
    lines = _lines(panel, _ALONE, span([panel], panel.across), styles, legend=len(styles) > 1)
    return "\n".join(line.rstrip() for line in lines)


def text_panels(panels: Sequence[Panel], *, width: int, colour: bool = False) -> str:
    """Panels below and, if `width` permits, beside each other, with a legend of all curves above them."""
    columns = max(1, (width + len(_GAP)) // (_BESIDE[0] + len(_GAP)))
    size = (min(width, _BESIDE[0]), _BESIDE[1])
    styles = _styles(panels, colour=colour)
    drawn = [_lines(panel, size, span(panels, panel.across), styles, legend=False) for panel in panels]
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    beside = ["\n".join(_GAP.join(parts).rstrip() for parts in zip(*row, strict=True)) for row in rows]
    legend = ["   ".join(f"{_inked(*style)} {name}" for name, style in styles.items())] if len(styles) > 1 else []
    return "\n\n".join([*legend, *beside])


def _lines(
    panel: Panel, size: tuple[int, int], steps: tuple[float, float], styles: Mapping[str, Style], *, legend: bool
) -> list[str]:
    """Lines of one panel over `steps` (first, last); `size` is columns and lines."""
    require("plotext")
    import plotext

    panel = _by_powers(panel) if panel.bars else panel
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(*size)
    for start in sorted({start for one in panel.series for start in one.starts}):
        figure.draw(figure.segment([start + 0.5] * 2, list(panel.limits), marker="┊"))
    for one in panel.series:
        _draw_raw(figure, one, plotext.marker("·", styles[one.label][1]))
    for one in panel.series:
        mark, ink = styles[one.label]
        _draw_line(figure, one, plotext.marker("braille", ink))
        xs, ys = _marked(one)
        points = figure.signal(xs, ys, marker=plotext.marker(mark, ink))
        figure.draw(points.label(one.label) if legend else points)
    _set_axes(figure, panel, size, steps)
    text = figure.build().string()
    coloured = any(ink for _, ink in styles.values())
    return str(text if coloured else plotext.uncolorize(text)).splitlines()


def _by_powers(panel: Panel) -> Panel:
    """A panel of bars with the powers of ten of its shares, as plotext has no logarithmic axis."""
    series = [replace(one, ys=[math.log10(y) if y else None for y in one.ys]) for one in panel.series]
    lower, upper = panel.limits
    return replace(panel, series=series, limits=(math.log10(lower), math.log10(upper)))


def _styles(panels: Sequence[Panel], *, colour: bool) -> dict[str, Style]:
    """Marker and colour of each curve's label, the same in all panels."""
    inks: Iterable[str | None] = itertools.cycle(_COLOURS) if colour else itertools.repeat(None)
    return dict(zip(labels(panels), zip(itertools.cycle(_MARKS), inks, strict=False), strict=False))


def _inked(mark: str, ink: str | None) -> str:
    import plotext

    return str(plotext.colorize(mark, ink)) if ink else mark


def _draw_raw(figure: Any, one: Series, marker: Any) -> None:
    points = [(x, y) for x, y in zip(one.xs, one.raw, strict=bool(one.raw)) if y is not None]
    if points:
        xs, ys = zip(*points, strict=True)
        figure.draw(figure.signal(xs, ys, marker=marker))


def _draw_line(figure: Any, one: Series, marker: Any) -> None:
    """Draw a curve, piece by piece (plotext ends the process on NaN), and its intervals.

    plotext's error bars are symmetric, so they are drawn around the middle of each interval.
    """
    for xs, ys in one.segments():
        figure.draw(figure.signal(xs, ys, marker=marker).lines())
    if one.los:
        middles = [(lo + hi) / 2 for lo, hi in zip(one.los, one.his, strict=True)]
        halves = [(hi - lo) / 2 for lo, hi in zip(one.los, one.his, strict=True)]
        figure.draw(figure.error(one.xs, middles, halves, [0.0] * len(one.xs)))


def _marked(one: Series) -> tuple[list[float], list[float]]:
    """Points of a curve that get a marker."""
    points = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y is not None]
    shown = points if len(points) <= _FEW else [*points[:: math.ceil(len(points) / _SOME)], points[-1]]
    return [x for x, _ in shown], [y for _, y in shown]


def _set_axes(figure: Any, panel: Panel, size: tuple[int, int], steps: tuple[float, float]) -> None:
    across, up = figure.ruler("x"), figure.ruler("y")
    up.lim(*panel.limits)
    if panel.ticks:
        across.ticks(panel.ticks)
    else:
        across.lim(*steps)
        marks = even_ticks(*steps, size[0] // _TICK_WIDTH, least=0 if panel.bars else 1)
        across.ticks(marks, _alike(marks))
        heights = even_ticks(*panel.limits, size[1] // _TICK_HEIGHT, least=1 if panel.bars else 0)
        up.ticks(heights, [f"{100 * 10**height:g} %" for height in heights] if panel.bars else _alike(heights))
    figure.title(panel.title)
    figure.label(panel.across)


def even_ticks(first: float, last: float, count: int, *, least: float = 0.0) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten from `first` to `last`, at least `least` apart."""
    apart = max(least, (last - first) / count)
    power = 10.0 ** math.floor(math.log10(apart))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= apart * (1 - 1e-9))
    return [n * distance for n in range(math.ceil(first / distance), math.floor(last / distance) + 1)]


def _alike(values: Sequence[float]) -> list[str]:
    """Values as text with as many decimals as the one that needs most."""
    decimals = max((len(f"{value:.6g}".partition(".")[2]) for value in values), default=0)
    exponents = any("e" in f"{value:.6g}" for value in values)
    return [f"{value:.6g}" if exponents else f"{value:.{decimals}f}" for value in values]
