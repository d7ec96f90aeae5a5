"""Groups of bars as a PNG: the speeds of a benchmark, a group for each batch. Needs matplotlib."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.render.figure import CURVES, INK, MUTED, RULE, STYLE
from flashrl_cli.render.plots import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_GROUP = 0.8
"""Width of a group of bars, of 1 between two groups."""


def write_png(speeds: Mapping[str, Mapping[int, Sequence[float]]], path: Path, *, about: str) -> None:
    """Draw medians by label and batch to `path`, the spread of the repeats as thin lines, `about` what below; needs no display."""
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    speeds = {label: by_batch for label, by_batch in speeds.items() if by_batch}
    batches = sorted({batch for by_batch in speeds.values() for batch in by_batch})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for place, (label, by_batch) in enumerate(speeds.items()):
            _draw(axes, label, by_batch, batches, place, len(speeds))
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


def _draw(
    axes: Any, label: str, by_batch: Mapping[int, Sequence[float]], batches: Sequence[int], place: int, count: int
) -> None:
    """The bars of one label; a batch that it has no value for stays empty."""
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
