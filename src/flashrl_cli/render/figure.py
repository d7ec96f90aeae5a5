"""Panels of curves as pictures: a PNG of all of them, or an SVG of each to stand in an HTML page. Needs matplotlib."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.render.plots import labels, require, span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from flashrl_cli.render.plots import Panel, Series

INK, MUTED, RULE = "#1f2329", "#6a7079", "#dfe2e6"
CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#808080")
"""After Okabe and Ito: told apart by most eyes; yellow is darker than theirs, black is left to text."""
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", **{c: f"--curve-{n}" for n, c in enumerate(CURVES, 1)}}
"""Colour to the CSS variable that stands for it in an SVG, so that the page may be dark."""

STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.unicode_minus": False, "svg.fonttype": "none"}
"""What matplotlib is told for every figure."""
_DASHES = ("-", "--", ":")
_FEW = 40
"""Points up to which each of a curve is marked."""
_MOST = 600
"""Points of a curve that are drawn; of more, the least and the greatest of each stretch."""
_METADATA = ("Creator", "Date", "Format", "Type")

Style = tuple[str, str]
"""A curve's colour, and its dashes."""


def styles(panels: Sequence[Panel]) -> dict[str, Style]:
    """Colour and dashes of each curve's label, the same in all panels."""
    looks = ((colour, dashes) for dashes in itertools.cycle(_DASHES) for colour in CURVES)
    return dict(zip(labels(panels), looks, strict=False))


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels to `path`, two in a row; needs no display."""
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (7, 4) if len(panels) == 1 else (11, 2.9 * rows)
    looks = styles(panels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.02)
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            _draw(axes, panel, looks, span(panels))
            axes.set_title(panel.title, loc="left", color=INK, weight="bold")
        figure.legend(handles=_handles(looks), loc="outside upper left", ncols=min(4, len(looks)), frameon=False)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def inline_svgs(panels: Sequence[Panel], prefix: str) -> Iterator[str]:
    """One `<svg>` a panel, without its title, in the page's font and the colours of `VARIABLES`.

    Ids begin with `prefix` and the panel's number: those of several SVGs in one page do not clash.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    looks = styles(panels)
    for number, panel in enumerate(panels):
        stream = io.StringIO()
        with mpl.rc_context(
            {**STYLE, "svg.hashsalt": prefix}
        ):  # with a salt of ours the same curves give the same file
            figure = Figure(figsize=(5, 2.4), layout="constrained")
            _draw(figure.add_subplot(), panel, looks, span(panels))
            figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
        yield _for_page(stream.getvalue(), f"{prefix}{number}-", panel.title)


def thinned(xs: Sequence[int], ys: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """At most about `_MOST` points that look like all of them; None becomes NaN, which breaks a line."""
    points = [(x, math.nan if y is None else y) for x, y in zip(xs, ys, strict=True)]
    if len(points) > _MOST:
        length = math.ceil(2 * len(points) / _MOST)
        stretches = [points[start : start + length] for start in range(0, len(points), length)]
        points = [point for stretch in stretches for point in _extremes(stretch)]
    return [x for x, _ in points], [y for _, y in points]


def _extremes(stretch: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The least and the greatest point of a stretch in their order, and one where the line breaks."""
    drawn = [point for point in stretch if not math.isnan(point[1])]
    broken = [point for point in stretch if math.isnan(point[1])][:1]
    ends = [pick(drawn, key=lambda point: point[1]) for pick in (min, max)] if drawn else []
    return sorted({*ends, *broken})


def _draw(axes: Axes, panel: Panel, looks: Mapping[str, Style], steps: tuple[int, int]) -> None:
    from matplotlib.ticker import MaxNLocator

    for one in panel.series:
        _draw_series(axes, one, looks[one.label])
    margin = 0.02 * (steps[1] - steps[0])
    axes.set(xlim=(steps[0] - margin, steps[1] + margin), ylim=panel.limits)
    if panel.ticks:
        axes.set_xticks(panel.ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step", color=MUTED)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _draw_series(axes: Axes, one: Series, look: Style) -> None:
    """The curve, raw values thin beneath smoothed ones, intervals shaded, a thin line where a later attempt went on."""
    colour, dashes = look
    for start in one.starts:
        axes.axvline(start + 0.5, color=colour, alpha=0.6, linewidth=0.8, linestyle=":")
    if one.raw:
        xs, ys = thinned(one.xs, one.raw)
        axes.plot(xs, ys, color=colour, alpha=0.5, linewidth=0.8, **_marks(_isolated(ys)))
    if one.los:
        axes.fill_between(one.xs, one.los, one.his, color=colour, alpha=0.15, linewidth=0)
    xs, ys = thinned(one.xs, one.ys)
    marked = list(range(len(ys))) if len(ys) <= _FEW else _isolated(ys)
    axes.plot(xs, ys, color=colour, linewidth=1.8, linestyle=dashes, **_marks(marked))


def _isolated(ys: Sequence[float]) -> list[int]:
    """Indices of values between two breaks, which no line shows."""
    padded = [math.nan, *ys, math.nan]
    triples = zip(padded, ys, padded[2:], strict=False)
    return [
        n
        for n, (before, y, after) in enumerate(triples)
        if math.isnan(before) and math.isnan(after) and not math.isnan(y)
    ]


def _marks(indices: list[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5, "markeredgewidth": 0, "markevery": indices}


def _handles(looks: Mapping[str, Style]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=c, linestyle=d, linewidth=1.8, label=label) for label, (c, d) in looks.items()]


def _for_page(svg: str, prefix: str, label: str) -> str:
    """matplotlib's SVG file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    view = re.search(r'viewBox="([^"]*)"', svg)
    opening = f'<svg viewBox="{view[1] if view else ""}" role="img" aria-label="{html.escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"(href=\"#|url\(#)", rf"\1{prefix}", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    return re.sub("|".join(VARIABLES), lambda colour: f"var({VARIABLES[colour[0]]})", svg)
