"""Panels of curves over training steps, drawn as one PNG, or as one SVG per panel for an HTML page.

The speeds of a benchmark are drawn as a PNG of grouped bars, one group per batch size, or over the KL to the trainer.
Drawing needs matplotlib; `text_plot` draws panels as text.
"""

from __future__ import annotations

import html
import importlib.util
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine import software
from flashrl_cli.runs import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flashrl_cli.runs.replay import Replay

INK, MUTED, RULE = "#1f2329", "#6a7079", "#dfe2e6"
CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#808080")
"""Colours by Okabe and Ito, which most people can distinguish; yellow is darker than theirs, and black is left for
text.
"""
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", **{c: f"--curve-{n}" for n, c in enumerate(CURVES, 1)}}
"""CSS variable for each colour in an SVG, so that the page can have a dark theme."""

STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.unicode_minus": False, "svg.fonttype": "none"}
"""matplotlib settings for every figure."""
_DASHES = ("-", "--", ":")
_MARKERS = ("o", "s", "^")
_FEW = 40
"""Largest number of points for which each point of a curve is marked."""
_MOST = 600
"""Largest number of points of a curve that are drawn; longer curves are reduced to the extremes of each section."""
_METADATA = ("Creator", "Date", "Format", "Type")
_TICKS = 12
_MARGIN = 0.06
"""Free space above and below curves, as a share of their height."""
_GROUP = 0.8
"""Width of a group of bars, relative to the distance between groups."""

STEP = "step"
"""Name of the horizontal axis of panels over training steps."""

Style = tuple[str, str]
"""The colour of a curve or point, and its dashes or marker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: `ys` at steps (or other positions) `xs`, None where its line breaks.

    With `los` and `his` each point has an interval; with `raw` the curve shows smoothed values. `starts` are the steps
    after which later attempts resumed.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    los: Sequence[float] = ()
    his: Sequence[float] = ()
    raw: Sequence[float | None] = ()
    starts: Sequence[int] = ()

    def segments(self) -> Iterator[tuple[list[float], list[float]]]:
        """Unbroken pieces of the curve."""
        points = zip(self.xs, self.ys, strict=True)
        for broken, piece in itertools.groupby(points, key=lambda point: point[1] is None):
            if not broken:
                xs, ys = zip(*piece, strict=True)
                yield list(xs), list(ys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves on one pair of axes; `limits` are for the vertical axis, `ticks` for the horizontal (None: automatic).

    `across` names the horizontal axis. A panel of `bars` has one series, whose points are the middles of bars of equal
    width, and a logarithmic vertical axis of shares.
    """

    title: str
    series: Sequence[Series]
    limits: tuple[float, float]
    ticks: Sequence[float] | None = None
    across: str = STEP
    bars: bool = False


def panels(found: Mapping[str, Sequence[curves.Curve]], weight: float) -> list[Panel]:
    """A panel for each metric: its raw values, and curves smoothed by `weight` above them."""
    drawn = {metric: [_series(one, weight) for one in listed] for metric, listed in found.items()}
    return [Panel(title=heading(metric), series=series, limits=_around(series)) for metric, series in drawn.items()]


def _series(one: curves.Curve, weight: float) -> Series:
    smoothed = one.smoothed(weight)
    raw = () if smoothed == list(one.values) else one.values
    return Series(label=one.run, xs=one.steps, ys=smoothed, raw=raw, starts=one.starts)


def heading(metric: str) -> str:
    """A metric's title with its unit."""
    name, unit = curves.title(metric)
    return f"{name} ({unit})" if unit else name


def panel(series: Sequence[Series], title: str) -> Panel:
    """One panel of curves; those with intervals show shares at few steps, all of which are marked."""
    if all(one.los for one in series):
        return Panel(title=title, series=series, limits=_tenths(series), ticks=_ticks(series))
    return Panel(title=title, series=series, limits=_around(series))


def _tenths(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the vertical axis in multiples of 0.1 that include every interval."""
    lower = math.floor(min(min(one.los) for one in series) * 10) / 10
    upper = math.ceil(max(max(one.his) for one in series) * 10) / 10
    return lower, max(upper, lower + 0.1)


def _around(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the vertical axis: a little more than all values, including raw ones; a flat curve is centred."""
    values = [y for one in series for y in (*one.ys, *one.raw) if y is not None]
    return _padded(min(values), max(values))


def _padded(lower: float, upper: float) -> tuple[float, float]:
    margin = _MARGIN * (upper - lower) or abs(upper) / 10 or 1.0
    return lower - margin, upper + margin


def _ticks(series: Sequence[Series]) -> list[float]:
    """Steps to mark on the horizontal axis: all of them, or a regular selection if there are many."""
    steps = sorted({x for one in series for x in one.xs})
    return steps[:: math.ceil(len(steps) / _TICKS)]


def styles(panels: Sequence[Panel]) -> dict[str, Style]:
    """Colour and dashes of each curve's label, the same in all panels."""
    looks = ((colour, dashes) for dashes in itertools.cycle(_DASHES) for colour in CURVES)
    return dict(zip(labels(panels), looks, strict=False))


def labels(panels: Sequence[Panel]) -> list[str]:
    """Labels of all curves, each once; a label looks the same in all panels."""
    return list(dict.fromkeys(one.label for panel in panels for one in panel.series))


def span(panels: Sequence[Panel], across: str = STEP) -> tuple[float, float]:
    """First and last step of all curves over `across`; a single step gets space on both sides."""
    steps = [x for panel in panels if panel.across == across for one in panel.series for x in one.xs]
    first, last = min(steps), max(steps)
    return (first, last) if first < last else (first - 1, last + 1)


def replayed(found: Replay) -> list[Panel]:
    """Pictures of a run's kept log-ratios: their histogram, and weights by position in the response."""
    edges, shares = found.histogram.edges, found.histogram.shares
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    drawn = [share for share in shares if share]
    places = [(one.first + one.last) / 2 for one in found.by_position]
    name = f"{found.responses:,} responses of {found.span}"
    distances = [one.distance for one in found.by_position]
    tokens = Series(label=name, xs=places, ys=distances)
    so_far = Series(
        label=name,
        xs=places,
        ys=[math.log(one.middle) for one in found.by_position],
        los=[math.log(one.low) for one in found.by_position],
        his=[math.log(one.high) for one in found.by_position],
    )
    where = "token of the response"
    return [
        Panel(
            title="log-ratios of tokens, ln(p_train / p_rollout): share of tokens",
            series=[Series(label=name, xs=middles, ys=shares)],
            limits=(10.0 ** math.floor(math.log10(min(drawn) / 2)), 2 * max(drawn)),
            across="nats",
            bars=True,
        ),
        Panel(title="mean |w - 1| of a token", series=[tokens], limits=(0, 1.1 * max(distances) or 1), across=where),
        Panel(
            title="ln of the response's weight so far: median, 5 % and 95 %",
            series=[so_far],
            limits=_padded(min(so_far.los), max(so_far.his)),
            across=where,
        ),
    ]


def installed(package: str) -> bool:
    """Whether the plotting `package` can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """Raise EnvironmentNotReady if the plotting `package` is not installed."""
    if not installed(package):
        raise EnvironmentNotReady(f"{package} is not installed", hint=software.install_extra("plot"))


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels to `path`, two per row; needs no display."""
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
            _draw(axes, panel, looks, span(panels, panel.across))
            axes.set_title(panel.title, loc="left", color=INK, weight="bold")
        figure.legend(handles=_handles(looks), loc="outside upper left", ncols=min(4, len(looks)), frameon=False)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def inline_svgs(panels: Sequence[Panel], prefix: str) -> Iterator[str]:
    """Yield one `<svg>` per panel, without title, in the page's font and the colours of `VARIABLES`.

    Ids begin with `prefix` and the panel's number, so that those of several SVGs in one page do not collide.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    looks = styles(panels)
    for number, panel in enumerate(panels):
        stream = io.StringIO()
        # with a fixed salt the same curves give the same file
        with mpl.rc_context({**STYLE, "svg.hashsalt": prefix}):
            figure = Figure(figsize=(5, 2.4), layout="constrained")
            _draw(figure.add_subplot(), panel, looks, span(panels, panel.across))
            figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
        yield _for_page(stream.getvalue(), f"{prefix}{number}-", panel.title)


def _draw(axes: Axes, panel: Panel, looks: Mapping[str, Style], steps: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    for one in panel.series:
        if panel.bars:
            axes.bar(one.xs, one.ys, width=one.xs[1] - one.xs[0], color=looks[one.label][0], linewidth=0)
        else:
            _draw_series(axes, one, looks[one.label])
    margin = 0.02 * (steps[1] - steps[0])
    axes.set(xlim=(steps[0] - margin, steps[1] + margin), ylim=panel.limits)
    if panel.ticks:
        axes.set_xticks(panel.ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=not panel.bars, steps=[1, 2, 5, 10]))
    if panel.bars:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(panel.across, color=MUTED)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _draw_series(axes: Axes, one: Series, look: Style) -> None:
    """Draw a curve: thin raw values below smoothed ones, shaded intervals, thin lines where attempts resumed."""
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


def thinned(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """About `_MOST` points at most that look like the full curve; None becomes NaN, which breaks a line."""
    points = [(x, math.nan if y is None else y) for x, y in zip(xs, ys, strict=True)]
    if len(points) > _MOST:
        length = math.ceil(2 * len(points) / _MOST)
        stretches = [points[start : start + length] for start in range(0, len(points), length)]
        points = [point for stretch in stretches for point in _extremes(stretch)]
    return [x for x, _ in points], [y for _, y in points]


def _extremes(stretch: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The smallest and the largest point of a section in their order, and one where the line breaks."""
    drawn = [point for point in stretch if not math.isnan(point[1])]
    broken = [point for point in stretch if math.isnan(point[1])][:1]
    ends = [pick(drawn, key=lambda point: point[1]) for pick in (min, max)] if drawn else []
    return sorted({*ends, *broken})


def _isolated(ys: Sequence[float]) -> list[int]:
    """Indices of values between two breaks, which a line does not show."""
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
    """Convert matplotlib's SVG file to an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would apply to the page
    view = re.search(r'viewBox="([^"]*)"', svg)
    opening = f'<svg viewBox="{view[1] if view else ""}" role="img" aria-label="{html.escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"(href=\"#|url\(#)", rf"\1{prefix}", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    return re.sub("|".join(VARIABLES), lambda colour: f"var({VARIABLES[colour[0]]})", svg)


def write_bars_png(speeds: Mapping[str, Mapping[int, Sequence[float]]], path: Path, *, about: str) -> None:
    """Draw medians by label and batch to `path`, with the range of the repeats as thin lines and `about` below.

    It needs no display.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    speeds = {label: by_batch for label, by_batch in speeds.items() if by_batch}
    batches = sorted({batch for by_batch in speeds.values() for batch in by_batch})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for place, (label, by_batch) in enumerate(speeds.items()):
            _draw_bars(axes, label, by_batch, batches, place, len(speeds))
        axes.set_xticks(range(len(batches)), [f"{batch:,}" if batch else "as fit" for batch in batches])
        axes.set_xlabel(f"sequences at once\n{about}", color=MUTED)
        axes.set_title("output tokens a second, prefill included", loc="left", color=INK, weight="bold")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        figure.legend(loc="outside upper left", ncols=min(6, len(speeds)), frameon=False)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_bars(
    axes: Any, label: str, by_batch: Mapping[int, Sequence[float]], batches: Sequence[int], place: int, count: int
) -> None:
    """Draw the bars of one label; a batch without a value has no bar."""
    width = _GROUP / count
    found = [(group, by_batch[batch]) for group, batch in enumerate(batches) if batch in by_batch]
    xs = [group + (place - (count - 1) / 2) * width for group, _ in found]
    tops = [statistics.median(values) for _, values in found]
    spread = [
        [top - min(values) for top, (_, values) in zip(tops, found, strict=True)],
        [max(values) - top for top, (_, values) in zip(tops, found, strict=True)],
    ]
    style = {"ecolor": MUTED, "elinewidth": 0.8}
    axes.bar(xs, tops, width * 0.9, yerr=spread, error_kw=style, color=CURVES[place % len(CURVES)], label=label)


def write_fronts_png(fronts: Mapping[str, Mapping[str, Any]], path: Path, *, about: str) -> None:
    """Draw fronts of speed against KL (documents of bench.front.Front) by title to `path`, with `about` below.

    A variant has a point at its median speed and its KL, with lines over the range of the repeats and over two standard
    errors. Points that no other one beats are filled and joined by a line. It needs no display.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = dict.fromkeys(point["rollout"] for front in fronts.values() for point in front["points"])
    looks = {
        name: (CURVES[n % len(CURVES)], _MARKERS[n // len(CURVES) % len(_MARKERS)]) for n, name in enumerate(names)
    }
    wide = min(3, len(fronts))
    high = math.ceil(len(fronts) / wide)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6, 0.6 + 3.6 * wide), 1 + 3 * high), dpi=150, layout="constrained")
        for number, (title, front) in enumerate(fronts.items(), 1):
            axes = figure.add_subplot(high, wide, number)
            _draw_front(axes, front["points"], looks)
            axes.set_title(title, loc="left", color=INK, weight="bold")
        figure.supxlabel(f"KL to the trainer, nats a token\n{about}", color=MUTED, fontsize=9)
        figure.supylabel("output tokens a second", color=MUTED, fontsize=9)
        figure.legend(handles=_points(looks), loc="outside upper left", ncols=min(5, len(looks)), frameon=False)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_front(axes: Axes, points: Sequence[Mapping[str, Any]], looks: Mapping[str, Style]) -> None:
    from matplotlib.ticker import LogLocator

    positive = min((point["kl"] for point in points if point["kl"] > 0), default=1e-3)
    # a KL of 0 has no place on a logarithmic axis
    places = {point["rollout"]: max(point["kl"], positive / 10) for point in points}
    best = sorted((point for point in points if not point["beaten_by"]), key=lambda point: point["kl"])
    axes.plot([places[point["rollout"]] for point in best], [point["tokens_s"] for point in best], color=RULE, zorder=1)
    for point in points:
        (colour, marker), x, y = looks[point["rollout"]], places[point["rollout"]], point["tokens_s"]
        lower, upper = min(2 * point["kl_error"], 0.9 * x), 2 * point["kl_error"]
        axes.errorbar(
            x,
            y,
            xerr=[[lower], [upper]],
            yerr=[[y - min(point["values"])], [max(point["values"]) - y]],
            color=colour,
            elinewidth=0.8,
            marker=marker,
            markersize=6,
            markerfacecolor="white" if point["beaten_by"] else colour,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(x=0.1, y=0.12)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _points(looks: Mapping[str, Style]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=colour, linestyle="", marker=marker, label=name)
        for name, (colour, marker) in looks.items()
    ]


def write_ranking_png(boards: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw leaderboards (documents of evals.accuracy.Board) to `path`, one beside the other; needs no display.

    A model has a dot at its accuracy and a line over its interval; those that are not distinguishable from the best
    have its colour.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    longest = max(len(board["places"]) for board in boards)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 + 4.5 * len(boards), 1.2 + 0.34 * longest), dpi=150, layout="constrained")
        for number, board in enumerate(boards, 1):
            axes = figure.add_subplot(1, len(boards), number)
            for place in board["places"]:
                behind = place["behind"]
                colour = MUTED if behind and behind["significant"] else CURVES[0]
                axes.plot([place["lo"], place["hi"]], [place["rank"]] * 2, color=colour, linewidth=1.8)
                axes.plot(place["accuracy"], place["rank"], "o", color=colour, markersize=6)
            axes.set_yticks([place["rank"] for place in board["places"]], [place["model"] for place in board["places"]])
            axes.set(ylim=(len(board["places"]) + 0.6, 0.4))
            axes.set_title(board["dataset"], loc="left", color=INK, weight="bold")
            axes.set_xlabel("accuracy, 95 % interval", color=MUTED)
            axes.grid(axis="x", color=RULE, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(colors=MUTED, length=0)
            axes.tick_params(axis="y", labelcolor=INK)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(RULE)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png")
